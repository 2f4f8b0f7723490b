"""`seerattn bench`: speed and memory on the user's own device, each appending its results to one file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer

from seerattn.bench.dense import default_baselines
from seerattn.bench.inputs import Shape
from seerattn.bench.session import Session, shown
from seerattn.cli.terminal import print_table, say
from seerattn.cli.values import numbers, words
from seerattn.eval.arms import choose_device, choose_dtype
from seerattn.ops.crossover import table_path
from seerattn.ops.resolve import preferred
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from seerattn.bench.model import Size

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

PAPER_SPARSITIES = "0.5,0.6,0.7,0.8,0.9,0.95"
MODELS = "llama-3.1-8b, llama-3.2-3b, llama-3.2-1b, or tiny to try the command out"
FORMS = "paper, default, sum-2, salient, salient-4x4, and -group of all but sum-2 and salient"

LengthsOption = Annotated[str, typer.Option(help="Lengths in tokens.")]
SparsitiesOption = Annotated[str, typer.Option(help="Shares of the causal blocks that are not computed, in [0, 1).")]
DensitiesOption = Annotated[str, typer.Option(help="Shares of the causal blocks that are computed, in (0, 1].")]
BaselinesOption = Annotated[str, typer.Option(help="Dense attention: sdpa, flash, cudnn, flash4, flex; default: all.")]
BackendsOption = Annotated[str, typer.Option(help="Dense attention: sdpa, flash, cudnn; default: flash,cudnn.")]
ImplsOption = Annotated[str, typer.Option(help="Sparse attention: gluon, triton, flash4, flex, reference.")]
ImplOption = Annotated[str, typer.Option(help="Sparse attention; default: the fastest here, never dense.")]
VariantsOption = Annotated[
    str, typer.Option(help="triton, reference, pytorch, and dense attention without a map; default: all.")
]
BlocksOption = Annotated[str, typer.Option(help="Block sizes, QUERIESxKEYS in tokens.")]
SharesOption = Annotated[str, typer.Option(help="Lists for every query head or for every KV group: head, group.")]
TargetSharesOption = Annotated[str, typer.Option(help="Shares of the query blocks that gates learn from, in (0, 1].")]
AlikeOption = Annotated[str, typer.Option(help="Neighbouring query blocks that draw the same key blocks.")]
BackwardOption = Annotated[bool, typer.Option("--backward", help="Time forward and backward together, as in training.")]
FormsOption = Annotated[str, typer.Option(help=f"Gates: {FORMS}.")]
FormsOption = Annotated[
    str, typer.Option(help="Maps, keys:power of each: max or sum over keys, 1 to inf over rows, such as max:inf,sum:2.")
]
FormOption = Annotated[str, typer.Option(help=f"Gate: {FORMS}.")]
GateImplsOption = Annotated[str, typer.Option(help="Gate and selection: triton, reference.")]
HeadsOption = Annotated[int, typer.Option(help="Query heads.", min=1)]
KVHeadsOption = Annotated[int, typer.Option(help="Key/value heads.", min=1)]
HeadDimOption = Annotated[int, typer.Option(help="Channels of a head.", min=1)]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="auto is bfloat16 on an accelerator and float32 on a CPU."),
]
ModelOption = Annotated[str, typer.Option(help=f"Shape, with random weights: {MODELS}.")]
LayersOption = Annotated[int | None, typer.Option(help="Decoder layers to measure; default: all of them.", min=1)]
RepeatsOption = Annotated[int, typer.Option(help="Timed runs; those of 5 s and more are repeated twice.", min=2)]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ...; default: cuda if there is one.")]
TimeLimitOption = Annotated[float, typer.Option(help="Begin nothing new after so many seconds; 0 for no limit.", min=0)]
OutputOption = Annotated[Path | None, typer.Option(help="Results file; finished cells in it are not run again.")]
TableOption = Annotated[Path | None, typer.Option(help="Where to write the table; default: the user's cache folder.")]


@app.command()
def attention(
    lengths: LengthsOption = "8192,32768,131072",
    sparsities: SparsitiesOption = PAPER_SPARSITIES,
    baselines: BaselinesOption = "",
    impls: ImplsOption = "",
    blocks: BlocksOption = "64x64,128x128",
    shares: SharesOption = "head,group",
    rows_alike: AlikeOption = "1",
    gates: FormsOption = "paper,paper-group",
    gate_impls: GateImplsOption = "",
    backward: BackwardOption = False,
    heads: HeadsOption = 32,
    kv_heads: KVHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "",
    time_limit: TimeLimitOption = 0.0,
    output: OutputOption = None,
) -> None:
    """Time one attention layer: dense, sparse with random blocks, and gate with selection.

    The report draws the speed-up against sparsity and the breakdown of the time from it.
    """
    from seerattn.bench.attention import Sparse, bench_attention

    session, shape = _session(device, output, time_limit), _shape(device, heads, kv_heads, head_dim, dtype)
    unknown = set(words(shares)) - {"head", "group"}
    if unknown or not words(shares):
        raise ValueError(f"shares must be head or group, got {shares!r}")
    kinds = [
        Sparse(impl, block_q, block_k, share, alike)
        for impl in words(impls) or _default_impls(session.device, backward)
        for block_q, block_k in _blocks(blocks)
        for share in words(shares)
        for alike in numbers("rows-alike", rows_alike, int, 1)
        # FlexAttention's kernel has tiles of 128 and a mask for every query head.
        if impl != "flex" or (block_q % 128 == block_k % 128 == 0 and share == "head")
    ]
    rows = bench_attention(
        session,
        shape,
        lengths=numbers("lengths", lengths, int, 1),
        sparsities=_sparsities(sparsities),
        baselines=words(baselines) or (_backends if backward else default_baselines)(session.device),
        kinds=kinds,
        # Training takes the gradients of a gate elsewhere.
        forms=[] if backward else words(gates),
        gate_impls=words(gate_impls) or [preferred("gate_scores", "auto", session.device)],
        backward=backward,
    )
    _finish(session, rows, output)


@app.command()
def pooled(
    lengths: LengthsOption = "8192,32768,65536,131072",
    variants: VariantsOption = "",
    forms: FormsOption = "max:inf",
    heads: HeadsOption = 32,
    kv_heads: KVHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "",
    time_limit: TimeLimitOption = 0.0,
    output: OutputOption = None,
) -> None:
    """Time attention that also emits the map gates learn from, and count its memory, beside dense attention."""
    from seerattn.bench.attention_map import PLAIN, bench_pooled
    from seerattn.selection.map_form import MapForm

    session, shape = _session(device, output, time_limit), _shape(device, heads, kv_heads, head_dim, dtype)
    dense = [name for name in default_baselines(session.device) if name in ("sdpa", "flash", "cudnn")]
    chosen = words(variants) or [preferred("attention_map", "auto", session.device), PLAIN, *dense]
    maps = list(dict.fromkeys(MapForm.parse(word) for word in words(forms)))
    rows = bench_pooled(session, shape, lengths=numbers("lengths", lengths, int, 1), variants=chosen, forms=maps)
    _finish(session, rows, output)


@app.command()
def crossover(
    lengths: LengthsOption = "128,256,512,1024,2048,4096,8192,16384,32768,65536,131072",
    densities: DensitiesOption = "0.05,0.1,0.2,0.3,0.5,0.7,1.0",
    baselines: BackendsOption = "",
    impl: ImplOption = "auto",
    gate: FormOption = "default",
    heads: HeadsOption = 32,
    kv_heads: KVHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "",
    time_limit: TimeLimitOption = 0.0,
    output: OutputOption = None,
    table: TableOption = None,
) -> None:
    """Measure from which length and density on sparse attention pays on this GPU, for impl="auto".

    The table goes to the user's cache folder, where every attached model finds it.
    """
    from seerattn.bench.crossover import bench_crossover, check_table, save_table

    session, shape = _session(device, output, time_limit), _shape(device, heads, kv_heads, head_dim, dtype)
    if table is None and session.device.type != "cuda":
        raise ValueError('table must be given on a CPU, where impl="auto" decides by a formula and looks for no table')
    path = table or table_path(session.device_name)
    check_table(path)
    shares = numbers("densities", densities, float, 0)
    if min(shares) == 0 or max(shares) > 1:
        raise ValueError(f"densities must be in (0, 1], got {densities!r}")
    found = bench_crossover(
        session,
        shape,
        lengths=numbers("lengths", lengths, int, 1),
        densities=shares,
        baselines=words(baselines) or _backends(session.device),
        form=gate,
        impl=impl,
    )
    _print_crossover(found)
    if found["rows"]:
        save_table(found, path)
        say(f"the table is in {path}")
    _finish(session, None, output)


@app.command()
def ttft(
    lengths: LengthsOption = "8192,16384,32768,65536,131072",
    sparsities: SparsitiesOption = PAPER_SPARSITIES,
    baselines: BackendsOption = "",
    gates: FormsOption = "paper",
    impl: ImplOption = "",
    model: ModelOption = "llama-3.1-8b",
    layers: LayersOption = None,
    repeats: RepeatsOption = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "",
    time_limit: TimeLimitOption = 0.0,
    output: OutputOption = None,
) -> None:
    """Time the prefill of a whole model: dense, and with gates at several sparsities."""
    from seerattn.bench.ttft import bench_ttft

    session = _session(device, output, time_limit)
    rows = bench_ttft(
        session,
        _size(model, layers, _dtype(dtype, session.device)),
        lengths=numbers("lengths", lengths, int, 2),
        sparsities=_sparsities(sparsities),
        baselines=words(baselines) or _backends(session.device),
        forms=words(gates),
        impl=impl or preferred("block_sparse_attention", "auto", session.device),
        repeats=repeats,
    )
    _finish(session, rows, output)


@app.command()
def distill(
    lengths: LengthsOption = "8192,32768,65536",
    baselines: BackendsOption = "",
    gate: FormOption = "paper",
    model: ModelOption = "llama-3.1-8b",
    layers: LayersOption = None,
    repeats: RepeatsOption = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "",
    time_limit: TimeLimitOption = 0.0,
    output: OutputOption = None,
) -> None:
    """Time steps of gate distillation beside plain forwards of the same model, and what the paper's recipe takes."""
    from seerattn.bench.distill import bench_distill

    session = _session(device, output, time_limit)
    size = _size(model, layers, _dtype(dtype, session.device))
    if size.layers != size.whole:
        say(f"measuring {size.layers} of {size.whole} layers; hours are scaled to all of them")
    rows = bench_distill(
        session,
        size,
        lengths=numbers("lengths", lengths, int, 128),
        baselines=words(baselines) or _backends(session.device),
        form=gate,
        repeats=repeats,
    )
    _finish(session, rows, output)


