"""Folders of gates: whether one holds whole gates, whose they are, and what it says of them.

A tensor that is no gate would be loaded all the same by PEFT and transformers, over the weights of the model. So every
tensor must be one that the folder's own config describes, which is checked before anything is built from it. Neither
transformers nor PEFT is needed for it.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.config import AttnGateConfig
from seerattn.selection.budgets import HeadBudgets, shares_density
from seerattn.selection.decode_policy import check_decode_policy
from seerattn.selection.policies import Policy, policy_from_dict

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Name under which the gates of an attention module are its child.
GATES = "seer_gate"
_PREFIX = "base_model.model."
# The last number in the name of an attention module is that of its decoder layer.
_MODULE = r"(?P<module>(?:\w+\.)*?(?P<layer>\d{1,6})(?:\.[a-zA-Z_]\w*)+)"
_KEY = re.compile(rf"{re.escape(_PREFIX)}{_MODULE}\.{GATES}\.[\w.]+")
_DTYPES = ("F32", "F16", "BF16", "F64")
_GATE_SIZES = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
_MODEL_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


class GateFolder(NamedTuple):
    """What a folder of whole gates says of them.

    Attributes:
        form: of the gates.
        policy: to start with, or None.
        decode_policy: the same of tokens that are decoded, or None.
        budgets: by which a density is shared among heads, or None.
        base: sizes and RoPE of the model that they belong to.
        listed: layers with a gate as the config names them; None is every full-attention layer.
        modules: names of the attention modules that had the gates, by layer, ascending.
    """

    form: AttnGateConfig
    policy: Policy | None
    decode_policy: Policy | None
    budgets: HeadBudgets | None
    base: Mapping[str, Any]
    listed: tuple[int, ...] | None
    modules: dict[int, str]


def read_folder(folder: Path) -> GateFolder:
    """Checks a folder of gates in whole and reads what it says of them; `read_weights` reads the gates.

    Raises:
        ValueError: the gates are missing, truncated, pickled, not finite, or beside tensors of something else, or the
            config says what gates cannot have.
    """
    config = read_config(folder)
    form = AttnGateConfig.from_dict(config.get("gate"))
    policy, decode_policy = (
        None if config.get(name) is None else policy_from_dict(config[name]) for name in ("policy", "decode_policy")
    )
    check_decode_policy(decode_policy)
    base, listed = config.get("base_model"), config.get("layers")
    check_layers(listed)
    modules = check_gates(folder, form, base, listed)
    budgets = read_budgets(config.get("budgets"), form, base, list(modules))
    if budgets is not None and shares_density(policy):
        budgets.check(policy.density)
    return GateFolder(form, policy, decode_policy, budgets, base, None if listed is None else tuple(listed), modules)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a gate folder, which must have both its files.

    Raises:
        ValueError: a file is missing, unreadable or a pickle, or the adapter is of another kind.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"gates must be a folder with {CONFIG}, got {folder}, which has none") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} must be JSON, got {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "SEER":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG} must describe gates (peft_type 'SEER'), got {str(kind)[:40]!r}")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise ValueError(f"{folder} must hold {WEIGHTS}, got {pickles or 'no weights'}; pickled gates are not read")
    return config


def check_weights(folder: Path, form: AttnGateConfig, base: Mapping[str, Any]) -> dict[int, str]:
    """Checks that the weights of a gate folder are gates of the form and sizes that its config describes, no more.

    Args:
        folder: with the weights.
        form: of the gates.
        base: sizes of the model that they belong to.

    Returns:
        Names of the attention modules that had the gates, by layer, ascending.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or type, or not finite, or the file is broken.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            modules = _modules(path, names)
            expected = {
                f"{_PREFIX}{module}.{GATES}.{name}": shape
                for index, module in enumerate(modules.values())
                for name, shape in gate_shapes(form, **_sizes(base, index)).items()
            }
            missing = sorted(expected.keys() - set(names))
            if missing:
                raise ValueError(f"{path} must hold whole gates, got none of {missing[:2]}, {len(missing)} missing")
            for name in names:
                head = file.get_slice(name)
                if tuple(head.get_shape()) != expected.get(name):
                    shape = expected.get(name)
                    wanted = f"{list(shape)}" if shape else "no tensor of a gate of this form"
                    raise ValueError(f"{name} in {path} must be {wanted}, got {list(head.get_shape())}")
                if head.get_dtype() not in _DTYPES:
                    raise ValueError(f"{name} in {path} must hold floats, got {head.get_dtype()}")
                if not bool(file.get_tensor(name).isfinite().all()):
                    raise ValueError(f"{name} in {path} must be finite, got NaN or infinity; train the gates again")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got a broken one: {error}") from None
    return modules


def _modules(path: Path, names: Sequence[str]) -> dict[int, str]:
    """The attention modules that tensors name, by layer."""
    modules: dict[int, str] = {}
    for name in names:
        match = _KEY.fullmatch(name)
        if match is None or modules.setdefault(int(match["layer"]), match["module"]) != match["module"]:
            raise ValueError(f"{path} must hold gates and nothing else, got the tensor {name[:100]}")
    if not modules:
        raise ValueError(f"{path} must hold gates, got no tensor")
    return dict(sorted(modules.items()))


def _sizes(base: Mapping[str, Any], index: int) -> dict[str, int]:
    """Sizes of the layer that is so manieth among the gated ones."""
    sizes = {name: base[key] for key, name in _GATE_SIZES.items()}
    return {name: size if isinstance(size, int) else size[index] for name, size in sizes.items()}


