"""An experiment in processes side by side."""

import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from seerattn.cli import main as seerattn
from seerattn.results.file import read_results

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import side_by_side
import typer


def values(path: Path) -> dict[tuple, float | None]:
    return {(r.key, r.what): r.value for r in read_results([path])}


@pytest.fixture
def config(inputs: dict[str, Path], tmp_path: Path) -> Path:
    methods = ["dense", "streaming", {"method": "gate", "name": "mine", "gates": str(inputs["gates"])}]
    methods.append({"method": "gate", "name": "gone", "gates": str(tmp_path / "nowhere")})
    about = {"model": str(inputs["model"]), "contexts": [512], "densities": [0.6], "methods": methods}
    about["tasks"] = [{"task": "perplexity", "data": str(inputs["books"]), "text": "books", "timed": False}]
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(about))
    return path


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(side_by_side.main)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_processes_measure_what_one_measures_and_a_method_that_fails_hinders_no_other(
    config: Path, tmp_path: Path
) -> None:
    found = run(config, "--jobs", 2, "--output", tmp_path / "out")
    assert found.exit_code == 1 and "failed: gone" in found.output, found.output
    alone = tmp_path / "alone.jsonl"
    with pytest.raises(SystemExit):
        seerattn(["eval", "--config", str(config), "--only", "streaming", "--only", "mine", "--output", str(alone)])
    assert values(tmp_path / "out" / "results.jsonl") == values(alone)
    dense = [r for r in read_results([*(tmp_path / "out" / "parts").glob("*.jsonl")]) if r.kind == "dense"]
    assert len({r.timestamp for r in dense}) == len({r.key for r in dense}), "measured once"


def test_methods_begin_where_dense_attention_has_nothing_to_measure(config: Path, tmp_path: Path) -> None:
    experiment = yaml.safe_load(config.read_text())
    experiment["tasks"] = [
        {"task": "key_value", "n": 1, "decode_tokens": [128], "data": experiment["tasks"][0]["data"]}
    ]
    config.write_text(yaml.safe_dump(experiment))
    found = run(config, "--jobs", 2, "--output", tmp_path / "out", "--only", "streaming", "--limit", 1)
    assert found.exit_code == 0, found.output
    assert {r.name for r in read_results([tmp_path / "out" / "results.jsonl"]) if r.kind != "dense"} == {"streaming"}


def test_results_of_an_earlier_call_are_not_measured_again(config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    run(config, "--jobs", 1, "--output", first, "--only", "streaming")
    run(config, "--jobs", 1, "--output", second, "--only", "streaming", "--begin", first / "results.jsonl")
    times: list[set[str | None]] = [
        {r.timestamp for r in read_results([of / "results.jsonl"])} for of in (first, second)
    ]
    assert times[0] == times[1] and None not in times[0]
