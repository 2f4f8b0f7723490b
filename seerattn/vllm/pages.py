"""Gate keys beside the pages of keys and values: of each page those that its keys give, by the number of the page.

A page holds the same keys for as long as its number means it, whoever shares it. So gate keys go with the page: a chunk
of a prompt, a prefix that another request left behind and a second turn find those of all pages that were read before.
Which of them hold is kept once for all layers that share a table of pages, since they are written together (`Written`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_memory import GateMemory
from seerattn.selection.selector import Memory


class Pages(NamedTuple):
    """The pages of one sequence, in order: their numbers on the host, and int64 ``[P]`` on the device."""

    numbers: list[int]
    tensor: Tensor


class Known(NamedTuple):
    """What is known of the beginning of a sequence.

    Attributes:
        tokens: leading ones whose gate keys are kept, whole gate keys.
        resumes: whether nobody wrote to its last page since the part before ended there.
    """

    tokens: int
    resumes: bool


@dataclass(eq=False)
class Written:
    """Up to which of its tokens the gate keys of every page are known.

    It stays on the device, and marking never waits for it: decode steps write pages too.

    Attributes:
        page: tokens of a page.
        tokens: int32 ``[pages]``, leading tokens of each page whose gate keys are kept.
    """

    page: int
    tokens: Tensor

    def write(self, slots: Tensor) -> None:
        """New keys came into these slots, int64 ``[T]``, ``page * number + offset``, negative for none.

        What was known of later tokens of their pages is then of other keys.
        """
        written = slots.clamp(min=0)
        # What is none marks the place that it marks least: behind the last token of a page.
        offsets = torch.where(slots < 0, self.page, written % self.page).to(self.tokens.dtype)
        self.tokens.scatter_reduce_(0, written // self.page, offsets, "amin")

    def known(self, pages: Pages, start: int, step: int) -> Known:
        """What is known of a sequence before its token ``start``.

        Args:
            pages: of the sequence.
            start: tokens that it had before.
            step: tokens of a gate key.
        """
        found = self.tokens[pages.tensor].tolist()
        whole = next((number for number, tokens in enumerate(found) if tokens < self.page), len(found))
        rest = found[whole] if whole < len(found) else 0
        tokens = min(start, whole * self.page + rest) // step * step
        resumes = start > 0 and found[(start - 1) // self.page] == (start - 1) % self.page + 1
        return Known(tokens, resumes)

    def known_of(self, tables: Tensor, starts: Sequence[int], step: int) -> list[int]:
        """Leading tokens of several sequences whose gate keys are kept; waits for the device once.

        Args:
            tables: int64 ``[n, P]``, pages of each.
            starts: tokens that each had before.
            step: tokens of a gate key.
        """
        found = self.tokens[tables.clamp(min=0)]
        whole = (found >= self.page).int().cumprod(1).sum(1, dtype=torch.long)
        rest = F.pad(found, (0, 1)).gather(1, whole[:, None])[:, 0]
        known = (whole * self.page + rest).tolist()
        return [min(start, tokens) // step * step for start, tokens in zip(starts, known)]

    def know_of(self, tables: Tensor, ends: Sequence[int]) -> None:
        """Gate keys of the first ``ends[i]`` tokens of the sequence of pages ``tables[i]`` are kept from now on."""
        begins = torch.arange(tables.shape[1], device=self.tokens.device) * self.page
        ends = torch.tensor(ends).to(self.tokens.device)
        kept = (ends[:, None] - begins).clamp(0, self.page).to(self.tokens.dtype)
        self.tokens.scatter_reduce_(0, tables.clamp(min=0).flatten(), kept.flatten(), "amax")

    def know(self, pages: Pages, end: int) -> None:
        """Gate keys of the first ``end`` tokens of a sequence are kept from now on."""
        begins = torch.arange(len(pages.numbers), device=self.tokens.device) * self.page
        ends = (end - begins).clamp(0, self.page).to(self.tokens.dtype)
        self.tokens[pages.tensor] = torch.maximum(self.tokens[pages.tensor], ends)


@dataclass(eq=False)
class GatePages:
    """What the gate of one layer keeps of the pages.

    Attributes:
        gate: whose gate keys they are.
        page: tokens of a page, a multiple of those of a gate key.
        places: number of query blocks that can be unfinished at once.
        keys: fp32 ``[pages, page / step, h, DG]``, or None as long as there are none.
        queries: of query blocks that the end of a chunk cut, by the page of their last token: how many tokens of the
            page there were, and the queries ``[1, H, n, D]``.
    """

    gate: AttnGate
    page: int
    places: int
    keys: Tensor | None = None
    queries: OrderedDict[int, tuple[int, Tensor]] = field(default_factory=OrderedDict)

    def recall(self, pages: Pages, known: Known, start: int) -> Memory:
        """What a part of a prompt that begins at ``start`` knows of the tokens before it."""
        memory = self.recall_keys(pages.tensor, known.tokens, start)
        if known.resumes and start % self.gate.config.block_q:
            tokens, queries = self.queries.get(pages.numbers[(start - 1) // self.page], (0, None))
            if tokens == (start - 1) % self.page + 1:
                memory.kept = replace(memory.kept, queries=queries)
        return memory

    def recall_keys(self, pages: Tensor, known: int, start: int) -> Memory:
        """The same of gate keys alone: those of the first ``known`` tokens, of the pages ``[P]`` of a sequence."""
        kept = replace(GateMemory.of(Memory(), self.gate), tokens=start)
        if known:
            keys = self.keys[pages[: -(-known // self.page)]].flatten(0, 1)
            kept = replace(kept, keys=keys[: known // self.gate.config.k_size].transpose(0, 1)[None])
        return Memory(start, kept)

    def keep(self, pages: Pages, known: Known, end: int, memory: Memory, num_pages: int) -> None:
        """Keeps what a part of a prompt found.

        Args:
            pages: of its sequence.
            known: before the part.
            end: position behind its last token.
            memory: as the selector left it.
            num_pages: of the cache.
        """
        kept = memory.kept
        self.keep_keys(pages.tensor, known.tokens, memory, num_pages)
        last = pages.numbers[(end - 1) // self.page]
        self.queries.pop(last, None)
        if kept.queries is not None:
            self.queries[last] = ((end - 1) % self.page + 1, kept.queries)
            while len(self.queries) > self.places:
                self.queries.popitem(last=False)

    def keep_keys(self, pages: Tensor, known: int, memory: Memory, num_pages: int) -> None:
        """Keeps the gate keys that were found behind the first ``known`` tokens of a sequence of pages ``[P]``."""
        kept, step = memory.kept, self.gate.config.k_size
        if kept.keys is None or kept.keys.shape[2] <= known // step:
            return
        new = kept.keys[0, :, known // step :].transpose(0, 1)  # [windows, h, DG]
        if self.keys is None or len(self.keys) != num_pages:
            self.keys = new.new_empty(num_pages, self.page // step, *new.shape[1:])
        windows = known // step + torch.arange(len(new), device=new.device)
        self.keys[pages[windows * step // self.page], windows % (self.page // step)] = new
