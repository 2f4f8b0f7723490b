"""Lines over the length, panels side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from seerattn.report import style
from seerattn.report.benchmarks import caption, form, tokens
from seerattn.report.select import group
from seerattn.results.record import Result

_DASHES = {"flash": "-", "cudnn": (0, (5, 3)), "sdpa": "-"}
_SHADES = ("Blues", "Oranges", "Greens", "Purples")
# A value of a row, by the title of its panel.
Panels = dict[str, list[tuple[Result, float]]]


def over_length(panels: Panels, label: Callable[[Result], str], *more: str) -> Figure | None:
    """The figure; panels over more than a decade have a logarithmic axis of values.

    Args:
        panels: what stands in it; empty ones are left out.
        label: name of the line of a row.
        more: what the line above says beside device and shape.

    Returns:
        None where all was measured at one length: tables say as much.
    """
    panels = {title: points for title, points in panels.items() if points}
    rows = [r for points in panels.values() for r, _ in points]
    if len({r.context for r in rows}) < 2:
        return None
    looks = _looks(rows, label)
    figure = Figure(figsize=(4.0 * len(panels) + 0.4, 4.2), layout="constrained")
    for number, (title, points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _panel(axes, points, label, looks)
        axes.set_title(title)
        values = [value for _, value in points]
        if max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        else:
            axes.set_ylim(bottom=0)
    style.legend(figure, looks, loc="outside lower center", ncols=len(panels) + 1)
    style.caption(figure, *caption(rows[0], *more))
    return figure


def _panel(
    axes: Axes, points: Sequence[tuple[Result, float]], label: Callable[[Result], str], looks: dict[str, dict]
) -> None:
    for name, line in group(points, lambda point: label(point[0])).items():
        line = sorted((r.context, value) for r, value in line)
        axes.plot(*zip(*line), label=name, **looks[name])
    lengths = sorted({r.context for r, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _looks(rows: Sequence[Result], label: Callable[[Result], str]) -> dict[str, dict]:
    """What chooses nothing and makes no map is grey; lines of one kind share a colour map, darker where sparser."""
    others = [r for r in rows if r.kind != "dense" or r.cell.get("map")]
    kinds = list(group(others, lambda r: (r.name, r.cell["impl"], form(r))))
    densities = sorted({r.density or 1.0 for r in others}, reverse=True)
    looks: dict[str, dict] = {}
    for r in sorted(rows, key=lambda r: (r in others, r.name, -(r.density or 1.0))):
        if r in others:
            shades = matplotlib.colormaps[_SHADES[kinds.index((r.name, r.cell["impl"], form(r))) % len(_SHADES)]]
            depth = (densities.index(r.density or 1.0) + 1) / (len(densities) + 1)
            looks[label(r)] = {"color": shades(0.35 + 0.6 * depth), "marker": "o"}
        else:
            looks[label(r)] = {"color": style.DENSE, "linestyle": _DASHES.get(r.cell["impl"], ":"), "marker": "s"}
    return looks
