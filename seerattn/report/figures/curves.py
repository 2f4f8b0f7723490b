"""Figure: losses of training runs over their steps, all runs in one picture (arXiv 2410.13276, figure 1a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from seerattn.report import style
from seerattn.report.curves import Curve

# Curves are smoothed over so much of the longest run.
SMOOTHED_SHARE = 0.05
# In so many of the first steps lines may leave a panel of several: they fall by far more than they differ later.
UNSCALED_SHARE = 0.1
# Further runs of the same sparsity.
_OTHERS = (("#e69f00", (0, (5, 1.5))), ("#cc79a7", (0, (1.5, 1.2))), ("#d55e00", (0, (6, 1.5, 1.5, 1.5))))
# Smoothed lines by the name of their run.
Panel = dict[str, tuple[list[int], np.ndarray]]


def draw(curves: Sequence[Curve]) -> Figure | None:
    """The loss of the language model, its difference from the dense run, and the loss of the gates.

    Runs that see the same samples share most of their noise, so the difference shows what the loss hides; where it is
    drawn, the loss is that of the dense run alone. The gates of a single run are drawn layer by layer as well. Panels
    that nothing belongs to are left out.
    """
    # The same for all, so that a run that ended early is as smooth as the others.
    window = max(1, round(SMOOTHED_SHARE * max(len(curve.records) for curve in curves)))
    panels = _panels(curves, window)
    if not panels:
        return None
    looks = _looks(curves)
    layers = _layers(curves[0], window) if len(curves) == 1 else {}
    # A single line needs less room than many and their names.
    widths = [3.6 if len(lines) == 1 else 5.4 for lines in panels.values()] + [5.4] * bool(layers)
    figure = Figure(figsize=(sum(widths), 3.8), layout="constrained")
    grid = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axes, (label, lines) in zip(grid, panels.items()):
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, linewidth=1.3, **looks[name])
        axes.set_ylabel(label)
        if len(lines) > 1:
            _limit(axes)
    for axes in grid:
        axes.set_xlabel("step")
    style.label_lines(figure)
    if layers:
        _draw_layers(grid[-1], layers)
    style.caption(figure, f"running mean over {SMOOTHED_SHARE:.0%} of the longest run")
    return figure


def _panels(curves: Sequence[Curve], window: int) -> dict[str, Panel]:
    """Smoothed lines by the label of their panel."""

    def lines(runs: Sequence[Curve], field: str, base: Mapping[int, float] | None = None) -> Panel:
        found = {}
        for curve in runs:
            values = curve.values(field)
            if base is not None:
                values = {step: value - base[step] for step, value in values.items() if step in base}
            if values:
                found[curve.name] = list(values), smoothed(list(values.values()), window)
        return found

    losses = [curve for curve in curves if curve.values("loss")]
    gates = [curve for curve in curves if curve.values("gate_loss")]
    dense = next((curve for curve in losses if not curve.values("gate_loss")), None)
    loss, difference = "loss of the language model, nats a token", {}
    if dense is not None:
        others = [curve for curve in losses if curve is not dense]
        difference = lines(others, "loss", dense.values("loss"))
    panels = {loss: lines([dense] if difference else losses, "loss")}
    if difference:
        panels[f"loss minus that of {dense.label}, nats a token"] = difference
    panels["loss of the gates, nats a row"] = lines(gates, "gate_loss")
    return {label: panel for label, panel in panels.items() if panel}


def _layers(curve: Curve, window: int) -> dict[int, tuple[list[int], np.ndarray]]:
    """Smoothed losses of the gates by layer."""
    found: dict[int, dict[int, float]] = {}
    for step, values in curve.values("layer_gate_loss").items():
        for layer, value in values.items():
            found.setdefault(int(layer), {})[step] = value
    return {layer: (list(v), smoothed(list(v.values()), window)) for layer, v in sorted(found.items())}


def _draw_layers(axes: Axes, layers: dict[int, tuple[list[int], np.ndarray]]) -> None:
    shades = matplotlib.colormaps["viridis"]
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, shades.N) if len(layers) > 1 else None
    for place, (layer, (steps, values)) in enumerate(layers.items()):
        colour = shades(norm(place) if norm else 0)
        axes.plot(steps, values, label=f"layer {layer}", linewidth=1.1, color=colour)
    axes.set_ylabel("the same by layer")
    if norm:
        bar = axes.figure.colorbar(ScalarMappable(norm, shades), ax=axes, label="layer")
        numbers = list(layers)
        every = range(0, len(numbers), -(-len(numbers) // 8))
        bar.set_ticks(list(every), labels=[str(numbers[place]) for place in every])
        bar.minorticks_off()
        bar.outline.set_visible(False)


def _limit(axes: Axes) -> None:
    """Ends the axis of values where the lines run after their first steps."""
    begin = UNSCALED_SHARE * max(line.get_xdata()[-1] for line in axes.lines)
    values = [y for line in axes.lines for x, y in zip(*line.get_data()) if x > begin]
    low, high = min(values), max(values)
    if high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and those before it, ``window`` in all, or as many as there are."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _looks(curves: Sequence[Curve]) -> dict[str, dict]:
    """Labels, and colours by sparsity, darker is sparser; others for further runs of one; grey without any."""
    shades = matplotlib.colormaps["viridis_r"]
    with_loss = any(curve.values("loss") for curve in curves)
    looks, seen = {}, {}
    for curve in curves:
        level = round(curve.sparsity, 1)
        number = seen[level] = seen.get(level, -1) + 1
        sparse = curve.values("gate_loss") and curve.values("loss")
        colour = shades(0.15 + 0.85 * np.clip((level - 0.4) / 0.5, 0, 1)) if sparse else style.DENSE
        dashes = "-" if number == 0 else _OTHERS[(number - 1) % len(_OTHERS)][1]
        if sparse and number:
            colour = _OTHERS[(number - 1) % len(_OTHERS)][0]
        alone = ", gates alone" if with_loss and not curve.values("loss") else ""
        looks[curve.name] = {"label": curve.label + alone, "color": colour, "linestyle": dashes}
    return looks
