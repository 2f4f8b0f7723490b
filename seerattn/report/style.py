"""The look of all figures: style sheet, colours, axes, deterministic saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from seerattn.report import select
from seerattn.report.names import name_of
from seerattn.report.parts import MARK
from seerattn.results.record import Result

STYLE = Path(__file__).with_name("seerattn.mplstyle")
Drawn = TypeVar("Drawn")
# A place in a panel, and the standard error of its height.
Point = tuple[float, float, float]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DENSE = "#4d4d4d"
# Static baselines stand in a figure as far as this many times the loss of the worst other line.
ROOM_FOR_STATIC = 2.0
# With more lines, names stand in one legend, and an axis of perplexity ends at so many times its lowest value: among
# many methods some lose everything, and what tells the others apart must stay visible.
MANY_LINES = 9
TOP_OF_MANY = 1.25
# Colours and dashes by kind. Variants of a training-free method, and budgets per head, share a colour with their like.
_COLOURS = {
    "oracle": ("#009e73", "#7b3294", "#0072b2", "#56b4e9", "#cc79a7", "#a6611a"),
    "learned": ("#0072b2", "#56b4e9", "#cc79a7", "#000000", "#5b4fa2", "#e69f00"),
    "training-free": ("#e69f00", "#7b3294", "#a6611a", "#35978f", "#b2182b", "#4d4d4d", "#c51b7d", "#01665e"),
    "static": ("#d55e00", "#7a7a7a", "#8f7f5f", "#b3589a"),
}
_SOLID = ("-", (0, (3, 1.5)))
_VARIANTS = ((0, (4, 1.5)), (0, (7, 1.5, 1.5, 1.5)), (0, (2, 1)), (0, (7, 1.5, 1.5, 1.5, 1.5, 1.5)))
_DASHES = {"oracle": _SOLID, "learned": _SOLID, "training-free": _VARIANTS, "static": ((0, (1, 1.3)),)}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*")
LABEL_POINTS = 11.0  # distance of two labels


def each(name: str, groups: Iterable[Drawn], draw: Callable[[Drawn], Figure | None], folder: Path) -> list[Path]:
    """Draws a figure of each group, if there is one to draw, and returns the files written: NAME, NAME-2 and so on."""
    written, number = [], 0
    for group in groups:
        # The style sheet on top of matplotlib's defaults, whatever the user's own settings are.
        with matplotlib.rc_context(matplotlib.rc_params_from_file(STYLE, use_default_template=True)):
            figure = draw(group)
            if figure is not None:
                number += 1
                written += save(figure, folder, f"{name}-{number}" if number > 1 else name)
    return written


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes NAME.png and NAME.svg, byte for byte the same for the same figure."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, metadata in zip(paths, ({"Software": MARK}, {"Date": None, "Creator": MARK})):
        figure.savefig(path, metadata=metadata)
    return paths


def looks(results: Iterable[Result]) -> dict[str, dict]:
    """Label, colour, dashes and marker of every line but dense, the same in all figures drawn of the same lines.

    No two lines look the same: of as many lines as there are markers, each of a kind has one of its own.
    """
    found: dict[str, dict] = {}
    taken: dict[str, dict[str, int]] = {}
    for line, (row, *_) in select.by_line(results).items():
        if row.kind != "dense":
            of_kind = taken.setdefault(row.kind, {})
            of = row.method if row.kind == "training-free" else line.removesuffix(select.PER_HEAD)
            variant = of_kind[of] = of_kind.get(of, -1) + 1
            colours, dashes = _COLOURS[row.kind], _DASHES[row.kind]
            found[line] = {
                "label": name_of(row),
                "color": colours[list(of_kind).index(of) % len(colours)],
                "linestyle": dashes[variant % len(dashes)],
                "marker": MARKERS[(sum(of_kind.values()) + len(of_kind) - 1) % len(MARKERS)],
            }
    return found


def grid(keys: Sequence[tuple], width: float, height: float, room: float = 0.0) -> tuple[Figure, dict[tuple, Axes]]:
    """A figure with axes for each key: a row for each text, or one row where no text has two.

    Args:
        keys: of the panels; the first entry of each is its text.
        width: of a panel, inches.
        height: of a panel, inches.
        room: height of what stands beside them, inches.
    """
    rows = list(select.group(sorted(keys), lambda key: key[0]).values())
    rows = [[key for (key,) in rows]] if max(map(len, rows)) == 1 else rows
    columns = max(map(len, rows))
    figure = Figure(figsize=(width * columns, height * len(rows) + room), layout="constrained")
    found = {}
    for line, of_text in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        found |= dict(zip(of_text, line))
        for axes in line[len(of_text) :]:
            axes.remove()
    return figure, found


def legend(figure: Figure, order: Iterable[str], **more: object) -> None:
    """One legend for all axes of a figure, in an order of labels."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    labels = [label for label in order if label in handles]
    figure.legend([handles[name] for name in labels], labels, fontsize=8, frameon=False, handlelength=4.5, **more)


