"""The examples, run as a reader runs them, on the reference model and little text."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import seerattn

ROOT = Path(__file__).parents[2]
MODEL, GATES = ROOT / "assets/reference-model", ROOT / "assets/reference-gates/best"
BOOK = ROOT / "assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz"
BLOCK, TOKENS = 64, 768


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *options: str | Path | float
) -> str:
    """What an example prints."""
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
    capsys.readouterr()
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    """What the groups of a pattern find, of all its matches."""
    return [float(value) for match in re.finditer(pattern, text) for value in match.groups()]


def one_block_a_row(tokens: int) -> float:
    """The density of one block in every row."""
    rows = -(-tokens // BLOCK)
    return rows / (rows * (rows + 1) / 2)


def reference_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    gates = {name: value for name, value in model.state_dict().items() if "seer_gate" in name}
    assert gates
    return gates


def test_a_question_is_asked_at_the_density_that_was_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--text", BOOK, "--question", "Who?", "--tokens", TOKENS, "--new-tokens", 3, "--impl", "sparse")
    out = run(monkeypatch, capsys, "ask_a_long_text", "--model", MODEL, "--gates", GATES, "--density", 0.4, *options)
    tokens, density, seconds = numbers(r"prompt: (\d+) tokens, density ([\d.]+), ([\d.]+) s", out)
    assert TOKENS < tokens < TOKENS + 20 and seconds > 0
    assert abs(density - 0.4) <= one_block_a_row(int(tokens))
    assert re.search(r"^answer: \S", out)


def test_the_answer_to_a_question_is_that_of_the_dense_model_where_every_block_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text, question = "The sea was calm that night, and nobody spoke of the storm.", "Who spoke?"
    path = tmp_path / "text.txt"
    path.write_text(text)
    options = ("--text", path, "--question", question, "--density", 1, "--new-tokens", 5, "--impl", "sparse")
    out = run(monkeypatch, capsys, "ask_a_long_text", "--model", MODEL, "--gates", GATES, *options)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(f"{text}\n\n{question}", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference_model().generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert f"answer: {tokenizer.decode(expected, skip_special_tokens=True).strip()}\n" in out


def test_training_prints_the_first_and_the_last_record_and_leaves_gates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = run(monkeypatch, capsys, "train_gates", "--context", TOKENS, "--steps", 8, "--output", tmp_path / "gates")
    records = [json.loads(line) for line in (tmp_path / "gates" / "training.jsonl").read_text().splitlines()]
    pattern = r"step (\d+): loss ([\d.]+), recall at density .1 ([\d.]+), best possible ([\d.]+)"
    first, last = numbers(pattern, out)[:4], numbers(pattern, out)[4:]
    assert (first[0], last[0]) == (1, 8) and last[1] == pytest.approx(records[-1]["loss"], abs=1e-4)
    assert first[2] <= first[3] and last[2] <= last[3]
    assert (tmp_path / "gates" / "adapter_model.safetensors").is_file()


def test_densities_are_met_within_a_block_a_row_and_dense_is_the_unpatched_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokens", TOKENS, "--densities", 1, 0.6, 0.3)
    out = run(monkeypatch, capsys, "choose_density", "--model", MODEL, "--gates", GATES, *options)
    lines = numbers(r"asked ([\d.]+): computed ([\d.]+), perplexity ([\d.]+)", out)
    asked, computed, perplexity = lines[0::3], lines[1::3], lines[2::3]
    assert asked == [1, 0.6, 0.3] and computed[0] == 1
    assert all(abs(a - c) <= one_block_a_row(TOKENS) for a, c in zip(asked, computed))
    assert computed[0] > computed[1] > computed[2]
    text = gzip.decompress(BOOK.read_bytes()).decode()[: 8 * TOKENS]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids[:, :TOKENS]
    with torch.no_grad():
        dense = float(reference_model()(ids, labels=ids).loss.exp())
    # Printed to two digits; every block in another order of sums.
    assert numbers(r"dense: perplexity ([\d.]+)", out)[0] == pytest.approx(dense, abs=0.006)
    assert perplexity[0] == pytest.approx(dense, abs=0.006)


def test_a_selector_of_ones_own_computes_the_blocks_that_it_lists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stride = 4
    out = run(monkeypatch, capsys, "own_selector", "--model", MODEL, "--tokens", TOKENS, "--stride", stride)
    rows = range(TOKENS // BLOCK)
    kept = sum(1 for row in rows for column in range(row + 1) if column % stride == 0 or row - column < 2)
    density, sparse, dense = numbers(r"density ([\d.]+), perplexity ([\d.]+), dense ([\d.]+)", out)
    assert density == pytest.approx(kept / (len(rows) * (len(rows) + 1) / 2), abs=5e-5)
    assert sparse != dense


def test_a_lora_learns_beside_gates_that_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--tokens", TOKENS, "--steps", 3, "--density", 0.4, "--output", tmp_path)
    out = run(monkeypatch, capsys, "beside_lora", "--model", MODEL, "--gates", GATES, *options)
    learning, of_lora = numbers(r"learning: (\d+) tensors, (\d+) of them of the LoRA", out)
    # A and B of two projections in six layers.
    assert learning == of_lora == 2 * 2 * 6
    steps = numbers(r"step \d+: loss ([\d.]+), density ([\d.]+)", out)
    assert steps[0] > steps[-2]
    assert all(abs(density - 0.4) <= one_block_a_row(TOKENS) for density in steps[1::2])
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as lora:
        names = list(lora.keys())
    assert len(names) == learning and all("lora" in name for name in names)
    before, after = (gates_of(seerattn.attach(reference_model(), path)) for path in (GATES, tmp_path / "gates"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
