"""The parts for several GPUs run to their ends on two CPUs, and their records say what is compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import FSDP, ON_CPUS, launch_two

from seerattn.results.file import read_results
from seerattn.results.record import Result

SCRIPT = Path(__file__).parents[2] / "research" / "several_gpus.py"
TOKENS = 384
AS_IF_ON_GPUS = f"""
import os, runpy
os.environ |= {FSDP | {"ACCELERATE_TORCH_DEVICE": "cpu"}}
{ON_CPUS}
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "shape"
    make = [sys.executable, SCRIPT.with_name("shape_model.py"), "--layers", "2", "--size", "tiny", "--output", folder]
    subprocess.run(make, check=True, capture_output=True)
    return folder


def options(shape: Path) -> list[str]:
    pairs = {"model": "model", "gates": "default", "text": "text.jsonl", "output": "several.jsonl"}
    named = [f"--{name}={shape / file}" for name, file in pairs.items()]
    return [*named, f"--lengths={TOKENS}", "--repeats=2"]


def alone(*arguments: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def rows(shape: Path, part: str) -> dict[tuple[str, int], Result]:
    found = [r for r in read_results([shape / "several.jsonl"]) if r.cell["parts"] == part]
    return {(r.what, r.cell["processes"]): r for r in found}


@pytest.mark.parametrize("part", ["distill", "finetune"])
def test_steps_of_two_processes_begin_with_the_loss_of_one_and_stand_beside_its_time(part: str, shape: Path) -> None:
    alone(part, *options(shape))
    script = SCRIPT
    if part == "finetune":
        script = shape / "sharded.py"
        script.write_text(AS_IF_ON_GPUS)
    done = launch_two(str(script), part, *options(shape))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of that of one process" in done.stdout
    found = rows(shape, part)
    assert found.keys() == {(what, count) for what in ("step_s", "tokens_per_second") for count in (1, 2)}
    for count in (1, 2):
        step, second = found["step_s", count], found["tokens_per_second", count]
        assert step.n == 2 and second.value == pytest.approx(2 * TOKENS / step.value, rel=1e-3)
        assert step.cell["sharded"] == (part == "finetune" and count == 2)
    (one,), (two,) = (found["step_s", count].samples["first_loss"] for count in (1, 2))
    # Two samples, whose mean is summed in another order.
    assert two == pytest.approx(one, rel=1e-6)
    (one,), (two,) = (found["step_s", count].samples["planned_gib"] for count in (1, 2))
    assert part == "distill" or 0 < two < one


def test_links_carry_what_they_are_given(shape: Path) -> None:
    done = launch_two(str(SCRIPT), "links", f"--output={shape / 'several.jsonl'}", "--lengths=1", "--repeats=2")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [r for r in read_results([shape / "several.jsonl"]) if r.cell["parts"] == "links"]
    assert [r.cell["work"] for r in found] == ["all-gather", "reduce-scatter", "all-to-all", "all-reduce"]
    assert all(r.value > 0 and r.cell["bytes"] == 1 << 20 for r in found)
