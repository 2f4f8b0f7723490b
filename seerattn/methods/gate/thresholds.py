"""Calibration: thresholds on the gate's scores that meet a target density or a target recall on given text.

With a threshold a head spends blocks where its scores say so, instead of the same number in every row. One threshold
a head meets the target in every head; one for all heads meets it on average and also shares the budget among heads.
Scores of different heads are hard to compare, though: of gates with budgets (`seerattn.methods.gate.budgets`) every
head gets the threshold that gives it its own density there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_selector import pooled_inputs
from seerattn.ops.attention_map import attention_map
from seerattn.selection.block_indices import causal_block_mask, forced_block_mask
from seerattn.selection.budgets import Densities
from seerattn.selection.selector import AttentionContext

Goal = Literal["density", "recall"]
Level = Literal["softmax", "score"]


@dataclass
class BlockGains:
    """The blocks of one layer that a threshold decides on, and what keeping each of them gains.

    The gain is a share of the goal: of the causal area, or of the target's mass. All forced blocks together are
    ``forced``; both are summed over sequences and divided by their number at the end.

    Attributes:
        levels: for each sequence fp32 ``[Hm, blocks]``, what the threshold is compared with.
        gains: the same for the gain.
        forced: for each sequence ``[Hm]``.
    """

    levels: list[Tensor] = field(default_factory=list)
    gains: list[Tensor] = field(default_factory=list)
    forced: list[Tensor] = field(default_factory=list)


class Calibrator:
    """Collects the gate scores of a model and finds thresholds.

    Args:
        gates: the gate of each layer.
        goal: "density" or "recall" of the target map.
        on: compare the gate's softmax or its raw scores.
        sink_blocks: first blocks that are kept in any case.
    """

    def __init__(self, gates: dict[int, AttnGate], *, goal: Goal, on: Level, sink_blocks: int = 1) -> None:
        self._gates, self._goal, self._on, self._sink_blocks = gates, goal, on, sink_blocks
        self._layers: dict[int, BlockGains] = {}

    @torch.no_grad()
    def see(self, q: Tensor, k: Tensor, context: AttentionContext) -> None:
        """Collects one call of whole sequences, queries and keys after RoPE."""
        gate = self._gates[context.layer]
        config = gate.config
        scores = gate(*pooled_inputs(gate, q, k, context))
        geometry = (0, q.shape[2], *scores.shape[2:], config.block_q, config.block_k)
        causal = causal_block_mask(*geometry, device=scores.device)[0]
        forced = forced_block_mask(*geometry, self._sink_blocks, device=scores.device)[0]
        if self._on == "softmax":
            hidden = ~causal | forced if config.exclude_forced else ~causal
            scores = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        if self._goal == "density":
            share = (causal / causal.sum()).expand(scores.shape)
        else:
            sizes = {"block_q": config.block_q, "block_k": config.block_k}
            target = attention_map(q, k, form=config.target, **sizes, **context.logits).map
            share = target.unflatten(1, (scores.shape[1], -1)).mean(2) / scores.shape[2]
        free = causal & ~forced
        layer = self._layers.setdefault(context.layer, BlockGains())
        for b in range(len(scores)):
            layer.levels.append(scores[b][:, free].cpu())
            layer.gains.append(share[b][:, free].double().cpu())
            layer.forced.append(share[b][:, forced].double().sum(-1).cpu())

    def thresholds(
        self, goal: float, *, per_head: bool, densities: Densities | None = None
    ) -> list[list[float]] | float:
        """The highest thresholds that meet the goal, or the nearest to it for a density.

        Args:
            goal: density or recall in (0, 1].
            per_head: one threshold a layer and head, or one for all.
            densities: of every layer and head, whose mean is the goal.

        Returns:
            ``[layers][Hm]`` with an empty list for layers without a gate, or one number.

        Raises:
            ValueError: the forced blocks alone exceed the density.
        """
        if not 0 < goal <= 1:
            raise ValueError(f"{self._goal} must be in (0, 1], got {goal}")
        if self._goal == "density" and self.least_density() > goal:
            raise ValueError(
                f"density must be at least that of the forced blocks, {self.least_density():.3f} at this context, got "
                f"{goal:g}; use a longer context or a higher density"
            )
        sequences = len(next(iter(self._layers.values())).levels)
        merged = {
            layer: (torch.cat(g.levels, 1), torch.cat(g.gains, 1) / sequences, sum(g.forced) / sequences)
            for layer, g in self._layers.items()
        }
        if densities is not None:
            return [
                [self._threshold(*head, own) for head, own in zip(zip(*merged[layer]), row)] if layer in merged else []
                for layer, row in enumerate(densities)
            ]
        if not per_head:
            heads = sum(len(forced) for _, _, forced in merged.values())
            levels = torch.cat([levels.flatten() for levels, _, _ in merged.values()])
            gains = torch.cat([gains.flatten() for _, gains, _ in merged.values()]) / heads
            forced = sum(float(forced.sum()) for _, _, forced in merged.values()) / heads
            return self._threshold(levels, gains, forced, goal)
        return [
            [self._threshold(*head, goal) for head in zip(*merged[layer])] if layer in merged else []
            for layer in range(max(merged) + 1)
        ]

    def least_density(self) -> float:
        """The lowest density that every head can have: that of its forced blocks."""
        layers = self._layers.values()
        return max(float((sum(gains.forced) / len(gains.forced)).max()) for gains in layers)

    def _threshold(self, levels: Tensor, gains: Tensor, forced: Tensor | float, goal: float) -> float:
        forced = float(forced)
        levels, order = levels.sort(descending=True)
        # reached[i] is what the i best blocks gain, forced ones included.
        reached = torch.cat((torch.tensor([forced]), forced + gains[order].cumsum(0)))
        nearest, enough = (reached - goal).abs().argmin(), (reached < goal - 1e-9).sum()
        keep = int(nearest if self._goal == "density" else enough)
        # A level counts as kept if it exceeds the threshold, so the threshold is the best level that is dropped.
        if keep < len(levels):
            return float(levels[keep])
        return float(levels[-1]) - 1.0 if len(levels) else 0.0


def threshold_level(gates: Mapping[int, AttnGate]) -> Level:
    """What thresholds on gates are compared with: raw scores where gates normalise them, else their softmax."""
    return "score" if next(iter(gates.values())).config.normalize_subblocks else "softmax"
