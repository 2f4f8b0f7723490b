"""One decoded token of every sequence: its blocks chosen by a `DecodeSelector`, and attention to those alone.

It is what `seerattn.hf.attention` does with a prompt, for calls of one token. transformers makes no mask of ours for
them, and none at all where nothing is padded: what is real is read off the mask that the model's own attention would
take. The hook of a layer adds a call here only where something chooses, so decoding without a policy pays nothing.

Rows of a padded batch are chosen for and attended to one by one, where their keys lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from seerattn.hf.call import LayerCall, alike, logits_of, state_key
from seerattn.hf.capturing import CAPTURE
from seerattn.hf.dense_steps import dense_layers
from seerattn.hf.mask import CallMask, Unservable
from seerattn.hf.meters import density_meters
from seerattn.hf.state import NO_GATE_BLOCK, AttentionLayer, LayerState, Running, Tables, check_filled
from seerattn.ops.decode_attention import decode_attention
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_selector import DecodeSelector
from seerattn.selection.density_meter import DensityMeter
from seerattn.selection.selector import AttentionContext, Memory, RotaryTables

T = TypeVar("T")
_IMPLS = ("triton", "reference")


class StepRow(NamedTuple):
    """Sequences of one length in a step: a row of a padded batch, or all rows of another one.

    Attributes:
        row: its number; None for all.
        keys: slots of its keys, as a slice or, where they do not lie together, int64 ``[tokens]``.
        tokens: its keys, that of the new token included.
    """

    row: int | None
    keys: slice | Tensor
    tokens: int

    def of(self, x: Tensor) -> Tensor:
        """Its queries ``[B, H, 1, D]`` of those of the batch, or any other tensor of rows."""
        return x if self.row is None else x[self.row : self.row + 1]

    def keys_of(self, x: Tensor) -> Tensor:
        """Its keys or values ``[B, HKV, tokens, D]``; a view unless padding lies among them."""
        x = self.of(x)
        if self.tokens == x.shape[2]:
            return x
        return x[:, :, self.keys if isinstance(self.keys, slice) else self.keys.to(x.device)]


@dataclass(eq=False)
class Step:
    """What the layers of one decode step share.

    Attributes:
        running: what they run.
        rows: those that hold a token; a row of padding alone is none of them.
        tables: rotary tables of cached keys, by rotation, row and positions.
        shared: what else is made once for all of them, by what it is and what it depends on; selectors put theirs
            there, too.
        dense: the layers that "auto" decodes dense though something would choose; None until one has asked.
    """

    running: Running
    rows: list[StepRow]
    tables: dict[Any, Tables] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    dense: set[AttentionLayer] | None = None

    @classmethod
    def of(cls, seer: LayerCall, key: Tensor, mask: Tensor | None) -> Step:
        """That of a forward, made by its first layer.

        It hangs on the rotary tables of the forward, new in every one: so it ends with it, and threads have their own.

        Raises:
            Unservable: a mask that is not padding alone.
        """
        tables = seer.position_embeddings
        found = None if tables is None else getattr(tables[0], "_seer_step", None)
        if found is None:
            found = cls(seer.state.attachment.now(), _rows(key, mask))
            if tables is not None:
                tables[0]._seer_step = found
        return found

    def is_dense(self, state: LayerState, query: Tensor) -> bool:
        """Whether "auto" decodes a layer dense; the first one that asks decides for all."""
        if self.dense is None:
            counts = (query.shape[0] if row.row is None else 1 for row in self.rows)
            tokens = [row.tokens for row, count in zip(self.rows, counts) for _ in range(count)]
            self.dense = dense_layers(self.running, state.attachment.layers.values(), tokens, query.device)
        return state.found in self.dense

    def once(self, name: Any, make: Callable[[], T]) -> T:
        """What the first layer makes that asks for it."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def lengths(self, row: StepRow, q: Tensor) -> Tensor:
        """Numbers of keys of the sequences of a row, int32 ``[B]``, of their queries."""
        name = ("lengths", row.row, q.device)
        return self.once(name, lambda: torch.full((q.shape[0],), row.tokens, dtype=torch.int32, device=q.device))

    def rotary(self, seer: LayerCall, row: StepRow, device: torch.device) -> RotaryTables | None:
        """How a row's new token was rotated, for kernels; None if no kernel can undo it, or nobody can."""
        rotation, tables = seer.state.rotation, seer.position_embeddings
        if tables is None:
            return None
        name = ("rotary", row.row, device, rotation.function, rotation.width)
        return self.once(name, lambda: rotation.as_tables(*(table.to(device) for table in _own_tables(seer, row))))

    def unrotate(self, seer: LayerCall, row: StepRow, x: Tensor) -> Tensor:
        """Vectors of a row's new token before RoPE, fp32.

        Raises:
            Unservable: see `_own_tables`.
        """
        own, rotation = _own_tables(seer, row), seer.state.rotation
        name = ("undone", row.row, x.device, rotation.function, rotation.width)
        return self.once(name, lambda: rotation.undone(*(table.to(x.device) for table in own)))(x)


