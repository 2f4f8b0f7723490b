"""The output folder of a run: what may be in it, who works in it, and what decides the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from seerattn.gate import AttnGateConfig
from seerattn.hf.distillation import DECODE_ROWS
from seerattn.locking import LOCK_NAME, check_unlocked, locked
from seerattn.outputs import check_folder
from seerattn.saving import is_staging, sweep, write_whole
from seerattn.training.card import is_card

LOG_NAME = "training.jsonl"
RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
# Folder of the gates that `seerattn finetune` writes.
GATES_NAME = "gates"
# What may differ between a run and its continuation: nothing that changes a weight or a record.
_FREE_TO_CHANGE = ("save_steps", "keep_checkpoints", "micro_batch_size", "report_to", "gradient_checkpointing")
# Facts that runs of earlier versions do not have, and what options were that they did not know.
_ADDED = ("weights",)
_EARLIER = {"phase": "prefill", "decode_rows": DECODE_ROWS}


def check_output(output: Path, *, resume: bool) -> None:
    """Refuses to write over what is there.

    Raises:
        ValueError: the output cannot be written, another process works in it, it holds something and is not to be
            resumed, or it is to be resumed and holds no run.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    check_folder(output, "output")
    check_unlocked(output, "output")
    _check_held(output, resume=resume)


def _check_held(output: Path, *, resume: bool) -> None:
    """`check_output` of what a folder holds."""
    # What a run leaves that was killed before it began is nothing.
    if not output.exists() or all(entry.name == LOCK_NAME or is_staging(entry) for entry in output.iterdir()):
        return
    if not resume:
        raise ValueError(
            f"output must be a new or empty folder, got {output}; choose another one, or resume the run in it"
        )
    _read_run(output)


def _read_run(output: Path) -> dict[str, Any]:
    """What decided the run in a folder."""
    path = output / RUN_NAME
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"output must be the folder of a run to be resumed, got {output} without {RUN_NAME}; name another one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"output must hold what decided its run, got {path}, which is no JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict) or "data_hash" not in run:
        raise ValueError(
            f"output must be the folder of a run to be resumed, got {output} with another {RUN_NAME}; name another one"
        )
    return run


def check_same_run(facts: dict[str, Any], output: Path) -> None:
    """Refuses to resume a run that was begun otherwise; a folder without a run is none.

    Raises:
        ValueError: what decides the run differs from what the folder says.
    """
    if not (output / RUN_NAME).exists():
        return
    before = _read_run(output)
    now, then = (dict(f, **f["config"]) for f in (json.loads(json.dumps(facts)), before))
    for told in (now, then):
        if isinstance(told.get("gate"), dict):
            # Runs of earlier versions do not tell every field; one that does not tell its target learned the published.
            told["gate"] = AttnGateConfig.from_dict(told["gate"]).to_dict()
    then = {name: value for name, value in _EARLIER.items() if name in now} | then
    names = [name for name in now | then if name not in ("config", "data", *_FREE_TO_CHANGE)]
    changed = [n for n in names if now.get(n) != then.get(n) and (n in then or n not in _ADDED)]
    if changed:
        told = ", ".join(f"{name} was {then.get(name)} and is {now.get(name)}" for name in changed)
        raise ValueError(f"a resumed run must be the one that was begun, got another: {told}")


@contextmanager
def begun(output: Path, facts: dict[str, Any], *, resume: bool, main: bool) -> Iterator[None]:
    """The run of these facts in its folder, which inside the ``with`` belongs to the main process of this run alone.

    A run that ends by an error before there is a record or a checkpoint of it leaves nothing, so that the command can
    be given again.

    Args:
        output: the folder, made if it is not there.
        facts: what decides the run.
        resume: whether the folder may hold the run already.
        main: whether this process writes; the others do nothing here.

    Raises:
        ValueError: see `check_output` and `check_same_run`.
    """
    if not main:
        yield
        return
    new_folder = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output, "output"):
            # Another run may have begun since the output was looked at.
            _check_held(output, resume=resume)
            check_same_run(facts, output)
            with _recorded(output, facts):
                yield
    except BaseException:
        if new_folder:
            _remove_empty(output)
        raise


@contextmanager
def _recorded(output: Path, facts: dict[str, Any]) -> Iterator[None]:
    run = output / RUN_NAME
    sweep(output, alone=True)
    if run.exists():
        yield
        return
    write_whole(run, json.dumps(facts, indent=2) + "\n")
    try:
        yield
    except BaseException:
        if not (output / LOG_NAME).exists():
            _remove_empty(output / CHECKPOINTS_NAME)
            run.unlink()
        raise


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def check_replaced(output: Path) -> None:
    """Refuses files that a run did not write in the place of those that it will write.

    Raises:
        ValueError: names the first one.
    """
    for name, is_ours in _WRITTEN.items():
        path = output / name
        if path.exists() and not is_ours(path):
            raise ValueError(
                f"output must hold nothing in the place of what its run writes, got {path}, which is not of a run; "
                "move it away"
            )


def _is_log(path: Path) -> bool:
    with path.open(errors="replace") as file:
        line = file.readline()
    # A kill may have left half of the first record.
    return line.startswith('{"step": ') or '{"step": '.startswith(line)


def _is_card(path: Path) -> bool:
    return path.is_file() and is_card(path.read_text(errors="replace"))


def _is_gate_config(path: Path) -> bool:
    try:
        return json.loads(path.read_text(errors="replace"))["peft_type"] == "SEER"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


_WRITTEN = {
    LOG_NAME: _is_log,
    "README.md": _is_card,
    "adapter_config.json": _is_gate_config,
    # Moved before the model, so it may be there without it.
    GATES_NAME: lambda path: _is_card(path / "README.md"),
}


def records(output: Path) -> list[dict[str, Any]]:
    """The records of a run, in order of the steps."""
    return [json.loads(line) for line in (output / LOG_NAME).read_text().splitlines()]
