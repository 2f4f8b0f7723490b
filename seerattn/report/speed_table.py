"""Tables of speed and memory: one line for each way of computing, one column for each length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seerattn.report import speed
from seerattn.report.markdown import markdown
from seerattn.results.record import Result

TITLES = {
    "attention_ms": "Attention alone, ms",
    "attention_training_ms": "Attention, forward and backward, ms",
    "selection_ms": "Gate and selection, ms",
    "pooled_ms": "Attention with the map of blocks, ms",
    "extra_memory_mib": "Attention with the map of blocks, MiB beyond inputs and results",
    "ttft_s": "Time to first token, s",
    "attention_share": "Share of attention in the time to first token",
    "finetune_layer_ms": "Fine-tuning, attention of one layer with backward, ms",
    "finetune_step_ms": "Fine-tuning, a step without the optimizer, ms",
    "tokens_per_second": "Tokens a second",
    "peak_memory_gib": "Peak memory, GiB",
    "distill_hours": "Hours of the published distillation recipe",
}
# Times that dense attention has as well.
COMPARED = ("attention_ms", "attention_training_ms", "pooled_ms", "ttft_s", "finetune_layer_ms", "finetune_step_ms")
WORK = {"forward": "plain forward", "distill": "distillation step"}


def speed_tables(results: Sequence[Result]) -> list[str]:
    """Titles and tables of the benchmarks, as Markdown; speed-ups in brackets are over the first dense line."""
    return [part for title, grid in speed_grids(results) for part in (f"### {title}", markdown(*grid))]


def speed_grids(results: Sequence[Result]) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """The same as titles, each with the head and the body of a table."""
    return [
        (f"{title}: {model}, {dtype}, {device}", _table(rows))
        for what, title in TITLES.items()
        for (device, model, dtype), rows in speed.machines(results, what).items()
    ]


def _table(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    lengths = speed.contexts(rows)
    reference = speed.baseline(rows) if rows[0].what in COMPARED else None
    dense = {_place(r): r.value for r in rows if r.selector == "dense" and r.cell["impl"] == reference}
    lines: dict[tuple[str, str], dict[int, Result]] = {}
    for r in rows:
        density = "" if r.density is None else f"{1 - r.density:.3g}"
        lines.setdefault((_name(r), density), {})[r.context] = r
    cell = _cell(dense)
    body = [
        [name, sparsity, *(cell(line[n]) if n in line else "" for n in lengths)]
        for (name, sparsity), line in lines.items()
    ]
    return ["", "sparsity", *map(speed.tokens, lengths)], body


def _place(row: Result) -> tuple[int, int | None]:
    """What a time and its reference have in common: the length, and of models the number of layers."""
    return row.context, row.cell.get("layers")


def _cell(dense: dict[tuple[int, int | None], float | None]) -> Callable[[Result], str]:
    def cell(row: Result) -> str:
        if row.value is None:
            return row.samples.get("error", ["not finite"])[0]
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
        reference = dense.get(_place(row))
        return f"{value} ({reference / row.value:.2f}x)" if reference else value

    return cell


def _name(row: Result) -> str:
    impl, cell = row.cell["impl"], row.cell
    parts = {"dense": speed.dense_name(impl), "random": f"{speed.dense_name(impl)}, random blocks"}
    name = parts.get(row.selector) or f"gates {row.gates}, {impl}"
    if "share" in cell:
        name += f", {speed.blocks(row)}"
    if cell.get("launch") == "graph":
        name += ", CUDA graph"
    if "map" in cell:
        name += f", with the map{speed.form(row)}" if cell["map"] else ", no map"
    # Titles name the work of quantities that belong to one kind of it.
    if "work" in cell and not row.what.startswith("finetune"):
        name += f", {WORK.get(cell['work'], cell['work'])}"
    if "target_share" in cell:
        name += f", {100 * cell['target_share']:.3g}% of the targets"
    if "layers" in cell:
        name += f", {cell['layers']} layers"
    return name
