"""The rows of a forward: which tokens go sparse, of prompts and of answers, and what is left for the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seerattn.vllm.density import Counted
from seerattn.vllm.pages import Known, Pages, Written
from seerattn.vllm.requests import Request
from seerattn.vllm.steps import Asked, Steps


class Part(NamedTuple):
    """Tokens of one prompt that run sparsely in a forward.

    Attributes:
        begin: first of them in the packed forward.
        tokens: their number.
        start: keys before them.
        prompt: tokens of the whole prompt.
        pages: of the sequence, as far as its keys after this part go.
        known: of its gate keys, before this part.
        counted: counts the blocks of the prompt.
    """

    begin: int
    tokens: int
    start: int
    prompt: int
    pages: Pages
    known: Known
    counted: Counted

    @property
    def end(self) -> int:
        """Keys up to the last of them."""
        return self.start + self.tokens


class Rest(NamedTuple):
    """Tokens that run as in the backend without gates.

    Attributes:
        tokens: int64, their places in the packed forward.
        metadata: the backend's own, of them alone.
    """

    tokens: Tensor
    metadata: Any


@dataclass(eq=False)
class Split:
    """Metadata of a forward in which gates choose.

    Attributes:
        parts: of prompts.
        steps: tokens that are decoded and choose their keys, or None.
        rest: what is left, or None.
        whole: the backend's own metadata, for layers without gates, or None where there are none.
    """

    parts: list[Part]
    steps: Steps | None
    rest: Rest | None
    whole: Any


class Row(NamedTuple):
    """Tokens ``begin .. end`` of a packed forward: those of row ``number``, with ``start`` keys before them."""

    number: int
    begin: int
    end: int
    start: int

    @property
    def keys(self) -> int:
        """Keys up to the last of them."""
        return self.start + self.end - self.begin


def rows_of(common: Any) -> list[Row]:
    """The rows of vLLM's metadata of a batch; those of padding have no tokens."""
    begins = common.query_start_loc_cpu.tolist()
    # Exact for prompts, and on the host.
    lengths = common.seq_lens_cpu_upper_bound if common.seq_lens_cpu_upper_bound is not None else common.seq_lens
    return [
        Row(number, begin, end, length - (end - begin))
        for number, (begin, end, length) in enumerate(zip(begins, begins[1:], lengths.tolist()))
    ]


def split_rows(
    common: Any,
    requests: Sequence[Request],
    written: Written,
    step: int,
    begin: Callable[[Request, Row, int], Counted | None],
    decode: Callable[[Request, Row], Asked | None] | None = None,
) -> tuple[list[Part], list[Row], list[Asked]]:
    """Parts of prompts that go sparse, the rows that are left, each less what goes sparse, and decoded tokens that do.

    Args:
        common: vLLM's metadata of the batch.
        requests: of its rows.
        written: what is known of pages; it learns that gate keys of the parts will be kept.
        step: tokens of a gate key.
        begin: gives what counts the next tokens of a prompt, so many; None where they run dense.
        decode: gives those of the decoded tokens of a row, up to its end, that choose their keys; None where none does.
    """
    parts, rest, asked = [], [], []
    for row, request in zip(rows_of(common), requests):
        # What was decoded is read again after a request made room for others; a prompt of one token is decoded.
        told = 0 if request.prompt < 2 else min(row.end - row.begin, max(0, request.prompt - row.start))
        answer = row._replace(begin=row.begin + told, start=row.start + told)
        counted = begin(request, row, told) if told else None
        found = decode(request, answer) if decode is not None and answer.begin < answer.end else None
        if found is not None:
            asked.append(found)
            row = row._replace(end=found.begin)
        if counted is None:
            told = 0
        else:
            end = row.start + told
            table = common.block_table_tensor[row.number, : -(-end // written.page)].long()
            pages = Pages(table.tolist(), table)
            known = written.known(pages, row.start, step)
            parts.append(Part(row.begin, told, row.start, request.prompt, pages, known, counted))
            written.know(pages, end)
        if row.begin + told < row.end:
            rest.append(row._replace(begin=row.begin + told, start=row.start + told))
    return parts, rest, asked


def rest_of(common: Any, rows: Sequence[Row]) -> tuple[Tensor, Any]:
    """Places of the tokens of some rows in a packed forward, and vLLM's metadata of a batch of them alone."""
    device = common.seq_lens.device
    lengths = [row.end - row.begin for row in rows]
    tokens = torch.cat([torch.arange(row.begin, row.end) for row in rows]).to(device)
    begins = torch.tensor([0, *lengths], dtype=common.query_start_loc_cpu.dtype).cumsum(0)
    begins = begins.to(common.query_start_loc_cpu.dtype)
    numbers = torch.tensor([row.number for row in rows])
    here = numbers.to(device)
    # Of a row whose last tokens choose their keys the keys end before them.
    keys = torch.tensor([row.keys for row in rows], dtype=common.seq_lens.dtype)

    def of_rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[numbers if x.device.type == "cpu" else here]

    return tokens, common.replace(
        query_start_loc=begins.to(device),
        query_start_loc_cpu=begins,
        seq_lens=torch.minimum(of_rows(common.seq_lens), keys.to(device)),
        seq_lens_cpu_upper_bound=None if common.seq_lens_cpu_upper_bound is None else keys,
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=max(lengths),
        block_table_tensor=of_rows(common.block_table_tensor),
        slot_mapping=common.slot_mapping[tokens],
        positions=None if common.positions is None else common.positions[tokens],
        is_prefilling=of_rows(common.is_prefilling),
        req_idx=None if common.req_idx is None else common.req_idx[numbers.numpy()],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
