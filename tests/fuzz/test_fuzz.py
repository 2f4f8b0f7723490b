"""Whatever is wrong with arguments and files, a command says so in one sentence and harms no file.

`make fuzz` tries more of it; ``SEERATTN_FUZZ_TRIES`` is how many, ``SEERATTN_FUZZ_SEED`` where they begin.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from mutations import VALUES, copy_folder, mutate_file, mutated_arguments
from tiny_models import tiny_model, tokens

from seerattn.cli import main
from seerattn.hf.attach import attach, detach, set_policy
from seerattn.results.file import read_results

TRIES = int(os.environ.get("SEERATTN_FUZZ_TRIES", "90"))
SEED = int(os.environ.get("SEERATTN_FUZZ_SEED", "0"))
# A command of this size takes a second or two; so long says that a size was not looked at.
PATIENCE = 30

TEXT = ["--model", "model", "--data", "docs.jsonl", "--device", "cpu"]
METHODS = ["--methods", "dense,gate,name=mine,gates=gates", "--densities", "0.6", "--max-docs", "2"]
SEARCH = [*TEXT, "--max-docs", "2", "--set", "context=128", "--set", "seed=0"]
BENCH = ["--shape", "2x1x32", "--device", "cpu", "--set", "dtype=float32"]
# Commands that are good, with the files that each of them reads.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "report": (
        ["report", "r.jsonl", "maps.npz", "--output", "out"],
        ["r.jsonl"] * 4 + ["maps.npz"],
    ),
    "earlier": (["report", "earlier.jsonl", "--output", "out"], ["earlier.jsonl"]),
    "curves": (["report", "training.jsonl", "--output", "out"], ["training.jsonl"]),
    "perplexity": (
        ["eval", *TEXT, *METHODS, "--gates", "gates", "--contexts", "96", "--batch", "1", "--output", "new.jsonl"],
        ["gates/adapter_config.json", "gates/adapter_model.safetensors", "model/config.json", "model/model.safetensors",
         "docs.jsonl", "model/tokenizer.json"],
    ),
    "resumed": (
        ["eval", *TEXT, *METHODS, "--methods", "gate,name=own,gates=gates,policy=saved", "--contexts", "96",
         "--output", "r.jsonl"],
        ["r.jsonl", "gates/adapter_config.json"],
    ),
    "retrieval": (
        ["eval", *TEXT, *METHODS, "--contexts", "128", "--tasks", "passkey,depths=0.5,n=1,seed=0",
         "--set", "last_rows_dense=0", "--output", "new.jsonl"],
        ["docs.jsonl", "gates/adapter_config.json"],
    ),
    "recall": (
        ["eval", *TEXT, *METHODS, "--contexts", "96", "--tasks", "recall,windows=1,max_docs=1", "--set", "name=m",
         "--output", "new.jsonl"],
        ["gates/adapter_model.safetensors", "docs.jsonl"],
    ),
    "calibrate": (
        ["calibrate", *TEXT, "--gates", "gates", "--contexts", "256", "--density", "0.9", "--set", "max_docs=2"],
        ["gates/adapter_config.json", "gates/adapter_model.safetensors"],
    ),
    "budgets": (
        ["calibrate", *TEXT, "--gates", "gates", "--contexts", "256", "--budgets", "--set", "ladder=0.8,0.9",
         "--set", "gain=sum:1", "--set", "max_docs=2"],
        ["gates/adapter_config.json"],
    ),
    "experiment": (
        ["eval", "--config", "experiment.yaml", "--device", "cpu", "--limit", "1", "--dry-run"],
        ["experiment.yaml"] * 4 + ["plan.json", "gates/adapter_config.json", "model/config.json"],
    ),
    "run": (
        ["eval", "--config", "experiment.yaml", "--device", "cpu", "--limit", "1", "--only", "mine",
         "--output", "r.jsonl"],
        ["experiment.yaml", "r.jsonl"],
    ),
    "official": (
        ["search", "minference", "--model", "model", "--set", "official=official.json", "--output", "new.json"],
        ["official.json", "model/config.json"],
    ),
    "plan": (
        ["search", "minference", *SEARCH, "--set", "block_q=32", "--set", "block_k=32", "--set", "density=0.9",
         "--output", "plan.json"],
        ["plan.json", "model/config.json"],
    ),
    "thresholds": (
        ["search", "xattention", *SEARCH, "--set", "stride=8", "--set", "block=32", "--set", "windows=1",
         "--output", "new.json"],
        ["docs.jsonl"],
    ),
    "bench": (["bench", "map", *BENCH, "--contexts", "64", "--output", "new.jsonl"], []),
    "distill": (
        ["distill", *TEXT, "--context", "128", "--steps", "1", "--gate", "paper", "--gate", "block_q=32", "--set",
         "seed=1", "--output", "new", "--dry-run"],
        ["docs.jsonl"],
    ),
}  # fmt: skip
# Files that a command may change when it succeeds: its output, and what calibration writes into gates.
OWN = {
    "resumed": "r.jsonl", "run": "r.jsonl", "plan": "plan.json", "calibrate": "gates/adapter_config.json",
    "budgets": "gates/adapter_config.json",
}  # fmt: skip


# Commands that leave nothing behind where they end with a sentence.
WHOLE = ("report", "earlier", "curves", "official", "experiment")


class Hang(BaseException):
    """A command that takes too long."""


def fuzzed(name: str, base: Path, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """A folder and arguments with one or two things wrong, and what they are."""
    copy_folder(base, folder)
    arguments, files = COMMANDS[name]
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        if files and rng.random() < 0.6:
            path = folder / rng.choice(files)
            if path.is_file():
                done.append(mutate_file(path, rng))
        else:
            arguments = mutated_arguments(arguments, rng)
            done.append("arguments")
    return arguments, ", ".join(done)


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file, link and folder with its content."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        content = str(os.readlink(path)) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = content
    return found


def run(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int | None, str, str, str]:
    """Exit code, output, errors and, if it did not end as a command does, where it broke."""

    def hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(PATIENCE)
    broke, code = "", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(arguments)
    except SystemExit as stop:
        code = stop.code
    except (Exception, Hang):
        broke = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    shown = capsys.readouterr()
    return code, shown.out, shown.err, broke


def judged(name: str, arguments: list[str], before: dict, after: dict, ended: tuple) -> str:
    """What is wrong with how a command ended; nothing if it ended well."""
    code, out, err, broke = ended
    if broke:
        return broke
    if code not in (0, 1, 2):
        return f"exit code {code}"
    usage = "Usage:" in err or "\N{BOX DRAWINGS LIGHT HORIZONTAL} Error" in err
    if code == 2 and not usage and sum(line.startswith("seerattn: ") for line in err.splitlines()) != 1:
        return f"no sentence: {err!r}"
    if code == 0 and not out and "is in" not in err:
        return "success without a result"
    if "\x1b[2J" in out + err:
        return "control characters reach the terminal"
    own = {OWN.get(name)} if code != 2 or name in ("resumed", "run") else set()
    # Results may be appended to a file of results that the arguments name, wherever it is.
    changed = [place for place in before if after.get(place) != before[place] and place not in own]
    changed = [place for place in changed if not appended(place, arguments, before, after)]
    if changed:
        return f"changed {changed}"
    left = [place for place in after if place not in before and place.endswith(".incomplete")]
    if left or (
        code == 2
        and name in ("report", "earlier", "curves", "official", "experiment")
        and after.keys() != before.keys()
    ):
        return f"left {sorted(after.keys() - before.keys())}"
    # A dry run whose flag was changed trains, and writes a curve.
    results = [place for place in after if place.endswith(".jsonl") and place not in before]
    results = [place for place in results if Path(place).name != "training.jsonl"]
    for place in results:
        if not read_results([Path(place)]):
            return f"an empty {place}"
    return ""


def appended(place: str, arguments: list[str], before: dict, after: dict) -> bool:
    """Whether a results file that is named as an output has grown, cut lines and groups at its end aside."""
    if place not in arguments or not isinstance(after.get(place), bytes):
        return False
    kept = before[place].rsplit(b"\n", 1)[0]
    return before[place] == b"" or after[place].startswith(kept) or kept.startswith(after[place])


def test_no_mistake_ends_in_a_traceback_or_harms_a_file(workplace, tmp_path, capsys, monkeypatch) -> None:
    findings: list[str] = []
    codes: Counter = Counter()
    names = list(COMMANDS)
    for number in range(SEED, SEED + TRIES):
        rng = random.Random(f"fuzz {number}")
        name = names[number % len(names)]
        folder = tmp_path / str(number)
        arguments, done = fuzzed(name, workplace, folder, rng)
        monkeypatch.chdir(folder)
        before = snapshot(folder)
        ended = run(arguments, capsys)
        wrong = judged(name, arguments, before, snapshot(folder), ended)
        codes[ended[0]] += 1
        if wrong:
            findings.append(f"try {number}, {done}\nseerattn {arguments}\n{wrong}")
            with capsys.disabled():
                print(ascii(findings[-1]).replace("\\n", "\n"), file=sys.stderr)
        monkeypatch.chdir(tmp_path)
        remove(folder)
    with capsys.disabled():
        print(f"\n{TRIES} tries, exit codes {dict(codes)}, {len(findings)} findings", file=sys.stderr)
    assert not findings, "\n\n".join(findings)
    # Damage that every command takes, or that every one refuses, would say nothing.
    assert codes[2] > TRIES // 3 and codes[0] > TRIES // 20


def remove(folder: Path) -> None:
    """A try leaves nothing behind: thousands of copies of a model would fill the disk."""
    shutil.rmtree(folder, ignore_errors=True)


def places(value: object, above: tuple = ()) -> list[tuple]:
    """Every place in JSON values, those of lists by their first one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [place for name, one in inner for place in ((*above, name), *places(one, (*above, name)))]


