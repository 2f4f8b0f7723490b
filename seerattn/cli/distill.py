"""`seerattn distill`: learn the gates of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from seerattn.cli.gate_form import gate_config, parse_layers, with_gate_form
from seerattn.cli.training import (
    LOSSES,
    TRAINING,
    BatchSizeOption,
    ContextOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    KeepCheckpointsOption,
    LoggingStepsOption,
    MicroBatchSizeOption,
    ReportToOption,
    ResumeOption,
    SaveStepsOption,
    SeedOption,
    StepsOption,
    TrustOption,
    WarmupStepsOption,
    load_base,
    local_device,
    show_plan,
)
from seerattn.texts import visible

_ABOUT = "Data and loss"


@with_gate_form
def distill(
    form: dict[str, Any],
    model: Annotated[str, typer.Option(help="Base model: a folder or Hub id.")],
    data: DataOption,
    context: ContextOption,
    steps: StepsOption,
    output: Annotated[Path, typer.Option(help="New folder for the gates.")],
    gates: Annotated[Path | None, typer.Option(help="Gates to start from; default: fresh ones.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; default: one that fits the head dim.", rich_help_panel=TRAINING),
    ] = None,
    batch_size: BatchSizeOption = 2,
    micro_batch_size: MicroBatchSizeOption = 1,
    warmup_steps: WarmupStepsOption = None,
    seed: SeedOption = 0,
    logging_steps: LoggingStepsOption = 10,
    save_steps: SaveStepsOption = 100,
    keep_checkpoints: KeepCheckpointsOption = 2,
    report_to: ReportToOption = "none",
    device: DeviceOption = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the base; auto: bfloat16 on an accelerator, else float32.", rich_help_panel=TRAINING),
    ] = "auto",
    trust_remote_code: TrustOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    loss: Annotated[str, typer.Option(help=f"{LOSSES}.", rich_help_panel=_ABOUT)] = "kl",
    row_weight: Annotated[
        str,
        typer.Option(help="uniform, or mass: rows count by what they leave to choose.", rich_help_panel=_ABOUT),
    ] = "uniform",
    drop_rows: Annotated[
        float,
        typer.Option(help="Share of early query rows to leave out; officially 0.25.", rich_help_panel=_ABOUT),
    ] = 0.0,
    retrieval_share: Annotated[
        float,
        typer.Option(help="Share of samples that are synthetic retrieval documents.", rich_help_panel=_ABOUT),
    ] = 0.0,
    target_share: Annotated[
        float,
        typer.Option(help="Share of the query blocks to learn from, others every step.", rich_help_panel=_ABOUT),
    ] = 0.25,
    density: Annotated[
        float, typer.Option(help="Density that the gates run at when they are loaded.", rich_help_panel=_ABOUT)
    ] = 0.2,
) -> None:
    """Learn the gates of a model from its own attention maps.

    The published recipe: --paper --context 65536 --steps 500 --batch-size 16 --lr 1e-3 --target-share 1
    --drop-rows 0.25.

    Several GPUs: torchrun --nproc-per-node 8 -m seerattn distill ...
    """
    from seerattn.training.distill import DistillConfig, plan, run
    from seerattn.training.output import check_output
    from seerattn.training.runs import is_main

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
        retrieval_share=retrieval_share,
        target_share=target_share,
        density=density,
        logging_steps=logging_steps,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        report_to=report_to,
        seed=seed,
    )
    gate, indices = gate_config(form), parse_layers(form.get("layers"))
    check_output(output, resume=resume)
    where = local_device(device)
    base = load_base(
        model,
        device=where,
        dtype=dtype,
        context=context,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
    )
    prepared = plan(base.model, base.tokenizer, data, config, gates=gates, gate=gate, layers=indices, device=where)
    if is_main():
        show_plan(prepared.describe())
    if dry_run:
        return
    run(prepared, output, resume=resume)
    if is_main():
        typer.echo(visible(f"The gates are in {output}."))
