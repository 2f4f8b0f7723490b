"""Output folders of runs: what is refused, what is left behind, damaged checkpoints, kills at every step of a save."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distill_runs import RUN, assert_same_result, records, train
from tiny_corpus import write_documents, write_model

import seerattn.training.output as run_folders
from seerattn.training.checkpoints import last_whole
from seerattn.training.distill import DistillConfig, DistillRun
from seerattn.training.finetune import FinetuneConfig
from seerattn.training.trainer import DistillTrainer

SHORT = replace(RUN, steps=6, save_steps=2, keep_checkpoints=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and documents."""
    folder = tmp_path_factory.mktemp("folders")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 1200, 700, 300, 150)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    train(folder, folder / "uninterrupted", SHORT)
    return folder / "uninterrupted"


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A run that was stopped before its gates were saved: its checkpoints are of the steps 4 and 6."""
    output = folder / "stopped"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["seerattn.training.distill"], "get_model_state_dict", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder, output, SHORT)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    return output


@pytest.fixture
def output(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "run",
    [None, "[]", "{}", '{"config": {"steps": 1}}', '{"config": [], "data_hash": "x"}', "[" * 100_000, "\udcff"],
    ids=["none", "list", "empty", "other", "list of config", "deep", "no text"],
)
def test_folder_that_holds_no_run_is_not_resumed_and_left_as_it_is(
    run: str | None, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    (output / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (output / "checkpoints" / "checkpoint-3" / "optimizer.pt").write_text("mine")
    (output / "README.md").write_text("mine")
    (output / "training.jsonl").write_text("mine")
    if run is not None:
        (output / "run.json").write_text(run, errors="surrogateescape")
    before = contents(output)
    with pytest.raises(ValueError, match=r"^output must (be the folder of a run|hold what decided its run)"):
        train(folder, output, SHORT, resume=True)
    assert contents(output) == before


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "training.jsonl", "gates"])
def test_file_of_somebody_in_the_place_of_a_result_is_not_overwritten(name: str, folder: Path, output: Path) -> None:
    path = output / name
    path.unlink(missing_ok=True)
    if name == "gates":
        path.mkdir()
        path = path / "README.md"
    path.write_text('{"mine": 1}')
    before = contents(output)
    with pytest.raises(ValueError, match=f"^output must hold nothing in the place of .*, got .*{name}"):
        train(folder, output, SHORT, resume=True)
    assert contents(output) == before


def test_files_of_somebody_beside_a_run_are_kept(folder: Path, uninterrupted: Path, output: Path) -> None:
    theirs = [
        output / "notes.txt",
        output / "checkpoints" / "notes.txt",
        output / "checkpoints" / "checkpoint-best.txt",
    ]
    theirs.append(output / "checkpoints" / "checkpoint-best" / "weights")
    theirs[-1].parent.mkdir()
    for path in theirs:
        path.write_text("mine")
    train(folder, output, SHORT, resume=True)
    assert all(path.read_text() == "mine" for path in theirs)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "checkpoint-best",
        "checkpoint-best.txt",
        "notes.txt",
    ]
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty, Path.unlink])
def test_checkpoint_is_not_whole_whatever_is_wrong_with_whichever_file(
    harm: Callable[[Path], None], output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = output / "checkpoints"
    newest = checkpoints / "checkpoint-6"
    assert last_whole(checkpoints) == newest and not caplog.records
    names = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    needed = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "adapter_model.safetensors"}
    assert needed | {"training.jsonl", "manifest.json"} <= names
    for name in sorted(names):
        before = (newest / name).read_bytes()
        caplog.clear()
        harm(newest / name)
        # Without a manifest it is one of an earlier version, of which less is known.
        if (name, harm) != ("manifest.json", Path.unlink):
            assert last_whole(checkpoints) == checkpoints / "checkpoint-4"
            assert f"{newest} is left out" in caplog.text and name in caplog.text
            assert "the run goes on from checkpoint-4" in caplog.text
        (newest / name).write_bytes(before)
    assert last_whole(checkpoints) == newest


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_checkpoint_of_an_earlier_version_needs_what_a_run_cannot_go_on_without(name: str, output: Path) -> None:
    newest = output / "checkpoints" / "checkpoint-6"
    (newest / "manifest.json").unlink()
    (newest / name).unlink()
    assert last_whole(output / "checkpoints") == output / "checkpoints" / "checkpoint-4"


@pytest.mark.parametrize("damaged", [1, 2])
def test_run_goes_on_from_the_last_whole_checkpoint_or_begins_anew(
    damaged: int, folder: Path, uninterrupted: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (6, 4)[:damaged]:
        cut(output / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    # The records of the steps that are done again, and of none that is not.
    (output / "training.jsonl").write_text('{"step": 1, "loss": 0.5}\nnonsense\n')
    train(folder, output, SHORT, resume=True)
    assert_same_result(output, uninterrupted)
    assert ("goes on from checkpoint-4" if damaged == 1 else "no checkpoint of the run is whole") in caplog.text


def test_run_on_replaced_weights_is_not_resumed(folder: Path, output: Path, uninterrupted: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    before = weights.read_bytes()
    try:
        state = load_file(weights)
        state["model.layers.0.mlp.up_proj.weight"] += 1
        save_file(state, weights, metadata={"format": "pt"})
        kept = contents(output)
        with pytest.raises(ValueError, match=r"another: weights was .{16} and is "):
            train(folder, output, SHORT, resume=True)
        assert contents(output) == kept
    finally:
        weights.write_bytes(before)
    # Runs of earlier versions do not say what they were begun on.
    run = json.loads((output / "run.json").read_text())
    del run["weights"]
    (output / "run.json").write_text(json.dumps(run))
    train(folder, output, SHORT, resume=True)
    assert_same_result(output, uninterrupted)


def test_run_of_an_earlier_version_that_tells_no_target_learns_the_published_one(output: Path) -> None:
    before = json.loads((output / "run.json").read_text())
    untold = {name: value for name, value in before["gate"].items() if not name.startswith("target_")}
    assert len(untold) == len(before["gate"]) - 2
    (output / "run.json").write_text(json.dumps(before | {"gate": untold}))
    published = {"target_keys": "max", "target_power": None}
    run_folders.check_same_run(before | {"gate": untold | published}, output)
    for other in ({"target_keys": "sum"}, {"target_power": 2.0}, {"block_q": 64}):
        with pytest.raises(ValueError, match=r"^a resumed run must be the one that was begun, got another: gate was "):
            run_folders.check_same_run(before | {"gate": untold | published | other}, output)
    # What is no gate at all is another run too.
    (output / "run.json").write_text(json.dumps(before | {"gate": [1]}))
    with pytest.raises(ValueError, match=r"got another: gate was \[1\] and is "):
        run_folders.check_same_run(before, output)


@pytest.mark.parametrize(
    ("steps", "save_steps", "told"),
    [
        # After the first step the rate of the second one leaves nothing finite: seen by the loss of the third,
        (6, 4, "losses and gradients must be finite, got others at step 3, first seen in the gate's loss of layer 0;"),
        # by the checkpoint of the second,
        (6, 1, "weights must be finite, got others at step 2, first seen in .*seer_gate.*;"),
        # or by nothing any more.
        (2, 4, "weights must be finite, got others at step 2, first seen in .*seer_gate.*;"),
    ],
)
def test_gates_that_are_not_finite_are_never_saved(
    steps: int, save_steps: int, told: str, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = replace(SHORT, steps=steps, save_steps=save_steps, logging_steps=1, warmup_steps=1, lr=3e38)
    with pytest.raises(ValueError, match=f"^{told} the run stopped .* with a smaller lr or with other text"):
        train(folder, output, config)
    saved = [output / "checkpoints" / "checkpoint-1"] if save_steps == 1 else []
    assert list((output / "checkpoints").iterdir()) == saved
    for checkpoint in saved:
        state = load_file(last_whole(output / "checkpoints") / "adapter_model.safetensors")
        assert last_whole(output / "checkpoints") == checkpoint
        assert all(bool(weight.isfinite().all()) for weight in state.values())
    assert {path.name for path in output.iterdir()} == {"checkpoints", "run.json", "training.jsonl"}
    assert all(math.isfinite(record["loss"]) for record in records(output))


def test_run_that_fails_before_its_first_record_leaves_nothing(
    folder: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty"):
        with monkeypatch.context() as patched, pytest.raises(MemoryError):

            def fail(*_: Any) -> None:
                raise MemoryError

            patched.setattr(DistillTrainer, "training_step", fail)
            train(folder, output, SHORT)
        assert output.exists() == (output.name == "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    train(folder, tmp_path / "new", SHORT)
    assert_same_result(tmp_path / "new", uninterrupted)


def test_record_that_cannot_be_written_stops_the_run_and_none_is_lost(
    folder: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = tmp_path / "out" / "training.jsonl", os.write

    def write_until_the_disk_is_full(descriptor: int, data: Any) -> int:
        if not (log.parent / "checkpoints" / "checkpoint-2").exists() or not os.path.samestat(
            os.fstat(descriptor), log.stat()
        ):
            return write(descriptor, data)
        if len(data) > 20:
            return write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write_until_the_disk_is_full(descriptor, bytes(data)))
        with pytest.raises(OSError, match=r"training\.jsonl cannot be written: No space left on device"):
            train(folder, log.parent, SHORT)
    assert records(log.parent) == records(uninterrupted)[:2]
    train(folder, log.parent, SHORT, resume=True)
    assert_same_result(log.parent, uninterrupted)


# Imports take longer than these runs, so one process begins them all, each in a process of its own.
HELD = """
import json, os, signal, sys, traceback
from pathlib import Path
sys.path[:0] = {paths!r}
import test_run_folders as here
import seerattn.training.trainer as trainer
from seerattn.training import output as outputs
calls = 0
def die(function, number, after=True):
    def dying(*arguments, **options):
        global calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = function(*arguments, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return dying
ends = {{}}
for name, (patch, _) in here.KILLS.items():
    run = os.fork()
    if run == 0:
        try:
            exec(patch)
            here.train(Path({folder!r}), Path({output!r}) / name, here.SHORT, resume=True)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    ends[name] = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
print(json.dumps(ends))
"""
# Where a run is killed, and the newest whole checkpoint that it leaves.
KILLS = {
    "before it wrote anything": ("outputs.write_whole = die(outputs.write_whole, 1, after=False)", None),
    "right after it had begun": ("outputs.write_whole = die(outputs.write_whole, 1)", None),
    "before a manifest": ("trainer.write_manifest = die(trainer.write_manifest, 2, after=False)", 2),
    "before a checkpoint is moved": ("trainer.write_manifest = die(trainer.write_manifest, 2)", 2),
    "in the deletion of an old checkpoint": (
        "def half(folder):\n    (folder / 'optimizer.pt').unlink()\ntrainer.shutil.rmtree = die(half, 1)",
        6,
    ),
}


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """The folder of all runs that were killed, how each of them ended, and what they had to say."""
    output, tests = tmp_path_factory.mktemp("killed"), Path(__file__).parents[1]
    code = HELD.format(paths=[str(tests), str(tests / "training")], folder=str(folder), output=str(output))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("name", KILLS)
def test_run_that_is_killed_while_it_saves_is_resumed_as_if_nothing_had_been(
    name: str, folder: Path, killed: tuple[Path, dict[str, int], str], uninterrupted: Path
) -> None:
    outputs, ends, told = killed
    assert ends[name] == -signal.SIGKILL, told
    output, newest = outputs / name, KILLS[name][1]
    last = last_whole(output / "checkpoints")
    assert (None if last is None else last.name) == (newest and f"checkpoint-{newest}")
    # The lock of the dead process keeps nobody out.
    assert (output / "run.lock").exists()
    train(folder, output, SHORT, resume=True)
    assert_same_result(output, uninterrupted)


HOLDER = "import sys; from pathlib import Path; from seerattn.locking import locked\n"
HOLDER += "with locked(Path(sys.argv[1]), 'output'): print('held', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "meanwhile"])
@pytest.mark.parametrize("resume", [False, True])
def test_second_process_in_a_folder_is_refused_and_changes_nothing(
    resume: bool, late: bool, folder: Path, output: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    output = output if resume else tmp_path / "new"
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        before = contents(output)
        told = f"^output must be used by one run at a time, but process {holder.pid} on "
        with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match=told):
            if late:
                # The first one came in while this one read its data.
                patched.setattr(run_folders, "check_unlocked", lambda *_: None)
            else:
                patched.setattr(DistillRun, "plan", lambda *_, **__: pytest.fail("begun"))
            train(folder, output, SHORT, resume=resume)
        assert contents(output) == before
    train(folder, output, SHORT, resume=resume)
    assert_same_result(output, uninterrupted)


def test_run_that_began_meanwhile_is_not_written_over(
    folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "new"
    wait = run_folders.locked

    def another_run_first(place: Path, name: str) -> Any:
        shutil.copytree(output, place, dirs_exist_ok=True)
        return wait(place, name)

    monkeypatch.setattr(run_folders, "locked", another_run_first)
    with pytest.raises(ValueError, match=r"^output must be a new or empty folder"):
        train(folder, other, SHORT)
    assert contents(other) == contents(output)


def test_run_that_was_killed_before_it_wrote_anything_can_be_begun_again(
    folder: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock").write_text("1 on some machine\n")
    (tmp_path / "out" / ".incomplete-machine-1-abcd1234").mkdir()
    train(folder, tmp_path / "out", SHORT)
    assert_same_result(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"steps": True}, "steps"),
        ({"context": "256"}, "context"),
        ({"steps": 10**18, "batch_size": 100}, "steps x batch_size x context"),
        ({"steps": 10**30}, "steps"),
        ({"save_steps": 10**30}, "save_steps"),
        ({"lr": 10**400}, "lr"),
        ({"report_to": "nosuch"}, "report_to"),
        ({"report_to": "wandb"}, "report_to"),
    ],
)
@pytest.mark.parametrize("kind", [DistillConfig, FinetuneConfig])
def test_config_refuses_what_the_trainer_would_refuse_later(
    kind: type, values: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=f"^{name} must "):
        kind(**{"context": 256, "steps": 10} | values)


def test_messages_are_shown_to_who_has_set_up_no_logging(output: Path, capfd: pytest.CaptureFixture) -> None:
    cut(output / "checkpoints" / "checkpoint-6" / "optimizer.pt")
    code = "import sys, pathlib\nfrom seerattn.training.checkpoints import *\nlast_whole(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, output / "checkpoints"], check=True)
    assert "the run goes on from checkpoint-4" in capfd.readouterr().err
    assert logging.getLogger("seerattn").handlers == []
