"""`seerattn bench` as a user runs it, tiny and on a CPU."""

import json
from pathlib import Path

import pytest

from seerattn.bench import attention_map
from seerattn.cli import main
from seerattn.results.environment import environment
from seerattn.results.file import read_results

TINY = ("--shape", "4x2x32", "--device", "cpu")
MODEL = ("--model", "tiny", "--device", "cpu", "--set", "repeats=2")
COMMANDS = {
    "attention": (*TINY, "--contexts", "200,130", "--densities", "0.5", "--set", "blocks=64x64,32x64"),
    "map": (*TINY, "--contexts", "130"),
    "crossover": (*TINY, "--contexts", "130", "--densities", "0.5,1", "--table", "@table.json", "--set", "keys=300"),
    "ttft": (*MODEL, "--contexts", "130", "--densities", "0.5,0.7"),
    "serve": (*MODEL, "--contexts", "130", "--densities", "0.5", "--at-once", "2,1", "--set", "batch_tokens=256"),
    "distill": (*MODEL, "--contexts", "130"),
    "finetune": (*MODEL, "--contexts", "130", "--densities", "0.5"),
}
# Quantity, method and what was asked for of every row, in order.
ROWS = {
    "attention": [
        ("attention_ms", "dense", "sdpa"),
        *[("attention_ms", "random", "reference")] * 4,
        *[("selection_ms", "gate", "reference")] * 4,
    ]
    * 2,
    "map": [("attention_map_ms", "dense", impl) for impl in ("reference", "pytorch", "sdpa")],
    "crossover": [
        ("host_ms", "gate", "auto"),
        ("attention_ms", "dense", "sdpa"),
        ("selection_ms", "gate", "auto"),
        *[("attention_ms", "random", "auto")] * 2,
        ("decode_host_ms", "gate", "sparse"),
        ("decode_attention_ms", "dense", "sdpa"),
        ("decode_select_ms", "gate", "auto"),
        *[("decode_attention_ms", "random", "auto")] * 4,
    ],
    "ttft": [
        ("ttft_s", "dense", "sdpa"),
        ("attention_share", "dense", "sdpa"),
        *[("ttft_s", "gate", "reference"), ("attention_share", "gate", "reference")] * 2,
    ],
    "serve": [
        (what, *of)
        for of in [("dense", "sdpa"), ("gate", "reference")] * 2
        for what in ("serve_first_s", "serve_tokens_per_second")
    ],
    "distill": [("tokens_per_second", "dense", "sdpa"), ("tokens_per_second", "gate", "reference")],
    "finetune": [
        (what, *of)
        for of in (("dense", "sdpa"), *[("gate", "reference")] * 2)
        for what in ("finetune_layer_ms", "finetune_step_ms", "tokens_per_second")
    ],
}


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *map(str, args)])
    return stop.value.code or 0


@pytest.mark.parametrize("name", COMMANDS)
def test_command_writes_whole_results_that_a_second_run_does_not_measure_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "r.jsonl"
    arguments = [arg.replace("@", f"{tmp_path}/") for arg in COMMANDS[name]]
    assert run(name, *arguments, "--output", output) == 0
    rows = read_results([output])
    assert [(r.what, r.method, r.cell["impl"]) for r in rows] == ROWS[name]
    machine = environment("cpu")["device"]
    for r in rows:
        assert r.value > 0 and r.n >= 2 and r.samples and 0 < r.realised_density <= 1
        assert r.device == r.cell["device"] == machine and r.cell["dtype"] == "float32" and r.seconds is not None
        assert (r.density is None) == (r.method == "dense" or name == "distill")
        assert (r.seed is None) == (r.method == "dense")
    said = capsys.readouterr()
    # Progress as it goes, each implementation checked before it is timed; then a table.
    assert said.err.index("checked") < said.err.index("130 tokens") and "130" in said.out
    before = output.read_bytes()
    assert run(name, *arguments, "--output", output) == 0
    assert output.read_bytes() == before and "checked" not in capsys.readouterr().err


def test_backward_rows_time_forward_and_backward_of_checked_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "r.jsonl"
    args = (*TINY, "--contexts", "130", "--densities", "0.5", "--set", "blocks=64x64", "--output", output)
    assert run("attention", *args, "--backward") == 0
    assert "checked gradients of reference 64x64 per group" in capsys.readouterr().err
    rows = read_results([output])
    expected = [("dense", "sdpa"), *[("random", "reference")] * 2]
    assert [(r.method, r.cell["impl"]) for r in rows] == expected
    assert {r.what for r in rows} == {"attention_training_ms"}


