"""Whether a folder holds whole gates, checked before anything is built from it.

A tensor that is no gate would be loaded all the same by PEFT and transformers, over the weights of the model. So every
tensor must be one that the folder's own config describes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.config import AttnGateConfig
from seerattn.hf.state import GATES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The last number in the name of an attention module is that of its decoder layer.
_MODULE = r"(?P<module>(?:\w+\.)*?(?P<layer>\d{1,6})(?:\.[a-zA-Z_]\w*)+)"
_KEY = re.compile(rf"{re.escape(_PREFIX)}{_MODULE}\.{GATES}\.[\w.]+")
_DTYPES = ("F32", "F16", "BF16", "F64")
_SIZES = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}


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
        base: sizes of the model that they belong to, see `seerattn.hf.identity`.

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
    sizes = {name: base[key] for key, name in _SIZES.items()}
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
