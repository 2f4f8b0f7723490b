"""`seerattn distill`: learn the gates of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from seerattn.gate import AttnGateConfig
    from seerattn.training.distill import Plan

_FORM = "Form of the gates (default: the form that measures best)"
_TRAINING = "Training"
_ABOUT = "Data and loss"


def distill(
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
    paper: Annotated[
        bool, typer.Option("--paper", help="Start from the published form.", rich_help_panel=_FORM)
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Layers with a gate, such as 0-3,7; default all.", rich_help_panel=_FORM)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of query and key blocks: 32, 64 or 128.", rich_help_panel=_FORM)
    ] = None,
    block_q: Annotated[int | None, typer.Option(help="Tokens of query blocks.", rich_help_panel=_FORM)] = None,
    block_k: Annotated[int | None, typer.Option(help="Tokens of key blocks.", rich_help_panel=_FORM)] = None,
    q_pooling: Annotated[
        str | None, typer.Option(help="Any of avg,max,min,salient, with commas.", rich_help_panel=_FORM)
    ] = None,
    k_pooling: Annotated[
        str | None, typer.Option(help="Any of avg,max,min,salient, with commas.", rich_help_panel=_FORM)
    ] = None,
    q_linear: Annotated[
        bool | None, typer.Option(help="A linear after the query pooling.", rich_help_panel=_FORM)
    ] = None,
    gate_dim: Annotated[
        int | None, typer.Option(help="Width of the gate; default the head dim.", rich_help_panel=_FORM)
    ] = None,
    rope: Annotated[bool | None, typer.Option(help="Rotate gate queries and keys.", rich_help_panel=_FORM)] = None,
    qk_norm: Annotated[bool | None, typer.Option(help="RMSNorm on both sides.", rich_help_panel=_FORM)] = None,
    query_subblocks: Annotated[
        int | None, typer.Option(help="Pieces a query block is pooled in.", rich_help_panel=_FORM)
    ] = None,
    key_subblocks: Annotated[
        int | None, typer.Option(help="Pieces a key block is pooled in.", rich_help_panel=_FORM)
    ] = None,
    normalize_subblocks: Annotated[
        bool | None, typer.Option(help="Softmax within each query piece before the maximum.", rich_help_panel=_FORM)
    ] = None,
    distance_bias: Annotated[
        int | None, typer.Option(help="Learned bias by block distance, up to so many blocks.", rich_help_panel=_FORM)
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="query_head, or kv_group: one gate a group.", rich_help_panel=_FORM)
    ] = None,
    init: Annotated[str | None, typer.Option(help="identity or normal.", rich_help_panel=_FORM)] = None,
    exclude_forced: Annotated[
        bool | None,
        typer.Option(help="Train without the blocks that selection keeps anyway.", rich_help_panel=_FORM),
    ] = None,
) -> None:
    """Learn the gates of a model from its own attention maps.

    The published recipe: --context 65536 --steps 500 --paper --drop-rows 0.25.

    Several GPUs: torchrun --nproc-per-node 8 -m seerattn distill ...
    """
    from seerattn.eval.arms import choose_device, load_subject
    from seerattn.training.distill import DistillConfig, check_output, is_main, plan, run

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
    if block_size is not None and (block_q is not None or block_k is not None):
        raise ValueError("block_size must be given alone, got it beside block_q or block_k; leave one of them out")
    gate = gate_config(
        paper=paper,
        block_q=block_q if block_size is None else block_size,
        block_k=block_k if block_size is None else block_size,
        q_pooling=_names(q_pooling),
        k_pooling=_names(k_pooling),
        q_linear=q_linear,
        gate_dim=gate_dim,
        rope=rope,
        qk_norm=qk_norm,
        query_subblocks=query_subblocks,
        key_subblocks=key_subblocks,
        normalize_subblocks=normalize_subblocks,
        distance_bias=distance_bias,
        share=share,
        init=init,
        exclude_forced=exclude_forced,
    )
    indices = parse_layers(layers)
    check_output(output, resume=resume)
    place = choose_device(device)
    if place.type == "cuda" and "LOCAL_RANK" in os.environ:
        place = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    base = load_subject(model, device=place, dtype=dtype, context=context)
    prepared = plan(base.model, base.tokenizer, data, config, gate=gate, layers=indices)
    if is_main():
        _show(prepared)
    if dry_run:
        return
    run(prepared, output, resume=resume)
    if is_main():
        typer.echo(f"The gates are in {output}.")


def _show(prepared: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    for name, value in prepared.describe().items():
        table.add_row(name, value)
    Console().print(table)


def gate_config(*, paper: bool, **options: Any) -> AttnGateConfig:
    """The published or the default form, with those options that were given."""
    from seerattn.gate import AttnGateConfig

    given = {name: value for name, value in options.items() if value is not None}
    return AttnGateConfig.paper(**given) if paper else AttnGateConfig(**given)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def parse_layers(text: str | None) -> list[int] | None:
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