def gate_shapes(form: AttnGateConfig, *, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, tuple]:
    """Names and shapes of the parameters of one gate; nothing is allocated."""
    with torch.device("meta"):
        frequencies = torch.empty((form.gate_dim or head_dim) // 2) if form.rope else None
        gate = AttnGate(form, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, inv_freq=frequencies)
    return {name: tuple(parameter.shape) for name, parameter in gate.named_parameters()}


def read_weights(folder: Path, modules: Mapping[int, str]) -> dict[int, dict[str, Tensor]]:
    """The parameters of every gate of a folder, fp32, by layer; ``modules`` are what `check_weights` returned."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        prefixes = {layer: f"{_PREFIX}{module}.{GATES}." for layer, module in modules.items()}
        return {
            layer: {name.removeprefix(p): file.get_tensor(name).float() for name in names if name.startswith(p)}
            for layer, p in prefixes.items()
        }


def check_identity(gates: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuses gates of another model; what gates of earlier versions do not say is not asked.

    Raises:
        ValueError: names the first field that differs.
    """
    for field in (*_MODEL_SIZES, "rope"):
        same = _same_rope if field == "rope" else operator.eq
        if field in gates and not same(gates[field], model[field]):
            raise ValueError(
                f"gates must belong to the model, got gates for {field} = {gates[field]} and a model with "
                f"{field} = {model[field]}; attach them to the model that they were trained for"
            )


def _same_rope(gates: Any, model: Mapping[str, Any]) -> bool:
    """Whether two models rotate alike, or one is the other with its context extended by YaRN.

    Gates of the shorter context are then what fine-tuning starts from. What only one side names, another version of
    transformers named.
    """
    if not isinstance(gates, Mapping):
        return False
    kinds = gates.get("rope_type", "default"), model.get("rope_type", "default")
    if kinds == ("default", "yarn"):
        return gates.get("rope_theta") == model.get("rope_theta")
    return kinds[0] == kinds[1] and all(gates[key] == model[key] for key in gates.keys() & model.keys())


def check_sizes(base: Any, layers: Sequence[int] | None) -> None:
    """Refuses a description that is none, before anything is built by it.

    Raises:
        ValueError: a size is missing or no positive number.
    """
    if not isinstance(base, Mapping):
        raise ValueError(f"base_model of gates must hold the sizes of their model, got {type(base).__name__}")
    for field in _MODEL_SIZES:
        value = base.get(field)
        by_layer = isinstance(value, list) and field != "num_hidden_layers"
        whole = by_layer and value and (layers is None or len(value) == len(layers))
        each = value if whole else [value]
        if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 1 << 24 for size in each):
            raise ValueError(f"{field} in base_model of gates must be a positive number, got {str(value)[:40]}")
    if base["num_hidden_layers"] <= max(layers or [], default=0):
        raise ValueError(f"layers of gates must be below num_hidden_layers {base['num_hidden_layers']}, got {layers}")


def check_layers(layers: Any) -> None:
    """Refuses what is no list of layers.

    Raises:
        ValueError: they are not numbers of layers, all different, or None for every full-attention layer.
    """
    if layers is None:
        return
    if not isinstance(layers, (list, set, tuple)) or any(type(layer) is not int for layer in layers):
        raise ValueError(f"layers of gates must be a list of int or null, got {str(layers)[:40]!r}")
    if len(set(layers)) < len(layers) or min(layers, default=0) < 0:
        raise ValueError(f"layers of gates must differ and be 0 or more, got {str(layers)[:40]}")


def check_gates(
    folder: Path, form: AttnGateConfig, base: Mapping[str, Any] | None, layers: Sequence[int] | None
) -> dict[int, str]:
    """Checks the weights of a gate folder against what its config says; see `check_weights`, whose result is returned.

    Raises:
        ValueError: see `check_weights`; or the sizes of the model are missing, or other layers have gates.
    """
    if base is None:
        raise ValueError(f"{folder / CONFIG} must hold base_model, the sizes of the gates' model, got none")
    check_sizes(base, layers)
    modules = check_weights(folder, form, base)
    if layers is not None and sorted(layers) != list(modules):
        raise ValueError(f"{folder / WEIGHTS} must hold gates of layers {layers}, got {list(modules)}")
    check_sizes(base, list(modules))
    return modules


def read_budgets(
    values: Any, form: AttnGateConfig, base: Mapping[str, Any] | None, layers: Sequence[int] | None
) -> HeadBudgets | None:
    """The budgets of gates, which must be theirs.

    Args:
        values: as the config has them; None are none.
        form: of the gates.
        base: sizes of their model, None where they are not known yet.
        layers: with a gate, None where they are not known yet.

    Raises:
        ValueError: they are none, or those of other blocks, another target, or other layers and heads.
    """
    if values is None:
        return None
    budgets = HeadBudgets.from_dict(values)
    here, there = (f"blocks of {x.block_q} x {x.block_k} tokens" for x in (form, budgets))
    if here == there:
        here, there = f"the target {form.target}", f"the target {budgets.target}"
    if here == there and base is not None and layers is not None:
        sizes = base["num_attention_heads" if form.share == "query_head" else "num_key_value_heads"]
        heads = sizes if isinstance(sizes, list) else [sizes] * len(layers)
        found = {layer: count for layer, count in enumerate(budgets.heads) if count}
        here, there = f"heads by layer {dict(zip(sorted(layers), heads))}", f"heads by layer {found}"
    if here != there:
        raise ValueError(
            f"budgets must be those of the gates, with {here:.200}, got budgets for {there:.200}; make them with "
            "seerattn calibrate --budgets"
        )
    return budgets


def plain_json(value: Any) -> Any:
    """JSON types, numbers as floats, so that 10000 and 10000.0 are one."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner) for key, inner in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, (list, tuple)):
        return [plain_json(inner) for inner in value]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
