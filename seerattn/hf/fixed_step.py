"""A decode step that can be repeated by a CUDA graph: nothing of it depends on what the host knows.

A step of `seerattn.hf.decode` cuts the cache to the keys that are there, looks up what is known of them, and makes
lists of the length that they need. Here sizes are those of the room that a static cache has, and how many tokens there
are is read on the device. Gate keys of a block that has been finished, one step in 64, are made by the host between two
steps, by the code of every other block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_decode import GateDecoder
from seerattn.gate_selector import pooled_keys
from seerattn.hf.call import LayerCall, logits_of
from seerattn.hf.decode import check_servable, decode_impl
from seerattn.hf.mask import Unservable
from seerattn.hf.rotary import token_queries
from seerattn.hf.state import Running
from seerattn.ops.decode_attention import decode_attention
from seerattn.selection.selector import AttentionContext

# It changes three in ten thousand list entries at most (docs/LOG.md), and a token reads all gate keys: in fp32, with 8
# sub-blocks of a block, they are more bytes than the keys and values of a tenth of the blocks.
KEY_DTYPE = torch.float16
# Larger gate keys keep fp32.
LARGEST = torch.finfo(torch.float16).max / 16
# Tokens whose keys are un-rotated at a time.
AT_ONCE = 1 << 17


@dataclass(eq=False)
class GateKeys:
    """Gate keys of all sequences of a batch, in room for as many as there may be.

    Attributes:
        gate: whose they are.
        keys: ``[B, h, W, DG]``, from the first key of each sequence on.
        starts: where the keys of each sequence begin in the cache.
        blocks: of each sequence that are there.
        due: tokens of the cache with which the next block of a sequence is finished.
    """

    gate: AttnGate
    keys: Tensor
    starts: Sequence[int]
    blocks: list[int]
    due: int = 0

    @classmethod
    def of(cls, decoder: GateDecoder, starts: Sequence[int], room: int, device: torch.device) -> GateKeys:
        """Room for the gate keys of ``room`` tokens."""
        heads = decoder.gate.k_weight.shape[0]
        shape = (len(starts), heads, decoder.finished_windows(room), decoder.gate.gate_dim)
        return cls(decoder.gate, torch.zeros(shape, dtype=KEY_DTYPE, device=device), starts, [0] * len(starts))

    def fill(self, k: Tensor, context: Callable[[], AttentionContext], tokens: int) -> None:
        """Adds those of blocks that are finished before the last of so many tokens of the cache.

        Args:
            k: post-RoPE keys ``[B, HKV, S, D]``, at least ``tokens`` of them.
            context: gives what knows how they were rotated.
            tokens: of the cache, padding included.
        """
        # In most steps no sequence has finished one, and each layer asks.
        if tokens < self.due:
            return
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, (start, known) in enumerate(zip(self.starts, self.blocks)):
            blocks = (tokens - start - 1) // self.gate.config.block_k
            if known < blocks:
                groups.setdefault((start, known, blocks), []).append(row)
        for (start, known, blocks), rows in groups.items():
            self._add(k[:, :, start:], context(), rows, known, blocks)
        ends = (start + (known + 1) * self.gate.config.block_k for start, known in zip(self.starts, self.blocks))
        self.due = 1 + min(ends)

    def _add(self, k: Tensor, context: AttentionContext, rows: list[int], known: int, blocks: int) -> None:
        """Those of some rows whose keys ``k`` begin at once, from block ``known`` to block ``blocks``."""
        config = self.gate.config
        begin, end = known * config.block_k, blocks * config.block_k
        windows = slice(begin // config.k_size, end // config.k_size)
        most = max(1, AT_ONCE // (end - begin))
        for first in range(0, len(rows), most):
            part = _slice_if_adjacent(rows[first : first + most])
            pooled = pooled_keys(self.gate, k[part, :, begin:end], context, begin, "reference")
            made = self.gate.gate_keys(pooled)
            # Asked once, of the first blocks: what follows is not sixteen times as large.
            if not known and bool(made.abs().amax() > LARGEST):
                self.keys = self.keys.float()
            self.keys[part, :, windows] = made.to(self.keys.dtype)
        for row in rows:
            self.blocks[row] = blocks


def _slice_if_adjacent(rows: list[int]) -> slice | list[int]:
    """Ascending rows, so that those that lie together are not copied."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


@dataclass(eq=False)
class FixedStep:
    """What the layers of one step share.

    Attributes:
        running: what they run.
        room: tokens that the cache has room for.
        lengths: int32 ``[B]``, keys of every sequence, that of the new token included.
        starts: int32 ``[B]``, where they begin in the cache; None where there is no padding.
        keys: gate keys, by layer; layers without them attend to all keys.
        counts: blocks that were chosen in the last step, ``[B, HKV]`` by layer.
    """

    running: Running
    room: int
    lengths: Tensor
    starts: Tensor | None
    keys: dict[int, GateKeys]
    counts: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, seer: LayerCall, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Attention ``[B, 1, H, D]`` of one token of every sequence.

        Args:
            seer: the layer.
            query: post-RoPE ``[B, H, 1, D]``.
            key: post-RoPE ``[B, HKV, S, D]``, a static cache in full.
            value: ``[B, HKV, S, D]``.
            kwargs: what the architecture passes on.

        Raises:
            Unservable: a layer that cannot be followed.
        """
        layer, blocks = seer.state.layer, None
        check_servable(seer, kwargs)
        if key.shape[2] != self.room:
            raise Unservable(f"layer {layer} must keep {self.room} tokens as the others, got {key.shape[2]}")
        if layer in self.keys:
            decoder, rotation = self.running.decoders[layer], seer.state.rotation
            tables = () if rotation is None else seer.on(query.device).token_tables()
            q, rotary = token_queries(rotation, query, tables)
            blocks = decoder.select_many(q, rotary, self.keys[layer].keys, self.lengths, tokens=self.room)
            self.counts[layer] = blocks.counts
        call = {
            "lengths": self.lengths,
            "starts": self.starts,
            "blocks": blocks,
            "impl": decode_impl(self.running),
            **logits_of(query, kwargs),
        }
        return decode_attention(query[:, :, 0], key, value, **call)[:, None]


# Set while a model runs such a step, and while a graph of one is made.
FIXED: ContextVar[FixedStep | None] = ContextVar("seerattn_fixed_step", default=None)
