"""Losses of gates inside a forward pass: collected layer by layer, each layer's graph freed at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.pooling import Pooled


class GateLoss(Protocol):
    """The loss of one gate on one batch of unpadded sequences of equal length."""

    def __call__(
        self, gate: AttnGate, q: Pooled, k: Pooled, target: Tensor, segment_ids: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the gate with the target map.

        Args:
            gate: call it, so that wrappers such as FSDP see the call.
            q: queries of all ``H`` heads, un-rotated and pooled as the gate takes them.
            k: the same of the keys of all ``HKV`` heads.
            target: fp32 ``[B, H, Nq, Nk]``, rows sum to 1.
            segment_ids: int ``[B, S]``, documents of packed rows, or None.

        Returns:
            A scalar loss, averaged over whatever it counts, and scalars to log.
        """
        ...


class GateLosses:
    """Collects the losses of one training step. Not a dataclass: wrappers such as FSDP would pass on a copy of one.

    A layer's loss depends on that layer's gate alone, so its gradient is taken while the layer runs and its graph is
    freed: memory does not grow with the number of layers. `total` gives a scalar whose backward pass hands out the
    finished gradients; gradient accumulation, DDP and loss scaling see nothing unusual.

    Attributes:
        loss_fn: compares a gate with its target.
        segment_ids: int ``[B, S]``, documents of packed rows, if the caller named them.
    """

    def __init__(self, loss_fn: GateLoss, segment_ids: Tensor | None = None) -> None:
        self.loss_fn = loss_fn
        self.segment_ids = segment_ids
        self._rows: dict[int, list[tuple[int, Tensor, dict[str, Tensor]]]] = {}

    def add(self, layer: int, gate: AttnGate, q: Pooled, k: Pooled, target: Tensor, segment_ids: Tensor | None) -> None:
        """Adds the loss of one layer on one batch of unpadded sequences; several calls a layer are averaged."""
        parameters = [p for p in gate.parameters() if p.requires_grad]
        with torch.enable_grad():
            loss, metrics = self.loss_fn(gate, q, k, target, segment_ids)
            gradients = torch.autograd.grad(loss, parameters)
            value = _FinishedLoss.apply(loss.detach(), gradients, *parameters)
        metrics = {name: torch.as_tensor(v).detach() for name, v in metrics.items()}
        self._rows.setdefault(layer, []).append(
            (q.features.shape[0] * q.length, value, {"loss": loss.detach(), **metrics})
        )

    def total(self) -> Tensor:
        """Mean over layers of each layer's token-weighted loss.

        Raises:
            ValueError: no layer added a loss.
        """
        if not self._rows:
            raise ValueError("the forward must reach at least one layer with a gate, got none; attach gates first")
        with torch.enable_grad():
            layers = [_average(rows, [value for _, value, _ in rows]) for rows in self._rows.values()]
            return torch.stack([loss.to(layers[0].device) for loss in layers]).mean()

    def metrics(self) -> dict[int, dict[str, Tensor]]:
        """What `GateLoss` returned, averaged over the step, by layer; "loss" is always among it."""
        return {
            layer: {name: _average(rows, [r[2][name] for r in rows]) for name in rows[0][2]}
            for layer, rows in sorted(self._rows.items())
        }


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
