"""Options: one declaration read by Python, YAML and the command line, refused in one sentence by all three."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from seerattn.cli.options import from_options
from seerattn.options import check_options, option, parse_options, read_options


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = option(help="Steps.", low=1)
    lr: float | None = option(None, help="Rate.", above=0)
    densities: tuple[float, ...] = option((0.5, 0.2), help="Densities.", above=0, high=1)
    kind: Literal["a", "b"] = option("a", help="Kind.")
    deep: bool = option(True, help="Deep.")
    data: tuple[str, ...] = option((), help="Data.", repeat=True)
    seed: int = option(3, help="Seed.", low=0, flag=False)
    place: Path | None = option(None, help="Place.")

    def __post_init__(self) -> None:
        check_options(self)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls a command of the options and returns them with its own argument, or the sentence that refused them."""
    app, found = typer.Typer(pretty_exceptions_enable=False), []

    @app.command()
    @from_options
    def command(options: Options, model: Annotated[str, typer.Option()]) -> None:
        found.append((options, model))

    def call(*args: str):
        outcome = CliRunner().invoke(app, ["--model", "m", *args])
        return found.pop() if outcome.exit_code == 0 else str(outcome.exception)

    return call


def test_python_yaml_and_flags_build_the_same_options(run, tmp_path) -> None:
    asked = Options(steps=5, lr=0.5, densities=[0.1], kind="b", deep=False, data=["x", "y,z"], seed=7, place="p")
    file = tmp_path / "run.yaml"
    file.write_text("{steps: 5, lr: 0.5, densities: 0.1, kind: b, deep: false, data: [x, 'y,z'], seed: 7.0, place: p}")
    flags = "--steps 5 --lr .5 --densities .1 --kind b --no-deep --data x --data y,z --set seed=7 --place p"
    assert asked.place == Path("p") and asked.densities == (0.1,)
    assert run(*flags.split()) == run("--config", str(file)) == (asked, "m")


def test_flags_go_before_a_file_and_a_file_before_defaults(run, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{steps: 5, lr: 0.5, densities: [0.3, 0.1]}")
    found, _ = run("--config", str(file), "--steps", "9", "--set", "seed=0")
    assert found == Options(steps=9, lr=0.5, densities=(0.3, 0.1), seed=0)
    assert found.deep and found.kind == "a"


@pytest.mark.parametrize(
    ("flags", "values", "told"),
    [
        ("--steps 0", {"steps": 0}, "steps must be a whole number at least 1"),
        ("--steps 1.5", {"steps": 1.5}, "steps must be a whole number"),
        ("--steps 1 --lr 0", {"steps": 1, "lr": 0}, "lr must be a number above 0 or none"),
        ("--steps 1 --lr nan", {"steps": 1, "lr": float("nan")}, "lr must be a number above 0 or none"),
        ("--steps 1 --densities .5,2", {"steps": 1, "densities": [0.5, 2]}, "densities must be one or several, each"),
        ("--steps 1 --set seed=-1", {"steps": 1, "seed": -1}, "seed must be a whole number at least 0"),
        ("--lr 1", {"lr": 1}, "options must have steps"),
    ],
)
def test_a_value_is_refused_in_the_same_sentence_wherever_it_comes_from(run, flags, values, told) -> None:
    assert run(*flags.split()).startswith(told)
    with pytest.raises(ValueError, match=told):
        read_options(Options, values)


def test_names_that_are_no_options_are_refused(run, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{steps: 5, stpes: 6}")
    assert "stpes" in run("--config", str(file))
    assert "stpes" in run("--steps", "1", "--set", "stpes=6")
    assert "lr" in run("--steps", "1", "--set", "lr=6")  # it is a flag
    with pytest.raises(ValueError, match="stpes"):
        parse_options(Options, ["stpes=6"])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "1: 2"])
def test_a_file_that_holds_no_options_is_refused(run, tmp_path, text) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert run("--config", str(file), "--steps", "1").startswith("config must be")
    assert run("--config", str(tmp_path / "none.yaml"), "--steps", "1").startswith("config must be a YAML file")


def test_values_of_the_wrong_type_are_refused() -> None:
    for values in ({"steps": True}, {"steps": "5"}, {"steps": 1, "deep": 1}, {"steps": 1, "data": [1]}):
        with pytest.raises(ValueError):
            Options(**values)
