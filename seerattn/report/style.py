"""The look of all figures: style sheet, colours, deterministic saving."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("seerattn.mplstyle")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
DENSE = "#4d4d4d"
_FIXED = {"oracle": "#009e73", "streaming": "#d55e00"}
PALETTE = ("#0072b2", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def looks(arms: Iterable[str]) -> dict[str, dict]:
    """Colour and marker of every arm, the same in all figures drawn of the same arms."""
    names = sorted(set(arms) - {"dense"})
    gates = [name for name in names if name not in _FIXED]
    colours = _FIXED | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(gates)}
    return {name: {"color": colours[name], "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(names)}


def context():
    """The style sheet on top of matplotlib's defaults, whatever the user's own settings are."""
    return matplotlib.rc_context(matplotlib.rc_params_from_file(STYLE, use_default_template=True))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes NAME.png and NAME.svg, byte for byte the same for the same figure."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None})):
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
