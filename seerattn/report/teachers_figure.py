"""Figure: loss against density of the perfect choice by each map, and beside it of the gates that learned from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from seerattn.report import style
from seerattn.report.cost import STREAMING, Column, Measured, measured, over
from seerattn.report.names import map_name, map_of, teacher_of
from seerattn.report.select import PER_HEAD, arms, kind
from seerattn.results.record import Result
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm

# Okabe and Ito's colours by map; further maps, and gates whose teacher their name does not tell, get those left over.
_OF_MAP = {PUBLISHED: "#d55e00", MASS: "#56b4e9", MapForm("sum", 2): "#0072b2", MapForm("sum", 4): "#009e73"}
_OTHERS = ("#cc79a7", "#000000", "#e69f00", "#5b4fa2", "#a6611a")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_FLOOR = "#8c8c8c"
# Up to this many percent the axis is linear, beyond it logarithmic: losses of a hundredth and of a hundred stand in it.
_LINEAR = 1.0
_ROOM_OF_LINEAR = 0.5
_TICKS = (-1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def draw_teachers(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws a line of two panels for each text, a figure for each model of which oracles of several maps were measured.

    Returns:
        The files written.
    """
    written = []
    for number, one in enumerate(found for found in measured(results) if any(c.dense for c in found.perplexity)):
        with style.context():
            written += _draw(one, folder, f"teachers-{number + 1}" if number else "teachers")
    return written


def _draw(one: Measured, folder: Path, name: str) -> list[Path]:
    texts: dict[str, list[Column]] = {}
    for column in one.perplexity:
        if column.dense:
            texts.setdefault(column.name, []).append(column)
    rows = {arm: found[-1] for columns in texts.values() for c in columns for arm, found in c.rows.items()}
    looks = _looks(rows)
    figure = Figure(figsize=(10.2, 3.9 * len(texts)), layout="constrained")
    grid = figure.subplots(len(texts), 2, squeeze=False, sharey="row")
    for line, (text, columns) in zip(grid, texts.items()):
        for axes, of, title in zip(line, ("oracle", "gate"), ("perfect choice by each map", "gates")):
            axes.set_title(f"{text}: {title}")
            axes.set_xlabel(f"density: share of causal blocks computed, of {one.context:,} tokens")
            _panel(axes, columns, {a: looks[a] for a in arms(rows.values()) if kind(rows[a]) == of or a == STREAMING})
        line[0].set_ylabel("perplexity over dense, %")
    figure.canvas.draw()
    for axes in figure.axes:
        style.label_lines(axes)
    return style.save(figure, folder, name)


def _looks(rows: dict[str, Result]) -> dict[str, dict]:
    """Colours by map or teacher, markers by gate; budgets per head are dashed and look like the rest of their arm."""
    forms = [form for form in map(map_of, rows.values()) if form is not None]
    colours: dict[MapForm | str, str] = {form: _OF_MAP[form] for form in forms if form in _OF_MAP}
    spare = iter(_OTHERS * len(rows))
    found, markers = {}, {}
    for arm in arms(rows.values()):
        row, plain = rows[arm], arm.removesuffix(PER_HEAD)
        label, form = plain, map_of(row) or teacher_of(row)
        if map_of(row) is not None:
            label = map_name(map_of(row))
        if arm.endswith(PER_HEAD):
            # Named by its colour where the same arm with equal heads stands beside it, as `_panel` says.
            label = f"_{label}, per head" if plain in rows else f"{label}, per head"
        if arm == STREAMING:
            found[arm] = {"label": label, "color": _FLOOR, "marker": "x", "linestyle": "-"}
            continue
        key = plain if form is None else form
        if key not in colours:
            colours[key] = _OF_MAP[key] if key in _OF_MAP else next(spare)
        # Gates of one teacher share its colour; the first of them has the marker of the map.
        of_key = markers.setdefault((key, kind(row)), {})
        marker = _MARKERS[of_key.setdefault(plain, len(of_key)) % len(_MARKERS)]
        dashes = (0, (3, 1.5)) if arm.endswith(PER_HEAD) else "-"
        found[arm] = {"label": label, "color": colours[key], "marker": marker, "linestyle": dashes}
    return found


def _panel(axes: Axes, columns: Sequence[Column], looks: dict[str, dict]) -> None:
    axes.axhline(0, color=style.DENSE, linewidth=1.0, linestyle=(0, (5, 3)))
    for arm, look in looks.items():
        points = _points(columns, arm)
        if points:
            x, y, errors = zip(*points)
            axes.errorbar(x, y, yerr=errors, linewidth=1.4, elinewidth=1.0, markersize=4, **look)
    if any(arm.removesuffix(PER_HEAD) in looks and arm.endswith(PER_HEAD) for arm in looks):
        place = {"transform": axes.transAxes, "ha": "right", "color": style.DENSE, "fontsize": 8}
        axes.text(0.99, 0.22, "dashed: budgets per head", **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(style.percent)
    axes.invert_xaxis()
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=_ROOM_OF_LINEAR)
    axes.set_yticks(_TICKS, [f"{tick:+d}%" if tick else "dense" for tick in _TICKS])
    axes.yaxis.set_minor_locator(NullLocator())
    # All lines of the text, so that both panels have the same axes.
    points = [point for arm in {arm for c in columns for arm in c.rows} for point in _points(columns, arm)]
    low = min((y - error for _, y, error in points), default=0.0)
    high = max((y + error for _, y, error in points), default=_LINEAR)
    axes.set_ylim(min(0.0, low) - 0.2, 1.3 * max(high, _LINEAR))


def _points(columns: Sequence[Column], arm: str) -> list[tuple[float, float, float]]:
    """Realised density, loss and error, by falling density."""
    found = []
    for rows, dense in ((c.rows[arm], c.dense) for c in columns if arm in c.rows):
        if rows[-1].realised_density:
            value, error = over(rows[-1], dense[-1])
            if math.isfinite(value) and math.isfinite(error or 0.0):
                found.append((rows[-1].realised_density, value, error or 0.0))
    return sorted(found, reverse=True)
