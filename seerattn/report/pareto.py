"""Figure: perplexity against the measured time of attention, the choice of blocks included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from seerattn.report import speed, style
from seerattn.report.select import asked, budget, kind, last_rows_dense, paired, perplexity_key
from seerattn.results.record import Result

FRONT = "not beaten"
Timed = list[tuple[float, Result]]
# Text, context and sequences a forward.
Panels = dict[tuple[str, int, int], Timed]


def draw_pareto(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws a panel for each text, context and number of sequences a forward, and a figure for each model and device.

    Of several numbers of dense last rows the least is drawn. A dotted line joins what nothing measured beats in both,
    the oracle left out: it runs dense attention to choose.

    Returns:
        The files written; none where no perplexity has a time.
    """
    written = []
    errors = paired(results)
    for number, ((model, device), found) in enumerate(timed(results).items()):
        name = "pareto" if not number else f"pareto-{number + 1}"
        with style.context():
            written += _draw(f"{model}, {device}", found, errors, folder, name)
    return written


def timed(results: Sequence[Result]) -> dict[tuple[str, str], Panels]:
    """Perplexities with milliseconds of attention, by model and device of the clock."""
    rows = [r for r in results if r.what == "perplexity" and r.value is not None]
    fewest = min((last_rows_dense(r) for r in rows if kind(r) != "dense"), default=0)
    rows = [r for r in rows if kind(r) == "dense" or last_rows_dense(r) == fewest]
    found: dict[tuple[str, str], Panels] = {}
    for batch, times in speed.in_models(results).items():
        clocks: dict[tuple, Result] = {}
        for r in times:
            clocks[_place(r)] = clocks[_place(r), r.text] = r
        for r in rows:
            # A time that was measured on another text is as good: it depends on the shapes.
            clock = clocks.get((_place(r), r.text), clocks.get(_place(r)))
            if clock is not None:
                panels = found.setdefault((r.model, clock.device), {})
                panels.setdefault((r.text, r.context, batch), []).append((clock.value, r))
    return found


def _place(result: Result) -> tuple:
    if kind(result) == "dense":
        return result.model, result.weights.get("model"), result.context
    of = (result.arm, asked(result), last_rows_dense(result), budget(result))
    return result.model, result.weights.get("model"), result.context, *of


def _draw(title: str, panels: Panels, errors: dict[str, float], folder: Path, name: str) -> list[Path]:
    rows = [r for found in panels.values() for _, r in found]
    looks, names = style.looks(rows), style.names(rows)
    texts = list(dict.fromkeys(text for text, *_ in sorted(panels)))
    columns = max(sum(text == other for other, *_ in panels) for text in texts)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.3 * len(texts) + 1.2), layout="constrained")
    grid = figure.subplots(len(texts), columns, squeeze=False)
    for line, text in zip(grid, texts):
        keys = sorted(key for key in panels if key[0] == text)
        for axes, key in zip(line, keys):
            _panel(axes, panels[key], errors, looks, names)
            axes.set_title(f"{text}, {key[1]:,} tokens, batch {key[2]}")
        for axes in line[len(keys) :]:
            axes.remove()
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    order = [name for name in (*names.values(), FRONT) if name in handles]
    legend = {"loc": "outside lower center", "ncols": 5, "fontsize": 8, "frameon": False, "handlelength": 4.5}
    figure.legend([handles[name] for name in order], order, **legend)
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return style.save(figure, folder, name)


def _panel(axes: Axes, found: Timed, errors: dict[str, float], looks: dict[str, dict], names: dict[str, str]) -> None:
    lines: dict[str, Timed] = {}
    for time, r in sorted(found, key=lambda one: one[0]):
        lines.setdefault(r.arm, []).append((time, r))
    drawn: dict[str, ErrorbarContainer] = {}
    for arm, line in lines.items():
        x, y = [time for time, _ in line], [r.value for _, r in line]
        if arm == "dense":
            axes.axhline(y[0], color=style.DENSE, linewidth=0.8, linestyle=(0, (5, 3)))
            axes.plot(x, y, color=style.DENSE, marker="*", markersize=9, linestyle="none", label=arm)
        else:
            error = [errors.get(perplexity_key(r), 0.0) for _, r in line]
            drawn[arm] = axes.errorbar(x, y, yerr=error, label=names[arm], elinewidth=1.0, **looks[arm])
    front: list[tuple[float, float]] = []
    for time, r in sorted(found, key=lambda one: (one[0], one[1].value)):
        if kind(r) != "oracle" and (not front or r.value < front[-1][1]):
            front.append((time, r.value))
    axes.plot(*zip(*front), color="#888888", linewidth=1.2, linestyle=":", drawstyle="steps-post", label=FRONT)
    style.cut_floors(axes, [r for _, r in found])
    for arm, container in drawn.items():
        if min(r.value for _, r in lines[arm]) > axes.get_ylim()[1]:
            # Nothing of it is in sight, and the legend leaves out what begins with an underscore.
            container.set_label(f"_{names[arm]}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("attention a sequence, choice of blocks included, ms")
    axes.set_ylabel("perplexity")
