"""`LayerLoss`: what one gate has to learn from one target map, and how much of the map it finds already.

`B` batch, `H` query heads, `HKV` kv heads, `Hm` mask heads, `S` tokens, `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate.pooling import Pooled
from seerattn.hf.mask import document_bounds
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
        self,
        gate: AttnGate,
        q: Pooled,
        k: Pooled,
        target: Tensor,
        segment_ids: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and recall of one layer.

        Args:
            gate: the gate.
            q: queries of all ``H`` heads as the gate takes them.
            k: the same of the keys of all ``HKV`` heads.
            target: map ``[B, H, Nq, Nk]`` of the whole rows, or ``[B, H, R, Nk]`` of some of its query blocks.
            segment_ids: int ``[B, S]``, documents of packed rows; each begins on a block boundary.
            rows: int64 ``[R]``, ascending query blocks that ``target`` holds, by default all. Recall is then not
                measured.

        Returns:
            The loss, and with ``measure`` the recall of the target at `RECALL_DENSITIES` by the gate ("recall@0.1")
            and by the best blocks of every head ("oracle_recall@0.1"); forced blocks included, averaged over heads
            and documents.

        Raises:
            ValueError: a document begins within a block.
        """
        config = gate.config
        if segment_ids is None:
            scores, lengths = gate.forward(q, k, rows), [q.length] * len(q.features)
            numbers = torch.arange(scores.shape[2]) if rows is None else rows
            numbers = numbers.expand(len(lengths), -1).to(target.device)
        else:
            scores, target, lengths, numbers = _cut_apart(gate, q, k, target, segment_ids, rows)
        wanted = group_target(target, gate.mask_heads).clone()
        tokens = torch.tensor(lengths, device=target.device)
        blocks = -(-tokens // config.block_q)
        first = torch.where(tokens < _least(config), blocks, (self.drop_rows * blocks.double()).long())
        wanted = wanted.masked_fill((numbers < first[:, None])[:, None, :, None], 0.0)
        ignore = None
        if config.exclude_forced:
            # Of the host's numbers: reading them from the device would wait for it in every layer.
            grid = (num_query_blocks(0, max(lengths), config.block_q), target.shape[3], config.block_q, config.block_k)
            forced = forced_block_mask(torch.zeros_like(tokens), tokens, *grid)
            ignore = forced[torch.arange(len(tokens), device=target.device)[:, None], numbers][:, None]
        loss = gate_loss(scores, wanted, ignore=ignore, kind=self.loss, row_weight=self.row_weight)
        measured = self.measure and rows is None
        return loss, _recalls(scores.detach(), target, lengths, config) if measured else {}


def _least(config: AttnGateConfig) -> int:
    """Tokens of the shortest document that leaves something to choose."""
    return 2 * max(config.block_q, config.block_k)


def _cut_apart(
    gate: AttnGate, q: Pooled, k: Pooled, target: Tensor, segment_ids: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Scores and maps of single documents, padded to the largest, the documents' lengths, and the numbers ``[N, R]``
    of their query blocks."""
    block_q, block_k = gate.config.block_q, gate.config.block_k
    places = torch.arange(target.shape[2]) if rows is None else rows.cpu()
    scores, targets, lengths, numbers = [], [], [], []
    for row, ids in enumerate(segment_ids):
        for begin, end in document_bounds(ids, block_q, block_k):
            blocks = slice(begin // block_q, -(-end // block_q))
            held = (places >= blocks.start) & (places < blocks.stop)
            if not held.any():
                continue
            own = places[held] - blocks.start
            part = q.cut(row, begin, end), k.cut(row, begin, end), None if rows is None else own
            scores.append(gate.forward(*part))
            seen = slice(begin // block_k, -(-end // block_k))
            targets.append(target[row : row + 1, :, held.to(target.device), seen])
            numbers.append(own)
            lengths.append(end - begin)
    padded = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True).to(target.device)
    return _stack(scores, -torch.inf), _stack(targets, 0.0), lengths, padded


def _stack(maps: list[Tensor], fill: float) -> Tensor:
    height, width = (max(m.shape[axis] for m in maps) for axis in (2, 3))
    return torch.cat([F.pad(m, (0, width - m.shape[3], 0, height - m.shape[2]), value=fill) for m in maps])


@torch.no_grad()
def _recalls(scores: Tensor, target: Tensor, lengths: list[int], config: AttnGateConfig) -> dict[str, Tensor]:
    rows = [row for row, length in enumerate(lengths) if length >= _least(config)]
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
