"""`seerattn finetune`: train a model and its gates together while attention is sparse."""

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

_SPARSITY = "Sparsity and gates"


@with_gate_form
def finetune(
    form: dict[str, Any],
    model: Annotated[str, typer.Option(help="Model to train: a folder or Hub id.")],
    data: DataOption,
    context: ContextOption,
    steps: StepsOption,
    output: Annotated[Path, typer.Option(help="New folder for the model and its gates.")],
    gates: Annotated[
        Path | None, typer.Option(help="Trained gates to start from; default: fresh ones.", rich_help_panel=_SPARSITY)
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Dense attention, no gates: to compare with.", rich_help_panel=_SPARSITY)
    ] = False,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the causal blocks to leave out; default 0.9.", rich_help_panel=_SPARSITY),
    ] = None,
    anneal: Annotated[
        float, typer.Option(help="Share of the steps over which sparsity rises from 0.", rich_help_panel=_SPARSITY)
    ] = 0.0,
    context_factor: Annotated[
        float, typer.Option(help="Extend the context so many times with YaRN.", rich_help_panel=_SPARSITY)
    ] = 1.0,
    target_share: Annotated[
        float, typer.Option(help="Share of the query blocks that gates learn from.", rich_help_panel=_SPARSITY)
    ] = 0.1,
    target_every: Annotated[
        int, typer.Option(help="Steps from one on which gates learn to the next.", rich_help_panel=_SPARSITY)
    ] = 1,
    loss: Annotated[str, typer.Option(help=f"Of the gates: {LOSSES}.", rich_help_panel=_SPARSITY)] = "kl",
    row_weight: Annotated[
        str,
        typer.Option(help="uniform, or mass: rows count by what they leave to choose.", rich_help_panel=_SPARSITY),
    ] = "uniform",
    lr: Annotated[float, typer.Option(help="Peak learning rate of the model.", rich_help_panel=TRAINING)] = 1e-5,
    gate_lr: Annotated[float, typer.Option(help="Peak learning rate of the gates.", rich_help_panel=TRAINING)] = 1e-3,
    batch_size: BatchSizeOption = 8,
    micro_batch_size: MicroBatchSizeOption = 1,
    warmup_steps: WarmupStepsOption = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Run layers twice in place of keeping activations.", rich_help_panel=TRAINING)
    ] = True,
    retrieval_share: Annotated[
        float,
        typer.Option(help="Share of samples that are synthetic retrieval documents.", rich_help_panel=TRAINING),
    ] = 0.0,
    seed: SeedOption = 0,
    logging_steps: LoggingStepsOption = 10,
    save_steps: SaveStepsOption = 100,
    keep_checkpoints: KeepCheckpointsOption = 2,
    report_to: ReportToOption = "none",
    device: DeviceOption = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(
            help="Of the weights; auto: float32 that compute in bfloat16 on an accelerator.", rich_help_panel=TRAINING
        ),
    ] = "auto",
    trust_remote_code: TrustOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a model and its gates together while attention is sparse.

    The published recipe, 8k to 32k: --context 32768 --context-factor 4 --steps 400 --gates FOLDER --sparsity 0.5.

    Several GPUs: torchrun --nproc-per-node 8 -m seerattn finetune ...
    """
    from seerattn.training.finetune import FinetuneConfig, plan, run
    from seerattn.training.output import check_output
    from seerattn.training.runs import is_main

    if dense and (sparsity is not None or anneal):
        raise ValueError("dense must be given without sparsity and anneal, got one of them; leave them out")
    config = FinetuneConfig(
        context=context,
        steps=steps,
        dense=dense,
        sparsity=0.9 if sparsity is None else sparsity,
        anneal=anneal,
        context_factor=context_factor,
        target_share=target_share,
        target_every=target_every,
        loss=loss,
        row_weight=row_weight,
        lr=lr,
        gate_lr=gate_lr,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        warmup_steps=warmup_steps,
        gradient_checkpointing=gradient_checkpointing,
        autocast=dtype == "auto",
        retrieval_share=retrieval_share,
        logging_steps=logging_steps,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        report_to=report_to,
        seed=seed,
    )
    gate, layers = gate_config(form), parse_layers(form.get("layers"))
    check_output(output, resume=resume)
    weights, where = "bfloat16" if dtype == "bfloat16" else "float32", local_device(device)
    base = load_base(model, device=where, dtype=weights, dry_run=dry_run, trust_remote_code=trust_remote_code)
    prepared = plan(base.model, base.tokenizer, data, config, gates=gates, gate=gate, layers=layers, device=where)
    if is_main():
        show_plan(prepared.describe())
    if dry_run:
        return
    run(prepared, output, resume=resume)
    if is_main():
        typer.echo(visible(f"The {'model is' if dense else 'model and its gates are'} in {output}."))
