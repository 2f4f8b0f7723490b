"""Runs a test file as a script in two processes that talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch_two(*arguments: str) -> subprocess.CompletedProcess:
    """Runs what `torchrun` takes twice side by side, on CPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def in_two_processes(script: str, folder: Path) -> None:
    """Runs ``script FOLDER`` so; what goes wrong in a process is shown."""
    done = launch_two(script, str(folder))
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)[-2000:]
