"""What the commands that train share."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from seerattn.eval.arms import EvalModel

TRAINING = "Training"  # the panel of --help
LOSSES = "kl, mse, smooth_l1, overlap or ranking"

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
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
SeedOption = Annotated[int, typer.Option(help="Seed of gates and data.", rich_help_panel=TRAINING)]


def local_device(name: str | None) -> torch.device:
    """The device of that name, under torchrun the GPU of this process.

    Raises:
        ValueError: there is no such device here.
    """
    from seerattn.eval.arms import choose_device

    # Each process asks for its own GPU alone: a context of every process on the first one would fill it.
    on_gpu = choose_device().type == "cuda" if name is None else name == "cuda"
    if on_gpu and "LOCAL_RANK" in os.environ:
        return choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return choose_device(name)


def load_base(
    name: str,
    *,
    device: torch.device,
    dtype: str,
    context: int = 0,
    dry_run: bool,
    trust_remote_code: bool = False,
) -> EvalModel:
    """Loads a model to be trained and its tokenizer, for a dry run without its weights.

    Under FSDP of accelerate weights go to the memory of the host, to be sharded from there when training begins; with
    ``fsdp_cpu_ram_efficient_loading`` the first process alone reads them.

    Args:
        name: a folder or the name of a model on the Hub.
        device: where it will train.
        dtype: of the weights, see `seerattn.eval.arms.choose_dtype`.
        context: longest context that will be asked for.
        dry_run: whether nothing will be trained.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: no such model, a context longer than the model's, or FSDP that cannot be used.
    """
    import torch
    from transformers.integrations import is_fsdp_enabled

    from seerattn.eval.arms import choose_dtype, load_eval_model
    from seerattn.training.runs import is_main, is_sharded

    place = device
    if dry_run:
        place = torch.device("meta")
    elif is_sharded():
        _begin_fsdp(device)
        place = torch.device("cpu" if is_main() or not is_fsdp_enabled() else "meta")
    return load_eval_model(
        name,
        device=place,
        dtype=choose_dtype(dtype, device),
        context=context,
        trust_remote_code=trust_remote_code,
    )


def _begin_fsdp(device: torch.device) -> None:
    """Starts the process group, which the Trainer would do only when the model is loaded.

    Raises:
        ValueError: accelerate would not shard on that device, would by FSDP1, or would round gates.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("fsdp_version must be 2, got 1; add --fsdp_version 2 to accelerate launch")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ValueError(
            f"mixed_precision must be no with FSDP, which would round the weights of gates as well, got {precision}; "
            "add --mixed_precision no to accelerate launch and choose by --dtype"
        )
    # While the first process reads hundreds of GiB, the others wait for it.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=2))
    if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(f"FSDP needs an accelerator for every process, got device {device}; launch without --use_fsdp")


def show_plan(described: dict[str, str]) -> None:
    """Shows what will be done."""
    from rich.table import Table

    from seerattn.cli.terminal import screen
    from seerattn.texts import visible

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    for name, value in described.items():
        table.add_row(visible(name), visible(value))
    screen().print(table)
