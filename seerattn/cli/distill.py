"""`seerattn distill`: learn the gates of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from seerattn.cli.gate_form import gate_config, parse_layers, with_gate_form
from seerattn.cli.training import local_device, show_plan

_TRAINING = "Training"
_ABOUT = "Data and loss"


@with_gate_form
def distill(
    form: dict[str, Any],
    model: Annotated[str, typer.Option(help="Base model: a folder or Hub id.")],
    data: Annotated[
        list[str], typer.Option(help=".jsonl or .txt file (also .gz, .bz2, .xz), folder, or dataset; can be repeated.")
    ],
    context: Annotated[int, typer.Option(help="Tokens of a sample.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")],
    output: Annotated[Path, typer.Option(help="New folder for the gates.")],
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 1e-3,
    batch_size: Annotated[
        int, typer.Option(help="Samples of a step, over all processes.", rich_help_panel=_TRAINING)
    ] = 16,
    micro_batch_size: Annotated[
        int, typer.Option(help="Samples that one process runs at once.", rich_help_panel=_TRAINING)
    ] = 1,
    warmup_steps: Annotated[
        int | None,
        typer.Option(help="Steps of warm-up; default 20, or 5 % of a short run.", rich_help_panel=_TRAINING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of gates and data.", rich_help_panel=_TRAINING)] = 0,
    logging_steps: Annotated[int, typer.Option(help="Steps between records.", rich_help_panel=_TRAINING)] = 10,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_TRAINING)] = 100,
    keep_checkpoints: Annotated[int, typer.Option(help="Checkpoints to keep.", rich_help_panel=_TRAINING)] = 2,
    report_to: Annotated[
        str, typer.Option(help="Tracker, such as wandb or tensorboard.", rich_help_panel=_TRAINING)
    ] = "none",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: cuda if there is one.", rich_help_panel=_TRAINING)
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the base; auto: bfloat16 on an accelerator, else float32.", rich_help_panel=_TRAINING),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder.", rich_help_panel=_TRAINING)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=_TRAINING)
    ] = False,
    loss: Annotated[str, typer.Option(help="kl, mse or smooth_l1.", rich_help_panel=_ABOUT)] = "kl",
    row_weight: Annotated[
        str,
        typer.Option(help="uniform, or mass: rows count by what they leave to choose.", rich_help_panel=_ABOUT),
    ] = "uniform",
    drop_rows: Annotated[
        float,
        typer.Option(help="Share of early query rows to leave out; officially 0.25.", rich_help_panel=_ABOUT),
    ] = 0.0,
    recall_share: Annotated[
        float,
        typer.Option(help="Share of samples that are synthetic recall documents.", rich_help_panel=_ABOUT),
    ] = 0.0,
    density: Annotated[
        float, typer.Option(help="Density that the gates run at when they are loaded.", rich_help_panel=_ABOUT)
    ] = 0.2,
) -> None:
    """Learn the gates of a model from its own attention maps.

    The published recipe: --context 65536 --steps 500 --paper --drop-rows 0.25.

    Several GPUs: torchrun --nproc-per-node 8 -m seerattn distill ...
    """
    from seerattn.eval.arms import load_subject
    from seerattn.training.distill import DistillConfig, plan, run
    from seerattn.training.runs import check_output, is_main

    config = DistillConfig(
        context=context,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        warmup_steps=warmup_steps,
        loss=loss,
        row_weight=row_weight,
        drop_rows=drop_rows,
        recall_share=recall_share,
        density=density,
        logging_steps=logging_steps,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        report_to=report_to,
        seed=seed,
    )
    gate, indices = gate_config(form), parse_layers(form.get("layers"))
    check_output(output, resume=resume)
    base = load_subject(model, device=local_device(device), dtype=dtype, context=context)
    prepared = plan(base.model, base.tokenizer, data, config, gate=gate, layers=indices)
    if is_main():
        show_plan(prepared.describe())
    if dry_run:
        return
    run(prepared, output, resume=resume)
    if is_main():
        typer.echo(f"The gates are in {output}.")
