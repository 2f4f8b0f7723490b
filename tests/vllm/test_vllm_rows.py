"""Which tokens of a forward go sparse, and what is told of the others. Nothing here needs vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.vllm.pages import Known, Written
from seerattn.vllm.requests import Request
from seerattn.vllm.rows import Row, rest_of, split_rows
from seerattn.vllm.steps import Asked, Steps, listed_pages, steps_of

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

    parts, rest, none = split_rows(common, requests, written, STEP, begin)
    assert none == []
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


def test_tokens_that_choose_their_keys_are_those_behind_prompts_and_leave_the_rest_its_keys() -> None:
    common, requests = batch()
    written = Written(PAGE, torch.zeros(20, dtype=torch.int32))
    rows = []

    def decode(request: Request, row: Row) -> Asked | None:
        """The first token of several reads all, and so does the prompt of one token."""
        rows.append((request.name, row))
        whole = int(row.end - row.begin > 1)
        if request.prompt == 1:
            return None
        return Asked(row.number, row.begin + whole, row.end - row.begin - whole, row.start + whole, 0, "counted")

    _, rest, asked = split_rows(common, requests, written, STEP, lambda *_: None, decode)
    assert rows == [("0", Row(0, 0, 1, 39)), ("2", Row(2, 51, 58, 30)), ("4", Row(4, 63, 64, 0))]
    assert [(one.number, one.begin, one.tokens, one.start, one.end) for one in asked] == [
        (0, 0, 1, 39, 40),
        (2, 52, 6, 31, 37),
    ]
    assert rest == [Row(1, 1, 21, 24), Row(2, 21, 52, 0), Row(3, 58, 63, 0), Row(4, 63, 64, 0)]
    _, told = rest_of(common, rest)
    # The third row lost its last tokens, and with them the last keys.
    assert told.seq_lens.tolist() == told.seq_lens_cpu_upper_bound.tolist() == [44, 31, 5, 1]

    written.tokens[1:4] = torch.tensor([16, 16, 3])
    found = steps_of(common, asked, written, STEP, 32)
    assert found.tokens.tolist() == [0, *range(52, 58)] and found.lengths.tolist() == [40, *range(32, 38)]
    assert [step.known for step in found.rows] == [32, 0] and found.rows[1].pages.tolist() == [7, 8, 9]
    assert found.tables.tolist() == [[1, 2, 3], *[[7, 8, 9]] * 6]
    # Blocks of 32 tokens before the last one, which is that of 40 and of 37 keys.
    assert written.tokens[1:10].tolist() == [16, 16, 3, 0, 0, 0, 16, 16, 0]


@pytest.mark.parametrize("block_k", [8, 16, 24, 32])
def test_pages_that_are_gathered_are_those_that_lists_read(block_k: int) -> None:
    torch.manual_seed(0)
    lengths, heads = [1, 40, 90, 64], 2
    tables = torch.randperm(40)[: 4 * 6].view(4, 6).int()
    steps = Steps([], torch.arange(4), torch.tensor(lengths).int(), tables)
    number = -(-max(lengths) // block_k)
    causal = torch.arange(number) * block_k < steps.lengths[:, None, None]
    mask = (torch.rand(4, heads, number) < 0.4) & causal
    mask[:, :, 0] = True
    blocks = DecodeBlocks.from_mask(mask, block_k=block_k)
    pages, compact = listed_pages(blocks, steps, PAGE, STEP)
    read = {
        (row, at // PAGE)
        for row, head, block in mask.nonzero().tolist()
        for at in range(block * block_k, min((block + 1) * block_k, lengths[row]))
    }
    assert set(pages.tolist()) == {int(tables[row, column]) for row, column in read}
    assert all(pages[compact[row, column]] == tables[row, column] for row, column in read)
