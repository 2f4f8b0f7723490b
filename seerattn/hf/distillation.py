"""Losses of gates inside a forward pass: collected layer by layer, each layer's graph freed at once."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.pooling import Pooled
from seerattn.gate_decode import single_queries
from seerattn.gate_selector import pooled_inputs, pooled_keys
from seerattn.hf.capturing import Capture
from seerattn.hf.mask import CallMask, document_numbers
from seerattn.ops.attention_map import attention_map
from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.map_form import MapForm

if TYPE_CHECKING:
    from seerattn.hf.call import LayerCall, Prefill

Phase = Literal["prefill", "decode", "both"]
# Rows of single tokens that a step learns from, of every sequence.
DECODE_ROWS = 256


class GateLoss(Protocol):
    """The loss of one gate on one batch of unpadded sequences of equal length."""

    def __call__(
        self,
        gate: AttnGate,
        q: Pooled,
        k: Pooled,
        target: Tensor,
        segment_ids: Tensor | None,
        **rows: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the gate with the target map.

        Args:
            gate: its weights are whole. Call its ``forward``: hooks such as those of FSDP are for calls whose graph
                lives until the backward pass.
            q: queries of all ``H`` heads, un-rotated and pooled as the gate takes them.
            k: the same of the keys of all ``HKV`` heads.
            target: fp32 ``[B, H, Nq, Nk]``, rows sum to 1.
            segment_ids: int ``[B, S]``, documents of packed rows, or None.
            rows: where ``target [B, H, R, Nk]`` does not hold all query blocks, ``rows``: int64 ``[R]``, ascending.
                Where it holds what single tokens give to blocks, ``tokens``: their positions, int64 ``[R]``, ascending;
                ``q`` is then un-rotated alone, in windows of one token.

        Returns:
            A scalar loss and scalars to log, each the mean over the sequences of what it is for one alone: a step is
            the same however its samples are spread over micro-batches and processes.
        """
        ...


