"""Figure: time to the first token of a whole model, its ratio to dense attention, and the memory it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from seerattn.report import speed, style
from seerattn.results.record import Result

Curves = dict[str, list[tuple[int, float]]]
_DASHES = {"flash": "-", "cudnn": (0, (5, 3)), "sdpa": "-"}


def draw_ttft(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws lines over the length, one for each dense attention, gate and sparsity; a figure for each device and model.

    Returns:
        The files written; none without such results.
    """
    written = []
    for number, rows in enumerate(speed.machines(results, "ttft_s", "peak_memory_gib").values()):
        # Peak memory is also measured of training steps.
        rows = [r for r in rows if r.value is not None and "work" not in r.cell]
        # Times of models that were cut to fewer layers stand in the tables.
        layers = max((r.cell["layers"] for r in rows), default=0)
        rows = [r for r in rows if r.cell["layers"] == layers]
        reference = speed.baseline([r for r in rows if r.what == "ttft_s"])
        if rows:
            with style.context():
                written += _draw(rows, reference, folder, "ttft" if not number else f"ttft-{number + 1}")
    return written


def _draw(rows: list[Result], reference: str | None, folder: Path, name: str) -> list[Path]:
    lines: dict[str, list[Result]] = {}
    for r in sorted(rows, key=lambda r: (r.selector != "dense", r.gates or "", -(r.density or 1.0), r.context)):
        lines.setdefault(_label(r), []).append(r)
    looks = _looks(lines)
    dense = {r.context: r.value for r in rows if _is_dense(r, reference) and r.what == "ttft_s"}
    panels: dict[str, Curves] = {
        "time to first token, s": {k: [(r.context, r.value) for r in v if r.what == "ttft_s"] for k, v in lines.items()}
    }
    if dense:
        panels[f"speed-up over {speed.dense_name(reference)}"] = {
            k: [(r.context, dense[r.context] / r.value) for r in v if r.what == "ttft_s" and r.context in dense]
            for k, v in lines.items()
        }
    memory = {k: [(r.context, r.value) for r in v if r.what == "peak_memory_gib"] for k, v in lines.items()}
    if any(memory.values()):
        panels["peak memory, GiB"] = memory
    figure = Figure(figsize=(4.0 * len(panels) + 0.4, 4.2), layout="constrained")
    for number, (axes, (title, curves)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items())
    ):
        _panel(axes, curves, looks, logarithmic=number == 0)
        axes.set_title(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    speed.caption(figure, rows[0], f"{rows[0].cell['layers']} layers")
    return style.save(figure, folder, name)


def _panel(
    axes: Axes, curves: dict[str, list[tuple[int, float]]], looks: dict[str, dict], *, logarithmic: bool
) -> None:
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points), label=label, **looks[label])
    lengths = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [speed.tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.set_ylim(bottom=0)


def _is_dense(result: Result, impl: str | None) -> bool:
    return result.selector == "dense" and result.cell["impl"] == impl


def _label(result: Result) -> str:
    if result.selector == "dense":
        return f"dense, {speed.dense_name(result.cell['impl'])}"
    return f"gates {result.gates}, {result.cell['impl']}, sparsity {1 - result.density:.3g}"


def _looks(lines: dict[str, list[Result]]) -> dict[str, dict]:
    """Dense lines are grey; those of one kind of gates share a colour map, darker where sparser."""
    maps = ("Blues", "Oranges", "Greens", "Purples")
    kinds = list(dict.fromkeys((v[0].gates, v[0].cell["impl"]) for v in lines.values() if v[0].selector != "dense"))
    densities = sorted({v[0].density for v in lines.values() if v[0].selector != "dense"}, reverse=True)
    looks = {}
    for label, (first, *_) in lines.items():
        if first.selector == "dense":
            looks[label] = {"color": style.DENSE, "linestyle": _DASHES.get(first.cell["impl"], ":"), "marker": "s"}
        else:
            shades = matplotlib.colormaps[maps[kinds.index((first.gates, first.cell["impl"])) % len(maps)]]
            depth = densities.index(first.density) / max(1, len(densities) - 1)
            looks[label] = {"color": shades(0.35 + 0.6 * depth), "marker": "o"}
    return looks
