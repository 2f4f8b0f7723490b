"""Runs a test file as a script in two processes that talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def in_two_processes(script: str, folder: Path) -> None:
    """Runs ``script FOLDER`` twice side by side; what goes wrong in a process is shown."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, script, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)[-2000:]
