"""Gates of a process that has some heads of every layer, as tensor parallelism deals them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from seerattn.gate.config import AttnGateConfig
from seerattn.selection.policies import Policy


class Heads(NamedTuple):
    """The heads of a layer that one process has.

    Attributes:
        num_heads: query heads of the whole layer.
        num_kv_heads: its key/value heads.
        query: those of the process.
        kv: the key/value heads that they attend to.
    """

    num_heads: int
    num_kv_heads: int
    query: range
    kv: range

    @classmethod
    def of_rank(cls, num_heads: int, num_kv_heads: int, rank: int, ranks: int) -> Heads:
        """Neighbours stay together, and KV heads are repeated where there are more ranks than they."""
        q, kv, copies = num_heads // ranks, max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)
        first = rank // copies * kv
        return cls(num_heads, num_kv_heads, range(rank * q, (rank + 1) * q), range(first, first + kv))

    def mask_heads(self, form: AttnGateConfig) -> range:
        """Those of the process among the heads that have lists of their own."""
        return self.query if form.share == "query_head" else self.kv

    def check(self, form: AttnGateConfig) -> None:
        """Refuses a part of the heads that a gate cannot choose for.

        Raises:
            ValueError: the gate is shared by a KV group that the process has in part.
        """
        if form.share == "kv_group" and len(self.query) * self.num_kv_heads != len(self.kv) * self.num_heads:
            raise ValueError(
                f"processes must be at most the {self.num_kv_heads} KV heads where a KV group shares one gate, got "
                f"processes of {len(self.query)} query heads; use fewer processes"
            )


def heads_of_gate(weights: Mapping[str, Tensor], form: AttnGateConfig, heads: Heads) -> dict[str, Tensor]:
    """The parameters of a gate that belong to some of its heads; those without heads are shared by all.

    Args:
        weights: of the whole gate, by name.
        form: of the gate.
        heads: of the process.
    """
    mask = heads.mask_heads(form)
    parts = {
        "q_weight": mask,
        "k_weight": heads.kv if form.q_linear else heads.query,
        "q_salience": heads.query,
        "k_salience": heads.kv,
        "distance_bias": mask,
    }
    return {
        name: x[parts[name].start : parts[name].stop].clone() if name in parts else x for name, x in weights.items()
    }


def policy_of_heads(policy: Policy, layer: int, heads: range) -> Policy:
    """A policy of all heads of a layer, with the settings of some of its mask heads alone; other layers have none."""
    if policy.setting is None or isinstance(policy.setting[1], (int, float)):
        return policy
    name, values = policy.setting
    own = tuple(tuple(row[heads.start : heads.stop]) if at == layer else () for at, row in enumerate(values))
    return replace(policy, **{name: own})
