"""Figure: perplexity against the measured time of attention, the choice of blocks included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from seerattn.report import style
from seerattn.report.benchmarks import in_models
from seerattn.report.select import asked, budget, group, last_rows_dense, paired, perplexity_key
from seerattn.results.record import Result

FRONT = "not beaten"
# A perplexity with its milliseconds, and the sequences a forward that those are of.
Timed = tuple[float, Result, int]


def groups(results: Sequence[Result]) -> list[tuple]:
    """Perplexities with times, of each model and device of the clock, and their errors."""
    return [(*item, paired(results)) for item in timed(results).items()]


def timed(results: Sequence[Result]) -> dict[tuple[str, str], list[Timed]]:
    """Perplexities with milliseconds of attention, by model and device of the clock."""
    rows = [r for r in results if r.what == "perplexity" and r.value is not None]
    fewest = min((last_rows_dense(r) for r in rows if r.kind != "dense"), default=0)
    rows = [r for r in rows if r.kind == "dense" or last_rows_dense(r) == fewest]
    found: dict[tuple[str, str], list[Timed]] = {}
    for batch, times in in_models(results).items():
        clocks: dict[tuple, Result] = {}
        for r in times:
            clocks[_place(r)] = clocks[_place(r), r.text] = r
        for r in rows:
            # A time that was measured on another text is as good: it depends on the shapes.
            clock = clocks.get((_place(r), r.text), clocks.get(_place(r)))
            if clock is not None:
                found.setdefault((r.model, clock.device), []).append((clock.value, r, batch))
    return found


def _place(r: Result) -> tuple:
    of = () if r.kind == "dense" else (r.line, asked(r), last_rows_dense(r), budget(r))
    return r.model, r.weights.get("model"), r.context, *of


def draw(group_of: tuple[tuple[str, str], Sequence[Timed], Mapping[str, float]]) -> Figure:
    """A panel for each text, context and number of sequences a forward.

    Of several numbers of dense last rows the least is drawn. A dotted line joins what nothing measured beats in both,
    the oracle left out: it runs dense attention to choose.
    """
    place, found, errors = group_of
    looks = style.looks(r for _, r, _ in found)
    panels = group(found, lambda one: (one[1].text, one[1].context, one[2]))
    figure, axes_of = style.grid(list(panels), 4.3, 3.3, 1.2)
    for (text, context, batch), axes in axes_of.items():
        _panel(axes, sorted(panels[text, context, batch], key=lambda one: (one[0], one[1].value)), errors, looks)
        axes.set_title(f"{text}, {context:,} tokens, batch {batch}")
    order = ["dense", *(look["label"] for look in looks.values()), FRONT]
    style.legend(figure, order, loc="outside lower center", ncols=5)
    style.caption(figure, *place)
    return figure


def _panel(axes: Axes, found: Sequence[Timed], errors: Mapping[str, float], looks: dict[str, dict]) -> None:
    top = style.cut_static(axes, [r for _, r, _ in found])
    points = {
        line: [(time, r.value, errors.get(perplexity_key(r), 0.0)) for time, r, _ in of_line]
        for line, of_line in group(found, lambda one: one[1].line).items()
    }
    for line in points.keys() - looks.keys():
        time, value, _ = points.pop(line)[0]
        style.dense_line(axes, value)
        axes.plot(time, value, color=style.DENSE, marker="*", markersize=9, linestyle="none", label="dense")
    # The legend leaves out what begins with an underscore: nothing of such a line is in sight.
    hidden = {line: {"label": f"_{line}"} for line, of in points.items() if min(y for _, y, _ in of) > top}
    style.lines(axes, points, {line: look | hidden.get(line, {}) for line, look in looks.items()})
    front: list[tuple[float, float]] = []
    for time, r, _ in found:
        if r.kind != "oracle" and (not front or r.value < front[-1][1]):
            front.append((time, r.value))
    axes.plot(*zip(*front), color="#888888", linewidth=1.2, linestyle=":", drawstyle="steps-post", label=FRONT)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("attention a sequence, choice of blocks included, ms")
    axes.set_ylabel("perplexity")
