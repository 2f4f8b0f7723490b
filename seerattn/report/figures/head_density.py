"""Figure: which heads get how many blocks, a map of layers by heads for each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seerattn.report import style
from seerattn.report.names import name_of
from seerattn.report.select import by_line, density_label
from seerattn.report.tables.heads import by_head, differing, head_densities
from seerattn.results.record import Result

# Of each method the sparsest, the densest and the one between are drawn; the table has all.
COLUMNS = 3


def groups(results: Sequence[Result]) -> Iterable[list[Result]]:
    """Methods whose heads differ at some density, of each model and text at the longest context."""
    return filter(None, map(differing, head_densities(results)))


def draw(rows: list[Result]) -> Figure:
    """Lines of methods by columns of densities."""
    asked = sorted({r.density for r in rows if r.density is not None}, reverse=True)
    places = np.linspace(0, len(asked) - 1, min(COLUMNS, len(asked))).round().astype(int)
    densities: list[float | None] = [asked[i] for i in dict.fromkeys(places)]
    densities += [None] if any(r.density is None for r in rows) else []
    lines = by_line(r for r in rows if r.density in densities)
    layers, heads = by_head(rows[0]).shape
    # Maps of one column share an image, with lines of nothing between them: quicker to draw than panels of their own.
    pitch = layers + max(1, layers // 6)
    height = max(0.9, 1.7 * min(1.0, layers / heads)) * len(lines)
    figure = Figure(figsize=(2.0 * len(densities) + 1.4, height + 1.2), layout="constrained")
    columns = figure.subplots(1, len(densities), squeeze=False, sharey=True)[0]
    for axes, density in zip(columns, densities):
        stack = np.full((pitch * len(lines) - pitch + layers, heads), np.nan)
        for place, of_line in enumerate(lines.values()):
            found = [by_head(r) for r in of_line if r.density == density]
            if found:
                stack[place * pitch : place * pitch + layers] = found[-1]
            else:
                middle = (heads - 1) / 2, place * pitch + (layers - 1) / 2
                axes.annotate("not measured", middle, ha="center", va="center", fontsize=8)
        top = np.nanmax(stack)
        picture = axes.imshow(stack, cmap="cividis", vmin=0.0, vmax=top, aspect="auto", interpolation="none")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(f"asked: {density_label(density)}")
        axes.set_xlabel("head")
        bar = figure.colorbar(picture, ax=axes, orientation="horizontal", shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("realised density", fontsize=8)
    centres = [place * pitch + (layers - 1) / 2 for place in range(len(lines))]
    columns[0].set_yticks(centres, [name_of(of_line[0]) for of_line in lines.values()])
    columns[0].set_ylabel("layers from top to bottom")
    style.caption(figure, rows[0].text, f"{rows[0].context:,} tokens", rows[0].model)
    return figure
