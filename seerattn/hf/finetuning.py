"""Sparse attention with gradients, for training a model and its gates together (arXiv 2410.13276, section 4.2)."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seerattn.gate_selector import GateSelector
from seerattn.hf.distillation import GateLoss, GateLosses, check_unpadded, check_whole, gathered
from seerattn.hf.mask import CallMask, document_bounds
from seerattn.hf.meters import DensityMeter
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection.block_indices import BlockIndices, num_query_blocks
from seerattn.selection.policies import TopK

if TYPE_CHECKING:
    from seerattn.hf.call import LayerCall
    from seerattn.hf.state import LayerState

# First tokens and ends of some documents of a packed row.
Group = list[tuple[int, int]]


class SparseTraining(GateLosses):
    """Attention of one training forward: each gate chooses blocks, and learns from a share of the target's rows.

    The choice is hard, so the language-model loss gives the gates no gradient; what they see of q and k is detached,
    so theirs gives the model none. A layer that runs a second time, as gradient checkpointing does in the backward
    pass, finds the lists of its first time here and adds no second loss. Use one object a forward, as the keyword
    ``seer_training`` of the model.

    Args:
        density: of the causal block area; at 1 the model's own dense attention runs.
        loss_fn: compares a gate with its target; None leaves the gates alone.
        target_share: share of the query blocks whose targets are computed, in (0, 1].
        seed: draws those query blocks, together with ``step`` and the layer.
        step: number of the optimizer step.
        segment_ids: int ``[B, S]``, documents of packed rows; by default documents begin where ``position_ids`` begin
            anew.

    Attributes:
        blocks: by layer and batch row the lists of every group of packed documents, see `similar_documents`; where
            no row is packed, the lists of the whole batch as those of one row; empty where attention is dense.
        meter: counts the blocks that were computed; empty at density 1.
    """

    def __init__(
        self,
        *,
        density: float,
        loss_fn: GateLoss | None,
        target_share: float = 1.0,
        seed: int = 0,
        step: int = 0,
        segment_ids: Tensor | None = None,
    ) -> None:
        super().__init__(loss_fn, segment_ids, target_share=target_share, seed=seed, step=step)
        self.policy = TopK(density=density)
        self.meter = SampleMeter()
        self.blocks: dict[int, list[list[BlockIndices]]] = {}
        self._groups: list[list[Group]] | None = None

    def learn(
        self, query: Tensor, key: Tensor, value: Tensor, mask: CallMask, call: LayerCall, logits: dict[str, Any]
    ) -> Tensor | None:
        """See `GateLosses.learn`; differentiable in all but the choice of the blocks."""
        check_whole(query, mask)
        check_unpadded(mask)
        device, state = query.device.type, call.state
        if torch.is_autocast_enabled(device):
            # RoPE left q and k in fp32; dense attention would round them here as well.
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        segment_ids = self.documents(query, mask, call)
        if state.layer not in self.blocks:
            inputs = query.detach(), key.detach(), call, _detached(logits), segment_ids
            with torch.no_grad(), torch.autocast(device, enabled=False):
                with gathered(state.gate):
                    self.blocks[state.layer] = self._choose(*inputs)
                if self.loss_fn is not None:
                    # The gate scores those rows a second time: with a graph all rows would cost more than sparse
                    # attention itself, and without one `GateSelector` scores them in a fused kernel.
                    self.learn_rows(*inputs)
        blocks = self.blocks[state.layer]
        if not blocks:
            return None
        logits = logits | {"impl": state.impl}
        if segment_ids is None:
            return block_sparse_attention(query, key, value, blocks[0][0], **logits)
        inputs = zip(*(x.split(1) for x in (query, key, value)), self._packed(segment_ids, state), blocks)
        rows = [_attend_packed(*row, logits) for row in inputs]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _choose(
        self, q: Tensor, k: Tensor, call: LayerCall, logits: dict[str, Any], segment_ids: Tensor | None
    ) -> list[list[BlockIndices]]:
        """See `blocks`."""
        if self.policy.density == 1:
            return []
        state, tokens = call.state, q.shape[2]
        selector = GateSelector(state.gate, self.policy, budgets=state.budgets)

        def document(b: int, begin: int, end: int) -> BlockIndices:
            size = end - begin
            context = call.part(b, begin, end).context(row=None, q_len=size, k_len=size, **logits)
            return selector.select(*(x[b : b + 1, :, begin:end] for x in (q, k)), context)

        if segment_ids is None:
            whole = call.context(row=None, q_len=tokens, k_len=tokens, **logits)
            chosen = [[selector.select(q, k, whole)]]
        else:
            chosen = [
                [BlockIndices.stack([document(b, *bounds) for bounds in group]) for group in groups]
                for b, groups in enumerate(self._packed(segment_ids, state))
            ]
        for b, lists in enumerate(chosen):
            for blocks in lists:
                self.meter.add(b, state, blocks)
        return chosen

    def _packed(self, segment_ids: Tensor, state: LayerState) -> list[list[Group]]:
        """The documents of every row in groups, read from the device once a forward."""
        if self._groups is None:
            sizes = state.gate.config.block_q, state.gate.config.block_k
            bounds = [document_bounds(ids, *sizes) for ids in segment_ids]
            self._groups = [similar_documents(row, sizes[0]) for row in bounds]
        return self._groups


class SampleMeter:
    """Counts the blocks of every sample by itself.

    Samples weigh the same, as they do in the losses, though packed ones have fewer causal blocks than whole ones.
    """

    def __init__(self) -> None:
        self._samples: dict[int, DensityMeter] = {}

    def add(self, sample: int, state: LayerState, blocks: BlockIndices) -> None:
        """Counts blocks of a sample in one layer, or those of a whole batch of samples without documents."""
        self._samples.setdefault(sample, DensityMeter()).add(state.layer, state.heads, blocks)

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that were counted."""
        return self._samples[0].layers if self._samples else []

    def mean(self) -> float:
        """Realised density over all samples, layers and heads."""
        return sum(meter.mean() for meter in self._samples.values()) / len(self._samples)


