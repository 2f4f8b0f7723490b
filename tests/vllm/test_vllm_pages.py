"""What is known of pages, against a model of them that remembers every key. Nothing here needs vLLM."""

from __future__ import annotations

import random

import pytest
import torch

from seerattn import AttnGate, AttnGateConfig
from seerattn.gate_memory import GateMemory
from seerattn.selection.selector import Memory
from seerattn.vllm.pages import GatePages, Known, Pages, Written

PAGE, STEP, NUMBER = 16, 4, 12


def pages(*numbers: int) -> Pages:
    return Pages(list(numbers), torch.tensor(numbers))


def slots(of: Pages, begin: int, end: int) -> torch.Tensor:
    return torch.tensor([of.numbers[at // PAGE] * PAGE + at % PAGE for at in range(begin, end)])


@pytest.mark.parametrize("seed", range(20))
def test_what_is_known_is_what_was_kept_and_nobody_wrote_over(seed: int) -> None:
    """Sequences of random pages are written and read; each slot remembers whether the key in it was read since."""
    draw = random.Random(seed)
    written = Written(PAGE, torch.zeros(NUMBER, dtype=torch.int32))
    was_read = torch.zeros(NUMBER * PAGE, dtype=torch.bool)
    sequences = []
    for _ in range(60):
        if not sequences or draw.random() < 0.3:
            # Pages come from others that are gone.
            sequences = [one for one in sequences if draw.random() < 0.5]
            free = sorted(set(range(NUMBER)) - {number for table, _ in sequences for number in table.numbers})
            if len(free) < 3:
                continue
            sequences.append((pages(*draw.sample(free, 3)), 0))
        index = draw.randrange(len(sequences))
        table, start = sequences[index]
        end = min(3 * PAGE, start + draw.choice((1, 1, 1, 7, 20)))
        if end == start:
            continue
        padding = torch.full((draw.randint(0, 3),), -1)
        new = slots(table, start, end)
        written.write(torch.cat((new, padding)))
        was_read[new] = False
        sequences[index] = (table, end)
        if draw.random() < 0.4:  # the part is of a prompt: it is read, with all that was not before
            here = was_read[slots(table, 0, start)] if start else torch.zeros(0, dtype=torch.bool)
            leading = next((at for at, is_read in enumerate(here.tolist()) if not is_read), start)
            known = written.known(Pages(table.numbers, table.tensor), start, STEP)
            assert known.tokens == leading // STEP * STEP
            written.know(Pages(table.numbers, table.tensor), end)
            was_read[slots(table, 0, end)] = True


def test_part_resumes_only_where_the_one_before_it_ended_and_nobody_wrote_since() -> None:
    written = Written(PAGE, torch.zeros(NUMBER, dtype=torch.int32))
    table = pages(3, 7)
    written.write(slots(table, 0, 22))
    written.know(table, 22)
    written.write(slots(table, 22, 30))
    assert written.known(table, 22, STEP) == Known(20, True)
    # One token was decoded in between.
    written.know(table, 30)
    written.write(slots(table, 30, 31))
    written.write(slots(table, 31, 32))
    assert written.known(table, 31, STEP) == Known(28, False)
    # The page went to somebody else, who wrote more than there was.
    written.write(slots(pages(7), 0, 16))
    assert written.known(table, 22, STEP) == Known(16, False)


def test_gate_keys_and_queries_go_with_their_pages() -> None:
    form = AttnGateConfig(block_q=32, block_k=32, query_subblocks=8, key_subblocks=8)
    gate = AttnGate(form, num_heads=2, num_kv_heads=1, head_dim=8, inv_freq=torch.zeros(4))
    store, table = GatePages(gate, PAGE, places=2), pages(5, 2, 9)
    keys, queries = torch.randn(1, 1, 9, 8), torch.randn(1, 2, 6, 8)

    def memory(keys, queries, tokens):
        kept = GateMemory.of(Memory(), gate)
        return Memory(0, GateMemory(kept.gate, kept.weights, tokens, keys, queries=queries))

    store.keep(table, Known(0, False), 38, memory(keys, queries, 38), NUMBER)
    found = store.recall(table, Known(36, True), 38)
    assert found.known == 38 and torch.equal(found.kept.keys, keys) and found.kept.queries is queries
    # Another sequence that begins with the same pages finds their gate keys, and no queries of a block that is whole.
    other = store.recall(pages(5, 2, 4), Known(32, True), 32)
    assert torch.equal(other.kept.keys, keys[:, :, :8]) and other.kept.queries is None
    assert store.recall(table, Known(36, False), 38).kept.queries is None
    # Of three unfinished blocks the oldest has no place.
    for number in (1, 3):
        store.keep(pages(number), Known(0, False), 6, memory(keys[:, :, :1], queries, 6), NUMBER)
    assert list(store.queries) == [1, 3] and store.recall(table, Known(36, True), 38).kept.queries is None


@pytest.mark.parametrize("seed", range(5))
def test_several_sequences_are_known_as_each_alone(seed: int) -> None:
    torch.manual_seed(seed)
    one, other = (Written(PAGE, torch.randint(0, PAGE + 1, (NUMBER,), dtype=torch.int32)) for _ in range(2))
    one.tokens[torch.rand(NUMBER) < 0.6] = PAGE
    other.tokens = one.tokens.clone()
    tables = torch.randperm(NUMBER).view(4, 3)
    starts, ends = torch.randint(0, 3 * PAGE, (2, 4)).tolist()
    alone = [one.known(pages(*table), start, STEP).tokens for table, start in zip(tables.tolist(), starts)]
    assert one.known_of(tables, starts, STEP) == alone
    one.know_of(tables, ends)
    for table, end in zip(tables.tolist(), ends):
        other.know(pages(*table), end)
    assert torch.equal(one.tokens, other.tokens)
