"""Figure: for chosen layers and heads the true block map, the gate's map and the chosen blocks, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

from seerattn.eval.maps import BlockMaps
from seerattn.report import style

# Small probabilities are most of a map; the power keeps them visible beside the diagonal.
GAMMA = 0.4
FORCED, LEFT_OUT = "#c8c8c8", "#f4f4f4"


def draw_maps(maps: BlockMaps, folder: Path) -> list[Path]:
    """Draws one row for each head, and returns the files written."""
    with style.context():
        rows = len(maps.heads)
        figure = Figure(figsize=(8.2, 2.5 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, 3, squeeze=False, sharex=True, sharey=True)
        colour = style.looks([maps.gates])[maps.gates]["color"]
        causal = np.tril(np.ones(maps.forced.shape, dtype=bool), k=maps.forced.shape[1] - maps.forced.shape[0])
        decided = causal & ~maps.forced
        for line, (layer, head), target, gate, chosen in zip(grid, maps.heads, maps.target, maps.gate, maps.chosen):
            shares = target * decided / np.maximum((target * decided).sum(-1, keepdims=True), 1e-30)
            top = float(np.quantile(shares[decided], 0.99)) if decided.any() else 1.0
            norm = PowerNorm(GAMMA, vmin=0.0, vmax=max(top, 1e-6), clip=True)
            for axes, image in zip(line, (shares, gate)):
                picture = axes.imshow(np.ma.array(image, mask=~decided), norm=norm, cmap="Blues", interpolation="none")
            bar = figure.colorbar(picture, ax=line[1], shrink=0.75, pad=0.03, ticks=[0, top / 10, top / 2, top])
            bar.ax.set_yticklabels([f"{tick:.2g}" for tick in (0, top / 10, top / 2, top)])
            bar.outline.set_visible(False)
            colours = ListedColormap([LEFT_OUT, colour])
            line[2].imshow(np.ma.array(chosen, mask=~decided), cmap=colours, vmin=0, vmax=1, interpolation="none")
            recall = (target * chosen).sum() / max(int((target.sum(-1) > 0).sum()), 1)
            label = f"recall {recall:.2f}"
            line[2].text(0.98, 0.96, label, transform=line[2].transAxes, ha="right", va="top", fontsize=8)
            for axes in line:
                forced = np.ma.array(np.ones(maps.forced.shape), mask=~(maps.forced & causal))
                axes.imshow(forced, cmap=ListedColormap([FORCED]), interpolation="none")
                axes.grid(False)
            line[0].set_ylabel(f"layer {layer}, head {head}\nquery block")
        titles = ("true map", f"map of the gate: {maps.gates}", f"chosen blocks, density {maps.density:g}")
        for axes, title in zip(grid[0], titles):
            axes.set_title(title)
        for axes in grid[-1]:
            axes.set_xlabel("key block")
        note = "Grey blocks are kept in any case; the rows of both maps are normalised over the others."
        figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
        return style.save(figure, folder, "maps")
