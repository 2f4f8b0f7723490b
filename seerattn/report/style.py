"""The look of all figures: style sheet, colours, deterministic saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seerattn.report.names import family_of, name_of
from seerattn.report.select import arms, kind
from seerattn.results.record import Result

# Stands near the beginning of every file that a report writes, and says that it may be replaced.
MARK = "Made by seerattn report"
STYLE = Path(__file__).with_name("seerattn.mplstyle")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
DENSE = "#4d4d4d"
# Floors stand in a figure as far as this many times the loss of the worst other line.
ROOM_FOR_FLOORS = 2.0
# With more lines, names stand in one legend, and an axis of perplexity ends at so many times its lowest value:
# among many systems some lose everything, and what tells the others apart must stay visible.
MANY_LINES = 9
TOP_OF_MANY = 1.25
PALETTE = ("#0072b2", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
# Colours by kind. Kinds differ in their dashes as well; systems of one family share a colour and differ in dashes.
_COLOURS = {
    "oracle": ("#009e73",),
    "gate": ("#0072b2", "#56b4e9", "#cc79a7", "#000000", "#5b4fa2"),
    "system": ("#e69f00", "#7b3294", "#a6611a", "#35978f", "#b2182b", "#4d4d4d"),
    "floor": ("#d55e00", "#7a7a7a", "#8f7f5f", "#b3589a"),
}
_DASHES = {
    "oracle": ("-",),
    "gate": ("-",),
    "system": ((0, (4, 1.5)), (0, (7, 1.5, 1.5, 1.5)), (0, (2, 1)), (0, (7, 1.5, 1.5, 1.5, 1.5, 1.5))),
    "floor": ((0, (1, 1.3)),),
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*")
LABEL_POINTS = 11.0  # distance of two labels


def looks(results: Iterable[Result]) -> dict[str, dict]:
    """Colour, line and marker of every arm but dense, the same in all figures drawn of the same arms.

    No two arms look the same: of as many arms as there are markers, each of a kind has one of its own.
    """
    results = list(results)
    by_arm = {r.arm: r for r in results if kind(r) != "dense"}
    found = {}
    for of, colours in _COLOURS.items():
        names = [arm for arm in arms(results) if arm in by_arm and kind(by_arm[arm]) == of]
        families: dict[str, int] = {}
        # Streaming, the floor that is always measured, comes first.
        for i, arm in enumerate(sorted(names, key=lambda arm: not arm.startswith("streaming"))):
            # Gates, and floors, are few: each has a colour.
            family = family_of(by_arm[arm]) if of == "system" else arm
            variant = families[family] = families.get(family, -1) + 1
            place = list(families).index(family)
            found[arm] = {
                "color": colours[place % len(colours)],
                "marker": _MARKERS[i % len(_MARKERS)],
                "linestyle": _DASHES[of][variant % len(_DASHES[of])],
            }
    return found


def names(results: Iterable[Result]) -> dict[str, str]:
    """What figures call every arm, in the order of tables."""
    results = list(results)
    found = {r.arm: name_of(r) for r in results}
    return {arm: found[arm] for arm in arms(results)}


def label_lines(axes: Axes) -> None:
    """Writes the name of each line beside its right end, in its colour; an arrow says that the line leaves the axes."""
    handles, labels = axes.get_legend_handles_labels()
    ends = []
    bottom, top = axes.get_ylim()
    for i, handle in enumerate(handles):
        line = handle[0] if isinstance(handle, tuple) else handle
        end = line.get_ydata()[-1]
        labels[i] += " \N{UPWARDS ARROW}" if end > top else ""
        ends.append((line.get_color(), min(max(end, bottom), top)))
    right = axes.get_xlim()[1]
    to_points = 72 / axes.figure.dpi
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


def percent(x: float, _: int | None = None) -> str:
    """A share as a tick: 0.5 is 50%, 0.125 is 12.5%."""
    return f"{100 * x:.6g}%"


def cut_floors(axes: Axes, results: Sequence[Result]) -> None:
    """Ends an axis of perplexity where floors would squeeze all others: what looks at nothing may lose anything."""
    low = min(r.value for r in results)
    worst = max((r.value for r in results if kind(r) != "floor"), default=low)
    top = low + ROOM_FOR_FLOORS * (worst - low)
    if len({r.arm for r in results}) > MANY_LINES:
        top = min(top, TOP_OF_MANY * low)
    if worst > low and max(r.value for r in results) > top:
        axes.set_ylim(low - 0.05 * (top - low), top)


def context():
    """The style sheet on top of matplotlib's defaults, whatever the user's own settings are."""
    return matplotlib.rc_context(matplotlib.rc_params_from_file(STYLE, use_default_template=True))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes NAME.png and NAME.svg, byte for byte the same for the same figure."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, metadata in zip(paths, ({"Software": MARK}, {"Date": None, "Creator": MARK})):
        figure.savefig(path, metadata=metadata)
    return paths


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