def test_attention_rows_have_exact_densities(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    # 10 blocks of 64 have 55 places, of which 22 are 40 %.
    rare = ("--set", "blocks=64x64", "--set", "rows-alike=1,3")
    args = (*TINY, "--contexts", "640", "--densities", "0.4", "--gates", "paper", *rare, "--output", output)
    assert run("attention", *args) == 0
    rows = [r for r in read_results([output]) if r.method == "random"]
    assert [(r.cell["share"], r.cell["mask_heads"], r.cell["rows_alike"]) for r in rows] == [
        ("head", 4, 1), ("head", 4, 3), ("group", 2, 1), ("group", 2, 3),
    ]  # fmt: skip
    assert {(r.density, r.realised_density) for r in rows} == {(0.4, 22 / 55)}


def test_crossover_writes_the_table_that_auto_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = tmp_path / "new" / "table.json"
    asked = ("crossover", *TINY, "--contexts", "130,65", "--densities", "0.5,1", "--table", table)
    assert run(*asked, "--set", "keys=300,400") == 0
    found, of = json.loads(table.read_text()), ["device", "batch", "heads", "kv_heads", "head_dim", "host_ms", "rows"]
    assert list(found) == [*of, "decode_host_ms", "decode_rows"]
    assert [row["tokens"] for row in found["decode_rows"]] == [300, 400]
    assert found["heads"] == 4
    assert [row["tokens"] for row in found["rows"]] == [65, 130]
    assert all(set(row) == {"tokens", "dense_ms", "overhead_ms", "sparse_ms"} for row in found["rows"])
    assert set(found["rows"][0]["sparse_ms"]) == {"0.5", "1.0"}
    out = capsys.readouterr().out
    assert all(f"{rows[0]['dense_ms']:.3f}" in out for rows in (found["rows"], found["decode_rows"]))


def test_a_time_limit_leaves_cells_out_and_a_later_run_measures_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "r.jsonl"
    arguments = ("map", *TINY, "--contexts", "130", "--variants", "reference,sdpa", "--output", output)
    assert run(*arguments, "--set", "time_limit=1e-9") == 0
    assert "2 cells were left out for the time limit" in capsys.readouterr().err and not output.exists()
    assert run(*arguments) == 0
    assert len(read_results([output])) == 2


def test_an_implementation_that_does_not_match_its_oracle_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention_map.plain_attention_with_map
    monkeypatch.setattr(attention_map, "plain_attention_with_map", lambda *x: (right(*x)[0] * 1.1, right(*x)[1]))
    output = tmp_path / "r.jsonl"
    assert run("map", *TINY, "--contexts", "130", "--variants", "pytorch,reference", "--output", output) == 1
    assert "map max:inf of pytorch does not match its fp64 oracle" in capsys.readouterr().err
    assert [r.cell["impl"] for r in read_results([output])] == ["reference"]


# What is wrong, and what the sentence must name.
BAD = {
    "no number": (("attention", *TINY, "--contexts", "8k"), "contexts"),
    "density of nothing": (("attention", *TINY, "--densities", "0"), "densities"),
    "density": (("crossover", *TINY, "--table", "t.json", "--densities", "0.1,2"), "densities"),
    "blocks": (("attention", *TINY, "--set", "blocks=64"), "blocks"),
    "share": (("attention", *TINY, "--set", "shares=layer"), "shares"),
    "gates": (("attention", *TINY, "--contexts", "64", "--gates", "best"), "gates"),
    "gate": (("crossover", *TINY, "--table", "t.json", "--set", "gates=best"), "gates"),
    "heads": (("map", "--shape", "6x4x32", "--device", "cpu"), "heads"),
    "shape": (("map", "--shape", "32x8", "--device", "cpu"), "shape"),
    "variant": (("map", *TINY, "--contexts", "64", "--variants", "fast"), "variants"),
    "variant that is not here": (("map", *TINY, "--contexts", "64", "--variants", "cudnn"), "nothing"),
    "target": (("map", *TINY, "--targets", "mean:2"), "mean:2"),
    "context": (("ttft", *MODEL, "--gates", "paper", "--contexts", "1"), "contexts"),
    "model": (("distill", "--model", "gpt-2", "--device", "cpu"), "llama-3.1-8b"),
    "layers": (("finetune", "--set", "layers=17", "--device", "cpu"), "layers"),
    "target share": (("finetune", *MODEL, "--set", "target_shares=0"), "target_shares"),
    "table": (("crossover", *TINY), "table"),
    "device": (("ttft", "--model", "tiny", "--device", "abacus"), "device"),
    "output": (("map", *TINY, "--contexts", "64", "--output", "."), "output"),
    "option that is none": (("map", *TINY, "--set", "lengths=64"), "lengths"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, told = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seerattn: ")]
    assert len(errors) == 1 and told in errors[0]
    assert list(tmp_path.iterdir()) == []
