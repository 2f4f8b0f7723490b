"""What the commands that train share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def local_device(name: str | None) -> torch.device:
    """The device of that name, under torchrun the GPU of this process.

    Raises:
        ValueError: there is no such device here.
    """
    from seerattn.eval.arms import choose_device

    place = choose_device(name)
    if place.type == "cuda" and "LOCAL_RANK" in os.environ:
        place = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return place


def show_plan(described: dict[str, str]) -> None:
    """Shows what will be done."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    for name, value in described.items():
        table.add_row(name, value)
    Console().print(table)
