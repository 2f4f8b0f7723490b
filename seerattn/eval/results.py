"""Results: one JSON line a measured value, appended as it is measured, read by tables and plots.

A line says what was measured, on what, how, and with which software and machine. Its `Result.key` names the cell it
fills, so an interrupted evaluation that is started again measures only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_FINGERPRINT_BYTES = 1 << 20
_WEIGHTS = (".safetensors", ".bin", ".pth")
# What a result says of how it came about; two results that differ in nothing else fill the same cell.
_PROVENANCE = ("value", "n", "stderr", "realised_density", "samples", "versions", "device", "git", "command")
_PROVENANCE += ("seconds", "timestamp")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured value.

    Attributes:
        what: the quantity, such as "perplexity", "accuracy" or "target_recall".
        value: the value; None where it is not finite, which JSON cannot hold.
        n: how many samples it rests on, in `unit`.
        unit: what `n` counts: "tokens", "documents", "sequences".
        stderr: standard error of the value, None where it is not known.
        model: name or folder of the base model.
        gates: name of the gates, None for selectors without.
        weights: fingerprints of the model's and the gates' weights, see `fingerprint`.
        selector: "dense", "gate", or the name of another way of choosing blocks.
        policy: `Policy.to_dict`, or the settings of a family with the "knob" that was tuned; None for dense.
        density: density that was asked for, None if the policy has none.
        realised_density: counted, forced blocks included, averaged over layers, heads and documents.
        context: tokens of the context.
        text: kind of text.
        seed: seed of generated documents, None where nothing is drawn.
        cell: everything else that sets this value apart: layer, head, depth, limits of the data, dtype, "budget" (what
            was asked for, a density or a share of the time of dense attention) and "share". A "note" there is a
            sentence for the reader and sets nothing apart.
        samples: what a reader needs to compare rows sample by sample, such as the summed loss of each document.
        versions: of seerattn, torch, transformers and python.
        device: the accelerator or processor.
        git: commit of the source, "+" appended if files were changed; None outside of a checkout.
        command: the command line.
        seconds: wall time of the measurement; values measured together share it.
        timestamp: UTC, ISO 8601.
    """

    what: str
    value: float | None
    n: int
    unit: str
    model: str
    selector: str
    context: int
    text: str
    stderr: float | None = None
    gates: str | None = None
    weights: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] | None = None
    density: float | None = None
    realised_density: float | None = None
    seed: int | None = None
    cell: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    git: str | None = None
    command: str = ""
    seconds: float | None = None
    timestamp: str = ""

    @property
    def key(self) -> str:
        """Canonical JSON of what was asked for: equal for two measurements of the same cell."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PROVENANCE}
        asked["cell"] = {name: value for name, value in self.cell.items() if name != "note"}
        return json.dumps(asked, sort_keys=True)

    @property
    def arm(self) -> str:
        """Name of the line this value belongs to in a table or figure: the gates' name, or the selector's."""
        blocks = self.cell.get("block_k", 64)
        return self.gates or (self.selector if blocks == 64 else f"{self.selector} {blocks}")


class ResultsFile:
    """A file of results that is appended to, one whole line at a time.

    Nothing is created before the first `append`. A last line without a line end was cut off by an interruption: it is
    ignored, and removed when writing goes on.

    Args:
        path: the file; None keeps results in memory only.
        device: what the measurements run on.

    Raises:
        ValueError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path | None, device: torch.device | str = "cpu") -> None:
        self.path = path
        if path is not None:
            there = next(p for p in (path, *path.absolute().parents) if p.exists())
            if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
                raise ValueError(f"output must be a file that can be written, got {path}")
        found = read_results([path]) if path is not None and path.exists() else []
        self._by_key = {result.key: result for result in found}
        self._provenance = environment(device)

    def find(self, result: Result) -> Result | None:
        """The finished result of the same cell, if there is one."""
        return self._by_key.get(result.key)

    def append(self, result: Result, seconds: float | None = None) -> Result:
        """Writes a result, stamped with the environment.

        Returns:
            The result as it stands in the file.
        """
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        result = replace(result, **self._provenance, seconds=seconds, timestamp=stamp)
        if self.path is not None:
            self._write(json.dumps(_finite(asdict(result))) + "\n")
        self._by_key[result.key] = result
        return result

    def draft(self) -> ResultsFile:
        """A file in memory that finds what this one holds; `adopt` writes what it was given."""
        draft = ResultsFile(None)
        draft._provenance, draft._by_key = self._provenance, ChainMap({}, self._by_key)
        return draft

    def adopt(self, draft: ResultsFile, note: str | None = None) -> None:
        """Writes the results of a draft, with a sentence for the reader if there is something to say."""
        for result in draft._by_key.maps[0].values():
            noted = replace(result, cell=result.cell | {"note": note}) if note else result
            self.append(noted, result.seconds)

    def setdefault(self, result: Result, seconds: float | None = None) -> Result:
        """The finished result of the same cell, or else this one, appended."""
        return self.find(result) or self.append(result, seconds)

    def _write(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Reads results files; a half-written last line is ignored.

    Raises:
        ValueError: a file is missing or a line is not a result.
    """
    names = {f.name for f in fields(Result)}
    results = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"results must be files of JSON lines, got {path}, which is none")
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(True), 1):
            if not line.endswith("\n"):
                break
            try:
                values = json.loads(line)
                unknown = set(values) - names
                results.append(Result(**{name: values[name] for name in set(values) - unknown}))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} must hold a result in every line, line {number} is none") from error
            if unknown:
                raise ValueError(f"{path} must hold results of this version, line {number} has {sorted(unknown)}")
    return results


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which are not JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def environment(device: torch.device | str) -> dict[str, Any]:
    """The fields of a `Result` that describe software, machine and command."""
    return _machine(device) | {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}


@lru_cache
def _machine(device: torch.device | str) -> dict[str, Any]:
    """What stays the same for the life of the process."""
    return {
        "versions": {name: package_version(name) for name in ("seerattn", "torch", "transformers")}
        | {"python": platform.python_version()},
        "device": _device_name(torch.device(device)),
        "git": _git_commit(),
    }


def package_version(package: str) -> str:
    """Version of an installed package; "source" for one that runs from its checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _git_commit() -> str | None:
    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # An installed copy may lie inside somebody else's repository.
    if not commit or git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def fingerprint(path: Path | str) -> str:
    """Short hash of the weights in a folder, so that results of replaced weights are not taken for finished.

    Hashes size, head and tail of each weights file, which is quick for any model; a name that is no folder stands for
    itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_FINGERPRINT_BYTES))
            handle.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(handle.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


class Stopwatch:
    """Wall time since it was made, the queued work of an accelerator included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def seconds(self) -> float:
        return round(self._now() - self._begin, 3)
