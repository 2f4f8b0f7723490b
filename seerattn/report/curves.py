"""Figure: losses of fine-tuning runs over their steps, all runs in one picture (arXiv 2410.13276, figure 1a)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from seerattn.report import style

# Curves are smoothed over so much of the longest run.
SMOOTHED_SHARE = 0.05
# Further runs of the same sparsity.
_OTHERS = (("#e69f00", (0, (5, 1.5))), ("#cc79a7", (0, (1.5, 1.2))), ("#d55e00", (0, (6, 1.5, 1.5, 1.5))))
# What a record of fine-tuning has; one of distillation has the losses of its layers under another name.
_FIELDS = {"step", "loss", "tokens_per_second"}


@dataclass(frozen=True)
class Curve:
    """The records of one run.

    Attributes:
        name: what the figure calls it.
        records: one for every few steps: "step", "loss" (of the language model), "gate_loss", "sparsity", and more;
            None where a run has none of it.
    """

    name: str
    records: list[dict]

    @property
    def sparsity(self) -> float:
        """Sparsity at the end; 0 for a run without gates."""
        return self.records[-1].get("sparsity") or 0.0

    def values(self, field: str) -> dict[int, float]:
        """Values of a field by step."""
        return {r["step"]: r[field] for r in self.records if r.get(field) is not None}


def is_curves(path: Path) -> bool:
    """Whether a file holds records of training, of one run or of several, and not results."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        record = json.loads(first)
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() >= _FIELDS and "layer_loss" not in record


def read_curves(paths: Sequence[Path]) -> list[Curve]:
    """Reads the records of runs; a half-written last line is ignored.

    A record without a name of its run ("arm") is one of the run whose folder the file lies in.

    Raises:
        ValueError: a line is no record.
    """
    found: dict[str, list[dict]] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(True), 1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                found.setdefault(record.get("arm", path.absolute().parent.name), []).append(
                    record | {"step": record["step"]}
                )
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{path} must hold a record of training in every line, line {number} is none"
                ) from error
    return [Curve(name, records) for name, records in found.items()]


def draw_curves(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draws the loss of the language model, its difference from the dense run, and the loss of the gates.

    Runs that see the same samples share most of their noise, so the difference shows what the loss hides. Panels that
    nothing belongs to are left out.

    Returns:
        The files written; none without curves.
    """
    losses = [curve for curve in curves if curve.values("loss")]
    gates = [curve for curve in curves if curve.values("gate_loss")]
    dense = next((curve for curve in losses if not curve.values("gate_loss")), None)
    panels = [(losses, "loss", "loss of the language model, nats a token")] if losses else []
    if dense is not None and len(losses) > 1:
        panels.append((losses, "difference", f"loss minus that of {dense.name}, nats a token"))
    panels += [(gates, "gate_loss", "loss of the gates, nats a row")] if gates else []
    if not panels:
        return []
    with style.context():
        looks = _looks(curves)
        figure = Figure(figsize=(4.4 * len(panels) + 1.6, 3.6), layout="constrained")
        for axes, (shown, field, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            # The same for all, so that a run that ended early is as smooth as the others.
            window = max(1, round(SMOOTHED_SHARE * max(len(curve.records) for curve in curves)))
            for curve in shown:
                values = curve.values("loss" if field == "difference" else field)
                if field == "difference":
                    base = dense.values("loss")
                    values = {step: value - base[step] for step, value in values.items() if step in base}
                line = smoothed(list(values.values()), window)
                axes.plot(list(values), line, label=curve.name, linewidth=1.3, **looks[curve.name])
            axes.set_xlabel("step")
            axes.set_ylabel(label)
        handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels())}
        order = [curve.name for curve in curves if curve.name in handles]
        figure.legend([handles[name] for name in order], order, loc="outside right center", fontsize=8, frameon=False)
        share = PercentFormatter(1.0, decimals=0).format_pct(SMOOTHED_SHARE, 1.0)
        figure.suptitle(f"running mean over {share} of the longest run", fontsize=8, x=0.01, ha="left")
        return style.save(figure, folder, "curves")


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