def is_untouched(state: LayerState, kwargs: dict[str, Any]) -> bool:
    """Whether an earlier layer of a step found that this one is decoded dense, and nobody counts that."""
    tables = kwargs.get("position_embeddings")
    step = getattr(tables[0], "_seer_step", None) if isinstance(tables, tuple) else None
    return bool(step and step.dense) and state.found in step.dense and not density_meters(state.attachment)


@torch.compiler.disable
def decode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CallMask | Tensor | None,
    seer: LayerCall,
    kwargs: dict[str, Any],
    tell: Callable[[str], None],
) -> Tensor | None:
    """Attention of one token over the blocks that are chosen for it.

    Args:
        module: the attention module.
        query: post-RoPE ``[B, H, 1, D]``.
        key: post-RoPE ``[B, HKV, S, D]``, a static cache in full.
        value: ``[B, HKV, S, D]``.
        mask: of the attention that ours replaced.
        seer: the layer.
        kwargs: what the architecture passes on.
        tell: told why "auto" runs a call dense that could not be followed.

    Returns:
        ``[B, 1, H, D]``, or None where the step is dense: nothing chooses, or "auto" knows that it would read all, or
        expects that to be faster.

    Raises:
        ValueError: a step that cannot be followed, unless "auto" may run it dense.
    """
    if isinstance(mask, CallMask) or CAPTURE.get() is not None:
        return None
    state, auto = seer.state, seer.state.attachment.now().impl == "auto"
    try:
        check_servable(seer, kwargs)
        step = Step.of(seer, key, mask)
        decoder = step.running.decoders.get(state.layer)
        if decoder is None or not step.rows:
            return None
        if step.is_dense(state, query):
            for row in step.rows:
                count_all(density_meters(state.attachment), step.running, state, row.tokens, query.device)
            return None
        logits = logits_of(query, kwargs)
        chosen = _choose(seer, decoder, step, query, key, logits)
    except Unservable as reason:
        if not auto:
            raise ValueError(f"{reason}; or set decode_policy=None to decode dense") from None
        tell(str(reason))
        return None
    for meter in density_meters(state.attachment):
        for row, blocks in zip(step.rows, chosen):
            meter.decode.add(state.layer, state.heads, blocks.counts, row.tokens, blocks.block_k)
    return _attend(step, query, key, value, chosen, logits)


def check_servable(seer: LayerCall, kwargs: dict[str, Any]) -> None:
    """Refuses a layer whose tokens cannot be decoded sparsely.

    Raises:
        Unservable: its keys cannot be followed, or attention drops out.
    """
    found = seer.state.found
    if found.not_cached is not None:
        raise Unservable(f"layer {found.layer} cannot be followed against a cache ({found.not_cached})")
    if found.rotation is not None and found.rotation.depends_on_length:
        raise Unservable(
            f"frequencies of layer {found.layer} must not depend on the length for sparse decoding, got "
            f"{type(found.rotation.embedding).__name__} whose do"
        )
    if kwargs.get("dropout"):
        raise Unservable(f"attention dropout must be 0, got {kwargs['dropout']}")


