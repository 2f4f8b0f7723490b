"""Tokens that are decoded in a forward and choose their keys, each as if it were alone.

Most rows have one such token. A row that reads again what it had written before it made room for others has several:
each chooses among the keys before it, as it did when it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.selection.block_indices import PAD
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.vllm.density import Counted
from seerattn.vllm.pages import Written


class Asked(NamedTuple):
    """Tokens of one request that choose their keys.

    Attributes:
        number: row of the request.
        begin: first of them in the packed forward.
        tokens: their number.
        start: keys before the first of them.
        seen: leading ones that were counted before, in the same layers.
        counted: counts what they read.
    """

    number: int
    begin: int
    tokens: int
    start: int
    seen: int
    counted: Counted

    @property
    def end(self) -> int:
        """Keys up to the last of them."""
        return self.start + self.tokens


class Step(NamedTuple):
    """The same with the pages of the request.

    Attributes:
        asked: the tokens.
        pages: int64 ``[P]``, of the sequence, as far as its keys go.
        known: leading tokens whose gate keys are kept.
    """

    asked: Asked
    pages: Tensor
    known: int


class Steps(NamedTuple):
    """All such tokens of a forward.

    Attributes:
        rows: by request.
        tokens: int64 ``[n]``, their places in the packed forward.
        lengths: int32 ``[n]``, keys of each, its own included.
        tables: int32 ``[n, P]``, pages of each.
    """

    rows: list[Step]
    tokens: Tensor
    lengths: Tensor
    tables: Tensor


def steps_of(common: Any, asked: Sequence[Asked], written: Written, step: int, block_k: int) -> Steps:
    """The tokens of a forward that choose their keys.

    Args:
        common: vLLM's metadata of the batch.
        asked: the tokens, by request.
        written: what is known of pages; it learns that gate keys of finished blocks will be kept.
        step: tokens of a gate key.
        block_k: tokens of a block.
    """
    device, page = common.block_table_tensor.device, written.page
    most = max(-(-one.end // page) for one in asked)
    tables = common.block_table_tensor[torch.tensor([one.number for one in asked]).to(device), :most].long()
    known = written.known_of(tables, [one.start for one in asked], step)
    rows = [Step(one, table[: -(-one.end // page)], of) for one, table, of in zip(asked, tables, known)]
    written.know_of(tables, [finished(one.end, block_k) for one in asked])
    counts = torch.tensor([one.tokens for one in asked])
    places = torch.cat([torch.arange(one.begin, one.begin + one.tokens) for one in asked])
    lengths = torch.cat([torch.arange(one.start + 1, one.end + 1) for one in asked]).int()
    each = torch.arange(len(asked)).repeat_interleave(counts).to(device)
    return Steps(rows, places.to(device), lengths.to(device), tables[each].int())


def finished(tokens: int, block_k: int) -> int:
    """Tokens of the blocks before that of the last of so many tokens."""
    return (tokens - 1) // block_k * block_k


def together(chosen: Sequence[DecodeBlocks]) -> DecodeBlocks:
    """Lists of several tokens, one below the other."""
    width = max(one.indices.shape[2] for one in chosen)
    indices = [F.pad(one.indices, (0, width - one.indices.shape[2]), value=PAD) for one in chosen]
    return DecodeBlocks(torch.cat(indices), torch.cat([one.counts for one in chosen]), chosen[0].block_k)


def listed_pages(blocks: DecodeBlocks, steps: Steps, page: int, step: int) -> tuple[Tensor, Tensor]:
    """The pages that lists read, each once, and tables that number them by their place there.

    Args:
        blocks: of the tokens.
        steps: the tokens.
        page: tokens of a page.
        step: tokens of a gate key, a divisor of a page and of a block.

    Returns:
        Numbers of pages, int64, ascending, and tables int32 ``[n, P]``; entries of pages that no list reads mean
        nothing.
    """
    places = blocks.indices.long()[..., None] * blocks.block_k + torch.arange(
        0, blocks.block_k, step, device=blocks.indices.device
    )
    is_read = (blocks.indices != PAD)[..., None] & (places < steps.lengths[:, None, None, None])
    tables = steps.tables.long()
    columns = (places // page).clamp(0, tables.shape[1] - 1).flatten(1)
    pages = tables.gather(1, columns)[is_read.flatten(1)].unique()
    return pages, torch.searchsorted(pages, tables).clamp(max=len(pages) - 1).int()
