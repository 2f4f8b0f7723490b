"""The report as one HTML page that works from a file, without network and without scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from seerattn.report.cost import cost_section
from seerattn.report.finetuned import finetuned_tables, is_finetuned
from seerattn.report.grid import density_label
from seerattn.report.head_density import by_head, differing, head_densities
from seerattn.report.parts import Figure, Section, Table
from seerattn.report.patterns import pattern_section
from seerattn.report.quality import gap_section, perplexity_section, recall_section, retrieval_section, time_grids
from seerattn.report.runs import failure_section, run_section
from seerattn.report.select import arms
from seerattn.report.speed_table import speed_grids
from seerattn.report.style import MARK
from seerattn.report.summary import summary_section
from seerattn.report.tasks import task_section
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result

# By the name of a figure's file: what it shows, and what to look for.
_PLOTS = {
    "summary": (
        "Lines of perplexity over density at the longest context, of some selectors that stand for the others.",
        "Against realised density, on a logarithmic axis. Shown are the dense model, the oracle, the best floor, the "
        "best, the middle and the worst of the gates, and the best of each family of systems, best families first.",
    ),
    "teachers": (
        "Lines of loss over density: on the left of the perfect choice by each map, on the right of gates.",
        "Perplexity over that of the dense model, against realised density; both axes are logarithmic, that of the "
        "loss linear up to 1%. On the left what a gate would reach that had learned a map perfectly, on the right "
        "gates, in the colour of the map that they learned where their name tells it. Dashed: budgets per head. Grey: "
        "streaming.",
    ),
    "perplexity": (
        "Lines of perplexity over sparsity, one for each selector; the numbers are those of the perplexity tables.",
        "Against realised sparsity (1 - realised density). Lower is better; bars are paired standard errors. A name "
        "with an arrow leaves the panel at its top.",
    ),
    "pareto": (
        "Points of perplexity over milliseconds of attention, one line for each selector.",
        "Against the measured time of attention, the choice of blocks included. Left and low is better; the dotted "
        "line joins what nothing measured beats in both.",
    ),
}
_SPEED = {
    "speedup": "Lines of speed-up over sparsity, a panel for each length; the numbers are in the tables of times.",
    "breakdown": "Bars of milliseconds: dense attention beside gate and selection under sparse attention.",
    "pooled": "Bars of time and memory by length, attention that makes the map of blocks beside attention that does "
    "not.",
    "ttft": "Lines over the length: time to first token, its speed-up over dense attention, peak memory.",
}

PIXELS_A_POINT = 4 / 3


def render_page(results: Sequence[Result], maps: BlockMaps | None, figures: Sequence[Path]) -> str:
    """The page.

    Args:
        results: results, the last of each cell.
        maps: block maps.
        figures: what was drawn of them; the .svg files are put inside.
    """
    drawn = {path.stem: path for path in figures if path.suffix == ".svg"}
    others = [r for r in results if not is_finetuned(r)]
    sections = [
        run_section(results),
        failure_section(results),
        summary_section(others),
        cost_section(others),
        perplexity_section(others),
        gap_section(others),
        retrieval_section(others),
        recall_section(others),
        _trade_off(others, drawn),
        _heads(others, drawn),
        None if maps is None else pattern_section(maps, _map_figures(drawn)),
        task_section(others),
        _trained(results, drawn),
        _speed(others, drawn),
    ]
    environment = Environment(
        loader=PackageLoader("seerattn.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = iter(range(len(drawn) + 1))
    environment.filters["inline"] = lambda path: inline_svg(path, prefix=f"f{next(numbers)}-")
    models = sorted({r.model for r in results})
    return environment.get_template("page.html.j2").render(
        mark=MARK,
        sections=[section for section in sections if section is not None],
        results=len(results),
        models=models,
        dates=sorted({r.timestamp[:10] for r in results if r.timestamp}),
        devices=sorted({r.device for r in results if r.device}),
    )


def inline_svg(path: Path, prefix: str) -> str:
    """A figure of matplotlib as an element of a page: no header, no metadata, no background, ids of its own."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    points = float(re.match(r'<svg[^>]*?\swidth="([\d.]+)pt"', svg)[1])
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    svg = f'{head} aria-hidden="true" style="--w:{points * PIXELS_A_POINT:.0f}px">{body}'
    for useless in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r'\sxmlns(:\w+)?="[^"]*"', r"(?<=>)\s+(?=<)"):
        svg = re.sub(useless, "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href").replace('style="fill: #ffffff"', 'style="fill: none"')
    # Texts that share letters each bring the letters along; a second one of the same name is the same.
    seen: set[str] = set()
    svg = re.sub(r'\sid="([^"]*)"', lambda one: _identifier(one[1], prefix, seen), svg)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}", svg)