def test_no_value_in_a_record_breaks_a_report(workplace, tmp_path, capsys, monkeypatch) -> None:
    """Every quantity, each of its fields: what a report takes, it can show. Nothing is painted, which takes seconds."""

    def outline(figure: Figure, path: Path, **_: object) -> None:
        Path(path).write_text('<svg width="9pt" height="9pt"></svg>')

    monkeypatch.setattr(Figure, "savefig", outline)
    lines = [json.loads(line) for line in (workplace / "r.jsonl").read_text().splitlines()]
    todo = [(number, place) for number, line in enumerate(lines) for place in places(line)]
    findings = []
    for number in range(SEED, SEED + TRIES):
        rng = random.Random(f"record {number}")
        line, place = rng.choice(todo)
        changed = json.loads(json.dumps(lines))
        spot = changed[line]
        for name in place[:-1]:
            spot = spot[name]
        if rng.random() < 0.2:
            del spot[place[-1]]
        else:
            spot[place[-1]] = rng.choice(VALUES)
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed))
        code, _, _, broke = run(["report", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "out")], capsys)
        if broke or code not in (0, 2):
            findings.append(f"try {number}, {lines[line]['what']} {place}: {broke or code}")
    with capsys.disabled():
        print(f"\n{TRIES} records, {len(findings)} findings", file=sys.stderr)
    assert not findings, "\n\n".join(findings)


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_mistake_every_command_succeeds(name: str, workplace, tmp_path, capsys, monkeypatch) -> None:
    if name in ("resumed", "run"):
        return
    folder = copy_folder(workplace, tmp_path / "good")
    monkeypatch.chdir(folder)
    if name == "plan":
        (folder / "plan.json").unlink()
    code, _, err, broke = run(COMMANDS[name][0], capsys)
    assert (code, broke) == (0, ""), err


