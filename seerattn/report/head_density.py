"""Figure: which heads get how many blocks, a map of layers by heads for each selector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seerattn.report import style
from seerattn.report.grid import density_label
from seerattn.report.select import arms, budget, kind, last_rows_dense
from seerattn.results.record import Result

# Of each selector the sparsest, the densest and the one between are drawn; the table has all.
COLUMNS = 3
# Heads that differ by less get the same; rounding of counts is below it.
UNIFORM = 1e-6


def draw_head_density(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws lines of selectors by columns of densities, a figure for each model and text at the longest context.

    Selectors that give every head the same at every density are left out.

    Returns:
        The files written; none without such results.
    """
    written = []
    drawn = [differing(rows) for rows in head_densities(results).values()]
    for number, rows in enumerate(filter(None, drawn)):
        name = "head_density" if not number else f"head_density-{number + 1}"
        with style.context():
            written += _draw(rows, folder, name)
    return written


def head_densities(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """By model and text the perplexity rows that counted every head, in their setting with the fewest dense rows."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        if r.what == "perplexity" and r.samples.get("head_density") and kind(r) != "dense" and budget(r) == "density":
            groups.setdefault((r.model, r.text), []).append(r)
    for place, rows in groups.items():
        longest = max(r.context for r in rows)
        rows = [r for r in rows if r.context == longest]
        fewest = min(map(last_rows_dense, rows))
        order = arms(rows)
        rows = [r for r in rows if last_rows_dense(r) == fewest]
        rows = [r for r in rows if by_head(r).shape == by_head(rows[0]).shape]
        groups[place] = sorted(rows, key=lambda r: (order.index(r.arm), -(r.density or 0.0)))
    return groups


def by_head(result: Result) -> np.ndarray:
    """Realised density ``[layers, heads]``, NaN beyond the last head of a layer."""
    layers = result.samples["head_density"]
    values = np.full((len(layers), max(map(len, layers))), np.nan)
    for line, heads in zip(values, layers):
        line[: len(heads)] = heads
    return values


def differing(results: Sequence[Result]) -> list[Result]:
    """The results of selectors whose heads differ at some density."""
    found = {r.arm for r in results if float(np.nanmax(by_head(r)) - np.nanmin(by_head(r))) > UNIFORM}
    return [r for r in results if r.arm in found]


def _draw(rows: list[Result], folder: Path, name: str) -> list[Path]:
    found = sorted({r.density for r in rows if r.density is not None}, reverse=True)
    own = any(r.density is None for r in rows)
    places = np.linspace(0, len(found) - 1, min(COLUMNS, len(found))).round().astype(int)
    densities: list[float | None] = [found[i] for i in dict.fromkeys(places)] + ([None] if own else [])
    names = [arm for arm in arms(rows) if any(r.arm == arm and r.density in densities for r in rows)]
    layers, heads = by_head(rows[0]).shape
    # Maps of one column share an image, with lines of nothing between them: quicker to draw than panels of their own.
    pitch = layers + max(1, layers // 6)
    height = max(0.9, 1.7 * min(1.0, layers / heads)) * len(names)
    figure = Figure(figsize=(2.0 * len(densities) + 1.4, height + 1.2), layout="constrained")
    columns = figure.subplots(1, len(densities), squeeze=False, sharey=True)[0]
    for axes, density in zip(columns, densities):
        stack = np.full((pitch * len(names) - pitch + layers, heads), np.nan)
        for place, arm in enumerate(names):
            found = [by_head(r) for r in rows if (r.arm, r.density) == (arm, density)]
            if found:
                stack[place * pitch : place * pitch + layers] = found[-1]
            else:
                middle = (heads - 1) / 2, place * pitch + (layers - 1) / 2
                axes.annotate("not measured", middle, ha="center", va="center", fontsize=8)
        picture = axes.imshow(
            stack, cmap="cividis", vmin=0.0, vmax=np.nanmax(stack), aspect="auto", interpolation="none"
        )
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(f"asked: {density_label(density)}")
        axes.set_xlabel("head")
        bar = figure.colorbar(picture, ax=axes, orientation="horizontal", shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("realised density", fontsize=8)
    centres = [place * pitch + (layers - 1) / 2 for place in range(len(names))]
    shown = style.names(rows)
    columns[0].set_yticks(centres, [shown[arm] for arm in names])
    columns[0].set_ylabel("layers from top to bottom")
    title = f"{rows[0].text}, {rows[0].context:,} tokens, {rows[0].model}"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return style.save(figure, folder, name)
