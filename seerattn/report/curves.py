"""Figure: losses of training runs over their steps, all runs in one picture (arXiv 2410.13276, figure 1a)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from seerattn.report import style
from seerattn.texts import check_kinds, parse_json, short, visible

# Curves are smoothed over so much of the longest run.
SMOOTHED_SHARE = 0.05
# In so many of the first steps lines may leave a panel of several: they fall by far more than they differ later.
UNSCALED_SHARE = 0.1
# Further runs of the same sparsity.
_OTHERS = (("#e69f00", (0, (5, 1.5))), ("#cc79a7", (0, (1.5, 1.2))), ("#d55e00", (0, (6, 1.5, 1.5, 1.5))))
# A sparsity that ends so much higher than it began was meant to.
RISE = 0.05
# What every record of training has.
_FIELDS = {"step", "loss", "tokens_per_second"}
_KINDS: dict[str, Any] = {"step": int, "arm": str, "layer_loss": dict[str, float]}
_KINDS |= dict.fromkeys(("loss", "gate_loss", "sparsity"), float | None)
_KINDS |= {"layer_gate_loss": dict[str, float] | None}
Panel = dict[str, tuple[list[int], np.ndarray]]


@dataclass(frozen=True)
class Curve:
    """The records of one run.

    Attributes:
        name: what the figure calls it.
        records: one for every few steps: "step", "loss" (of the language model), "gate_loss", "layer_gate_loss",
            "sparsity", and more; None where a run has none of it.
    """

    name: str
    records: list[dict]

    @property
    def sparsity(self) -> float:
        """Sparsity at the end; 0 for a run without gates."""
        return self.records[-1].get("sparsity") or 0.0

    @property
    def label(self) -> str:
        """Name for people: "together-0.9-every4" is "together, sparsity 0.9, every 4"; tells where it rises."""
        words = re.sub(r"(?<=[a-z])(?=\d)", " ", self.name.replace("_", "-")).split("-")
        words = [f"sparsity {word}" if self._is_sparsity(word) else word for word in words]
        found = [r["sparsity"] for r in self.records if r.get("sparsity") is not None]
        if found and found[-1] - found[0] > RISE:
            words.append(f"sparsity {found[0]:.2g} to {found[-1]:.2g}")
        return ", ".join(words)

    def _is_sparsity(self, word: str) -> bool:
        return bool(re.fullmatch(r"0?\.\d+", word)) and abs(float(word) - self.sparsity) < RISE

    def values(self, field: str) -> dict[int, float]:
        """Values of a field by step."""
        return {r["step"]: r[field] for r in self.records if r.get(field) is not None}


def is_curves(path: Path) -> bool:
    """Whether a file holds records of training, of one run or of several, and not results."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline()
    try:
        record = parse_json(first, constants=True)
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() >= _FIELDS


def as_finetuning(record: Mapping) -> dict:
    """A record of training with the names of fine-tuning.

    Distillation has no other loss than that of the gates, and calls it "loss", that of the layers "layer_loss".
    """
    record = dict(record)
    if "layer_loss" in record:
        record |= {"gate_loss": record.get("loss"), "loss": None, "layer_gate_loss": record.pop("layer_loss")}
    return record


def read_curves(paths: Sequence[Path]) -> list[Curve]:
    """Reads the records of runs; a half-written last line is ignored.

    A record without a name of its run ("arm") is one of the run whose folder the file lies in.

    Raises:
        ValueError: a line is no record.
    """
    found: dict[str, list[dict]] = {}
    for path in paths:
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line, constants=True)
                if not isinstance(record, dict):
                    raise ValueError(f"it must be an object, got {short(record)}")
                check_kinds(record, _KINDS)
                if "step" not in record:
                    raise ValueError("it must have a step, got none")
                layers = record.get("layer_loss") or record.get("layer_gate_loss") or {}
                if not all(map(str.isdecimal, layers)):
                    raise ValueError(f"losses of layers must be named by their numbers, got {short(list(layers))}")
            except ValueError as error:
                raise ValueError(
                    f"{path} must hold a record of training in every line, line {number} is none: {error}"
                ) from error
            name = record.get("arm", path.absolute().parent.name)
            found.setdefault(visible(name), []).append(as_finetuning(record))
    return [Curve(name, records) for name, records in found.items()]


def draw_curves(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draws the loss of the language model, its difference from the dense run, and the loss of the gates.

    Runs that see the same samples share most of their noise, so the difference shows what the loss hides; where it is
    drawn, the loss is that of the dense run alone. The gates of a single run are drawn layer by layer as well. Panels
    that nothing belongs to are left out.

    Returns:
        The files written; none without curves.
    """
    # The same for all, so that a run that ended early is as smooth as the others.
    window = max(1, round(SMOOTHED_SHARE * max((len(curve.records) for curve in curves), default=0)))
    panels = _panels(curves, window)
    if not panels:
        return []
    with style.context():
        looks = _looks(curves)
        names = {curve.name: curve.label for curve in curves}
        if any(curve.values("loss") for curve in curves):
            names |= {c.name: f"{c.label}, gates alone" for c in curves if not c.values("loss")}
        layers = _layers(curves[0], window) if len(curves) == 1 else {}
        # A single line needs less room than many and their names.
        widths = [3.6 if len(lines) == 1 else 5.4 for lines in panels.values()] + [5.4] * bool(layers)
        figure = Figure(figsize=(sum(widths), 3.8), layout="constrained")
        grid = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        for axes, (label, lines) in zip(grid, panels.items()):
            for name, (steps, values) in lines.items():
                axes.plot(steps, values, label=names[name], linewidth=1.3, **looks[name])
            axes.set_ylabel(label)
            if len(lines) > 1:
                _limit(axes)
        if layers:
            _draw_layers(grid[-1], layers)
        for axes in grid:
            axes.set_xlabel("step")
        figure.canvas.draw()
        for axes in grid[: len(panels)]:
            style.label_lines(axes)
        share = PercentFormatter(1.0, decimals=0).format_pct(SMOOTHED_SHARE, 1.0)
        figure.suptitle(f"running mean over {share} of the longest run", fontsize=8, x=0.01, ha="left")
        return style.save(figure, folder, "curves")


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
    """Colours by sparsity, darker is sparser; others for further runs of one sparsity; grey where nothing is sparse."""
    shades = matplotlib.colormaps["viridis_r"]
    looks, seen = {}, {}
    for curve in curves:
        level = round(curve.sparsity, 1)
        number = seen[level] = seen.get(level, -1) + 1
        sparse = curve.values("gate_loss") and curve.values("loss")
        colour = shades(0.15 + 0.85 * np.clip((level - 0.4) / 0.5, 0, 1)) if sparse else style.DENSE
        dashes = "-" if number == 0 else _OTHERS[(number - 1) % len(_OTHERS)][1]
        if sparse and number:
            colour = _OTHERS[(number - 1) % len(_OTHERS)][0]
        looks[curve.name] = {"color": colour, "linestyle": dashes}
    return looks
