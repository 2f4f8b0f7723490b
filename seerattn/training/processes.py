"""The processes of a training run, as torchrun and accelerate tell of them."""

from __future__ import annotations

import os


def processes() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Whether accelerate was told to shard the model of the run by FSDP."""
    return "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_main() -> bool:
    """Whether this process is the one that writes and shows."""
    return os.environ.get("RANK", "0") == "0"
