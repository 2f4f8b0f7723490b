"""Figure: perplexity against realised sparsity, one line for each way of choosing blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seerattn.report import style
from seerattn.report.select import budget, group, last_rows_dense, paired, panels, perplexity_key
from seerattn.results.record import Result


def draw_perplexity(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws a panel for each kind of text and context, and returns the files written; none without such results.

    Error bars are the standard error of the paired difference from the dense model: what two lines have in common,
    the difficulty of the documents, is not in them.
    """
    rows = [r for r in results if r.what == "perplexity" and r.value is not None and not last_rows_dense(r)]
    rows = [r for r in rows if budget(r) == "density" and r.realised_density is not None]
    found = panels(rows)
    if not found:
        return []
    with style.context():
        looks, names = style.looks(rows), style.names(rows)
        texts = list(dict.fromkeys(key[:2] for key in sorted(found)))
        columns = max(sum(key[:2] == text for key in found) for text in texts)
        figure = Figure(figsize=(4.6 * columns, 3.4 * len(texts)), layout="constrained")
        grid = figure.subplots(len(texts), columns, squeeze=False)
        for line, text in zip(grid, texts):
            keys = sorted(key for key in found if key[:2] == text)
            for axes, key in zip(line, keys):
                _panel(axes, key, found[key], paired(results), looks, names)
            for axes in line[len(keys) :]:
                axes.remove()
        if len(looks) > style.MANY_LINES:
            drawn = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels())}
            order = [name for name in names.values() if name in drawn]
            legend = {"loc": "outside right center", "fontsize": 8, "frameon": False, "handlelength": 4.5}
            figure.legend([drawn[name] for name in order], order, **legend)
        else:
            figure.canvas.draw()
            for axes in figure.axes:
                style.label_lines(axes)
        return style.save(figure, folder, "perplexity")


def _panel(
    axes: Axes,
    key: tuple,
    rows: Sequence[Result],
    errors: dict[str, float],
    looks: dict[str, dict],
    names: dict[str, str],
) -> None:
    _, text, context, _ = key
    axes.set_title(f"{text}, {context:,} tokens")
    for (arm,), line in sorted(group(rows, "arm").items()):
        if arm == "dense":
            axes.axhline(line[0].value, color=style.DENSE, linewidth=1.2, linestyle=(0, (5, 3)), label="dense")
            continue
        line = sorted(line, key=lambda r: 1 - r.realised_density)
        x, y = [1 - r.realised_density for r in line], [r.value for r in line]
        axes.errorbar(
            x,
            y,
            yerr=[errors.get(perplexity_key(r), 0.0) for r in line],
            label=names[arm],
            elinewidth=1.0,
            linewidth=1.2,
            **looks[arm],
        )
    style.cut_floors(axes, rows)
    axes.xaxis.set_major_formatter(style.percent)
    axes.set_xlabel("sparsity: share of causal blocks not computed")
    axes.set_ylabel("perplexity")
    axes.grid(axis="x", visible=False)