@app.command()
def finetune(
    lengths: LengthsOption = "32768",
    sparsities: SparsitiesOption = "0.9,0.5",
    target_shares: TargetSharesOption = "0.1,1",
    baselines: BackendsOption = "",
    gates: FormsOption = "paper",
    impl: ImplOption = "",
    model: ModelOption = "llama-3.2-1b",
    layers: LayersOption = None,
    repeats: RepeatsOption = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "",
    time_limit: TimeLimitOption = 0.0,
    output: OutputOption = None,
) -> None:
    """Time fine-tuning with sparse attention beside dense: one layer, and whole steps without the optimizer."""
    from seerattn.bench.finetune import bench_finetune

    session = _session(device, output, time_limit)
    shares = numbers("target-shares", target_shares, float, 0)
    if min(shares) == 0 or max(shares) > 1:
        raise ValueError(f"target-shares must be in (0, 1], got {target_shares!r}")
    rows = bench_finetune(
        session,
        _size(model, layers, _dtype(dtype, session.device)),
        lengths=numbers("lengths", lengths, int, 128),
        sparsities=_sparsities(sparsities),
        target_shares=shares,
        baselines=words(baselines) or _backends(session.device)[::-1],
        forms=words(gates),
        impl=impl or preferred("block_sparse_attention", "auto", session.device),
        repeats=repeats,
    )
    _finish(session, rows, output)


