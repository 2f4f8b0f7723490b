"""Figures of block maps: the true map, the gate's map and the choice side by side; choices of many heads or methods."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

from seerattn.report import style
from seerattn.report.names import shown_name
from seerattn.results.maps import BlockMaps

# Small probabilities are most of a map; the power keeps them visible beside the diagonal.
GAMMA = 0.4
FORCED, LEFT_OUT, MISSED = "#c8c8c8", "#f4f4f4", "Reds"
# Heads drawn with their maps, and heads drawn as masks alone.
FULL, SMALL = 6, 64
PER_LINE = 8
# Heads that all methods are shown of.
COMPARED = 3


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
        norm = _norm(shares[decided])
        for axes, image in zip(line, (shares, gate)):
            picture = axes.imshow(np.ma.array(image, mask=~decided), norm=norm, cmap="Blues", interpolation="none")
        ticks = [share * norm.vmax for share in (0, 0.1, 0.5, 1)]
        bar = figure.colorbar(picture, ax=line[1], shrink=0.75, pad=0.03, ticks=ticks)
        bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
        bar.outline.set_visible(False)
        _mask(line[2], maps, chosen)
        label = f"recall {_recall(target, chosen):.2f}"
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


def draw_choices(maps: BlockMaps) -> Figure | None:
    """What every method keeps of up to `COMPARED` heads, after the true map of each; None of a file of gates alone."""
    if not maps.systems:
        return None
    shown = _spread(maps, COMPARED)
    lines = -(-(len(maps.systems) + 1) // PER_LINE)
    columns = min(len(maps.systems) + 1, PER_LINE)
    figure = Figure(figsize=(1.52 * columns, 1.8 * lines * len(shown) + 0.3), layout="constrained")
    causal = maps.decided | maps.forced
    parts = [figure] if len(shown) == 1 else figure.subfigures(len(shown), 1, hspace=0.03)
    for part, i in zip(parts, shown):
        target = maps.target[i]
        norm = _norm(target[maps.decided])
        first, *places = part.subplots(lines, columns, squeeze=False).flat
        first.imshow(np.ma.array(target, mask=~causal), norm=norm, cmap=MISSED, interpolation="none")
        _name(first, "layer {}, head {}".format(*maps.heads[i]), "true map")
        for axes, name, kept in zip(places, maps.systems, maps.kept[:, i]):
            left_out = np.ma.array(target, mask=~causal | kept)
            axes.imshow(left_out, norm=norm, cmap=MISSED, interpolation="none")
            axes.imshow(np.ma.array(kept, mask=~kept), cmap=ListedColormap([style.PALETTE[0]]), interpolation="none")
            density = kept.sum() / causal.sum()
            _name(axes, shown_name(name), f"density {density:.2f}, recall {_recall(target, kept):.2f}")
        for axes in places[len(maps.systems) :]:
            axes.remove()
    note = "Blue blocks are computed. Red is what is left out of the true map: the darker, the more of its row."
    figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def _name(axes: Axes, name: str, told: str) -> None:
    axes.set_axis_off()
    # As large as a panel has room for.
    axes.set_title(f"{name}\n", fontsize=min(7.5, 172 / max(len(name), 1)), pad=2)
    axes.text(0, 1.02, told, transform=axes.transAxes, fontsize=6.5, color="#555555", va="bottom")


def _norm(shares: np.ndarray) -> PowerNorm:
    """Shades that end where one block in a hundred holds more."""
    top = float(np.quantile(shares, 0.99)) if len(shares) else 1.0
    return PowerNorm(GAMMA, vmin=0.0, vmax=max(top, 1e-6), clip=True)


def _recall(target: np.ndarray, kept: np.ndarray) -> float:
    """What the blocks hold of a map, the mean over its rows."""
    return (target * kept).sum() / max(int((target.sum(-1) > 0).sum()), 1)


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
