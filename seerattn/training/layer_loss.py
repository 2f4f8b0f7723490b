"""`LayerLoss`: what one gate has to learn from one target map, and how much of the map it finds already.

`B` batch, `H` query heads, `HKV` kv heads, `Hm` mask heads, `S` tokens, `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate.pooling import Pooled
from seerattn.gate_decode import token_scores
from seerattn.hf.mask import document_bounds
from seerattn.selection.block_indices import forced_block_mask, num_query_blocks
from seerattn.selection.policies import TopK
from seerattn.selection.target_map import group_target, target_recall
from seerattn.training.losses import LossKind, RowWeight, gate_loss_sums, weighted_mean

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
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and recall of one layer.

        Args:
            gate: the gate.
            q: queries of all ``H`` heads as the gate takes them; with ``tokens`` windows of one token.
            k: the same of the keys of all ``HKV`` heads.
            target: map ``[B, H, Nq, Nk]`` of the whole rows, or ``[B, H, R, Nk]`` of some of its query blocks.
            segment_ids: int ``[B, S]``, documents of packed rows; each begins on a block boundary.
            rows: int64 ``[R]``, ascending query blocks that ``target`` holds, by default all.
            tokens: int64 ``[R]``, ascending positions of single tokens whose rows ``target [B, H, R, Nk]`` holds. Then
                the gate learns what decoding chooses their blocks by.

        Returns:
            The loss, and with ``measure`` the recall of the target at `RECALL_DENSITIES` by the gate ("recall@0.1")
            and by the best blocks of every head ("oracle_recall@0.1"); forced blocks included, averaged over heads
            and the documents of a sample, then over the samples that have documents to measure; of ``rows`` alone. Of
            ``tokens`` they are "decode_recall@0.1" and "oracle_decode_recall@0.1", the latter by the best blocks of
            every KV group.

        Raises:
            ValueError: a document begins within a block.
        """
        config = gate.config
        losses, recalls = [], []
        for samples, bounds in _alike(config, q, segment_ids, len(target)):
            sums, found = [], []
            held = (rows, config.block_q) if tokens is None else (tokens, 1)
            for document in _documents(config, q, k, target, *held, samples, bounds):
                measured = self.measure and document.counts(config)
                # Also those that do not count, so that the loss always has a graph.
                if tokens is not None:
                    document = self._choosing(document, config)
                    scores = _scores_of_tokens(gate, document)
                    sums.append(self._compare(scores, group_target(document.target, gate.num_kv_heads)))
                    # All of a document may stand before there is anything to choose.
                    if measured and len(document.rows):
                        found.append(_token_recalls(scores.detach(), document, config))
                    continue
                scores = gate.forward(document.q, document.k, document.rows)
                sums.append(self._sums(gate, scores, document))
                if measured:
                    found.append(_recalls(scores.detach(), document, config))
            total, weight = (torch.stack(parts).sum(0) for parts in zip(*sums))
            losses.append(weighted_mean(total, weight))
            if found:
                recalls.append({name: torch.stack([values[name] for values in found]).mean(0) for name in found[0]})
        means = {name: torch.cat([values[name] for values in recalls]).mean() for name in recalls[0]} if recalls else {}
        return torch.cat(losses).mean(), means

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
        return self._compare(scores, target, ignore)

    def _compare(self, scores: Tensor, target: Tensor, ignore: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return gate_loss_sums(scores, target, ignore=ignore, kind=self.loss, row_weight=self.row_weight)

    def _choosing(self, document: _Document, config: AttnGateConfig) -> _Document:
        """A document with those of its tokens that the loss is about: before the others there is nothing to choose."""
        dropped = int(self.drop_rows * document.length) if document.counts(config) else document.length
        some = (document.rows >= dropped) & (document.rows // config.block_k > _unscored(config))
        return replace(document, rows=document.rows[some], target=document.target[:, :, some])


@dataclass(frozen=True, eq=False)
class _Document:
    """A document on its own, or documents at the same place in several samples.

    Attributes:
        q: its queries.
        k: its keys.
        target: its map ``[samples, H, R, Nk]``.
        rows: int64 ``[R]``, its query blocks, or single tokens, that the map holds, on the host; None for all.
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


def _alike(
    config: AttnGateConfig, q: Pooled, segment_ids: Tensor | None, samples: int
) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Neighbouring samples with the same first tokens and ends of documents.

    They run in one call: a model as small as SmolLM2 is bound by the number of its calls.
    """
    if segment_ids is None:
        yield slice(0, samples), [(0, q.length)]
        return
    bounds = [document_bounds(ids, config.block_q, config.block_k) for ids in segment_ids]
    for _, same in groupby(range(samples), key=bounds.__getitem__):
        numbers = list(same)
        yield slice(numbers[0], numbers[-1] + 1), bounds[numbers[0]]


def _documents(
    config: AttnGateConfig,
    q: Pooled,
    k: Pooled,
    target: Tensor,
    rows: Tensor | None,
    size: int,
    samples: slice,
    bounds: list[tuple[int, int]],
) -> Iterator[_Document]:
    """The documents of samples that are alike, of which the map holds rows, each of ``size`` tokens."""
    block_k = config.block_k
    held = range(target.shape[2]) if rows is None else rows.tolist()
    for begin, end in bounds:
        first, last = (bisect_left(held, -(-token // size)) for token in (begin, end))
        if first == last:
            continue
        own = None if rows is None else rows[first:last].cpu() - begin // size
        seen = slice(begin // block_k, -(-end // block_k))
        part = target[samples, :, first:last, seen]
        yield _Document(q.cut(samples, begin, end), k.cut(samples, begin, end), part, own)


def _unscored(config: AttnGateConfig) -> int:
    """First blocks that a gate gives no score of meaning to."""
    return 1 if config.exclude_forced else 0


def _scores_of_tokens(gate: AttnGate, document: _Document) -> Tensor:
    """What decoding would choose the blocks of a document's tokens by, ``[samples, HKV, R, Nk]``."""
    positions = document.rows.to(document.target.device, non_blocking=True)
    queries = replace(document.q, features=document.q.features[:, :, positions])
    vectors = gate.token_queries(queries, positions), gate.gate_keys(document.k)
    return token_scores(gate, *vectors, positions, unscored=_unscored(gate.config))


@torch.no_grad()
def _token_recalls(scores: Tensor, document: _Document, config: AttnGateConfig) -> dict[str, Tensor]:
    """Recalls ``[samples]`` of the rows of single tokens, by name."""
    positions, found = document.rows.to(scores.device), {}
    # A block is worth what it is to the head that needs it most; a row's sum does not change the order.
    best_by = document.target.unflatten(1, (scores.shape[1], -1)).amax(2)
    for density in RECALL_DENSITIES:
        policy = TopK(density=density, rule="row_share")
        chosen = policy.keep_tokens(scores, positions, block_k=config.block_k, forced_scored=not config.exclude_forced)
        best = policy.keep_tokens(best_by, positions, block_k=config.block_k)
        for name, mask in (("decode_recall", chosen), ("oracle_decode_recall", best)):
            found[f"{name}@{density}"] = target_recall(mask, document.target).mean(1)
    return found


@torch.no_grad()
def _recalls(scores: Tensor, document: _Document, config: AttnGateConfig) -> dict[str, Tensor]:
    """Recalls ``[samples]`` by name."""
    geometry = {"q_start": 0, "q_len": document.length, "block_q": config.block_q, "block_k": config.block_k}
    target, found = document.target, {}
    if document.rows is not None:
        # A policy chooses for all rows of a prompt; those that are not known hold nothing, and count for nothing.
        blocks = num_query_blocks(0, document.length, config.block_q)
        rows = document.rows.to(target.device)
        scores, target = (
            torch.full((*x.shape[:2], blocks, x.shape[3]), fill, device=x.device).index_copy(2, rows, x)
            for x, fill in ((scores, -torch.inf), (target, 0.0))
        )
    for density in RECALL_DENSITIES:
        policy = TopK(density=density)
        chosen = policy.select(scores, forced_scored=not config.exclude_forced, **geometry)
        best = policy.select(target, **geometry)
        for name, blocks in (("recall", chosen), ("oracle_recall", best)):
            found[f"{name}@{density}"] = target_recall(blocks.to_mask(), target).mean(1)
    return found
