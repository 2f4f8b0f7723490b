"""Undoing a model's rotary embedding, with the model's own function and tables.

A rotation by (cos, sin) is undone by the same function with (cos / n, -sin / n), n = cos^2 + sin^2. The division also
takes back what YaRN and LongRoPE put on the tables as a scale, and the rounding of bf16 tables (without it the error
of the un-rotated vector is 4e-3 relative in bf16, with it that of bf16 itself). It works on cached keys, whatever made
them: LoRA, quantised or fused projections, norms.

Dynamic NTK and LongRoPE change their frequencies with the length of a call and keep what they changed to. What is asked
here is asked of copies, so that the model's own forward finds its state as it left it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seerattn.gate.rope import Pairing, turn
from seerattn.selection.selector import RotaryTables

# What a layer keeps, most of it frequencies by the length of a call.
KEPT_RESULTS = 16


class Form(NamedTuple):
    """What a rotary function does with its tables: the first three as in `RotaryTables`.

    Attributes:
        width: leading channels of a head that are rotated.
        interleaved: whether neighbours are rotated together, otherwise halves.
        column_step: columns of the tables from pair to pair.
        backwards: whether it turns by the negative of the angle.
    """

    width: int
    interleaved: bool
    column_step: int
    backwards: bool


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
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies depend on the length of a call, its past included."""
        return self._rope_type == "longrope" or "dynamic" in self._rope_type

    @property
    def original_length(self) -> int:
        """Tokens up to which a call has the frequencies of short ones, where they depend on its length."""
        if self._rope_type != "longrope":
            return self.embedding.original_max_seq_len
        parameters = self.embedding.config.rope_parameters
        parameters = parameters if self._layer_type is None else parameters[self._layer_type]
        return parameters["original_max_position_embeddings"]

    @property
    def _layer_type(self) -> str | None:
        return next((v for v in self.arguments.values() if isinstance(v, str)), None)

    @property
    def _rope_type(self) -> str:
        kind = getattr(self.embedding, "rope_type", "default")
        return kind[self._layer_type] if isinstance(kind, dict) else kind

    def tables(self, positions: Tensor, like: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """The (cos, sin) that the model itself makes for ``positions [1, n]``, in the dtype of ``like``.

        Args:
            positions: where.
            like: gives dtype and device.
            tokens: length of the call, its past included, of which these may be a part; by default they are its end.
        """
        home = self._held(self.embedding).device
        if home != like.device and home.type != "meta":
            # A sharded model makes its tables on one device.
            return tuple(x.to(like.device) for x in self.tables(positions, like.to(home), tokens))
        positions = positions.to(like.device)
        if not self.depends_on_length:
            return _ask(self.embedding, like, positions, self.arguments)
        if tokens is not None:
            positions = F.pad(positions, (0, 1), value=tokens - 1)
        cos, sin = _ask(_forward_of(_aside(self.embedding)), like, positions, self.arguments)
        end = cos.shape[1] if tokens is None else -1
        return cos[:, :end], sin[:, :end]

    def frequencies(self, head_dim: int, tokens: int | None = None) -> Tensor:
        """Frequencies that the model's embedding class has for heads of that width, fp32 on the CPU, one a pair.

        At the width of the model they are those that its module holds, with the rounding of its dtype. They are
        negative where the model turns by the negative of the angle.

        Args:
            head_dim: the width.
            tokens: length of the call, its past included; only looked at where frequencies depend on it.

        Raises:
            ValueError: the class cannot be built at that width.
        """
        reached = self._reached(tokens) if self.depends_on_length else None
        found = self._once((head_dim, reached), lambda: self._find_frequencies(head_dim, reached))
        form = None if self.function is unproven else self.form()
        return -found if form is not None and form.backwards else found

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        found = self._kept.get(key)
        if found is None:
            found = (find(),)
            if len(self._kept) > KEPT_RESULTS:
                self._kept.clear()
            self._kept[key] = found
        return found[0]

    def _find_frequencies(self, head_dim: int, tokens: int | None) -> Tensor:
        held = self._held(self.embedding)
        try:
            built = self._built(head_dim, tokens)
        except (RuntimeError, ArithmeticError) as error:
            name = type(self.embedding).__name__
            raise ValueError(
                f"gate_dim must be the head dim of the model, got {head_dim}, at which {name} cannot be built ({error})"
            ) from None
        if held.is_meta or not torch.equal(built, self._built(None, tokens)):
            return built
        return built.to(held.dtype).float() if self.depends_on_length else held.float().cpu()

    def _held(self, embedding: nn.Module) -> Tensor:
        return getattr(embedding, "inv_freq" if self._layer_type is None else f"{self._layer_type}_inv_freq")

    def _built(self, head_dim: int | None, tokens: int | None) -> Tensor:
        embedding = self._fresh(head_dim)
        if tokens is not None:
            _ask(
                _forward_of(embedding),
                torch.empty(0, dtype=torch.float32),
                torch.tensor([[tokens - 1]]),
                self.arguments,
            )
        return self._held(embedding).float()

    def _fresh(self, head_dim: int | None) -> nn.Module:
        config = copy.deepcopy(self.embedding.config)
        if head_dim is not None:
            config.head_dim = head_dim
        with torch.device("cpu"):
            return type(self.embedding)(config)

    def _reached(self, tokens: int | None) -> int | None:
        """A length whose frequencies a call of ``tokens`` has."""
        if tokens is None:
            return None
        if self._rope_type == "longrope":
            return self.original_length + (tokens > self.original_length)
        # With dynamic NTK, those of a longer call hold on until one below the original length.
        own = f"{self._layer_type}_max_seq_len_cached"
        longest = int(getattr(self.embedding, own, self.embedding.max_seq_len_cached))
        return tokens if tokens < self.original_length else max(tokens, longest)

    def _first_tables(self) -> tuple[Tensor, Tensor]:
        """Tables of some positions, fp32 on the CPU, wherever the model is."""
        forward, like = _forward_of(self._fresh(None)), torch.empty(0, dtype=torch.float32)
        return _ask(forward, like, torch.arange(1, 9)[None], self.arguments)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies the model's function to ``x [B, h, n, D]`` with tables ``[1 or B, n, R]``."""
        turned, rest = (x, None) if self.width == x.shape[-1] else x.split((self.width, x.shape[-1] - self.width), -1)
        turned = _turned_by(self.function, turned, cos, sin)
        return turned if rest is None else torch.cat((turned, rest), -1)

    def as_tables(self, cos: Tensor, sin: Tensor) -> RotaryTables | None:
        """What `rotate` does with these tables, for kernels that undo it; None if its form is not known."""
        form = self.form((cos, sin))
        if form is None:
            return None
        return RotaryTables(cos, -sin if form.backwards else sin, form.width, form.interleaved, form.column_step)

    def form(self, tables: tuple[Tensor, Tensor] | None = None) -> Form | None:
        """What `rotate` does, found the first time with some tables; None if it fits none of the known forms."""
        return self._once("form", lambda: self._find_form(*(tables or self._first_tables())))

    def _find_form(self, cos: Tensor, sin: Tensor) -> Form | None:
        cos, sin = cos[:1, -8:].float(), sin[:1, -8:].float()
        columns = cos.shape[-1]
        x = torch.randn(1, 1, cos.shape[1], self.width, generator=torch.Generator().manual_seed(0)).to(cos.device)
        turned = self.rotate(x, cos, sin)
        sizes = ((columns, 1), (columns, 2), (2 * columns, 1))
        for (width, step), interleaved, backwards in product(sizes, (False, True), (False, True)):
            form = Form(width, interleaved, step, backwards)
            if width <= self.width and torch.allclose(_turn(x, cos, sin, form), turned, atol=1e-5):
                return form
        return None

    def unrotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of `rotate`, fp32."""
        return self.undone(cos, sin)(x)

    def undone(self, cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
        """`unrotate` by these tables, which are looked at once, for all layers that rotate alike."""
        cos, sin = cos.float(), sin.float()
        norm = cos.square() + sin.square()
        cos, sin = cos / norm, -sin / norm
        if cos.shape[-1] != self.width or not _turns_halves(self.function, self.width):
            return lambda x: self.rotate(x.float(), cos, sin)
        factors, pairing = _factors_of_halves(cos, sin), Pairing(self.width)

        def undo(x: Tensor) -> Tensor:
            x = x.float()
            if self.width == x.shape[-1]:
                return turn(x, factors, pairing)
            turned, rest = x.split((self.width, x.shape[-1] - self.width), -1)
            return torch.cat((turn(turned, factors, pairing), rest), -1)

        return undo


def _turned_by(function: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, cos, sin) if _takes_one(function) else function(x, x[:, :0], cos, sin)[0]


@functools.lru_cache(maxsize=64)
def _turns_halves(function: Callable, width: int) -> bool:
    """Whether a rotary function is `turn` of heads in halves bit for bit, which takes a third of the calls of torch."""
    generator = torch.Generator().manual_seed(0)
    x, angle = (torch.randn(1, 2, 8, width // n, generator=generator) for n in (1, 2))
    cos, sin = (torch.cat((table, table), -1)[:, 0] for table in (angle.cos(), angle.sin()))
    found = _turned_by(function, x, cos, sin)
    return torch.equal(found, turn(x, _factors_of_halves(cos, sin), Pairing(width)))


def _factors_of_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables ``[1 or B, n, R]`` as `turn` takes them."""
    first, second = sin.chunk(2, dim=-1)
    return cos[:, None], torch.cat((-first, second), dim=-1)[:, None]


@functools.lru_cache(maxsize=64)  # reading a signature takes 30 us, and every decoded token asks in every layer
def _takes_one(function: Callable) -> bool:
    """Whether a rotary function is over ``(x, cos, sin)``, not ``(q, k, cos, sin)``."""
    return list(inspect.signature(function).parameters)[1] == "cos"


def token_queries(rotation: Rotation | None, q: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, RotaryTables]:
    """Queries ``[B, H, D]`` of single tokens for a kernel that undoes their rotation; un-rotated ones if none could.

    Args:
        rotation: of the layer, None without RoPE.
        q: post-RoPE ``[B, H, 1, D]``.
        tables: (cos, sin) of the tokens, ``[1 or B, 1, R]``; not looked at without RoPE.
    """
    known = RotaryTables() if rotation is None else rotation.as_tables(*tables)
    if known is None:
        q, known = rotation.unrotate(q, *tables), RotaryTables()
    return q[:, :, 0], known


def unproven(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Stands for the function of a layer on the meta device, of which only shapes are known."""
    raise ValueError(
        "gates and selectors must be attached to a model with weights, which prove how it rotates, got one that was on "
        "the meta device; attach to the loaded model"
    )


def _aside(embedding: nn.Module) -> nn.Module:
    """A copy with buffers of its own, which the model's module does not hear of."""
    twin = copy.copy(embedding)
    twin._buffers = {name: None if x is None else x.clone() for name, x in embedding._buffers.items()}
    return twin


def _forward_of(embedding: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The class's own forward: hooks on a copy could lead back to the original."""
    return partial(type(embedding).forward, embedding)


@torch.no_grad()
def _ask(
    make: Callable[..., tuple[Tensor, Tensor]], like: Tensor, positions: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    try:
        return make(like, positions, **arguments)
    except IndexError:  # Vision-language models may take a position for each of three axes, which a text does not have.
        return make(like, positions.expand(3, *positions.shape), **arguments)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, form: Form) -> Tensor:
    """Rotates ``x [B, h, n, D]`` in a form."""
    width, interleaved, column_step, backwards = form
    pairs, sin = width // 2, -sin if backwards else sin
    cos, sin = (t[:, None, :, : pairs * column_step : column_step] for t in (cos, sin))
    first = slice(0, width, 2) if interleaved else slice(0, pairs)
    second = slice(1, width, 2) if interleaved else slice(pairs, width)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


class GateRotation(NamedTuple):
    """How the gate of a layer rotates: keyword arguments of `AttnGate`.

    Attributes:
        inv_freq: fp32 ``[DG / 2]``, a frequency for every pair of channels.
        pairing: the pairs; None are halves, which serve where nothing rotates.
    """

    inv_freq: Tensor
    pairing: Pairing | None


def gate_rotation(rotation: Rotation | None, *, gate_dim: int) -> GateRotation:
    """The layer's own rotation at the width of a gate: its frequencies, and which channels it rotates together.

    A gate of a layer without RoPE does not rotate. A layer on the meta device shows nothing of its pairs: its gate is a
    plan, with halves.

    Raises:
        ValueError: the model pairs channels in a way that gates do not know, or has no frequencies at that width.
    """
    frequencies, count = _padded(rotation, gate_dim)
    if rotation is None or rotation.function is unproven:
        return GateRotation(frequencies, None)
    form = rotation.form()
    if form is None:
        raise ValueError(
            "rope of a gate must rotate the channel pairs of the model, got ones of no known form from "
            f"{rotation.function.__module__}; use AttnGateConfig(rope=False)"
        )
    return GateRotation(frequencies, Pairing(2 * count, form.interleaved) if count else None)


def gate_frequencies(rotation: Rotation | None, *, gate_dim: int, tokens: int | None = None) -> Tensor:
    """The layer's rotation frequencies at the width of a gate, fp32 ``[gate_dim / 2]``.

    They come from the model's own embedding class, built for heads of ``gate_dim`` channels, so theta and every kind
    of scaling are the model's; where that is the width of its heads they are the very ones that it holds. Where the
    model rotates only a part of its channels, so does the gate (the missing frequencies are 0), and the gate of a layer
    without RoPE does not rotate at all.

    Args:
        rotation: of the layer.
        gate_dim: ``DG``.
        tokens: length of the call, its past included, for a model whose frequencies depend on it; by default those of
            short calls.

    Raises:
        ValueError: the model's embedding class cannot be built at that width.
    """
    return _padded(rotation, gate_dim, tokens)[0]


def _padded(rotation: Rotation | None, gate_dim: int, tokens: int | None = None) -> tuple[Tensor, int]:
    """Frequencies of all pairs of a gate, and how many of them are the model's."""
    if rotation is None:
        return torch.zeros(gate_dim // 2), 0
    frequencies = rotation.frequencies(gate_dim, tokens)
    missing = gate_dim // 2 - len(frequencies)
    if missing < 0:
        name = type(rotation.embedding).__name__
        raise ValueError(f"gate_dim must be the head dim of the model, got {gate_dim}: {name} has a fixed width")
    return F.pad(frequencies, (0, missing)), len(frequencies)
