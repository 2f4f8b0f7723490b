"""What the commands that train share: all of it but how they train."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from rich.table import Table

from seerattn.cli.terminal import say, screen
from seerattn.gate import AttnGateConfig
from seerattn.options import check_options, option
from seerattn.texts import visible
from seerattn.training.config import TRAINING, RunConfig
from seerattn.training.output import check_output
from seerattn.training.processes import is_main, is_sharded
from seerattn.training.run import TrainingRun

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GATES = "Gates"  # the panel of --help
R = TypeVar("R", bound=TrainingRun)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, on what, from which gates on, and where.

    Attributes:
        model: a folder or the name of a model on the Hub.
        data: see `seerattn.data.text.read_documents`.
        output: folder of the result.
        gates: folder of gates to start from, which have their form.
        gate: form of fresh gates.
        layers: with a fresh gate, such as "0-3,7"; None is all.
        device: see `choose_device`; under torchrun the GPU of this process.
        dtype: of the weights, see `choose_dtype`.
        trust_remote_code: whether code that comes with the model may run.
        resume: continue the run in the output folder.
        dry_run: show the plan and write nothing.
    """

    model: str = option(help="Model: a folder or Hub id.")
    data: tuple[str, ...] = option(
        help=".jsonl or .txt file (also .gz, .bz2, .xz), folder, or dataset; can be repeated.", repeat=True
    )
    output: Path = option(help="New folder for the result.")
    gates: Path | None = option(None, help="Trained gates to start from; default: fresh ones.", panel=_GATES)
    gate: AttnGateConfig | None = option(
        None,
        help="Form of fresh gates.",
        forms={"default": AttnGateConfig, "paper": AttnGateConfig.paper},
        panel=_GATES,
    )
    layers: str | None = option(None, help="Layers with a fresh gate, such as 0-3,7; default all.", panel=_GATES)
    device: str | None = option(None, help="cpu, cuda, ...; default: cuda if there is one.", panel=TRAINING)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="Of the weights; auto: what fits the device and the command.", panel=TRAINING
    )
    trust_remote_code: bool = option(False, help="Run code that comes with the model.", panel=TRAINING)
    resume: bool = option(False, help="Continue the run in the output folder.", panel=TRAINING)
    dry_run: bool = option(False, help="Show the plan and write nothing.", panel=TRAINING)

    def __post_init__(self) -> None:
        check_options(self)


def train(kind: type[TrainingRun], config: RunConfig, setup: Setup) -> None:
    """Plans a run, shows the plan, and carries it out.

    Raises:
        ValueError: what is asked for does not fit together; nothing was written.
    """
    run = plan(kind, config, setup)
    if is_main():
        show_plan(run.describe(every_way=setup.dry_run))
    if setup.dry_run:
        return
    try:
        run.run(setup.output, resume=setup.resume)
    except ValueError as error:
        from seerattn.training.trainer import Stopped

        # Of what all processes found together one tells.
        if isinstance(error, Stopped) and not is_main():
            raise SystemExit(2) from error
        raise
    if is_main():
        say(f"what was trained is in {setup.output}")


def plan(kind: type[R], config: RunConfig, setup: Setup) -> R:
    """A run that is ready, see `TrainingRun.plan`; arguments and errors are those of `train`."""
    layers = _layers(setup.layers)
    check_output(setup.output, resume=setup.resume)
    device = _local_device(setup.device)
    model, tokenizer = _load(setup, device)
    start = {"gates": setup.gates, "gate": setup.gate, "layers": layers}
    return kind.plan(model, tokenizer, setup.data, config, **start, device=device)


def _layers(text: str | None) -> list[int] | None:
    """Indices out of a list such as "0-3,7".

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers must be numbers and ranges such as 0-3,7, got {text!r}")
        layers += range(int(first), int(last or first) + 1)
    return sorted(set(layers))


def _local_device(name: str | None) -> torch.device:
    """The device of that name, under torchrun the GPU of this process.

    Raises:
        ValueError: there is no such device here.
    """
    from seerattn.hf.eval_model import choose_device

    # Each process asks for its own GPU alone: a context of every process on the first one would fill it.
    on_gpu = choose_device().type == "cuda" if name is None else name == "cuda"
    if on_gpu and "LOCAL_RANK" in os.environ:
        return choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return choose_device(name)


def _load(setup: Setup, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model to be trained and its tokenizer, for a dry run without its weights.

    Under FSDP of accelerate weights go to the memory of the host, to be sharded from there when training begins; with
    ``fsdp_cpu_ram_efficient_loading`` the first process alone reads them.

    Raises:
        ValueError: no such model, or FSDP that cannot be used.
    """
    import torch
    from transformers.integrations import is_fsdp_enabled

    from seerattn.hf.eval_model import choose_dtype
    from seerattn.hf.loading import read_config, read_model, read_tokenizer

    place, trust = device, {"trust_remote_code": setup.trust_remote_code}
    if setup.dry_run:
        place = torch.device("meta")
    elif is_sharded():
        _begin_fsdp(device)
        place = torch.device("cpu" if is_main() or not is_fsdp_enabled() else "meta")
    config = read_config(setup.model, **trust)
    tokenizer = read_tokenizer(setup.model, **trust)
    dtype = getattr(torch, choose_dtype(setup.dtype, device))
    return read_model(setup.model, dtype=dtype, device=place, config=config, **trust), tokenizer


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
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    for name, value in described.items():
        table.add_row(visible(name), visible(value))
    screen().print(table)
