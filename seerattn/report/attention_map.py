"""Figure: time and memory of attention that also emits the map gates learn from, beside dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from seerattn.report import speed, style
from seerattn.results.record import Result

PANELS = {"pooled_ms": "time, ms", "extra_memory_mib": "memory beyond inputs and results, MiB"}
_GREYS = ("#4d4d4d", "#8c8c8c", "#bdbdbd", "#dddddd")


def draw_pooled(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws grouped bars by length on logarithmic axes, a figure for each device and shape.

    Grey bars make no map. A variant that ran out of memory is written out.

    Returns:
        The files written; none without such results.
    """
    written = []
    for number, rows in enumerate(speed.machines(results, *PANELS).values()):
        with style.context():
            written += _draw(rows, folder, "pooled" if not number else f"pooled-{number + 1}")
    return written


def _draw(rows: list[Result], folder: Path, name: str) -> list[Path]:
    variants = {_variant(r): r.cell.get("map", False) for r in rows}
    variants = dict(sorted(variants.items(), key=lambda item: not item[1]))
    colours = iter(style.PALETTE), iter(_GREYS)
    looks = {impl: next(colours[0 if made else 1]) for impl, made in variants.items()}
    whats = [what for what in PANELS if any(r.what == what and r.value is not None for r in rows)]
    figure = Figure(figsize=(4.6 * len(whats) + 0.4, 3.9), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(whats), squeeze=False)[0], whats):
        _panel(axes, [r for r in rows if r.what == what], looks, variants)
        axes.set_title(PANELS[what])
    handles = [Patch(color=colour, label=_label(impl, variants[impl])) for impl, colour in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    speed.caption(figure, rows[0])
    return style.save(figure, folder, name)


def _panel(axes: Axes, rows: list[Result], looks: dict[str, str], variants: dict[str, bool]) -> None:
    lengths = speed.contexts(rows)
    width = 0.8 / len(variants)
    axes.set_yscale("log")
    for i, impl in enumerate(variants):
        for place, length in enumerate(lengths):
            x = place + (i - (len(variants) - 1) / 2) * width
            row = next((r for r in rows if (_variant(r), r.context) == (impl, length)), None)
            if row is None:
                continue
            if not row.value:
                text = "0" if row.value == 0 else row.samples.get("error", ["not finite"])[0]
                at, y = ("data", "axes fraction"), 0.02
            else:
                axes.bar(x, row.value, width * 0.92, color=looks[impl])
                text, at, y = f"{row.value:.3g}" if row.value < 1000 else f"{row.value:,.0f}", "data", row.value
            turned = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 6.5}
            axes.annotate(text, (x, y), xycoords=at, xytext=(0, 3), textcoords="offset points", **turned)
    axes.margins(y=0.2)
    axes.set_xticks(range(len(lengths)), [speed.tokens(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.grid(axis="x", visible=False)


def _variant(row: Result) -> str:
    return row.cell["impl"] + speed.form(row)


def _label(impl: str, made: bool) -> str:
    if not made:
        return f"{speed.dense_name(impl)} (no map)"
    name, *form = impl.split(maxsplit=1)
    return " ".join([speed.dense_name(name) if name == "pytorch" else f"seerattn, {name}", *form])
