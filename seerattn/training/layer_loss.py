"""`LayerLoss`: what one gate has to learn from one target map, and how much of the map it finds already.

`B` batch, `H` query heads, `HKV` kv heads, `Hm` mask heads, `S` tokens, `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate.pooling import Pooled
from seerattn.selection.block_indices import forced_block_mask, num_query_blocks
from seerattn.selection.policies import TopK
from seerattn.training.losses import LossKind, RowWeight, gate_loss, group_target, target_recall

RECALL_DENSITIES = (0.1, 0.2)


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """Compares the gate of a layer with the layer's target map; see `seerattn.hf.distillation.GateLoss`.

    Packed documents are cut apart first, so each counts as if it were alone. Documents shorter than two blocks leave
    nothing to choose and do not count.

    Attributes:
        loss: see `gate_loss`.
        row_weight: see `gate_loss`.
        drop_rows: share of the first query-block rows of every document that the loss leaves out.
        measure: whether to measure recall as well, which costs a few sorts of the maps.
    """

    loss: LossKind = "kl"
    row_weight: RowWeight = "uniform"
    drop_rows: float = 0.0
    measure: bool = False

    def __call__(
        self, gate: AttnGate, q: Pooled, k: Pooled, target: Tensor, segment_ids: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and recall of one layer.

        Args:
            gate: the gate.
            q: queries of all ``H`` heads as the gate takes them.
            k: the same of the keys of all ``HKV`` heads.
            target: map ``[B, H, Nq, Nk]`` of the whole rows.
            segment_ids: int ``[B, S]``, documents of packed rows; each begins on a block boundary.

        Returns:
            The loss, and with ``measure`` the recall of the target at `RECALL_DENSITIES` by the gate ("recall@0.1")
            and by the best blocks of every head ("oracle_recall@0.1"); forced blocks included, averaged over heads
            and documents.

        Raises:
            ValueError: a document begins within a block.
        """
        config = gate.config
        if segment_ids is None:
            scores, lengths = gate(q, k), [q.length] * len(q.features)
        else:
            scores, target, lengths = _cut_apart(gate, q, k, target, segment_ids)
        wanted = group_target(target, gate.mask_heads).clone()
        for row, length in enumerate(lengths):
            dropped = int(self.drop_rows * num_query_blocks(0, length, config.block_q))
            wanted[row, :, : None if _too_short(length, config) else dropped] = 0.0
        ignore = None
        if config.exclude_forced:
            tokens = torch.tensor(lengths, device=target.device)
            grid = (*target.shape[2:], config.block_q, config.block_k)
            ignore = forced_block_mask(torch.zeros_like(tokens), tokens, *grid)[:, None]
        loss = gate_loss(scores, wanted, ignore=ignore, kind=self.loss, row_weight=self.row_weight)
        return loss, _recalls(scores.detach(), target, lengths, config) if self.measure else {}


def _too_short(length: int, config: AttnGateConfig) -> bool:
    return length < 2 * max(config.block_q, config.block_k)


def _cut_apart(
    gate: AttnGate, q: Pooled, k: Pooled, target: Tensor, segment_ids: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """Scores and maps of single documents, padded to the largest, and the documents' lengths."""
    block_q, block_k = gate.config.block_q, gate.config.block_k
    scores, targets, lengths = [], [], []
    for row, ids in enumerate(segment_ids):
        edges = [0, *((ids.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(ids)]
        for begin, end in pairwise(edges):
            if begin % block_q or begin % block_k:
                raise ValueError(
                    f"packed documents must begin on block boundaries, got one at token {begin} with blocks of "
                    f"{block_q} and {block_k}; cut documents to whole blocks"
                )
            scores.append(gate(q.cut(row, begin, end), k.cut(row, begin, end)))
            rows = slice(begin // block_q, -(-end // block_q))
            targets.append(target[row : row + 1, :, rows, begin // block_k : -(-end // block_k)])
            lengths.append(end - begin)
    return _stack(scores, -torch.inf), _stack(targets, 0.0), lengths


def _stack(maps: list[Tensor], fill: float) -> Tensor:
    height, width = (max(m.shape[axis] for m in maps) for axis in (2, 3))
    return torch.cat([F.pad(m, (0, width - m.shape[3], 0, height - m.shape[2]), value=fill) for m in maps])


@torch.no_grad()
def _recalls(scores: Tensor, target: Tensor, lengths: list[int], config: AttnGateConfig) -> dict[str, Tensor]:
    rows = [row for row, length in enumerate(lengths) if not _too_short(length, config)]
    found: dict[str, list[Tensor]] = {}
    for row in rows:
        num_q, num_k = num_query_blocks(0, lengths[row], config.block_q), -(-lengths[row] // config.block_k)
        truth, predicted = (m[row : row + 1, :, :num_q, :num_k] for m in (target, scores))
        geometry = {"q_start": 0, "q_len": lengths[row], "block_q": config.block_q, "block_k": config.block_k}
        for density in RECALL_DENSITIES:
            policy = TopK(density=density)
            chosen = policy.select(predicted, forced_scored=not config.exclude_forced, **geometry)
            best = policy.select(truth, **geometry)
            for name, blocks in (("recall", chosen), ("oracle_recall", best)):
                found.setdefault(f"{name}@{density}", []).append(target_recall(blocks.to_mask(), truth).mean())
    return {name: torch.stack(values).mean() for name, values in found.items()}
