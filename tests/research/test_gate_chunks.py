"""Times of gates over a prompt in chunks: what is timed chooses as one call, and a choice that does not is counted."""

import runpy
from pathlib import Path

import pytest
import torch

from seerattn.bench.inputs import Shape
from seerattn.gate_memory import GateMemory
from seerattn.results.file import read_results

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "research" / "kernels" / "gate_chunks.py"))
CALL = ("default", Shape(4, 2, 32, torch.float32), 2500, 600, torch.device("cpu"), 0.4)


@torch.no_grad()
def test_lists_that_are_not_those_of_one_call_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = SCRIPT["Prompt"](*CALL)
    assert prompt.differing() == 0
    assert [blocks.q_len.tolist() for blocks in prompt.again()] == [[600]] * 4 + [[100]]
    monkeypatch.setattr(GateMemory, "whole_block", lambda self, q, start: q)
    assert prompt.differing() > 0


@torch.no_grad()
def test_a_result_says_how_keys_were_had(tmp_path: Path) -> None:
    prompt = SCRIPT["Prompt"](*CALL)
    file = SCRIPT["ResultsFile"](tmp_path / "r.jsonl", torch.device("cpu"))
    file.append(SCRIPT["result"](prompt, "remembered", prompt.remembered, torch.device("cpu")))
    (row,) = read_results([tmp_path / "r.jsonl"])
    assert row.value > 0 and row.context == 2500 and (row.cell["chunk"], row.cell["keys"]) == (600, "remembered")