class GateLosses(Capture):
    """Dense attention that collects the gates' losses of one forward; the base model is left alone.

    Not a dataclass: wrappers such as FSDP would pass on a copy of one.

    A layer's loss depends on that layer's gate alone, so its gradient is taken while the layer runs and its graph is
    freed: memory does not grow with the number of layers. `total` gives a scalar whose backward pass hands out the
    finished gradients; gradient accumulation, DDP and loss scaling see nothing unusual.

    Args:
        loss_fn: compares a gate with its target.
        segment_ids: int ``[B, S]``, documents of packed rows, if the caller names them.
        target_share: share of the query blocks whose targets are computed, in (0, 1]. Below 1 the output is that of
            the model's own dense attention.
        seed: draws those query blocks, together with ``step`` and the layer.
        step: number of the optimizer step.
        phase: what is learned: to choose for the query blocks of a prompt ("prefill"), for single tokens that are
            decoded ("decode"; the output is that of the model's own dense attention), or both, whose losses are added.
        decode_rows: single tokens of a sequence whose rows are learned, drawn anew for every step and layer.
    """

    def __init__(
        self,
        loss_fn: GateLoss,
        segment_ids: Tensor | None = None,
        *,
        target_share: float = 1.0,
        seed: int = 0,
        step: int = 0,
        phase: Phase = "prefill",
        decode_rows: int = DECODE_ROWS,
    ) -> None:
        self.loss_fn = loss_fn
        self.segment_ids = segment_ids
        self.target_share, self.seed, self.step = target_share, seed, step
        self.phase, self.decode_rows = phase, decode_rows
        # By phase and layer.
        self._rows: dict[str, dict[int, list[tuple[int, Tensor, dict[str, Tensor]]]]] = {"prefill": {}, "decode": {}}

    def attend(self, call: Prefill) -> Tensor | None:
        """See `Capture.attend`; layers without a gate are the model's own."""
        if call.state.gate is None:
            return None
        self.reached = True
        if call.kwargs.get("dropout"):
            raise ValueError(f"attention dropout must be 0 while gates learn, got {call.kwargs['dropout']}")
        return self.learn(call.query, call.key, call.value, call.described_mask, call.seer, call.logits)

    @torch.no_grad()
    def learn(
        self, query: Tensor, key: Tensor, value: Tensor, mask: CallMask, call: LayerCall, logits: dict[str, Any]
    ) -> Tensor | None:
        """Attention of one layer with a gate, see `attend`, and the loss of its gate on the way.

        Left-padded batches may be given where the whole target is learned.
        """
        check_whole(query, mask)
        if self.phase != "prefill":
            self.learn_tokens(query, key, mask, call, logits, self.documents(query, mask, call))
        if self.phase == "decode":
            return None
        if self.target_share < 1:
            check_unpadded(mask)
            self.learn_rows(query, key, call, logits, self.documents(query, mask, call))
            return None
        gate, layer, k_len, lengths = call.state.gate, call.state.layer, mask.k_len, mask.lengths
        segment_ids, config = self.documents(query, mask, call), gate.config
        out, (target,) = attention_map(
            query,
            key,
            value,
            form=config.target,
            block_q=config.block_q,
            block_k=config.block_k,
            **logits,
            lengths=None if lengths is None else torch.tensor(lengths, device=query.device),
            segment_ids=segment_ids,
        )
        for b, n in _sequences(mask):
            context = call.context(row=b, q_len=n, k_len=n, **logits)
            rows = slice(None) if b is None else slice(b, b + 1)
            real = (x[rows, :, k_len - n : k_len] for x in (query, key))
            num_q, num_k = num_query_blocks(0, n, config.block_q), num_query_blocks(0, n, config.block_k)
            segments = None if segment_ids is None else segment_ids[rows, k_len - n :]
            self.add(layer, gate, *pooled_inputs(gate, *real, context), target[rows, :, :num_q, :num_k], segments)
        return out

    def learn_tokens(
        self,
        query: Tensor,
        key: Tensor,
        mask: CallMask,
        call: LayerCall,
        logits: dict[str, Any],
        segment_ids: Tensor | None,
    ) -> None:
        """Adds the loss of one layer on rows of single tokens, q and k after RoPE.

        The target is what a token gives to each block before its own. A map of one row is that row whatever the power
        of its form, so what counts of the gate's target is how it takes keys. Padded sequences learn as they do alone.
        """
        gate, layer = call.state.gate, call.state.layer
        config, k_len = gate.config, mask.k_len
        form = MapForm(config.target_keys, math.inf)
        for b, n in _sequences(mask):
            rows = slice(None) if b is None else slice(b, b + 1)
            q, k = (x[rows, :, k_len - n :] for x in (query, key))
            segments = None if segment_ids is None else segment_ids[rows, k_len - n :]
            tokens = self.tokens(layer, n)
            wanted = {"form": form, "query_blocks": tokens, "block_q": 1, "block_k": config.block_k}
            target = attention_map(q, k, **wanted, **logits, segment_ids=segments).map
            context = call.context(row=b, q_len=n, k_len=n, **logits)
            pooled = single_queries(gate, q, context, 0, "auto"), pooled_keys(gate, k, context, 0)
            self.add(layer, gate, *pooled, target, segments, tokens=tokens)

    def tokens(self, layer: int, length: int) -> Tensor:
        """Positions ``[R]`` of the tokens of this step whose rows a layer learns from, ascending."""
        drawn = random.Random(f"tokens {self.seed} {self.step} {layer}")
        return torch.tensor(sorted(drawn.sample(range(length), min(self.decode_rows, length))))

    def rows(self, layer: int, num_q_blocks: int) -> Tensor:
        """The query blocks ``[R]`` of this step whose targets a layer learns from, ascending."""
        count = max(1, math.ceil(self.target_share * num_q_blocks))
        drawn = random.Random(f"rows {self.seed} {self.step} {layer}").sample(range(num_q_blocks), count)
        return torch.tensor(sorted(drawn))

    def learn_rows(
        self, q: Tensor, k: Tensor, call: LayerCall, logits: dict[str, Any], segment_ids: Tensor | None
    ) -> None:
        """Adds the loss of one layer on some rows of the target of whole sequences, q and k after RoPE."""
        gate, layer, tokens = call.state.gate, call.state.layer, q.shape[2]
        config = gate.config
        rows = self.rows(layer, num_query_blocks(0, tokens, config.block_q))
        wanted = {"form": config.target, "query_blocks": rows, "block_q": config.block_q, "block_k": config.block_k}
        target = attention_map(q, k, **wanted, **logits, segment_ids=segment_ids).map
        context = call.context(row=None, q_len=tokens, k_len=tokens, **logits)
        self.add(layer, gate, *pooled_inputs(gate, q, k, context), target, segment_ids, rows=rows)

    def documents(self, query: Tensor, mask: CallMask, call: LayerCall) -> Tensor | None:
        """Document numbers ``[B, S]`` of packed rows, None where every row is one document."""
        if self.segment_ids is not None or mask.is_causal:
            return self.segment_ids
        documents = document_numbers(call.position_ids, query.shape[0])
        if not bool(documents.diff(dim=1).any()):
            raise ValueError(
                "a training batch must be causal text, alone or packed, got a pattern of the model's own over it, such "
                "as that of images; train on text"
            )
        return documents

    def add(
        self,
        layer: int,
        gate: AttnGate,
        q: Pooled,
        k: Pooled,
        target: Tensor,
        segment_ids: Tensor | None,
        **rows: Tensor,
    ) -> None:
        """Adds the loss of one layer on one batch of unpadded sequences.

        Several calls a layer, one for each row of a padded batch, are averaged with their tokens as weights.
        """
        with gathered(gate):
            parameters = [p for p in gate.parameters() if p.requires_grad]
            # The gate's graph ends here. Hooks of gradient checkpointing must not see it: they would run the layer
            # again.
            with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
                loss, metrics = self.loss_fn(gate, q, k, target, segment_ids, **rows)
                gradients = torch.autograd.grad(loss, parameters)
                value = _FinishedLoss.apply(loss.detach(), gradients, *parameters)
        metrics = {name: torch.as_tensor(v).detach() for name, v in metrics.items()}
        self._rows["decode" if "tokens" in rows else "prefill"].setdefault(layer, []).append(
            (q.features.shape[0] * q.length, value, {"loss": loss.detach(), **metrics})
        )

    def total(self) -> Tensor:
        """Mean over layers of each layer's token-weighted loss, of both phases the sum of theirs.

        Raises:
            ValueError: no layer added a loss.
        """
        layers = dict.fromkeys(layer for found in self._rows.values() for layer in found)
        if not layers:
            raise ValueError("the forward must reach at least one layer with a gate, got none; attach gates first")
        with torch.enable_grad():
            losses = [sum(map(_loss_of, filter(None, (x.get(i) for x in self._rows.values())))) for i in layers]
            return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def metrics(self) -> dict[int, dict[str, Tensor]]:
        """What `GateLoss` returned, averaged over the step, by layer; "loss" is always among it.

        Padded rows that are too short for a metric have no part in it. Of both phases "loss" is the sum of theirs, and
        "decode_loss" tells the one.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for phase, layers in self._rows.items():
            for layer, rows in layers.items():
                names = dict.fromkeys(name for *_, metrics in rows for name in metrics)
                having = {name: [row for row in rows if name in row[2]] for name in names}
                means = {name: _average(some, [row[2][name] for row in some]) for name, some in having.items()}
                if layer in found:
                    means |= {f"{phase}_loss": means["loss"], "loss": found[layer]["loss"] + means["loss"]}
                found[layer] = found.get(layer, {}) | means
        return dict(sorted(found.items()))


def _sequences(mask: CallMask) -> list[tuple[int | None, int]]:
    """Rows of a batch with their numbers of tokens, all together, as None, where none is padded."""
    return [(None, mask.k_len)] if mask.lengths is None else list(enumerate(mask.lengths))


def check_whole(query: Tensor, mask: CallMask) -> None:
    """Refuses batches to train gates on that are not whole causal sequences."""
    if query.shape[2] != mask.k_len or mask.has_overlay:
        raise ValueError(
            "a training batch must be whole causal sequences without a cache, "
            f"got {query.shape[2]} tokens against {mask.k_len}"
        )


def check_unpadded(mask: CallMask) -> None:
    """Refuses padded batches where only some rows of a target are computed, which are those of whole sequences."""
    if mask.lengths is not None:
        raise ValueError(
            f"a batch that learns some query blocks must not be padded, got rows of {mask.lengths}; pack documents"
        )


@contextmanager
def gathered(gate: AttnGate) -> Iterator[None]:
    """Lets a gate that FSDP2 shards by itself hold whole weights; its gradients still reach FSDP2."""
    sharded = isinstance(gate, FSDPModule)
    if sharded:
        gate.unshard()
    yield
    if sharded:
        gate.reshard()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _loss_of(rows: list[tuple[int, Tensor, dict]]) -> Tensor:
    return _average(rows, [value for _, value, _ in rows])


def _average(rows: list[tuple[int, Tensor, dict]], values: list[Tensor]) -> Tensor:
    tokens = sum(n for n, *_ in rows)
    return sum(value * (n / tokens) for value, (n, *_) in zip(values, rows))


class _FinishedLoss(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return (None, None, *(grad * g for g in ctx.gradients))