def _session(device: str, output: Path | None, time_limit: float) -> Session:
    where = choose_device(device or None)
    return Session(where, ResultsFile(output, where), say, time_limit=time_limit or None)


def _shape(device: str, heads: int, kv_heads: int, head_dim: int, dtype: str) -> Shape:
    return Shape(heads, kv_heads, head_dim, _dtype(dtype, choose_device(device or None)))


def _size(model: str, layers: int | None, dtype: torch.dtype) -> Size:
    from seerattn.bench.model import SIZES

    if model not in SIZES:
        raise ValueError(f"model must be among {', '.join(SIZES)}, got {model!r}")
    size = SIZES[model]
    if layers is not None and layers > size.whole:
        raise ValueError(f"layers must be at most the {size.whole} of {model}, got {layers}")
    return replace(size, layers=layers or size.whole, shape=replace(size.shape, dtype=dtype))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    return getattr(torch, choose_dtype(name, device))


def _default_impls(device: torch.device, backward: bool) -> list[str]:
    if device.type != "cuda":
        return ["reference"]
    return ["gluon", "triton"] if backward else ["gluon", "triton", "flash4", "flex"]


def _backends(device: torch.device) -> list[str]:
    return ["flash", "cudnn"] if device.type == "cuda" else ["sdpa"]


