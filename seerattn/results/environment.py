"""Where a result comes from: software, machine, command, weights, and a clock."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
import time
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_FINGERPRINT_BYTES = 1 << 20
_WEIGHTS = (".safetensors", ".bin", ".pth")


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