def label_lines(figure: Figure) -> None:
    """Writes the name of each line beside its right end, in its colour; an arrow says that the line leaves the axes."""
    figure.canvas.draw()
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        ends = []
        bottom, top = axes.get_ylim()
        for i, handle in enumerate(handles):
            line = handle[0] if isinstance(handle, tuple) else handle
            end = line.get_ydata()[-1]
            labels[i] += " \N{UPWARDS ARROW}" if end > top else ""
            ends.append((line.get_color(), min(max(end, bottom), top)))
        right = axes.get_xlim()[1]
        to_points = 72 / figure.dpi
        heights = [axes.transData.transform((right, y))[1] * to_points for _, y in ends]
        for label, (colour, y), height, moved in zip(labels, ends, heights, spread(heights, LABEL_POINTS)):
            axes.annotate(
                label,
                xy=(1, y),
                xycoords=("axes fraction", "data"),
                xytext=(4, moved - height),
                textcoords="offset points",
                color=colour,
                fontsize=8,
                va="center",
                annotation_clip=False,
            )


def lines(axes: Axes, points: Mapping[str, Sequence[Point]], looks: Mapping[str, dict]) -> None:
    """Draws lines with error bars, by name."""
    for line, of_line in points.items():
        x, y, errors = zip(*of_line)
        axes.errorbar(x, y, yerr=errors, linewidth=1.3, elinewidth=1.0, **looks[line])


def dense_line(axes: Axes, y: float, label: str | None = None) -> None:
    """A level line of the dense model."""
    axes.axhline(y, color=DENSE, linewidth=1.2, linestyle=(0, (5, 3)), label=label)


def density_axis(axes: Axes) -> None:
    """Density on a logarithmic axis that falls to the right.

    Half the blocks is one step, whatever there is to halve: the sparse end, where lines part, gets its room.
    """
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.6g}%")
    axes.invert_xaxis()
    axes.set_xlabel("density: share of causal blocks computed")
    axes.grid(axis="x", visible=False)


def cut_static(axes: Axes, results: Sequence[Result]) -> float:
    """Ends an axis of perplexity where static baselines would squeeze all others, which may lose anything.

    Returns:
        Its upper end, infinity where it is left as it is.
    """
    low = min(r.value for r in results)
    worst = max((r.value for r in results if r.kind != "static"), default=low)
    top = low + ROOM_FOR_STATIC * (worst - low)
    if len({r.line for r in results}) > MANY_LINES:
        top = min(top, TOP_OF_MANY * low)
    if worst <= low or max(r.value for r in results) <= top:
        return math.inf
    axes.set_ylim(low - 0.05 * (top - low), top)
    return top


def caption(figure: Figure, *words: str) -> None:
    """Says above a figure what was measured where."""
    figure.suptitle(", ".join(filter(None, words)), fontsize=8, x=0.01, ha="left")


def spread(positions: list[float], gap: float) -> list[float]:
    """Moves label positions apart until neighbours are ``gap`` apart, each as near to its own place as that allows."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    # Clusters of touching labels, each as (centre, members).
    clusters: list[tuple[float, list[int]]] = []
    for i in order:
        centre, members = positions[i], [i]
        while clusters and clusters[-1][0] + gap * (len(clusters[-1][1]) + len(members)) / 2 > centre:
            other, more = clusters.pop()
            centre = (other * len(more) + centre * len(members)) / (len(more) + len(members))
            members = more + members
        clusters.append((centre, members))
    moved = list(positions)
    for centre, members in clusters:
        for place, i in enumerate(members):
            moved[i] = centre + gap * (place - (len(members) - 1) / 2)
    return moved
