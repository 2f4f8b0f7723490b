"""Figure: speed-up of sparse attention over dense attention against sparsity, with the ideal line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from seerattn.report import speed, style
from seerattn.results.record import Result


def draw_speedup(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws a panel for each length, a figure for each device and shape, and returns the files written.

    A line is one kind of blocks by the implementation that was measured most fully, and is the fastest of those; what
    was measured at one sparsity alone stands in the tables. Times are of attention alone; dashed are the other dense
    ones.
    """
    written = []
    for number, rows in enumerate(speed.machines(results, "attention_ms").values()):
        rows = [r for r in rows if r.value is not None]
        reference, sparse = speed.baseline(rows), _fullest([r for r in rows if r.selector == "random"])
        rows = [r for r in rows if r.selector == "dense"] + sparse
        if reference is None or not sparse:
            continue
        with style.context():
            written += _draw(rows, sparse, reference, folder, "speedup" if not number else f"speedup-{number + 1}")
    return written


def _fullest(sparse: list[Result]) -> list[Result]:
    """The rows of one implementation for each kind of blocks."""
    kinds: dict[str, dict[str, list[Result]]] = {}
    for r in sparse:
        kinds.setdefault(speed.blocks(r), {}).setdefault(r.cell["impl"], []).append(r)
    chosen = (
        min(impls.values(), key=lambda rows: (-len(rows), sum(r.value for r in rows))) for impls in kinds.values()
    )
    return [r for rows in chosen if len({r.density for r in rows}) > 1 for r in rows]


def _draw(rows: list[Result], sparse: list[Result], reference: str, folder: Path, name: str) -> list[Path]:
    lengths = [length for length in speed.contexts(sparse) if _dense(rows, length, reference)]
    if not lengths:
        return []
    looks = _looks(sparse)
    figure = Figure(figsize=(3.6 * len(lengths) + 0.4, 4.6), layout="constrained")
    axes_row = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(axes_row, lengths):
        _panel(axes, [r for r in rows if r.context == length], reference, looks)
    axes_row[0].set_ylabel(f"speed-up over {speed.dense_name(reference)}")
    handles = {label: handle for axes in axes_row for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    speed.caption(figure, sparse[0])
    return style.save(figure, folder, name)


def _panel(axes: Axes, rows: list[Result], reference: str, looks: dict[str, dict]) -> None:
    dense = _dense(rows, rows[0].context, reference).value
    for r in rows:
        if r.selector == "dense" and r.cell["impl"] != reference:
            axes.axhline(dense / r.value, color=style.DENSE, linewidth=1.0, linestyle=_DASHES[r.cell["impl"]])
            axes.plot([], [], color=style.DENSE, linewidth=1.0, linestyle=_DASHES[r.cell["impl"]],
                      label=f"dense, {speed.dense_name(r.cell['impl'])}")  # fmt: skip
    lines: dict[str, list[Result]] = {}
    for r in rows:
        if r.selector == "random":
            lines.setdefault(_line(r), []).append(r)
    for label, line in lines.items():
        line = sorted(line, key=lambda r: -r.realised_density)
        x, y = [1 - r.realised_density for r in line], [dense / r.value for r in line]
        axes.plot(x, y, label=label, **looks[label])
    sparsities = [1 - r.realised_density for line in lines.values() for r in line]
    x = np.linspace(min(sparsities), max(sparsities), 200)
    axes.plot(x, 1 / (1 - x), color="black", linewidth=1.0, linestyle=":", label="ideal, 1 / (1 - sparsity)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"{speed.tokens(rows[0].context)} tokens")
    axes.set_xlabel("sparsity: share of causal blocks not computed")


_DASHES = {"cudnn": (0, (6, 2)), "flash4": (0, (3, 2)), "flex": (0, (1.5, 1.5)), "sdpa": "-", "flash": "-"}


def _looks(sparse: Sequence[Result]) -> dict[str, dict]:
    """By the name of a line: a colour for each implementation and block size, dashed where a KV group shares lists."""
    kinds: list[tuple] = []
    looks = {}
    for r in sparse:
        kind = (r.cell["impl"], r.cell["block_q"], r.cell["block_k"])
        kinds += [] if kind in kinds else [kind]
        alike = r.cell.get("rows_alike", 1) > 1
        looks[_line(r)] = {
            "color": style.PALETTE[kinds.index(kind) % len(style.PALETTE)],
            "linestyle": "-" if r.cell["share"] == "head" else (0, (4, 1.5)),
            "marker": "o" if r.cell["share"] == "head" else "s",
            "markerfacecolor": "white" if alike else None,
        }
    return looks


def _dense(rows: Sequence[Result], length: int, impl: str) -> Result | None:
    return next((r for r in rows if (r.selector, r.context, r.cell["impl"]) == ("dense", length, impl)), None)


def _line(result: Result) -> str:
    return f"{speed.dense_name(result.cell['impl'])} {speed.blocks(result)}"
