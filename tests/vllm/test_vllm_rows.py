"""Which tokens of a forward go sparse, and what is told of the others. Nothing here needs vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seerattn.vllm.pages import Known, Written
from seerattn.vllm.requests import Request
from seerattn.vllm.rows import Row, rest_of, split_rows

PAGE, STEP = 16, 8


@dataclass
class Common:
    """The fields of vLLM's metadata of a batch that are looked at."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    positions: Tensor
    is_prefilling: Tensor
    req_idx: Any = None
    _num_computed_tokens_cache: Any = "old"
    _token_to_req_indices_cache: Any = "old"

    def replace(self, **changed: Any) -> Common:
        return replace(self, **changed)


def batch() -> tuple[Common, list[Request]]:
    """A token that is decoded; 20 tokens of a prompt of 50; a prompt of 30 with 7 tokens that were decoded before the
    request made room for others; a short prompt; a prompt of one token; padding."""
    queries, lengths, prompts = [1, 20, 37, 5, 1, 0], [40, 44, 37, 5, 1, 0], [30, 50, 30, 5, 1]
    begins = torch.tensor([0, *queries]).cumsum(0).int()
    tables = torch.arange(1, 19).view(6, 3).int()
    slots = [
        int(tables[row, at // PAGE]) * PAGE + at % PAGE
        for row, (count, length) in enumerate(zip(queries, lengths))
        for at in range(length - count, length)
    ]
    common = Common(
        begins,
        begins,
        torch.tensor(lengths).int(),
        torch.tensor(lengths).int(),
        6,
        64,
        37,
        tables,
        torch.tensor(slots),
        torch.arange(64),
        torch.tensor([False, True, True, True, True, False]),
    )
    return common, [Request(f"{number}", prompt) for number, prompt in enumerate(prompts)]


def test_parts_are_the_tokens_of_prompts_and_the_rest_all_others() -> None:
    common, requests = batch()
    written = Written(PAGE, torch.zeros(20, dtype=torch.int32))
    written.tokens[4:6] = torch.tensor([16, 8])  # the second row read 24 tokens before
    written.write(common.slot_mapping)
    asked = []

    def begin(request: Request, row: Row, tokens: int) -> Any:
        asked.append((request.name, row.start, tokens))
        return None if request.prompt == 5 else "counted"

    parts, rest = split_rows(common, requests, written, STEP, begin)
    assert asked == [("1", 24, 20), ("2", 0, 30), ("3", 0, 5)]
    assert [(p.begin, p.tokens, p.start, p.end, p.prompt) for p in parts] == [(1, 20, 24, 44, 50), (21, 30, 0, 30, 30)]
    assert [p.pages.numbers for p in parts] == [[4, 5, 6], [7, 8]]
    assert [p.known for p in parts] == [Known(24, True), Known(0, False)]
    assert written.tokens[4:9].tolist() == [16, 16, 12, 16, 14]
    assert rest == [Row(0, 0, 1, 39), Row(2, 51, 58, 30), Row(3, 58, 63, 0), Row(4, 63, 64, 0)]

    tokens, told = rest_of(common, rest)
    assert tokens.tolist() == [0, *range(51, 64)] == told.positions.tolist()
    assert told.query_start_loc.tolist() == told.query_start_loc_cpu.tolist() == [0, 1, 8, 13, 14]
    # Keys are those of the whole rows.
    assert told.seq_lens.tolist() == told.seq_lens_cpu_upper_bound.tolist() == [40, 37, 5, 1]
    assert (told.num_reqs, told.num_actual_tokens, told.max_query_len) == (4, 14, 7)
    assert torch.equal(told.block_table_tensor, common.block_table_tensor[[0, 2, 3, 4]])
    assert torch.equal(told.slot_mapping, common.slot_mapping[tokens])
    assert told._num_computed_tokens_cache is None is told._token_to_req_indices_cache
    assert common.num_reqs == 6 and told.is_prefilling.tolist() == [False, True, True, True]
