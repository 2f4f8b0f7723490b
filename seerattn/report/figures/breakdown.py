"""Figure: where the time of one attention layer goes, gate and selection or sparse attention, by sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seerattn.report import style
from seerattn.report.benchmarks import blocks, caption, dense_name, machines, tokens
from seerattn.results.record import Result

SELECTION, SPARSE = "#e69f00", "#0072b2"
# By the name of gates and the length: pairs of gate with selection and the fastest sparse attention.
Stacks = dict[str, dict[int, list[tuple[Result, Result]]]]


def groups(results: Sequence[Result]) -> Iterable[list[Result]]:
    """Times of each device and shape."""
    return machines(results, "attention_ms", "selection_ms").values()


def draw(rows: list[Result]) -> Figure | None:
    """A row for each gate and a panel for each length.

    Gates that were measured at more than one sparsity at the greatest length have a row, the others stand in tables.
    A bar is gate and selection, timed alone, under sparse attention over random blocks of the same sizes, density and
    number of lists, by the implementation that is fastest there.
    """
    rows = [r for r in rows if r.value is not None]
    stacks = _stacks(rows)
    if not stacks:
        return None
    lengths = sorted({length for by_length in stacks.values() for length in by_length})
    figure = Figure(figsize=(3.6 * len(lengths) + 0.4, 2.9 * len(stacks) + 0.8), layout="constrained")
    grid = figure.subplots(len(stacks), len(lengths), squeeze=False)
    for line, (label, by_length) in zip(grid, stacks.items()):
        for axes, length in zip(line, lengths):
            dense = [r for r in rows if r.kind == "dense" and r.context == length]
            _panel(axes, dense, by_length.get(length, []))
            axes.set_title(f"{tokens(length)} tokens")
        line[0].set_ylabel(f"{label}\nms")
    parts = [("dense attention", style.DENSE), ("sparse attention", SPARSE), ("gate and selection", SELECTION)]
    handles = [grid[0][0].bar(0, 0, color=colour, label=part) for part, colour in parts]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    style.caption(figure, *caption(rows[0]))
    return figure


def _stacks(rows: list[Result]) -> Stacks:
    """The pairs, ascending in sparsity."""
    found: Stacks = {}
    for selection in sorted((r for r in rows if r.what == "selection_ms"), key=lambda r: -r.density):
        fitting = [r for r in rows if r.method == "random" and _place(r) == _place(selection)]
        if fitting:
            label = f"gate {selection.name}, {blocks(selection)}"
            best = min(fitting, key=lambda r: r.value)
            found.setdefault(label, {}).setdefault(selection.context, []).append((selection, best))
    longest = max((length for by_length in found.values() for length in by_length), default=0)
    full = {label: by_length for label, by_length in found.items() if len(by_length.get(longest, [])) > 1}
    return full or found


def _place(result: Result) -> tuple:
    return result.context, result.density, *(result.cell.get(name) for name in ("block_q", "block_k", "mask_heads"))


def _panel(axes: Axes, dense: list[Result], pairs: list[tuple[Result, Result]]) -> None:
    dense = sorted(dense, key=lambda r: -r.value)
    places = [*range(len(dense)), *(len(dense) + 0.4 + i for i in range(len(pairs)))]
    below, above = [choice.value for choice, _ in pairs], [sparse.value for _, sparse in pairs]
    axes.bar(places[: len(dense)], [r.value for r in dense], color=style.DENSE)
    axes.bar(places[len(dense) :], below, color=SELECTION)
    axes.bar(places[len(dense) :], above, bottom=below, color=SPARSE)
    for x, total in zip(places, [r.value for r in dense] + [a + b for a, b in zip(below, above)]):
        axes.annotate(f"{total:.3g}", (x, total), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    labels = [*(dense_name(r.cell["impl"]) for r in dense), *(f"{1 - r.realised_density:.0%}" for _, r in pairs)]
    axes.set_xticks(places, labels, rotation=50, ha="right", rotation_mode="anchor", fontsize=7)
    axes.grid(axis="x", visible=False)