def _rows(key: Tensor, mask: Tensor | None) -> list[StepRow]:
    """The rows of a step by the mask of the replaced attention; the host waits once where there is one.

    Raises:
        Unservable: the mask tells keys apart in another way than as padding.
    """
    slots = key.shape[2]
    if mask is None:
        return [StepRow(None, slice(0, slots), slots)]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] < slots:
        raise Unservable(f"the mask of a decoded token must be [B, 1, 1, {slots}], got {list(mask.shape)}")
    mask = mask[:, 0, 0, :slots].expand(key.shape[0], -1).cpu()
    real = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((real | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise Unservable("the mask of a decoded token must hide keys or show them, got one that weighs them")
    counts = real.sum(1).tolist()
    if len(set(counts)) == 1 and bool(real[:, : counts[0]].all()):
        return [StepRow(None, slice(0, counts[0]), counts[0])]
    rows, found = [], [row.nonzero()[:, 0] for row in real]
    end = max((int(keys[-1]) for keys in found if len(keys)), default=0)
    for number, (keys, tokens) in enumerate(zip(found, counts)):
        # A row whose new token is hidden is one of padding.
        if tokens and int(keys[-1]) == end:
            first, last = int(keys[0]), end
            rows.append(StepRow(number, slice(first, last + 1) if last - first + 1 == tokens else keys, tokens))
    return rows


def _choose(
    seer: LayerCall, decoder: DecodeSelector, step: Step, query: Tensor, key: Tensor, logits: dict[str, Any]
) -> list[DecodeBlocks]:
    """Lists of every row of a step.

    Raises:
        Unservable: nobody can tell how the keys of earlier calls were rotated.
    """
    state, recall, chosen = seer.state, seer.recall, []
    if state.layer in step.running.gates:
        check_filled(step.running.gates[state.layer], state.layer)
    for row in step.rows:
        q, k = row.of(query), row.keys_of(key)

        def select(memory: Memory | None, row: StepRow = row, q: Tensor = q, k: Tensor = k) -> DecodeBlocks:
            return decoder.select_token(q, k, _context(seer, step, row, q.device, logits, memory))

        if recall is None:
            chosen.append(select(None))
            continue
        # Which slots of a row are its own may change where padding lies among them.
        untouched = recall.untouched and isinstance(row.keys, slice)
        chosen.append(recall.through(row.row, k, row.tokens - 1, untouched, select))
    if recall is not None:
        recall.end(key)
    return chosen


def _context(
    seer: LayerCall, step: Step, row: StepRow, device: torch.device, logits: dict[str, Any], memory: Memory | None
) -> AttentionContext:
    """What a selector may know of a step; tables of keys are made when it asks for them, most steps do not."""
    layer, rotation = seer.state.layer, seer.state.rotation
    facts = logits | {"memory": memory, "shared": step.shared}
    if rotation is None:
        none = RotaryTables()
        return AttentionContext(layer=layer, unrotate=lambda x, _: x.float(), rotary=none, token_rotary=none, **facts)

    def unrotate(x: Tensor, start: int) -> Tensor:
        if start == row.tokens - 1:
            return step.unrotate(seer, row, x)
        cos, sin = _tables(seer, step, row, start, start + x.shape[2])
        return rotation.unrotate(x, cos.to(x.device), sin.to(x.device))

    return AttentionContext(layer=layer, unrotate=unrotate, token_rotary=step.rotary(seer, row, device), **facts)


def _own_tables(seer: LayerCall, row: StepRow) -> Tables:
    """Rotary tables ``[1 or B, 1, R]`` of the new token, as the model made them.

    Raises:
        Unservable: they do not reach the layer.
    """
    return tuple(x if x.shape[0] == 1 else row.of(x) for x in seer.token_tables())


def _tables(seer: LayerCall, step: Step, row: StepRow, start: int, end: int) -> Tables:
    """Those of cached keys ``start .. end`` of a row, made again by the model's own module and held to the token's.

    Raises:
        Unservable: positions that do not count up by one to the token's.
    """
    rotation, own = seer.state.rotation, _own_tables(seer, row)
    name = (state_key(seer.state), row.row, start, end)
    if name in step.tables:
        return step.tables[name]
    places = torch.tensor([*range(start, end), row.tokens - 1])
    slots = torch.arange(row.keys.start, row.keys.stop) if isinstance(row.keys, slice) else row.keys
    for positions in seer.positions(row.row, row.tokens, slots):
        made = rotation.tables(positions[:, places].to(own[0].device), own[0])
        if all(alike(m[:, -1:], t) for m, t in zip(made, own)):
            step.tables[name] = tuple(x[:, :-1] for x in made)
            return step.tables[name]
    raise Unservable(
        "position_ids must count up by one to the decoded token, got resetting or skipping ones, as packed documents "
        "and images have"
    )


def _attend(
    step: Step, query: Tensor, key: Tensor, value: Tensor, chosen: list[DecodeBlocks], logits: dict[str, Any]
) -> Tensor:
    """Attention ``[B, 1, H, D]`` over the lists of all rows; zeros for a row of padding."""
    out = None
    for row, blocks in zip(step.rows, chosen):
        q = row.of(query)
        lengths = step.lengths(row, q)
        found = attend_to(q, row.keys_of(key), row.keys_of(value), blocks, step.running, logits, lengths)
        if row.row is None:
            return found
        if out is None:
            out = found.new_zeros(query.shape[0], *found.shape[1:])
        out[row.row] = found[0]
    return out


def attend_to(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: DecodeBlocks,
    running: Running,
    logits: dict[str, Any],
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention ``[B, 1, H, D]`` of the last tokens ``[B, H, 1, D]`` of sequences of one length over their lists.

    ``lengths`` are those of ``k``, int32 ``[B]``, where they are there already.
    """
    if lengths is None:
        lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    call = {"lengths": lengths, "blocks": blocks, "impl": decode_impl(running), **logits}
    return decode_attention(q[:, :, 0], k, v, **call)[:, None]


def decode_impl(running: Running) -> str:
    """What `decode_attention` is told."""
    return running.op_impl if running.op_impl in _IMPLS else "auto"


def count_all(meters: Iterable[DensityMeter], running: Running, state: LayerState, tokens: int, device: Any) -> None:
    """Counts every block of a token that "auto" decodes dense because all would be read."""
    gate = running.gates.get(state.layer)
    size = NO_GATE_BLOCK if gate is None else gate.config.block_k
    full = torch.full((1, state.found.num_kv_heads), -(-tokens // size), device=device)
    for meter in meters:
        meter.decode.add(state.layer, state.heads, full, tokens, size)
