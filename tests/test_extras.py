"""The base install: what needs no extra works without any, and what needs one says which."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from seerattn.extras import PACKAGES, check_extra

ROOT = Path(__file__).parents[1]
MODEL, GATES = "assets/reference-model", "assets/reference-gates/best"
COMMANDS = ["distill", "finetune", "eval", "calibrate", "search", "bench", "generate", "serve", "report"]
TRAIN = ["--context", "512", "--steps", "1", "--device", "cpu", "--output", "outputs/none"]
NEED = {
    "report": ["report", "research/records/reference-perplexity.jsonl.xz", "--output", "outputs/none"],
    "tasks": ["eval", "--model", MODEL, "--tasks", "ruler_vt", "--dry-run", "--device", "cpu"],
    "train": ["distill", "--model", MODEL, "--data", "someone/books", *TRAIN],
    "serve": ["serve", "--model", MODEL, "--dense"],
    "eval": ["search", "moa", "--model", MODEL, "--data", "assets/books/distill", "--output", "outputs/none.json"],
}
# One process for all, as importing torch is most of the time.
CODE = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
extras, commands, model, gates = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(extras)

import torch
from transformers import AutoModelForCausalLM
import seerattn
attached = seerattn.attach(AutoModelForCausalLM.from_pretrained(model), gates, impl="sparse")
with torch.no_grad(), seerattn.record_density(attached) as meter:
    attached(input_ids=torch.arange(1024)[None] % 256, logits_to_keep=1)

from seerattn.cli import main
ends = []
for command in commands:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            main(command)
        except SystemExit as end:
            ends.append((end.code, said.getvalue()))
print(json.dumps([meter.mean(), ends]))
"""


class Ran(NamedTuple):
    """What happened without the extras: the density of a forward, exit codes and stderr of commands."""

    density: float
    ends: list[tuple[int, str]]


@pytest.fixture(scope="module")
def ran() -> Ran:
    extras = [package for packages in PACKAGES.values() for package in packages]
    commands = [*([name, "--help"] for name in COMMANDS), *NEED.values()]
    arguments = json.dumps([extras, commands, MODEL, GATES])
    ended = subprocess.run([sys.executable, "-c", CODE, arguments], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return Ran(*json.loads(ended.stdout.splitlines()[-1]))


def test_extras_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for extra, packages in PACKAGES.items():
        assert {re.match(r"\w+", line)[0] for line in extras[extra]} == set(packages)
    assert extras["all"] == [f"seerattn[{','.join(PACKAGES)}]"]
    base = {re.match(r"\w+", line)[0] for line in project["dependencies"]}
    assert not base & {package for packages in PACKAGES.values() for package in packages}


def test_gates_are_attached_and_run_without_any_extra(ran: Ran) -> None:
    assert 0.1 < ran.density < 0.35


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=COMMANDS)
def test_help_of_every_command_needs_no_extra(ran: Ran, number: int) -> None:
    assert ran.ends[number][0] == 0, ran.ends[number]


@pytest.mark.parametrize("number", range(len(NEED)), ids=list(NEED))
def test_a_command_without_its_extra_ends_in_a_sentence_that_names_it(ran: Ran, number: int) -> None:
    code, said = ran.ends[len(COMMANDS) + number]
    assert code == 2, said
    # transformers may show on stderr that it loads a model.
    (sentence,) = [line for line in said.splitlines() if line.startswith("seerattn: ")]
    assert f"seerattn[{list(NEED)[number]}]" in sentence and "Traceback" not in said
    assert not list((ROOT / "outputs").glob("none*"))


def test_a_missing_package_is_a_value_error_and_one_that_is_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_spec("scipy") is not None
    check_extra("eval", "this")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"this needs scipy.*seerattn\[eval\]"):
        check_extra("eval", "this")
