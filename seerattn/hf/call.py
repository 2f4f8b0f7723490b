"""One call of an attention layer: what of it reaches selectors and gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from seerattn.hf.capturing import CAPTURE, Capture
from seerattn.hf.gate_cache import Recall
from seerattn.hf.mask import CallMask, Unservable
from seerattn.hf.rotary import gate_frequencies
from seerattn.hf.state import Kind, LayerState, Running, Tables, check_filled
from seerattn.ops.crossover import LayerShape
from seerattn.selection.selector import AttentionContext, RotaryTables, Selector

# Tables of neighbouring positions differ by up to 1 in their fastest channel; bf16 rounds theirs by 4e-3.
_SAME_TABLES = 1e-2


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that was attached to: its state and what only its module saw.

    Attributes:
        state: of the layer.
        position_embeddings: the model's rotary tables (cos, sin) of the call.
        position_ids: positions of the call's tokens, if the architecture passes them on.
        tokens: length of the call that this one is a part of, its past included, where frequencies depend on it.
        recall: what is known of the sequences whose keys are in the cache of the call; None without a cache.
    """

    state: LayerState
    position_embeddings: Tables | None
    position_ids: Tensor | None
    tokens: int | None = None
    recall: Recall | None = None

    def on(self, device: torch.device) -> LayerCall:
        """The same call with its tables where the layer runs: a sharded model makes them on its first device."""
        tables = self.position_embeddings
        if tables is None or tables[0].device == device:
            return self
        return replace(self, position_embeddings=tuple(x.to(device) for x in tables))

    def token_tables(self) -> Tables:
        """Rotary tables of a decoded token.

        Raises:
            Unservable: they do not reach the layer.
        """
        if self.position_embeddings is None:
            raise Unservable(
                f"position_embeddings must reach the attention of layer {self.state.layer}, got None; call the whole "
                "model, not its layers"
            )
        return self.position_embeddings

    def part(self, row: int, begin: int, end: int) -> LayerCall:
        """The call that would hold tokens ``begin .. end`` of one batch row alone."""
        tables = self.position_embeddings
        if tables is not None:
            tables = tuple((x[row : row + 1] if x.shape[0] > 1 else x)[:, begin:end] for x in tables)
        return replace(self, position_embeddings=tables, position_ids=None, tokens=self._length(None))

    def context(
        self,
        *,
        row: int | None,
        q_len: int,
        k_len: int,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        mask: CallMask | None = None,
        slots: Tensor | None = None,
    ) -> AttentionContext:
        """What a selector may know of the call.

        Args:
            row: batch row, None for all rows of an unpadded call.
            q_len: queries of the row.
            k_len: keys of the row; they end with the call's last, unless ``slots`` says where they are.
            scale: factor of q.k.
            softcap: of the logits.
            sinks: logits of keys without values.
            mask: of the forward, which keeps what its layers share; needed against a cache.
            slots: int64 ``[k_len]``, slots of the row's keys.

        Raises:
            Unservable: nobody can tell how the keys of earlier calls were rotated.
        """
        state, rotary, frequencies = self.state, RotaryTables(), None
        if state.rotation is None:
            unrotate: Callable[[Tensor, int], Tensor] = lambda x, start: x.float()  # noqa: E731
        else:
            cos, sin = self._tables(row, q_len, k_len, mask, slots)
            rotary = state.rotation.as_tables(cos, sin)
            if state.rotation.depends_on_length:
                at = partial(gate_frequencies, state.rotation, tokens=self._length(mask) or k_len)
                frequencies = lambda width: at(gate_dim=width).to(cos.device)  # noqa: E731

            def unrotate(x: Tensor, start: int) -> Tensor:
                end = start + x.shape[2]
                return state.rotation.unrotate(x, cos[:, start:end], sin[:, start:end])

        return AttentionContext(
            layer=state.layer,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            unrotate=unrotate,
            rotary=rotary,
            frequencies=frequencies,
        )

    def _length(self, mask: CallMask | None) -> int | None:
        """Tokens of the call by its positions, read once a forward; None where nothing depends on them."""
        rotation = self.state.rotation
        if self.position_ids is None or rotation is None or not rotation.depends_on_length:
            return self.tokens
        if mask is None:
            return int(self.position_ids.max()) + 1
        if mask.positions_end is None:
            mask.positions_end = int(self.position_ids.max()) + 1
        return mask.positions_end

    def _tables(self, row: int | None, q_len: int, k_len: int, mask: CallMask | None, slots: Tensor | None) -> Tables:
        """Rotary tables of the keys of one row, or of all rows, in their order."""
        tables = self.position_embeddings
        if tables is None:
            raise Unservable(
                f"position_embeddings must reach the attention of layer {self.state.layer}, got None; "
                "call the whole model, not its layers"
            )
        if row is not None and tables[0].shape[0] > 1:
            tables = tuple(x[row : row + 1] for x in tables)
        tokens = tables[0].shape[1]
        if mask is None or mask.k_len == tokens:
            if slots is not None:
                return tuple(x[:, slots.to(x.device)] for x in tables)
            return tuple(x[:, tokens - k_len :] for x in tables)
        # Layers that rotate alike share what is found.
        key = (state_key(self.state), row)
        if key not in mask.tables:
            mask.tables[key] = self._cached_tables(row, q_len, k_len, tables, slots)
        return mask.tables[key]

    def _cached_tables(self, row: int | None, q_len: int, k_len: int, tables: Tables, slots: Tensor | None) -> Tables:
        """Tables of keys that earlier calls rotated: made again by the model's own module and held to the call's."""
        rotation, tokens = self.state.rotation, tables[0].shape[1]
        if rotation.depends_on_length and k_len > rotation.original_length:
            raise Unservable(
                f"a prompt beyond {rotation.original_length} tokens must come in one call, got {q_len} tokens against "
                f"a cache of {k_len - q_len}; the model rotates longer texts by other frequencies, and those of cached "
                "keys are not known"
            )
        last = slice(tokens - q_len, None)
        if slots is not None:
            first_slot = int(slots[-1]) + 1 - tokens
            last = (slots[slots >= first_slot] - first_slot).to(tables[0].device)
        for positions in self.positions(row, k_len, slots):
            made = rotation.tables(positions.to(tables[0].device), tables[0])
            if all(alike(m[:, -q_len:], t[:, last]) for m, t in zip(made, tables)):
                return made
        raise Unservable(
            "position_ids must count up by one along a prompt that comes in several calls, got resetting or skipping "
            "ones, as packed documents and images have; give such a prompt in one call"
        )

    def positions(self, row: int | None, k_len: int, slots: Tensor | None) -> Iterator[Tensor]:
        """Candidates for the positions ``[1 or B, S]`` of all keys of the call, which all precede its last token."""
        steps = torch.arange(k_len)
        ids = self.position_ids
        if ids is not None and ids.ndim == 2:
            ids = ids[row : row + 1] if row is not None and ids.shape[0] > 1 else ids
            ids = ids.cpu()
            yield ids[:, -1:] - (k_len - 1) + steps
        yield steps[None]
        if slots is not None:
            yield slots.cpu()[None]


