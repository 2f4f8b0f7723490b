"""What the commands that train share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

TRAINING = "Training"  # the panel of --help

DataOption = Annotated[
    list[str], typer.Option(help=".jsonl or .txt file (also .gz, .bz2, .xz), folder, or dataset; can be repeated.")
]
ContextOption = Annotated[int, typer.Option(help="Tokens of a sample.")]
StepsOption = Annotated[int, typer.Option(help="Optimizer steps.")]
BatchSizeOption = Annotated[int, typer.Option(help="Samples of a step, over all processes.", rich_help_panel=TRAINING)]
MicroBatchSizeOption = Annotated[
    int, typer.Option(help="Samples that one process runs at once.", rich_help_panel=TRAINING)
]
WarmupStepsOption = Annotated[
    int | None, typer.Option(help="Steps of warm-up; default 20, or 5 % of a short run.", rich_help_panel=TRAINING)
]
LoggingStepsOption = Annotated[int, typer.Option(help="Steps between records.", rich_help_panel=TRAINING)]
SaveStepsOption = Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=TRAINING)]
KeepCheckpointsOption = Annotated[int, typer.Option(help="Checkpoints to keep.", rich_help_panel=TRAINING)]
ReportToOption = Annotated[str, typer.Option(help="Tracker, such as wandb or tensorboard.", rich_help_panel=TRAINING)]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...; default: cuda if there is one.", rich_help_panel=TRAINING)
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder.", rich_help_panel=TRAINING)
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=TRAINING)
]
SeedOption = Annotated[int, typer.Option(help="Seed of gates and data.", rich_help_panel=TRAINING)]


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
