"""Reading the published gates of the official implementation (microsoft/SeerAttention).

A folder holds ``config.json``, the base model's configuration with fields ``seerattn_*``, and
``attn_gate_weights.pth`` with ``model.layers.N.self_attn.attn_gate.mask_linear_{q,k}.weight``. The layouts are those
of `AttnGate`: per head ``[heads, poolings * head_dim, gate_dim]``, poolings concatenated in the order of the name.
There is no Q linear if Q has one pooling, the gate is as wide as a head, and ``force_double`` is off; K then has a
matrix per query head, otherwise one per KV head. Gates of the decode phase have tensors of other names, see
`seerattn.hf.official_decode`.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from seerattn.gate.config import AttnGateConfig
from seerattn.hf.attach import attach
from seerattn.hf.config import folder_of
from seerattn.hf.official_decode import KEY as DECODE_KEY
from seerattn.hf.official_decode import DecodeLayout, is_decode
from seerattn.hf.state import layer_states
from seerattn.selection.policies import Policy, Threshold, TopK

CONFIG, WEIGHTS = "config.json", "attn_gate_weights.pth"
_KEY = "model.layers.{}.self_attn.attn_gate.mask_linear_{}.weight"
_GATE_TYPE = re.compile(r"Q((?:avg|max|min)+)_K((?:avg|max|min)+)")


@dataclass(frozen=True)
class OfficialGates:
    """Published gates, read and checked.

    Attributes:
        config: their form.
        base_model: name of the model that they were trained for.
        policy: the selection that their config names, or None.
        weights: parameters of `AttnGate` by layer, fp32.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        decode_policy: the selection for decoded tokens that the config of decode gates names, or None.
        first_layer: the first layer that gets its gate.
    """

    config: AttnGateConfig
    base_model: str | None
    policy: Policy | None
    weights: list[dict[str, Tensor]]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    decode_policy: Policy | None = None
    first_layer: int = 0


def read_official_gates(
    name: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> OfficialGates:
    """Reads published gates; see `load_official_gates`.

    Raises:
        ValueError: a file is missing or broken, a tensor is missing, unknown or of another shape, or a form that gates
            here cannot have.
    """
    folder = folder_of(name, (CONFIG, WEIGHTS), subfolder, revision=revision)
    values = _read_config(folder / CONFIG)
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    tensors = _read_weights(folder / WEIGHTS)
    if is_decode(tensors):
        return _decode_gates(values, tensors, layers, {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim})
    gate_dim = values.get("seerattn_gate_hidden_size", 128)
    block = values.get("seerattn_gate_block_size", 64)
    q_pooling, k_pooling = _poolings(values.get("seerattn_gate_type", "Qavg_Kmaxminavg"))
    q_linear = len(q_pooling) > 1 or gate_dim != head_dim or bool(values.get("seerattn_gate_force_double", False))
    config = AttnGateConfig.paper(
        block_q=block, block_k=block, q_pooling=q_pooling, k_pooling=k_pooling, q_linear=q_linear, gate_dim=gate_dim
    )
    shapes = {"k": (kv_heads if q_linear else heads, len(k_pooling) * head_dim, gate_dim)}
    if q_linear:
        shapes["q"] = (heads, len(q_pooling) * head_dim, gate_dim)
    _check_tensors(tensors, {_KEY.format(i, side): shape for i in range(layers) for side, shape in shapes.items()})
    return OfficialGates(
        config=config,
        base_model=values.get("base_model"),
        policy=_policy(values),
        weights=[{f"{side}_weight": tensors[_KEY.format(i, side)].float() for side in shapes} for i in range(layers)],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def _decode_gates(
    values: dict[str, Any], tensors: dict[str, Tensor], layers: int, sizes: dict[str, int]
) -> OfficialGates:
    layout = DecodeLayout.read(values, tensors, **sizes)
    names = [{part: DECODE_KEY.format(i, part) for part in layout.shapes} for i in range(layers)]
    _check_tensors(tensors, {key: layout.shapes[part] for layer in names for part, key in layer.items()})
    return OfficialGates(
        config=layout.config,
        base_model=values.get("base_model"),
        # The published ones run prompts dense.
        policy=None,
        weights=[layout.parameters({part: tensors[key] for part, key in layer.items()}) for layer in names],
        num_heads=layout.num_heads,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        decode_policy=layout.policy,
        first_layer=layout.first_layer,
    )


def load_official_gates(
    name: str | Path,
    model: PreTrainedModel | None = None,
    *,
    policy: Policy | None = None,
    decode_policy: Policy | None = None,
    impl: str = "auto",
    subfolder: str | None = None,
    revision: str | None = None,
) -> OfficialGates | PeftModel:
    """Reads published gates and attaches them.

    Args:
        name: a folder with ``config.json`` and ``attn_gate_weights.pth``, or the name of a repository on the Hub with
            both, such as "SeerAttention/SeerAttention-Llama-3.1-8B-AttnGates".
        model: the base model; without one the gates are only read.
        policy: replaces the selection that the gates' config names; decode gates leave prompts dense.
        decode_policy: replaces the selection for decoded tokens that the config of decode gates names.
        impl: as in `attach`.
        subfolder: of the folder or repository.
        revision: branch, tag or commit of the repository.

    Returns:
        `OfficialGates`, or with ``model`` a `PeftModel` in evaluation mode; its `save_pretrained` writes the gates in
        this project's own form.

    Raises:
        ValueError: the files are not whole, or the gates do not fit the model.
    """
    gates = read_official_gates(name, subfolder=subfolder, revision=revision)
    if model is None:
        return gates
    decode_policy = decode_policy or gates.decode_policy
    wanted = list(range(gates.first_layer, len(gates.weights)))
    layers = wanted if gates.first_layer else None
    gated = attach(model, gates.config, policy or gates.policy, decode_policy=decode_policy, impl=impl, layers=layers)
    states = [state for state in layer_states(gated) if state.gate is not None]
    sizes = {(s.gate.num_heads, s.gate.num_kv_heads, s.gate.head_dim) for s in states}
    expected = (gates.num_heads, gates.num_kv_heads, gates.head_dim)
    if sizes != {expected} or [s.layer for s in states] != wanted:
        detached = gated.unload()
        raise ValueError(
            f"gates must belong to the model, got {len(gates.weights)} gates for heads, KV heads and head dim "
            f"{expected} and a {type(detached).__name__} with {len(states)} layers of {sorted(sizes)}"
        )
    for state in states:
        weights = dict(gates.weights[state.layer])
        # The official gate puts YaRN's attention factor on its tables, ours does not rotate with a scale.
        if gates.config.rope:
            last = "k_norm.weight" if gates.config.qk_norm else "k_weight"
            weights[last] = weights[last] * _attention_factor(state.rotation) ** 2
        state.gate.load_state_dict(weights)
        state.gate.requires_grad_(False)
    return gated.eval()


def _attention_factor(rotation: Any) -> float:
    return 1.0 if rotation is None else float(getattr(rotation.embedding, "attention_scaling", 1.0))


def _read_config(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"published gates must be a folder with {CONFIG}, got {path.parent}, which has none") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    needed = ("num_attention_heads", "num_hidden_layers", "hidden_size")
    if not isinstance(values, dict) or any(key not in values for key in needed):
        raise ValueError(f"{path} must hold the base model's {', '.join(needed)}")
    return values


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"published gates must hold {WEIGHTS}, got {path.parent}, which has none") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no data"
        raise ValueError(f"{path} must be a whole file of plain tensors, got a broken one: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} must be a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{WEIGHTS} must hold just the {len(expected)} tensors that {CONFIG} describes, "
            f"got {len(missing)} missing {missing[:2]} and {len(extra)} unknown {extra[:2]}"
        )
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{key} must be {list(shape)}, got {list(tensors[key].shape)}")


def _poolings(gate_type: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    match = _GATE_TYPE.fullmatch(gate_type)
    if match is None:
        raise ValueError(f"seerattn_gate_type must look like 'Qavg_Kmaxminavg', got {gate_type!r}")
    return tuple(tuple(re.findall("avg|max|min", part)) for part in match.groups())


def _policy(values: dict) -> Policy | None:
    """The official selection forces no block; ours keeps the diagonal whatever the policy says."""
    rows = 2 if values.get("seerattn_last_block_dense", True) else 0
    method = values.get("seerattn_sparsity_method", "threshold")
    if method == "threshold" and values.get("seerattn_threshold", 0.0) > 0:
        return Threshold(threshold=values["seerattn_threshold"], sink_blocks=0, last_rows_dense=rows)
    if method == "nz_ratio" and values.get("seerattn_nz_ratio", 1.0) < 1:
        return TopK(density=values["seerattn_nz_ratio"], sink_blocks=0, last_rows_dense=rows)
    return None
