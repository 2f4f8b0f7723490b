"""`DensityMeter`: which share of the causal blocks layers compute."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from seerattn.selection.block_indices import BlockIndices, causal_block_mask, num_query_blocks

# Counts of tokens that a layer gathers before it sums them up, which would take three launches for each token of each
# request otherwise.
WAITING = 64


class _Meter:
    """What counting prompts and counting decode steps share.

    Args:
        nothing: what is said where nothing was counted.
    """

    def __init__(self, nothing: str) -> None:
        self._nothing = nothing
        # Counts stay on the device until they are asked for, so that counting never waits for a GPU.
        self._computed: dict[int, Tensor] = {}
        self._causal: dict[int, int] = {}

    def _add(self, layer: int, heads: int, computed: Tensor, causal: int) -> None:
        """Counts blocks that were computed, int ``[Hm]``, of so many causal ones a head."""
        computed = computed.repeat_interleave(heads // len(computed))
        self._computed[layer] = self._computed[layer] + computed if layer in self._computed else computed
        self._causal[layer] = self._causal.get(layer, 0) + causal

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that were counted."""
        return sorted(self._computed)

    def by_head(self) -> dict[int, Tensor]:
        """Realised density of every counted layer, float64 ``[H]``; the heads of a group may share theirs."""
        return {layer: self._computed[layer].double().cpu() / self._causal[layer] for layer in self.layers}

    def mean(self) -> float:
        """Realised density over all counted layers and heads.

        Raises:
            ValueError: nothing was counted.
        """
        self._check_counted()
        return float(torch.stack([density.mean() for density in self.by_head().values()]).mean())

    def _check_counted(self) -> None:
        if not self.layers:
            raise ValueError(self._nothing)


class DecodeMeter(_Meter):
    """Counts the blocks that layers read for tokens that are decoded; see `DensityMeter`."""

    def __init__(self) -> None:
        super().__init__("the meter must have seen at least one token that was decoded by a policy, got none")
        # By layer, query heads and heads of the counts.
        self._waiting: dict[tuple[int, int, int], list[tuple[Tensor, int]]] = {}
        # A meter is asked in other threads than that of the forwards.
        self._lock = threading.Lock()

    def add(self, layer: int, heads: int, counts: Tensor, tokens: int, block_k: int) -> None:
        """Counts one token of each of some sequences of ``tokens`` keys, by the lengths ``[B, Hm]`` of their lists."""
        with self._lock:
            name = (layer, heads, counts.shape[1])
            waiting = self._waiting.setdefault(name, [])
            waiting.append((counts, len(counts) * -(-tokens // block_k)))
            if len(waiting) >= WAITING:
                self._sum_up(name)

    def _sum_up(self, name: tuple[int, int, int]) -> None:
        counts, causal = zip(*self._waiting.pop(name))
        self._add(*name[:2], torch.cat(counts).sum(0), sum(causal))

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that were counted."""
        with self._lock:
            for name in [*self._waiting]:
                self._sum_up(name)
        return super().layers

    def add_whole(self, blocks: int) -> None:
        """Counts tokens that read all of so many blocks, in every layer that was counted."""
        for layer in self.layers:
            self._computed[layer] = self._computed[layer] + blocks
            self._causal[layer] += blocks


class DensityMeter(_Meter):
    """Counts the blocks that layers compute; see `seerattn.record_density`.

    Only prefill calls of layers with a selector count. A call that ``impl="auto"`` ran dense counts with density 1.
    Blocks that attention skips (`Policy.skip_threshold`) count, since their scores are computed; `skipped` tells them.

    Attributes:
        decode: the same of tokens that were decoded by a policy of their own; one that "auto" let read everything
            counts with density 1. Nothing is counted without such a policy.
    """

    def __init__(self) -> None:
        super().__init__("the meter must have seen at least one prefill of a layer with a selector, got none")
        self._skipped: dict[int, Tensor] = {}
        self.decode = DecodeMeter()

    def add(self, layer: int, heads: int, blocks: BlockIndices) -> None:
        """Counts one call of a layer with so many query heads."""
        geometry = (tuple(blocks.q_start.tolist()), tuple(blocks.q_len.tolist()), blocks.block_q, blocks.block_k)
        self._add(layer, heads, blocks.counts.sum((0, 2)), _causal_blocks(*geometry))

    def add_skipped(self, layer: int, blocks: BlockIndices, counts: Tensor) -> None:
        """Tells of a call that was counted how many blocks were computed in full, ``counts [B, H, Nq]``."""
        listed = blocks.counts.repeat_interleave(counts.shape[1] // blocks.num_heads, 1)
        skipped = (listed - counts).sum((0, 2))
        self._skipped[layer] = self._skipped[layer] + skipped if layer in self._skipped else skipped

    def skipped(self) -> float:
        """Share of the counted blocks whose scores were computed, and then neither softmax nor product with values.

        Raises:
            ValueError: nothing was counted.
        """
        self._check_counted()
        return sum(int(x.sum()) for x in self._skipped.values()) / sum(int(x.sum()) for x in self._computed.values())


@functools.lru_cache(maxsize=256)
def _causal_blocks(q_starts: tuple[int, ...], q_lens: tuple[int, ...], block_q: int, block_k: int) -> int:
    """Causal blocks of all rows of a call, which every layer of a forward asks for again."""
    total = 0
    for start, length in zip(q_starts, q_lens):
        geometry = (num_query_blocks(start, length, block_q), -(-(start + length) // block_k), block_q, block_k)
        total += int(causal_block_mask(start, length, *geometry).sum())
    return total
