"""Checkpoints of a run: which one is whole, and the newest that is."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from seerattn.saving import sweep

MANIFEST_NAME = "manifest.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_CHUNK = 1 << 24
# Checkpoints of earlier versions have no manifest: what a run cannot go on without.
_NEEDED = ("trainer_state.json", "scheduler.pt", "optimizer*")


def write_manifest(checkpoint: Path) -> None:
    """Writes down what is in a finished checkpoint, by which damage is found out later."""
    files = {str(path.relative_to(checkpoint)): _content(path) for path in _files(checkpoint)}
    (checkpoint / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=2) + "\n")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if all of it is as it was written."""
    if not (checkpoint / MANIFEST_NAME).exists():
        missing = [name for name in _NEEDED if not any(path.stat().st_size for path in checkpoint.glob(name))]
        return f"it has no {missing[0]}" if missing else None
    try:
        files = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
        wrong = [name for name, content in files.items() if _content(checkpoint / name) != content]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_NAME} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"{wrong[0]} is damaged" if wrong else None


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole. It is told which newer ones are not."""
    log = logging.getLogger(__name__)
    passed = False
    for checkpoint in reversed(checkpoints(folder)):
        found = damage(checkpoint)
        if found is None:
            if passed:
                log.warning("the run goes on from %s", checkpoint.name)
            return checkpoint
        log.warning("%s is left out: %s", checkpoint, found)
        passed = True
    if passed:
        log.warning("no checkpoint of the run is whole: it begins anew")
    return None


def was_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint is of a model that FSDP had sharded; accelerate then saves its weights by another name."""
    return any(checkpoint.glob("pytorch_model_fsdp*"))


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, whole or not, in order of their steps."""
    return sorted((path for path in folder.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def delete_checkpoints(folder: Path) -> None:
    """Deletes all of them, and the folder if nothing else is in it."""
    sweep(folder, alone=True)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _content(path: Path) -> list[int]:
    """Size and CRC of a file. Nobody forges checkpoints, and those of large models are hundreds of GB."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
