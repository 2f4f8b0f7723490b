"""Speed and memory: a line for each way of computing, a column for each length."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.benchmarks import baseline, blocks, dense_name, form, machines, tokens
from seerattn.report.parts import Cell, Table, plain
from seerattn.report.select import group
from seerattn.results.record import Result

ID, TITLE = "speed", "Speed and memory"
READ = (
    "Times of attention over random blocks of given sizes, of gate and selection by themselves, and of whole models "
    "and training steps. Beside a time stands the speed-up over the first dense line."
)
_TITLES = {
    "attention_ms": "Attention alone, ms",
    "attention_training_ms": "Attention, forward and backward, ms",
    "selection_ms": "Gate and selection, ms",
    "attention_map_ms": "Attention with the map of blocks, ms",
    "extra_memory_mib": "Attention with the map of blocks, MiB beyond inputs and results",
    "decode_attention_ms": "Attention of one token, ms",
    "decode_select_ms": "Choice of the blocks of one token, ms",
    "ttft_s": "Time to first token, s",
    "decode_ms": "Decoded tokens of whole models, ms",
    "serve_first_s": "Serving, time to the first token, s",
    "serve_tokens_per_second": "Serving, tokens a second",
    "attention_share": "Share of attention in the time to first token",
    "finetune_layer_ms": "Fine-tuning, attention of one layer with backward, ms",
    "finetune_step_ms": "Fine-tuning, a step without the optimizer, ms",
    "tokens_per_second": "Tokens a second",
    "peak_memory_gib": "Peak memory, GiB",
    "distill_hours": "Hours of the published distillation recipe",
}
# Times that dense attention has as well.
_COMPARED = ("attention_ms", "attention_training_ms", "attention_map_ms", "ttft_s")
_COMPARED += ("finetune_layer_ms", "finetune_step_ms", "decode_attention_ms", "decode_ms", "serve_first_s")
# Of these more is better.
_RATES = ("serve_tokens_per_second",)
_WORK = {"forward": "plain forward", "distill": "distillation step"}


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each quantity, device and shape."""
    return [
        _table(f"{title}: {model}, {dtype}, {device}", rows)
        for what, title in _TITLES.items()
        for (device, model, dtype), rows in machines(results, what).items()
    ]


def _table(title: str, rows: list[Result]) -> Table:
    lengths = sorted({r.context for r in rows})
    reference = baseline(rows) if rows[0].what in (*_COMPARED, *_RATES) else None
    dense = {_place(r): r.value for r in rows if r.kind == "dense" and (r.cell["impl"] == reference or _graph(r))}
    lines = group(rows, lambda r: (_name(r), "" if r.density is None else f"{1 - r.density:.3g}"))
    body = []
    for (name, sparsity), line in lines.items():
        found = {r.context: _cell(r, dense.get(_place(r))) for r in line}
        body.append([name, sparsity, *(found.get(length, "") for length in lengths)])
    return plain(title, ["", "sparsity", *map(tokens, lengths)], body)


def _place(row: Result) -> tuple[int | bool | None, ...]:
    """What a time and its reference have in common: the length, of models the layers, and how much runs at once."""
    return row.context, _graph(row), *(row.cell.get(name) for name in ("layers", "at_once", "batch", "queries"))


def _graph(row: Result) -> str | None:
    """What a row says of the CUDA graph of its step; None for steps that the host launches."""
    return {"graph": "CUDA graph", "compiled": "CUDA graph, compiled parts"}.get(row.cell.get("launch"))


def _cell(row: Result, reference: float | None) -> Cell:
    if row.value is None:
        return Cell(row.samples.get("error", ["not finite"])[0])
    value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
    if not reference:
        return Cell(value)
    return Cell(value, more=f"{row.value / reference if row.what in _RATES else reference / row.value:.2f}x")


def _name(row: Result) -> str:
    impl, cell = row.cell["impl"], row.cell
    name = f"gates {row.name}, {impl}" if row.kind == "learned" else dense_name(impl)
    if row.method == "random":
        name += ", random blocks" if cell.get("lists", True) else ", all blocks"
    if "share" in cell:
        name += f", {blocks(row)}"
    if row.what == "decode_select_ms":
        name += ", CUDA graph" if cell["clock"] == "graph" else ", one by one"
    if graph := _graph(row):
        name = f"{'all keys, triton' if row.kind == 'dense' else name}, {graph}"
    if cell.get("page"):
        name += f", pages of {cell['page']}"
    if "queries" in cell:
        name += f", {cell['queries']:,} queries"
    if row.what.startswith("decode"):
        name += f", {cell['batch']} at a time"
    if "at_once" in cell:
        name += f", {cell['at_once']} at once"
    if "chunk" in cell:
        name += f", chunks of {tokens(cell['chunk'])}"
    if "map" in cell:
        name += f", with the map{form(row)}" if cell["map"] else ", no map"
    # Titles name the work of quantities that belong to one kind of it.
    if "work" in cell and not row.what.startswith("finetune"):
        name += f", {_WORK.get(cell['work'], cell['work'])}"
    if "target_share" in cell:
        name += f", {100 * cell['target_share']:.3g}% of the targets"
    if "layers" in cell:
        name += f", {cell['layers']} layers"
    return name
