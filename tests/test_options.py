"""Options: one declaration read by Python, YAML and the command line, refused in one sentence by all three."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from seerattn.cli.options import from_options
from seerattn.options import check_options, option, parse_options, read_options


@dataclass(frozen=True, kw_only=True)
class Form:
    size: int = option(4, help="Size.", choices=(4, 8))
    kinds: tuple[Literal["x", "y"], ...] = option(("x",), help="Kinds.")

    def __post_init__(self) -> None:
        check_options(self)


def large(**values) -> Form:
    return Form(**{"size": 8} | values)


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
    form: Form | None = option(None, help="Form.", forms={"small": Form, "large": large})
    dry: bool = option(False, help="Dry.")

    def __post_init__(self) -> None:
        check_options(self)


FOUND = []


@pytest.fixture
def app():
    """A command of the options and an argument of its own."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @from_options
    def command(options: Options, model: Annotated[str, typer.Option()]) -> None:
        FOUND.append((options, model))

    return app


@pytest.fixture
def run(app):
    """Calls the command and returns what it was given, or the sentence that refused it."""

    def call(*args: str):
        outcome = CliRunner().invoke(app, ["--model", "m", *args])
        return FOUND.pop() if outcome.exit_code == 0 else str(outcome.exception)

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
        ("--steps 1 --densities ,", {"steps": 1, "densities": []}, "densities must be one or several, each"),
        ("--steps 1 --set seed=-1", {"steps": 1, "seed": -1}, "seed must be a whole number at least 0"),
        ("--lr 1", {"lr": 1}, "options must have steps"),
    ],
)
def test_a_value_is_refused_in_the_same_sentence_wherever_it_comes_from(run, flags, values, told) -> None:
    assert run(*flags.split()).startswith(told)
    with pytest.raises(ValueError, match=told):
        read_options(Options, values)


def test_an_empty_text_is_a_value_and_not_a_flag_that_was_left_out(run) -> None:
    assert run("--steps", "").startswith("steps must be a whole number")
    assert run("--steps", "1", "--densities", "").startswith("densities must be one or several, each")
    assert run("--steps", "1", "--lr", "")[0] == Options(steps=1, lr=None)


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


@pytest.mark.parametrize(
    ("flags", "given", "wanted"),
    [
        ("--form large", "large", Form(size=8)),
        ("--form small", "small", Form()),
        ("--form size=8 --form kinds=x,y", {"size": 8, "kinds": ["x", "y"]}, Form(size=8, kinds=("x", "y"))),
        ("--form large --form kinds=y", ["large", "kinds=y"], Form(size=8, kinds=("y",))),
        ("--form size=4 --form large", ["size=4", "large"], Form()),
    ],
)
def test_an_option_that_is_a_dataclass_is_a_form_with_values_changed(run, tmp_path, flags, given, wanted) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"steps": 1, "form": given}))
    asked = Options(steps=1, form=wanted)
    assert run("--steps", "1", *flags.split())[0] == run("--config", str(file))[0] == asked
    assert Options(steps=1, form=given) == asked and Options(steps=1).form is None


@pytest.mark.parametrize(
    ("flags", "given", "name"),
    [
        ("--form huge", "huge", "form"),
        ("--form small --form large", ["small", "large"], "form"),
        ("--form size=5", {"size": 5}, "size"),
        ("--form kinds=z", {"kinds": ["z"]}, "kinds"),
        ("--form width=5", {"width": 5}, "form"),
        (None, 3, "form"),
        (None, [3], "form"),
        (None, [], None),
    ],
)
def test_what_is_no_form_is_refused_by_name(run, flags, given, name) -> None:
    if name is None:
        assert Options(steps=1, form=given).form == Form()
        return
    if flags is not None:
        assert run("--steps", "1", *flags.split()).startswith(f"{name} must be")
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Options(steps=1, form=given)


def test_help_tells_every_option_with_its_default_and_choices(app) -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "1000"}).output.split())
    for flag in ("--steps", "--lr", "--densities", "--kind", "--deep", "--no-deep", "--data", "--form", "--dry"):
        assert f" {flag} " in shown
    assert "--no-dry" not in shown and "--seed" not in shown
    for told in ("seed (3): Seed.", "size (4): Size. Of 4, 8.", "kinds (x): Kinds. Of x, y.", "small or large"):
        assert told in shown


def test_values_of_the_wrong_type_are_refused() -> None:
    wrong = [{"deep": 1}, {"data": [1]}, {"lr": 10**400}, {"lr": float("inf")}, {"form": 1}]
    wrong = [{"steps": 1} | values for values in wrong]
    for values in ({"steps": True}, {"steps": "5"}, {"steps": 10**30}, *wrong):
        with pytest.raises(ValueError):
            Options(**values)
