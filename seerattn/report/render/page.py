"""The report as one HTML page that works from a file, without network and without scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from seerattn.report.parts import MARK, Figure, Section, Table
from seerattn.report.select import KINDS
from seerattn.report.tables import failures
from seerattn.results.record import Result

# By the name of a figure's file: the section it stands in, what it shows, and what to look for.
_FIGURES = {
    "summary": (
        "summary",
        "Lines of perplexity over density at the longest context, of some methods that stand for the others.",
        "Shown are the dense model, the oracle, the best static baseline, the best, the middle and the worst of the "
        "gates, and the best line of each training-free method, as far as there is room.",
    ),
    "teachers": (
        "cost",
        "Lines of loss over density: on the left of the perfect choice by each map, on the right of gates.",
        "Perplexity over that of the dense model, on a logarithmic axis that is linear up to 1%. On the left "
        "is what a gate would reach that had learned a map perfectly. Dashed: budgets per head.",
    ),
    "perplexity": (
        "perplexity",
        "Lines of perplexity over density, one for each method; the numbers are those of the tables below.",
        "Lower is better. Bars are paired standard errors. A name with an arrow leaves the panel at its top.",
    ),
    "pareto": (
        "time",
        "Points of perplexity over milliseconds of attention, one line for each method.",
        "The choice of blocks is in the time. The dotted line joins what nothing measured beats in both.",
    ),
    "head_density": (
        "heads",
        "Maps of layers by heads, brighter where a head computes more blocks; lines are methods, columns densities.",
    ),
    "maps": ("masks", "For some heads three block maps: the true map, the gate's map, the chosen blocks."),
    "masks": ("masks", "The chosen blocks of many heads, small, in the order of layers and heads."),
    "choices": (
        "masks",
        "For some heads the true map, and the blocks that each method keeps of it.",
        "Blue blocks are computed; red is what is left out.",
    ),
    "curves": ("training", "Lines of loss over steps, one for each training run; darker is sparser."),
    "speedup": ("speed", "Lines of speed-up over sparsity, a panel for each length; tables have the numbers."),
    "breakdown": ("speed", "Bars of milliseconds: dense attention beside gate and selection under sparse attention."),
    "attention_map": ("speed", "Bars of time and memory by length, attention with the map of blocks beside others."),
    "ttft": ("speed", "Lines over the length: time to first token, its speed-up over dense attention, peak memory."),
}
# Columns that a page has room for; wider tables are shown group by group.
WIDTH = 18
# Models that a title has room for.
NAMED = 3
PIXELS_A_POINT = 4 / 3


def render_page(results: Sequence[Result], sections: Sequence[Section], figures: Sequence[Path]) -> str:
    """The page.

    Args:
        results: results, the last of each cell.
        sections: their tables.
        figures: what was drawn of them; the .svg files are put inside.
    """
    svgs = [path for path in figures if path.suffix == ".svg"]
    shown = [replace(of, parts=[*_figures(svgs, of.id), *_narrow(of.parts)]) for of in sections]
    numbers, models = iter(range(len(svgs))), sorted({r.model for r in results})
    environment = Environment(
        loader=PackageLoader("seerattn.report", "render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = lambda path: inline_svg(path, prefix=f"f{next(numbers)}-")
    return environment.get_template("page.html.j2").render(
        mark=MARK,
        plain_kinds=("", KINDS["dense"]),
        sections=[section for section in shown if section.parts],
        results=len(results),
        failed=sum(len(part.lines) for of in sections if of.id == failures.ID for part in of.parts),
        failures=failures.ID,
        models=", ".join(models) if len(models) <= NAMED else f"{len(models)} models and shapes",
        dates=sorted({r.timestamp[:10] for r in results if r.timestamp}),
        devices=sorted({r.device for r in results if r.device}),
    )


def _figures(svgs: Sequence[Path], section: str) -> list[Figure]:
    """The figures of a section; those of further devices and models carry a number."""
    found = []
    for name, (of, *told) in _FIGURES.items():
        if of == section:
            found += [Figure(path, *told) for path in svgs if re.fullmatch(rf"{name}(-\d+)?", path.stem)]
    return found


def _narrow(tables: Sequence[Table]) -> list[Table]:
    return [one for table in tables for one in (table.by_group() if len(table.columns) > WIDTH else [table])]


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
