"""Figures of block maps: the true map, the gate's map and the choice side by side; the choices of many heads."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

from seerattn.report import style
from seerattn.results.maps import BlockMaps

# Small probabilities are most of a map; the power keeps them visible beside the diagonal.
GAMMA = 0.4
FORCED, LEFT_OUT = "#c8c8c8", "#f4f4f4"
# Heads drawn with their maps, and heads drawn as masks alone.
FULL, SMALL = 6, 64
PER_LINE = 8


def draw_maps(maps: BlockMaps) -> Figure:
    """A row for each of up to `FULL` heads, spread evenly over all."""
    shown = _spread(maps, FULL)
    rows = len(shown)
    figure = Figure(figsize=(8.2, 2.5 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False, sharex=True, sharey=True)
    decided = maps.decided
    for line, i in zip(grid, shown):
        target, gate, chosen = maps.target[i], maps.gate[i], maps.chosen[i]
        shares = target * decided / np.maximum((target * decided).sum(-1, keepdims=True), 1e-30)
        top = float(np.quantile(shares[decided], 0.99)) if decided.any() else 1.0
        norm = PowerNorm(GAMMA, vmin=0.0, vmax=max(top, 1e-6), clip=True)
        for axes, image in zip(line, (shares, gate)):
            picture = axes.imshow(np.ma.array(image, mask=~decided), norm=norm, cmap="Blues", interpolation="none")
        bar = figure.colorbar(picture, ax=line[1], shrink=0.75, pad=0.03, ticks=[0, top / 10, top / 2, top])
        bar.ax.set_yticklabels([f"{tick:.2g}" for tick in (0, top / 10, top / 2, top)])
        bar.outline.set_visible(False)
        _mask(line[2], maps, chosen)
        recall = (target * chosen).sum() / max(int((target.sum(-1) > 0).sum()), 1)
        label = f"recall {recall:.2f}"
        line[2].text(0.98, 0.96, label, transform=line[2].transAxes, ha="right", va="top", fontsize=8)
        for axes in line:
            _forced(axes, maps)
            axes.grid(False)
        line[0].set_ylabel("layer {}, head {}\nquery block".format(*maps.heads[i]))
    titles = ("true map", f"map of the gate: {maps.gates}", f"chosen blocks, density {maps.density:g}")
    for axes, title in zip(grid[0], titles):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel("key block")
    note = "Grey blocks are kept in any case; the rows of both maps are normalised over the others."
    figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def draw_masks(maps: BlockMaps) -> Figure | None:
    """The choice of up to `SMALL` heads, spread evenly over all; None where `draw_maps` shows every head."""
    if len(maps.heads) <= FULL:
        return None
    shown = _spread(maps, SMALL)
    lines = -(-len(shown) // PER_LINE)
    figure = Figure(figsize=(8.2, 1.15 * lines + 0.3), layout="constrained")
    places = figure.subplots(lines, PER_LINE, squeeze=False).flat
    for i, axes in zip(shown, places):
        _mask(axes, maps, maps.chosen[i])
        _forced(axes, maps)
        axes.set_axis_off()
        axes.set_title("layer {}, head {}".format(*maps.heads[i]), fontsize=6, fontweight="normal", pad=2, loc="center")
    for axes in places:
        axes.remove()
    return figure


def _spread(maps: BlockMaps, most: int) -> list[int]:
    """Places of up to so many heads, evenly spread over all."""
    return np.linspace(0, len(maps.heads) - 1, min(most, len(maps.heads))).round().astype(int).tolist()


def _mask(axes: Axes, maps: BlockMaps, chosen: np.ndarray) -> None:
    colours = ListedColormap([LEFT_OUT, style.PALETTE[0]])
    picture = np.ma.array(chosen, mask=~maps.decided)
    axes.imshow(picture, cmap=colours, vmin=0, vmax=1, interpolation="none")


def _forced(axes: Axes, maps: BlockMaps) -> None:
    picture = np.ma.array(np.ones(maps.forced.shape), mask=~maps.forced)
    axes.imshow(picture, cmap=ListedColormap([FORCED]), interpolation="none")