def test_damaged_gates_are_refused_or_leave_the_model_as_it_was(workplace, tmp_path, capsys) -> None:
    """Whatever an adapter folder holds: a sentence, or gates that go again without a trace."""
    model, ids = tiny_model("llama"), tokens(1, 70)
    with torch.no_grad():
        clean = model(ids).logits
    findings = []
    for number in range(SEED, SEED + TRIES):
        rng = random.Random(f"gates {number}")
        folder = copy_folder(workplace / "gates", tmp_path / str(number))
        files = ["adapter_config.json", "adapter_model.safetensors"]
        done = [mutate_file(folder / rng.choice(files), rng)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gated = attach(model, folder)
                with torch.no_grad():
                    sparse = gated(ids).logits
                    set_policy(gated, None)
                    same = torch.equal(gated(ids).logits, clean)
                model = detach(gated)
            if not same or not sparse.isfinite().all():
                findings.append(f"try {number}, {done}: the model is another one, or its logits are not finite")
        except (ValueError, OSError):
            pass
        except Exception:
            findings.append(f"try {number}, {done}\n{traceback.format_exc()}")
        with torch.no_grad():
            if not torch.equal(model(ids).logits, clean):
                findings.append(f"try {number}, {done}: the model is another one afterwards")
                model = tiny_model("llama")
        remove(folder)
    with capsys.disabled():
        print(f"\n{TRIES} folders of gates, {len(findings)} findings", file=sys.stderr)
    assert not findings, "\n\n".join(findings)