@dataclass(frozen=True, eq=False)
class Prefill:
    """One call of more than one query, of a full-attention layer that was attached to.

    Attributes:
        module: the attention module.
        query: post-RoPE ``[B, H, T, D]``.
        key: post-RoPE ``[B, HKV, S, D]``, a static cache in full.
        value: ``[B, HKV, S, D]``.
        mask: what the layer was handed.
        seer: the layer, and what only its module saw.
        running: what the layers of this forward run.
        capture: what this forward shows its attention to, or None.
        kwargs: what the architecture passes on.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: CallMask | Tensor | None
    seer: LayerCall
    running: Running
    capture: Capture | None
    kwargs: dict[str, Any]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: CallMask | Tensor | None,
        seer: LayerCall,
        kwargs: dict[str, Any],
    ) -> Prefill:
        """Finds what the layer runs in this forward, and refuses a gate that nothing filled."""
        attachment, index = seer.state.attachment, seer.state.layer
        own = isinstance(mask, CallMask)
        running = mask.running(attachment) if own else attachment.now()
        capture = mask.capture if own else CAPTURE.get()
        if index in running.gates:
            check_filled(running.gates[index], index)
        return cls(module, query, key, value, mask, seer.on(query.device), running, capture, kwargs)

    @property
    def state(self) -> LayerState:
        """Of the layer."""
        return self.seer.state

    @property
    def selector(self) -> Selector | None:
        """What chooses the blocks of the call, see `Kind.chooses`; nothing where attention is captured."""
        if self.capture is not None or not self.kind.chooses(self.q_len, self.k_len):
            return None
        return self.running.selectors[self.state.layer]

    @cached_property
    def kind(self) -> Kind:
        """Of the layer, in this forward."""
        return self.running.kind(self.state.found)

    @property
    def q_len(self) -> int:
        """Query slots, padding included."""
        return self.query.shape[2]

    @property
    def k_len(self) -> int:
        """Key slots, padding included; those of a static cache as far as they are filled."""
        return self.mask.k_len if isinstance(self.mask, CallMask) else self.key.shape[2]

    def shape_of(self, kind: Kind) -> dict[str, Any]:
        """What `prefer_dense` asks of layers of a kind in this forward, beside their density."""
        shape = LayerShape(self.query.shape[0], *kind.sizes)
        return {"q_len": self.q_len, "k_len": self.k_len, "device": self.query.device, "shape": shape}

    @property
    def auto(self) -> bool:
        """Whether the call may also run dense."""
        return self.running.impl == "auto"

    @property
    def described_mask(self) -> CallMask:
        """The mask as the model described it.

        Raises:
            Unservable: the layer was handed a finished one.
        """
        if not isinstance(self.mask, CallMask):
            got = "None" if self.mask is None else f"shape {list(self.mask.shape)}"
            raise Unservable(
                f"attention_mask must be a 2-D padding mask [B, S] or None, got {got}; sparse attention cannot follow "
                "a finished mask"
            )
        return self.mask

    @property
    def logits(self) -> dict[str, Any]:
        """What makes attention logits of q and k, under the names of our ops."""
        return logits_of(self.query, self.kwargs)


def logits_of(query: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What makes attention logits of q and k, under the names of our ops, from what an architecture passes on."""
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return {"scale": scale, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}


def state_key(state: LayerState) -> tuple:
    """Equal for layers of a model whose keys are rotated alike."""
    rotation = state.rotation
    return (rotation.embedding, tuple(rotation.arguments.items()))


def alike(made: Tensor, given: Tensor) -> bool:
    """Whether rotary tables that were made again are those that a call was given, rounding aside."""
    return made.shape[1:] == given.shape[1:] and bool(((made - given).abs() <= _SAME_TABLES).all())
