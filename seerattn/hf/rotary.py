"""Undoing a model's rotary embedding, with the model's own function and tables.

A rotation by (cos, sin) is undone by the same function with (cos / n, -sin / n), n = cos^2 + sin^2. The division also
takes back what YaRN and LongRoPE put on the tables as a scale, and the rounding of bf16 tables (without it the error
of the un-rotated vector is 4e-3 relative in bf16, with it that of bf16 itself). It works on cached keys, whatever made
them: LoRA, quantised or fused projections, norms.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seerattn.selection.selector import RotaryTables


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one attention layer rotates its queries and keys.

    Attributes:
        function: the modeling file's ``apply_rotary_pos_emb``, over ``(q, k, cos, sin)`` or ``(x, cos, sin)``.
        width: leading channels of a head that are given to the function; the others are not rotated.
        embedding: the module of the decoder that makes the tables.
        arguments: what the decoder passes to it beside ``(x, position_ids)``, such as the layer type.
    """

    function: Callable
    width: int
    embedding: nn.Module
    arguments: dict[str, Any] = field(default_factory=dict)

    def tables(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The (cos, sin) that the model itself makes for ``positions [1, n]``, in the dtype of ``like``."""
        return self.embedding(like, positions.to(like.device), **self.arguments)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies the model's function to ``x [B, h, n, D]`` with tables ``[1 or B, n, R]``."""
        turned, rest = x[..., : self.width], x[..., self.width :]
        if list(inspect.signature(self.function).parameters)[1] == "cos":
            turned = self.function(turned, cos, sin)
        else:
            turned = self.function(turned, turned[:, :0], cos, sin)[0]
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def as_tables(self, cos: Tensor, sin: Tensor) -> RotaryTables | None:
        """What `rotate` does with these tables, for kernels that undo it; None if it fits none of the known forms.

        The form is found by trying each on random vectors, once.
        """
        if not hasattr(self, "_form"):
            object.__setattr__(self, "_form", self._find_form(cos[:1, -8:].float(), sin[:1, -8:].float()))
        return None if self._form is None else RotaryTables(cos, sin, **self._form)

    def _find_form(self, cos: Tensor, sin: Tensor) -> dict[str, Any] | None:
        columns = cos.shape[-1]
        x = torch.randn(1, 1, cos.shape[1], self.width, generator=torch.Generator().manual_seed(0)).to(cos.device)
        turned = self.rotate(x, cos, sin)
        for width, step in ((columns, 1), (columns, 2), (2 * columns, 1)):
            for interleaved in (False, True):
                form = {"width": width, "interleaved": interleaved, "column_step": step}
                if width <= self.width and torch.allclose(_turn(x, cos, sin, **form), turned, atol=1e-5):
                    return form
        return None

    def unrotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of `rotate`, fp32."""
        cos, sin = cos.float(), sin.float()
        norm = cos.square() + sin.square()
        return self.rotate(x.float(), cos / norm, -sin / norm)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, width: int, interleaved: bool, column_step: int) -> Tensor:
    """Rotates ``x [B, h, n, D]`` in the form that `RotaryTables` describes."""
    pairs = width // 2
    cos, sin = (t[:, None, :, : pairs * column_step : column_step] for t in (cos, sin))
    first = slice(0, width, 2) if interleaved else slice(0, pairs)
    second = slice(1, width, 2) if interleaved else slice(pairs, width)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def gate_frequencies(rotation: Rotation | None, *, gate_dim: int) -> Tensor:
    """The layer's rotation frequencies at the width of a gate, fp32 ``[gate_dim / 2]``.

    They come from the model's own embedding class, built for heads of ``gate_dim`` channels, so theta and every kind
    of scaling are the model's. Where the model rotates only a part of its channels, so does the gate (the missing
    frequencies are 0), and the gate of a layer without RoPE does not rotate at all.

    Raises:
        ValueError: the model's embedding class cannot be built at that width.
    """
    if rotation is None:
        return torch.zeros(gate_dim // 2)
    config = copy.deepcopy(rotation.embedding.config)
    config.head_dim = gate_dim
    with torch.device("cpu"):
        embedding = type(rotation.embedding)(config)
    layer_type = next((v for v in rotation.arguments.values() if isinstance(v, str)), None)
    frequencies = getattr(embedding, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq").float()
    missing = gate_dim // 2 - len(frequencies)
    if missing < 0:
        raise ValueError(
            f"gate_dim must be the head dim of the model, got {gate_dim}: {type(embedding).__name__} has a fixed width"
        )
    return F.pad(frequencies, (0, missing))
