"""`LayerLoss`: what one gate has to learn from one target map, and how much of the map it finds already.

`B` batch, `H` query heads, `HKV` kv heads, `Hm` mask heads, `S` tokens, `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate.pooling import Pooled
from seerattn.hf.mask import document_bounds
from seerattn.selection.block_indices import forced_block_mask, num_query_blocks
from seerattn.selection.policies import TopK
from seerattn.training.losses import LossKind, RowWeight, gate_loss_sums, group_target, target_recall, weighted_mean

RECALL_DENSITIES = (0.1, 0.2)


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """Compares the gate of a layer with the layer's target map; see `seerattn.hf.distillation.GateLoss`.

    Packed documents are cut apart first, so each counts as if it were alone. Documents shorter than two blocks leave
    nothing to choose and do not count. Every sample weighs the same: the loss is the mean over the query-block rows of
    a sample, all its documents together, then over the samples.

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
            and the documents of a sample, then over the samples that have documents to measure.

        Raises:
            ValueError: a document begins within a block.
        """
        config, measured = gate.config, self.measure and rows is None
        losses, recalls = [], []
        for sample in range(len(target)):
            sums, found = [], []
            for document in _documents(config, q, k, target, segment_ids, rows, sample):
                # Also those that do not count, so that the loss always has a graph.
                scores = gate.forward(document.q, document.k, document.rows)
                sums.append(self._sums(gate, scores, document))
                if measured and document.counts(config):
                    found.append(_recalls(scores.detach(), document, config))
            total, weight = (torch.cat(parts).sum() for parts in zip(*sums))
            losses.append(weighted_mean(total, weight))
            recalls += [_means(found)] if found else []
        return torch.stack(losses).mean(), _means(recalls) if recalls else {}

    def _sums(self, gate: AttnGate, scores: Tensor, document: _Document) -> tuple[Tensor, Tensor]:
        """See `gate_loss_sums`."""
        config, device = gate.config, scores.device
        blocks = num_query_blocks(0, document.length, config.block_q)
        dropped = int(self.drop_rows * blocks) if document.counts(config) else blocks
        rows = torch.arange(blocks) if document.rows is None else document.rows
        first = int((rows < dropped).sum())
        ignore = None
        if config.exclude_forced:
            # Made on the device: a copy of the whole map from the host would wait for it.
            start, tokens = (torch.full((1,), n, device=device) for n in (0, document.length))
            forced = forced_block_mask(start, tokens, blocks, scores.shape[3], config.block_q, config.block_k)
            ignore = forced[:, None, rows[first:].to(device, non_blocking=True)]
        scores, target = (x[:, :, first:] for x in (scores, group_target(document.target, gate.mask_heads)))
        return gate_loss_sums(scores, target, ignore=ignore, kind=self.loss, row_weight=self.row_weight)


@dataclass(frozen=True, eq=False)
class _Document:
    """A document of one sample, on its own.

    Attributes:
        q: its queries.
        k: its keys.
        target: its map ``[1, H, R, Nk]``.
        rows: int64 ``[R]``, its query blocks that the map holds, on the host; None for all.
    """

    q: Pooled
    k: Pooled
    target: Tensor
    rows: Tensor | None

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.q.length

    def counts(self, config: AttnGateConfig) -> bool:
        """Whether it leaves something to choose."""
        return self.length >= 2 * max(config.block_q, config.block_k)


def _documents(
    config: AttnGateConfig,
    q: Pooled,
    k: Pooled,
    target: Tensor,
    segment_ids: Tensor | None,
    rows: Tensor | None,
    sample: int,
) -> Iterator[_Document]:
    """The documents of a sample of which the map holds rows."""
    block_q, block_k = config.block_q, config.block_k
    held = range(target.shape[2]) if rows is None else rows.tolist()
    bounds = [(0, q.length)] if segment_ids is None else document_bounds(segment_ids[sample], block_q, block_k)
    for begin, end in bounds:
        first, last = (bisect_left(held, -(-token // block_q)) for token in (begin, end))
        if first == last:
            continue
        own = None if rows is None else rows[first:last].cpu() - begin // block_q
        seen = slice(begin // block_k, -(-end // block_k))
        part = target[sample : sample + 1, :, first:last, seen]
        yield _Document(q.cut(sample, begin, end), k.cut(sample, begin, end), part, own)


@torch.no_grad()
def _recalls(scores: Tensor, document: _Document, config: AttnGateConfig) -> dict[str, Tensor]:
    geometry = {"q_start": 0, "q_len": document.length, "block_q": config.block_q, "block_k": config.block_k}
    found = {}
    for density in RECALL_DENSITIES:
        policy = TopK(density=density)
        chosen = policy.select(scores, forced_scored=not config.exclude_forced, **geometry)
        best = policy.select(document.target, **geometry)
        for name, blocks in (("recall", chosen), ("oracle_recall", best)):
            found[f"{name}@{density}"] = target_recall(blocks.to_mask(), document.target).mean()
    return found


def _means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([values[name] for values in found]).mean() for name in found[0]}