def _sparsities(text: str) -> list[float]:
    values = numbers("sparsities", text, float, 0)
    if max(values) >= 1:
        raise ValueError(f"sparsities must be in [0, 1), got {text!r}")
    return values


def _blocks(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(q), int(k)) for q, k in (word.split("x") for word in words(text))]
    except ValueError as error:
        raise ValueError(f"blocks must be QUERIESxKEYS with commas between, such as 64x64, got {text!r}") from error


def _finish(session: Session, rows: list[Result] | None, output: Path | None) -> None:
    """Prints what was measured, what was not, and exits with 1 if something failed."""
    if rows is not None:
        _print_results(rows)
    if output is not None and output.exists():
        say(f"results are in {output}")
    if session.left_out:
        say(f"{len(session.left_out)} cells were left out for the time limit; run again to measure them")
    for failure in session.failures:
        say(f"failed: {failure}")
    if session.failures:
        raise typer.Exit(1)
    if rows == [] and not session.left_out:
        raise ValueError("nothing could be measured; the reasons are above")


def _print_results(rows: Iterable[Result]) -> None:
    """A line for each variant, with its quantities beside each other."""
    lines: dict[tuple, list[Result]] = {}
    for row in rows:
        cell = {name: value for name, value in row.cell.items() if name not in ("device", "dtype", "clock")}
        lines.setdefault((row.context, row.selector, row.gates, row.density, str(cell)), []).append(row)
    heads = ("tokens", "what", "impl", "blocks", "lists", "density", "realised", "measured")
    body = []
    for found in lines.values():
        row = found[0]
        name = {"dense": "dense", "random": "sparse, random blocks"}.get(row.selector, f"gate {row.gates}")
        if row.cell.get("map"):
            name = "dense with the map"
        targets = [f"{row.cell['target_share']:.0%} of the targets"] if "target_share" in row.cell else []
        blocks = f"{row.cell['block_q']}x{row.cell['block_k']}" if "block_q" in row.cell else ""
        body.append(
            [
                f"{row.context:,}",
                ", ".join([name, *([row.cell["work"]] if "work" in row.cell else []), *targets]),
                row.cell["impl"],
                blocks,
                f"per {row.cell['share']}" if "share" in row.cell else "",
                "" if row.density is None else f"{row.density:g}",
                "" if row.realised_density is None else f"{row.realised_density:.3f}",
                ", ".join(map(shown, found)),
            ]
        )
    print_table(heads, body, texts=heads)


def _print_crossover(found: dict) -> None:
    densities = found["rows"][0]["sparse_ms"] if found["rows"] else {}
    heads = ["tokens", "dense ms", "gate + selection ms", *(f"sparse {d} ms" for d in densities), "pays up to density"]
    body = []
    for row in found["rows"]:
        pays = [d for d, ms in row["sparse_ms"].items() if row["overhead_ms"] + ms < row["dense_ms"]]
        times = [row["dense_ms"], row["overhead_ms"], *row["sparse_ms"].values()]
        body.append([f"{row['tokens']:,}", *(f"{ms:.3f}" for ms in times), max(pays, key=float, default="never")])
    print_table(heads, body)