def _identifier(name: str, prefix: str, seen: set[str]) -> str:
    first = name not in seen
    seen.add(name)
    return f' id="{prefix}{name}"' if first else ""


def _named(drawn: dict[str, Path], names: dict, make: Callable[[Path, str], Figure]) -> list[Figure]:
    """Figures of these names; those of further devices and models carry a number."""
    found = []
    for name in names:
        found += [make(path, name) for stem, path in drawn.items() if re.fullmatch(rf"{name}(-\d+)?", stem)]
    return found


def _trade_off(results: Sequence[Result], drawn: dict[str, Path]) -> Section | None:
    figures = _named(drawn, _PLOTS, lambda path, name: Figure(path, *_PLOTS[name]))
    read = "What quality costs: each selector at several densities. A selector is better where its line lies lower."
    parts = [*figures, *time_grids(results)]
    return Section("pareto", "Quality against cost", read, parts) if parts else None


def _heads(results: Sequence[Result], drawn: dict[str, Path]) -> Section | None:
    alt = "Maps of layers by heads, brighter where a head computes more blocks; lines are selectors, columns densities."
    parts: list = _named(drawn, {"head_density": None}, lambda path, _: Figure(path, alt))
    for (model, text), rows in head_densities(results).items():
        uneven = differing(rows)
        even = [arm for arm in arms(rows) if arm not in arms(uneven)]
        body = []
        for r in uneven:
            values = by_head(r)
            ends = [divmod(int(place), values.shape[1]) for place in (np.nanargmin(values), np.nanargmax(values))]
            low, high = (f"{values[end]:.3f} (layer {end[0]}, head {end[1]})" for end in ends)
            body.append([r.arm, density_label(r.density), low, f"{np.nanmean(values):.3f}", high])
        title = f"{text}, {rows[0].context:,} tokens, {model}"
        notes = [f"Every head alike: {', '.join(even)}."] if even else []
        head = ["selector", "asked", "sparsest head", "mean", "densest head"]
        parts.append(Table(title, head, body, notes))
    read = (
        "Realised density of every head, at the longest context. Policies that give each head the same number of "
        "blocks are even by design and not drawn; others spend more on some heads. Layers are numbered among those "
        "of full attention."
    )
    return Section("heads", "Density of the heads", read, parts) if parts else None


def _map_figures(drawn: dict[str, Path]) -> list[Figure]:
    alts = {
        "maps": "For some heads three block maps side by side: the true map, the gate's map, the chosen blocks.",
        "masks": "The chosen blocks of many heads, small, in the order of layers and heads.",
    }
    return _named(drawn, alts, lambda path, name: Figure(path, alts[name]))


def _trained(results: Sequence[Result], drawn: dict[str, Path]) -> Section | None:
    alt = "Lines of loss over steps, one for each training run; darker is sparser."
    figures = _named(drawn, {"curves": None}, lambda path, _: Figure(path, alt))
    tables = finetuned_tables(results)
    if not tables:
        read = "Losses of training runs over their steps."
        return Section("training", "Training", read, figures) if figures else None
    read = (
        "Models whose weights were trained further, densely or while they attended sparsely, each at the sparsity of "
        "its column. They are compared with the model that was trained densely and runs dense."
    )
    return Section("finetuned", "Fine-tuning", read, [*figures, *tables])


def _speed(results: Sequence[Result], drawn: dict[str, Path]) -> Section | None:
    figures = _named(drawn, _SPEED, lambda path, name: Figure(path, _SPEED[name]))
    tables = [Table(title, *grid) for title, grid in speed_grids(results)]
    read = (
        "Times of attention over random blocks of given sizes, of gate and selection by themselves, and of whole "
        "models and training steps; brackets are speed-ups over the first dense line."
    )
    return Section("speed", "Speed and memory", read, [*figures, *tables]) if figures or tables else None
