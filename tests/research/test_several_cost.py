"""What work costs on several GPUs is what one took and what links carry, worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from seerattn.results.record import Result

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import several_cost

CONTEXT, RATE = 131072, 100.0  # GB/s


def result(what: str, value: float, part: str, processes: int, **cell: Any) -> Result:
    values = {"method": "dense", "kind": "dense", "name": "dense", "text": "random", "n": 5, "unit": "runs"}
    cell = {"parts": part, "processes": processes, "layers": 32, "dtype": "bfloat16", "impl": "cudnn"} | cell
    return Result(what=what, value=value, model="Llama of width 4096", context=CONTEXT, cell=cell, **values)


def links() -> list[Result]:
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
    return [result("link_gb_per_second", RATE, "links", 2, work=kind, bytes=1 << 28) for kind in kinds]


def seconds(rows: list[Result], name: str) -> list[str]:
    (table,) = several_cost.growth(rows)
    (line,) = (line for line in table.lines if line.name.startswith(name))
    return [f"{cell.text} {cell.more}".strip() for cell in line.cells[1:]]


def test_a_prompt_is_shared_out_and_its_parts_are_sent() -> None:
    rows = [*links(), result("ttft_s", 16.0, "one", 1), result("ttft_s", 9.0, "context", 2)]
    # Of 32 layers: two sums of the stream of every token, in 2 bytes; 32 query, 2 x 8 KV and 32 output heads of 128.
    stream = 32 * 2 * CONTEXT * 4096 * 2
    heads = 32 * (32 + 2 * 8 + 32) * 128 * CONTEXT * 2
    by_heads = [16 / n + stream * (n - 1) / n / 1e9 / RATE for n in (1, 2, 4, 8)]
    # A process has some of the tokens before, and some of the heads after.
    by_tokens = [16 / n + heads / n * (n - 1) / n / 1e9 / RATE for n in (1, 2, 4, 8)]
    assert seconds(rows, "a prompt by heads") == [f"{x:.3g}" for x in by_heads]
    expected = [f"{x:.3g}" for x in by_tokens]
    assert seconds(rows, "a prompt by tokens") == [expected[0], f"{expected[1]} 9", *expected[2:]]


def test_a_step_of_a_sample_each_sends_weights_twice_and_gradients_once() -> None:
    rows = [*links(), result("step_s", 20.0, "finetune", 1, batch=2, sharded=False)]
    rows += [result("step_s", 11.0, "finetune", 2, batch=2, sharded=True)]
    # The published number of parameters of Llama-3.1-8B, in 2 bytes.
    sent = 3 * 8_030_261_248 * 2
    one, two, four, eight = (f"{10 + sent * (n - 1) / n / 1e9 / RATE:.3g}" for n in (1, 2, 4, 8))
    assert seconds(rows, "fine-tuning (FSDP2)") == [one, f"{two} 11", four, eight]


def test_gates_alone_are_summed_where_they_alone_are_trained() -> None:
    rows = [*links(), result("step_s", 4.0, "distill", 1, batch=2, sharded=False)]
    # Whatever they weigh, less than a hundredth of a second.
    assert [float(x) for x in seconds(rows, "distilling")] == pytest.approx([2.0] * 4, abs=0.01)


def test_links_must_have_been_measured() -> None:
    with pytest.raises(ValueError, match="must hold the links of several processes, got none"):
        several_cost.growth([result("ttft_s", 1.0, "one", 1)])