def similar_documents(bounds: list[tuple[int, int]], block_q: int) -> list[Group]:
    """Documents of one row, given by their first tokens and ends, in groups of similar length.

    Lists of one call are padded to its longest document, in rows and in width: for one document of 16k tokens beside
    128 of 128, 32 heads, density .1, they took 56 MiB a layer, and each alone .5. In a group numbers of query blocks
    differ by less than a factor of 2; padded lists then are less than 5 times what they must be, at densities of .01
    to .9 and up to 511 blocks.
    """
    groups: dict[int, Group] = {}
    for begin, end in bounds:
        groups.setdefault(num_query_blocks(0, end - begin, block_q).bit_length(), []).append((begin, end))
    return list(groups.values())


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, groups: list[Group], blocks: list[BlockIndices], logits: dict[str, Any]
) -> Tensor:
    """Attention of one row of packed documents, those of a group in one call."""
    if len(groups) == 1:
        return block_sparse_attention(q, k, v, blocks[0], cu_seqlens=_edges(groups[0]), **logits)
    documents = sorted(document for group in groups for document in group)
    lengths = [end - begin for begin, end in documents]
    # Not slices, each of which would have a gradient of the size of the row.
    parts = [dict(zip(documents, x.split(lengths, 2))) for x in (q, k, v)]
    out: dict[tuple[int, int], Tensor] = {}
    for group, lists in zip(groups, blocks):
        own = (torch.cat([part[document] for document in group], 2) for part in parts)
        edges = _edges(group)
        found = block_sparse_attention(*own, lists, cu_seqlens=edges, **logits)
        out |= zip(group, found.split(edges.diff().tolist(), 2))
    return torch.cat([out[document] for document in documents], 2)


def _edges(group: Group) -> Tensor:
    """``cu_seqlens`` of documents one after the other."""
    return torch.tensor([0, *accumulate(end - begin for begin, end in group)])


def _detached(logits: dict[str, Any]) -> dict[str, Any]:
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in logits.items()}
