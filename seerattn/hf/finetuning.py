"""Sparse attention with gradients, for training a model and its gates together (arXiv 2410.13276, section 4.2)."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seerattn.gate_selector import GateSelector, pooled_inputs
from seerattn.hf.distillation import GateLoss, GateLosses, check_whole, gathered
from seerattn.hf.mask import CallMask, document_bounds
from seerattn.hf.meters import DensityMeter
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.pooled_attention import pooled_targets
from seerattn.selection.block_indices import BlockIndices, num_query_blocks
from seerattn.selection.policies import TopK

if TYPE_CHECKING:
    from seerattn.hf.attention import LayerCall


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
        blocks: by layer the lists of the batch, or those of each row of packed documents; empty where attention is
            dense.
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
        super().__init__(loss_fn, segment_ids)
        self.policy = TopK(density=density)
        self.target_share, self.seed, self.step = target_share, seed, step
        self.meter = DensityMeter()
        self.blocks: dict[int, list[BlockIndices]] = {}
        self._bounds: list[list[tuple[int, int]]] | None = None

    def rows(self, layer: int, num_q_blocks: int) -> Tensor:
        """The query blocks ``[R]`` of this step whose targets a layer learns from, ascending."""
        count = max(1, math.ceil(self.target_share * num_q_blocks))
        drawn = random.Random(f"rows {self.seed} {self.step} {layer}").sample(range(num_q_blocks), count)
        return torch.tensor(sorted(drawn))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: CallMask, call: LayerCall, logits: dict[str, Any]
    ) -> Tensor | None:
        """See `GateTraining.attend`; differentiable in all but the choice of the blocks."""
        check_whole(query, mask)
        if mask.lengths is not None:
            raise ValueError(
                f"a batch for sparse training must not be padded, got rows of {mask.lengths}; pack documents instead"
            )
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
                    self._learn(*inputs)
        blocks = self.blocks[state.layer]
        if not blocks:
            return None
        logits = logits | {"impl": "auto" if state.impl == "sparse" else state.impl}
        if segment_ids is None:
            return block_sparse_attention(query, key, value, blocks[0], **logits)
        rows = []
        for b, bounds in enumerate(self._documents(segment_ids, state.gate.config)):
            edges = torch.tensor([0, *(end for _, end in bounds)])
            inputs = (x[b : b + 1] for x in (query, key, value))
            rows.append(block_sparse_attention(*inputs, blocks[b], cu_seqlens=edges, **logits))
        return torch.cat(rows)

    def _choose(
        self, q: Tensor, k: Tensor, call: LayerCall, logits: dict[str, Any], segment_ids: Tensor | None
    ) -> list[BlockIndices]:
        """Blocks of the batch, or of each row with packed documents; none where attention is dense."""
        if self.policy.density == 1:
            return []
        state, tokens = call.state, q.shape[2]
        selector = GateSelector(state.gate, self.policy)
        if segment_ids is None:
            chosen = [selector.select(q, k, call.context(row=None, q_len=tokens, k_len=tokens, **logits))]
        else:
            chosen = []
            for b, bounds in enumerate(self._documents(segment_ids, state.gate.config)):
                parts = []
                for begin, end in bounds:
                    context = call.part(b, begin, end).context(row=None, q_len=end - begin, k_len=end - begin, **logits)
                    own = (x[b : b + 1, :, begin:end] for x in (q, k))
                    parts.append(selector.select(*own, context))
                chosen.append(BlockIndices.stack(parts))
        for blocks in chosen:
            self.meter.add(state.layer, state.heads, blocks)
        return chosen

    def _learn(self, q: Tensor, k: Tensor, call: LayerCall, logits: dict[str, Any], segment_ids: Tensor | None) -> None:
        """The gate's loss on some of the target's rows.

        The gate scores those rows a second time: with a graph all rows would cost more than sparse attention itself,
        and without one `GateSelector` scores them in a fused kernel.
        """
        gate, layer, tokens = call.state.gate, call.state.layer, q.shape[2]
        config = gate.config
        rows = self.rows(layer, num_query_blocks(0, tokens, config.block_q))
        target = pooled_targets(
            q, k, rows, block_q=config.block_q, block_k=config.block_k, **logits, segment_ids=segment_ids
        )
        context = call.context(row=None, q_len=tokens, k_len=tokens, **logits)
        self.add(layer, gate, *pooled_inputs(gate, q, k, context), target, segment_ids, rows=rows)

    def _documents(self, segment_ids: Tensor, config: Any) -> list[list[tuple[int, int]]]:
        """First tokens and ends of the documents of every row, read from the device once a forward."""
        if self._bounds is None:
            self._bounds = [document_bounds(ids, config.block_q, config.block_k) for ids in segment_ids]
        return self._bounds


def _detached(logits: dict[str, Any]) -> dict[str, Any]:
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in logits.items()}
