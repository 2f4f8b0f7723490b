"""Figure: perplexity against density at the longest context, of a few arms that stand for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from seerattn.report import style
from seerattn.report.names import family_of
from seerattn.report.select import arms, budget, group, kind, last_rows_dense, paired, panels, perplexity_key, reached
from seerattn.results.record import Result

LINES = 8
# Okabe and Ito's colours for the oracle and the best floor, and for the others in the order of tables.
_OF_KIND = {"oracle": "#009e73", "floor": "#d55e00"}
_OTHERS = ("#0072b2", "#56b4e9", "#000000", "#e69f00", "#cc79a7")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def draw_summary(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws a panel for each text at the longest context, a figure for each model, where there are more than `LINES`.

    Returns:
        The files written; none where the figure of all lines is as clear.
    """
    rows = [r for r in results if r.what == "perplexity" and r.value is not None and not last_rows_dense(r)]
    rows = [r for r in rows if budget(r) == "density" and r.realised_density is not None]
    written = []
    for of_model in group(rows, "model").values():
        longest = max(r.context for r in of_model)
        of_model = [r for r in of_model if r.context == longest]
        shown = representatives(of_model)
        if len(shown) < len(arms(of_model)):
            with style.context():
                name = f"summary-{len(written) // 2 + 1}" if written else "summary"
                written += _draw([r for r in of_model if r.arm in shown], paired(results), folder, name)
    return written


def representatives(rows: Sequence[Result]) -> list[str]:
    """The arms that stand for the others, in the order of tables, at most `LINES`.

    The dense model, the oracle, and the best floor; the best, the middle and the worst of the gates; of each family of
    systems the best, best families first, as far as there is room. Arms that reached more of the densities that were
    asked for come before others, then a lower mean loss is better.
    """
    by_arm = {arm: line for (arm,), line in group(rows, "arm").items()}
    order = sorted(by_arm, key=lambda arm: _rank(by_arm[arm]))
    of: dict[str, list[str]] = {}
    for arm in order:
        of.setdefault(kind(by_arm[arm][0]), []).append(arm)
    gates = of.get("gate", [])
    shown = [*of.get("dense", []), *of.get("oracle", [])[:1], *of.get("floor", [])[:1]]
    shown += [gates[place] for place in sorted({0, len(gates) // 2, len(gates) - 1}) if gates]
    families: dict[str, str] = {}
    for arm in of.get("system", []):
        families.setdefault(family_of(by_arm[arm][0]), arm)
    shown += list(families.values())[: max(0, LINES - len(shown))]
    return [arm for arm in arms(rows) if arm in shown]


def _rank(line: Sequence[Result]) -> tuple[int, float]:
    return -sum(reached([r]) for r in line), sum(math.log(r.value) for r in line) / len(line)


def _draw(rows: Sequence[Result], errors: dict[str, float], folder: Path, name: str) -> list[Path]:
    found = dict(sorted(panels(rows).items()))
    looks, names = _looks(rows), style.names(rows)
    figure = Figure(figsize=(5.4 * len(found), 4.4), layout="constrained")
    for axes, (key, panel) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        _panel(axes, panel, errors, looks, names)
        axes.set_title(f"{key[1]}, {key[2]:,} tokens")
    figure.canvas.draw()
    for axes in figure.axes:
        style.label_lines(axes)
    return style.save(figure, folder, name)


def _looks(rows: Sequence[Result]) -> dict[str, dict]:
    kinds = {r.arm: kind(r) for r in rows if kind(r) != "dense"}
    spare = iter([*_OTHERS, *(c for of, c in _OF_KIND.items() if of not in kinds.values())])
    found = {}
    for arm, marker in zip((arm for arm in arms(rows) if arm in kinds), _MARKERS):
        found[arm] = {"color": _OF_KIND.get(kinds[arm]) or next(spare), "marker": marker}
    return found


def _panel(
    axes: Axes, rows: Sequence[Result], errors: dict[str, float], looks: dict[str, dict], names: dict[str, str]
) -> None:
    for (arm,), line in group(rows, "arm").items():
        if arm not in looks:
            axes.axhline(line[0].value, color=style.DENSE, linewidth=1.2, linestyle=(0, (5, 3)), label=names[arm])
            continue
        line = sorted(line, key=lambda r: -r.realised_density)
        error = [errors.get(perplexity_key(r), 0.0) for r in line]
        points = [r.realised_density for r in line], [r.value for r in line]
        axes.errorbar(*points, yerr=error, label=names[arm], linewidth=1.5, elinewidth=1.0, **looks[arm])
    style.cut_floors(axes, rows)
    # Half the blocks is one step, whatever there is to halve: the sparse end, where lines part, gets its room.
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(style.percent)
    axes.invert_xaxis()
    axes.set_xlabel("density: share of causal blocks computed")
    axes.set_ylabel("perplexity")
    axes.grid(axis="x", visible=False)
