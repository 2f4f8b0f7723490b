"""Figure: speed-up of sparse attention over dense attention against sparsity, with the ideal line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from seerattn.report import style
from seerattn.report.benchmarks import baseline, blocks, caption, dense_name, machines, tokens
from seerattn.report.select import group
from seerattn.results.record import Result

_DASHES = {"cudnn": (0, (6, 2)), "flash4": (0, (3, 2)), "flex": (0, (1.5, 1.5)), "sdpa": "-", "flash": "-"}


def groups(results: Sequence[Result]) -> Iterable[list[Result]]:
    """Times of each device and shape."""
    return machines(results, "attention_ms").values()


def draw(rows: list[Result]) -> Figure | None:
    """A panel for each length; dashed are the other dense ones.

    A line is one kind of blocks by the implementation that was measured most fully, and is the fastest of those; what
    was measured at one sparsity alone stands in the tables.
    """
    rows = [r for r in rows if r.value is not None]
    reference, sparse = baseline(rows), _fullest([r for r in rows if r.method == "random"])
    dense = {(r.context, r.cell["impl"]): r.value for r in rows if r.kind == "dense"}
    lengths = [length for length in sorted({r.context for r in sparse}) if (length, reference) in dense]
    if not lengths:
        return None
    looks = _looks(sparse)
    figure = Figure(figsize=(3.6 * len(lengths) + 0.4, 4.6), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0], lengths):
        times = {impl: ms for (context, impl), ms in dense.items() if context == length}
        _panel(axes, times, reference, [r for r in sparse if r.context == length], looks)
        axes.set_title(f"{tokens(length)} tokens")
        axes.set_xlabel("sparsity: share of causal blocks not computed")
    figure.axes[0].set_ylabel(f"speed-up over {dense_name(reference)}")
    order = dict.fromkeys(label for axes in figure.axes for label in axes.get_legend_handles_labels()[1])
    style.legend(figure, order, loc="outside lower center", ncols=3)
    style.caption(figure, *caption(sparse[0]))
    return figure


def _fullest(sparse: list[Result]) -> list[Result]:
    """The rows of one implementation for each kind of blocks."""
    found = []
    for of_blocks in group(sparse, blocks).values():
        impls = group(of_blocks, lambda r: r.cell["impl"]).values()
        rows = min(impls, key=lambda rows: (-len(rows), sum(r.value for r in rows)))
        found += rows if len({r.density for r in rows}) > 1 else []
    return found


def _panel(axes: Axes, times: dict[str, float], reference: str, sparse: list[Result], looks: dict[str, dict]) -> None:
    for impl, ms in times.items():
        if impl != reference:
            look = {"color": style.DENSE, "linewidth": 1.0, "linestyle": _DASHES[impl]}
            axes.axhline(times[reference] / ms, **look)
            axes.plot([], [], label=f"dense, {dense_name(impl)}", **look)
    for label, line in group(sparse, _line).items():
        line = sorted(line, key=lambda r: -r.realised_density)
        axes.plot([1 - r.realised_density for r in line], [times[reference] / r.value for r in line], **looks[label])
    sparsities = [1 - r.realised_density for r in sparse]
    x = np.linspace(min(sparsities), max(sparsities), 200)
    axes.plot(x, 1 / (1 - x), color="black", linewidth=1.0, linestyle=":", label="ideal, 1 / (1 - sparsity)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _looks(sparse: Sequence[Result]) -> dict[str, dict]:
    """By the name of a line: a colour for each implementation and block size, dashed where a KV group shares lists."""
    kinds = list(group(sparse, _kind))
    looks = {}
    for r in sparse:
        own = r.cell["share"] == "head"
        looks[_line(r)] = {
            "label": _line(r),
            "color": style.PALETTE[kinds.index(_kind(r)) % len(style.PALETTE)],
            "linestyle": "-" if own else (0, (4, 1.5)),
            "marker": "o" if own else "s",
            "markerfacecolor": "white" if r.cell.get("rows_alike", 1) > 1 else None,
        }
    return looks


def _kind(r: Result) -> tuple:
    return r.cell["impl"], r.cell["block_q"], r.cell["block_k"]


def _line(result: Result) -> str:
    return f"{dense_name(result.cell['impl'])} {blocks(result)}"
