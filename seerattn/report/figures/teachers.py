"""Figure: loss against density of the perfect choice by each map, and beside it of the gates that learned from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from seerattn.report import style
from seerattn.report.names import per_head
from seerattn.report.select import PER_HEAD, group
from seerattn.report.tables.cost import Compared, Place, compared, over
from seerattn.report.tables.gap import STREAMING
from seerattn.results.record import Result

# Up to this many percent the axis is linear, beyond it logarithmic: losses of a hundredth and of a hundred stand in it.
_LINEAR = 1.0
_ROOM_OF_LINEAR = 0.5
_TICKS = (-1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def groups(results: Sequence[Result]) -> list[Compared]:
    """What was measured of each model of which oracles of several maps were."""
    return compared(results)


def draw(one: Compared) -> Figure | None:
    """Two panels for each text."""
    texts = group((place for place in one.perplexity if place.dense), lambda place: place.name)
    if not texts:
        return None
    rows = {line: found[-1] for places in texts.values() for place in places for line, found in place.rows.items()}
    looks = style.looks(rows.values())
    for line in rows:
        if per_head(line) and line.removesuffix(PER_HEAD) in rows:
            # Told by its dashes beside the same line with equal heads; labels leave out what begins so.
            looks[line]["label"] = f"_{line}"
    figure = Figure(figsize=(10.2, 3.9 * len(texts)), layout="constrained")
    grid = figure.subplots(len(texts), 2, squeeze=False, sharey="row")
    for axes_of_text, (text, places) in zip(grid, texts.items()):
        points = {line: found for line in looks if (found := _points(places, line))}
        for axes, of, title in zip(axes_of_text, ("oracle", "learned"), ("perfect choice by each map", "gates")):
            shown = {line: found for line, found in points.items() if rows[line].kind == of or line == STREAMING}
            style.dense_line(axes, 0)
            style.lines(axes, shown, looks)
            if any(looks[line]["label"].startswith("_") for line in shown):
                place = {"transform": axes.transAxes, "ha": "right", "color": style.DENSE, "fontsize": 8}
                axes.text(0.99, 0.22, "dashed: budgets per head", **place)
            _scale(axes, [point for found in points.values() for point in found])
            axes.set_title(f"{text}: {title}")
            axes.set_xlabel(f"density: share of causal blocks computed, of {one.context:,} tokens")
        axes_of_text[0].set_ylabel("perplexity over dense, %")
    style.label_lines(figure)
    return figure


def _scale(axes: Axes, points: Sequence[style.Point]) -> None:
    """The same axes for both panels of a text: all its lines fit."""
    style.density_axis(axes)
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=_ROOM_OF_LINEAR)
    axes.set_yticks(_TICKS, [f"{tick:+d}%" if tick else "dense" for tick in _TICKS])
    axes.yaxis.set_minor_locator(NullLocator())
    low = min((y - error for _, y, error in points), default=0.0)
    high = max((y + error for _, y, error in points), default=_LINEAR)
    axes.set_ylim(min(0.0, low) - 0.2, 1.3 * max(high, _LINEAR))


def _points(places: Sequence[Place], line: str) -> list[style.Point]:
    """Realised density, loss and error, by falling density."""
    found = []
    for rows, dense in ((place.rows[line], place.dense) for place in places if line in place.rows):
        value, error = over(rows[-1], dense[-1])
        if rows[-1].realised_density and math.isfinite(value) and math.isfinite(error or 0.0):
            found.append((rows[-1].realised_density, value, error or 0.0))
    return sorted(found, reverse=True)
