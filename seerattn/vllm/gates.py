"""The gates of a folder for the layers of vLLM, each with the heads that a process has of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.config import AttnGateConfig
from seerattn.gate.heads import Heads
from seerattn.gate.rope import Pairing
from seerattn.gate_files import CONFIG, WEIGHTS, GateFolder, check_identity, plain_json, read_folder, read_weights
from seerattn.selection.budgets import HeadBudgets, share_density
from seerattn.selection.policies import Policy


@dataclass(frozen=True, eq=False)
class LayerGate:
    """The gate of one layer, and what it chooses by.

    Attributes:
        layer: index of the decoder layer.
        gate: of the heads of this process.
        policy: of all heads.
        budgets: of all heads, or None.
        decode_policy: what a decoded token chooses by, or None where it reads all.
    """

    layer: int
    gate: AttnGate
    policy: Policy
    budgets: HeadBudgets | None
    decode_policy: Policy | None = None

    @property
    def form(self) -> AttnGateConfig:
        """Of the gate."""
        return self.gate.config

    def policy_of(self, prompt: int, tokens: int) -> Policy:
        """The policy for a part of a prompt, of all heads; the selector keeps to those of this process.

        Args:
            prompt: tokens of the whole prompt.
            tokens: keys of the part.
        """
        policy = self.policy if not self.policy.needs_length else replace(self.policy, length=prompt)
        return share_density(policy, self.budgets, tokens)


def open_folder(name: str) -> GateFolder:
    """A folder of gates, checked in whole; once for all layers of a process.

    Raises:
        ValueError: it is none; see `read_folder`.
    """
    folder = Path(name)
    changed = [path.stat().st_mtime_ns for path in (folder / CONFIG, folder / WEIGHTS) if path.is_file()]
    return _open(folder, tuple(changed))


@lru_cache(maxsize=2)
def _open(folder: Path, changed: tuple[int, ...]) -> GateFolder:
    return read_folder(folder)


def check_model(folder: GateFolder, model_config: Any) -> None:
    """Refuses gates of another model than the one that vLLM's ``model_config`` describes.

    Raises:
        ValueError: names the first size, or RoPE, that differs.
    """
    config = model_config.hf_text_config
    found = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": model_config.get_total_num_kv_heads(),
        "head_dim": model_config.get_head_size(),
        "rope": plain_json(getattr(config, "rope_parameters", None) or {}),
    }
    check_identity(folder.base, found)


def layer_number(name: str, layers: int) -> int:
    """The decoder layer that an attention layer of vLLM is, by its name, such as ``model.layers.3.self_attn.attn``.

    Raises:
        ValueError: the name has no number, several ones, or that of a layer which the model does not have.
    """
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1 or numbers[0] >= layers or re.search(r"(^|\.)(encoder|vision\w*|visual|mtp\w*)\.", name):
        raise ValueError(
            f"attention layers must be those of the decoder, layers.0 to layers.{layers - 1}, where gates are asked "
            f"for, got the unknown layer {name}; serve this model without gates"
        )
    return numbers[0]


def has_gate(folder: GateFolder, layer: int, *, is_windowed: bool) -> bool:
    """Whether a layer has a gate.

    Args:
        folder: of the gates.
        layer: index of the decoder layer.
        is_windowed: whether it attends to a window.

    Raises:
        ValueError: it must have one and has none, or has one that it cannot have.
    """
    if layer in folder.modules and is_windowed:
        raise ValueError(
            f"layers with gates must attend to all tokens, got layer {layer} with a sliding window; use gates of the "
            "full-attention layers alone, or --disable-sliding-window"
        )
    if layer not in folder.modules and folder.listed is None and not is_windowed:
        raise ValueError(
            f"every full-attention layer must have a gate, got none for layer {layer}; train the gates again, or list "
            f"the layers that have one under 'layers' in {CONFIG}"
        )
    return layer in folder.modules


def load_gate(
    name: str,
    folder: GateFolder,
    policy: Policy,
    layer: int,
    heads: Heads,
    frequencies: Tensor | None,
    pairing: Pairing | None,
    device: torch.device,
    decode_policy: Policy | None = None,
) -> LayerGate:
    """Builds the gate of one layer and fills it with the weights of the heads of this process.

    Args:
        name: of the folder.
        folder: what it says of them.
        policy: that prompts run by.
        layer: index of the decoder layer.
        heads: of this process.
        frequencies: fp32 ``[D / 2]``, at which the layer rotates, zeros for channels that it leaves as they are.
        pairing: which channels it rotates together, or None where it does not rotate.
        device: where the layer runs.
        decode_policy: that tokens are decoded by, or None.

    Raises:
        ValueError: the gate is of another width than the heads, or the settings of the policy are not those of its
            heads.
    """
    form, weights = folder.form, read_weights(Path(name), {layer: folder.modules[layer]})[layer]
    head_dim = weights["k_weight"].shape[1] // len(form.k_pooling)
    if form.rope and form.gate_dim not in (None, head_dim):
        raise ValueError(
            f"gate_dim must be the head dim {head_dim} in vLLM, whose tables of rotation have that width, got "
            f"{form.gate_dim}; use gates of that width, or without RoPE"
        )
    gate = AttnGate(
        form,
        num_heads=len(heads.query),
        num_kv_heads=len(heads.kv),
        head_dim=head_dim,
        inv_freq=torch.zeros(head_dim // 2) if frequencies is None else frequencies,
        pairing=pairing,
        part=heads,
    )
    gate.load_state_dict(weights)
    gate = gate.float().to(device).requires_grad_(False).eval()
    _check_setting(policy, layer, heads.num_heads if form.share == "query_head" else heads.num_kv_heads)
    return LayerGate(layer, gate, policy, folder.budgets, decode_policy)


def _check_setting(policy: Policy, layer: int, heads: int) -> None:
    if policy.setting is None or isinstance(policy.setting[1], (int, float)):
        return
    name, values = policy.setting
    found = len(values[layer]) if layer < len(values) else 0
    if found != heads:
        raise ValueError(
            f"{name} must have a value for each of the {heads} heads of layer {layer}, got {found}; use the policy "
            "that the gates were calibrated with"
        )
