"""The layout of published gates of the decode phase (SeerAttention-R, arXiv 2506.08889), as parameters of `AttnGate`.

Their weights are ``model.layers.N.self_attn.attn_gate.attngate_{linear_q,linear_k,qnorm,knorm}.weight``. A gate query
is that of one token and one KV group, at the token's own position: so query sub-blocks are single tokens here, and the
heads of a group share a gate. How they become one vector is linear, whatever its name:

- "Qproj": a matrix a query head, summed over the group, ``[HKV, G, D, DG]``; the parts of ours.
- "Qavgproj": the mean of the group through one matrix, ``[HKV, D, DG]``; that matrix over ``G`` in every part.
- "Qavg": the mean alone; the identity over ``G`` in every part.

In two things this follows the published training, and not the released code of decoding: a block that decoded tokens
finish lies at its first position, and an unfinished block takes part in no softmax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seerattn.gate.config import BLOCK_SIZES, AttnGateConfig
from seerattn.selection.policies import Policy, Threshold, TokenBudget

KEY = "model.layers.{}.self_attn.attn_gate.attngate_{}.weight"
_K_POOLING = re.compile(r"K((?:avg|max|min)+)")
_HEADS = ("Qproj", "Qavgproj", "Qavg")


@dataclass(frozen=True)
class DecodeLayout:
    """What the config of published decode gates says of their tensors.

    Attributes:
        config: form of the gates.
        heads_by: how the query heads of a group become one vector: "Qproj", "Qavgproj" or "Qavg".
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        policy: what tokens read by the config; None is everything.
        first_layer: layers before it decode dense.
    """

    config: AttnGateConfig
    heads_by: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    policy: Policy | None
    first_layer: int

    @classmethod
    def read(
        cls, values: dict[str, Any], tensors: dict[str, Tensor], *, heads: int, kv_heads: int, head_dim: int
    ) -> DecodeLayout:
        """The layout that a config names.

        Raises:
            ValueError: a form that gates here cannot have.
        """
        heads_by = values.get("seerattn_q_head_pooling_type", "Qproj")
        if heads_by not in _HEADS:
            raise ValueError(
                f"seerattn_q_head_pooling_type must be one of {', '.join(_HEADS)}, which make one query of a KV group, "
                f"got {heads_by!r}"
            )
        pooling = values.get("seerattn_k_seq_pooling_type", "Kmaxminavg")
        match = _K_POOLING.fullmatch(pooling)
        if match is None:
            raise ValueError(f"seerattn_k_seq_pooling_type must look like 'Kmaxminavg', got {pooling!r}")
        block, gate_dim = values.get("seerattn_gate_block_size", 64), values.get("seerattn_gate_hidden_size", 128)
        if block not in BLOCK_SIZES:
            raise ValueError(f"seerattn_gate_block_size must be one of {BLOCK_SIZES}, got {block}")
        if heads_by == "Qavg" and gate_dim != head_dim:
            raise ValueError(f"seerattn_gate_hidden_size of 'Qavg' must be the head dim {head_dim}, got {gate_dim}")
        config = AttnGateConfig.paper(
            block_q=block,
            block_k=block,
            query_subblocks=block,
            k_pooling=tuple(re.findall("avg|max|min", match[1])),
            q_linear=True,
            gate_dim=gate_dim,
            rope=bool(values.get("seerattn_use_rope", True)),
            # Configs before there was the option do not tell it.
            qk_norm=bool(values.get("seerattn_use_qk_norm", KEY.format(0, "qnorm") in tensors)),
            # Rows of the target are softmax rows of single tokens.
            normalize_subblocks=True,
            share="kv_group",
        )
        first = values.get("seerattn_start_layer", 0)
        return cls(config, heads_by, heads, kv_heads, head_dim, _policy(values, block), first)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a layer, by their part of the name."""
        group, width = self.num_heads // self.num_kv_heads, self.config.gate_dim
        linear = {"Qproj": (self.num_kv_heads, group, self.head_dim, width)}
        linear["Qavgproj"] = (self.num_kv_heads, self.head_dim, width)
        found = {"linear_q": linear[self.heads_by]} if self.heads_by in linear else {}
        found["linear_k"] = (self.num_kv_heads, len(self.config.k_pooling) * self.head_dim, width)
        return found | ({"qnorm": (width,), "knorm": (width,)} if self.config.qk_norm else {})

    def parameters(self, layer: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of `AttnGate`, fp32, of the tensors of a layer by their part of the name."""
        layer = {name: x.float() for name, x in layer.items()}
        group = self.num_heads // self.num_kv_heads
        if self.heads_by == "Qproj":
            parts = layer["linear_q"]
        else:
            eye = torch.eye(self.head_dim).expand(self.num_kv_heads, -1, -1)
            one = layer.get("linear_q", eye) / group
            parts = one[:, None].expand(-1, group, -1, -1)
        found = {"q_weight": parts.flatten(1, 2).contiguous(), "k_weight": layer["linear_k"]}
        norms = {f"{side}_norm.weight": layer[f"{side}norm"] for side in "qk" if f"{side}norm" in layer}
        return found | norms


def is_decode(tensors: dict[str, Tensor]) -> bool:
    """Whether published weights are those of decode gates."""
    return any(".attn_gate.attngate_" in name for name in tensors)


def _policy(values: dict[str, Any], block: int) -> Policy | None:
    """What a config lets a token read, and no less: forced blocks are there on top of its budget.

    The first block may be among the best ones of the budget as well; then a token reads one block more here.
    """
    method = values.get("seerattn_sparsity_method", "threshold")
    if method == "token_budget":
        return TokenBudget(tokens=values.get("seerattn_token_budget", 2048) // block * block + 2 * block)
    if method == "threshold":
        level = values.get("seerattn_threshold", 0.0)
        return Threshold(threshold=level) if level > 0 else None
    if method == "nz_ratio" and values.get("seerattn_nz_ratio", 1.0) == 1:
        return None
    raise ValueError(
        f"seerattn_sparsity_method of decode gates must be threshold or token_budget, got {method!r}; choose by "
        "decode_policy after changing it"
    )
