"""All figures of a report, each as .png and .svg: a module says the `groups` that it has to `draw`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from seerattn.report import style
from seerattn.report.curves import Curve
from seerattn.report.figures import (
    attention_map,
    breakdown,
    curves,
    head_density,
    maps,
    pareto,
    perplexity,
    speedup,
    summary,
    teachers,
    ttft,
)
from seerattn.report.select import is_finetuned
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result, with_texts
from seerattn.texts import in_figure

OF_RESULTS = (summary, teachers, perplexity, pareto, head_density, speedup, breakdown, attention_map, ttft)


def draw_figures(
    results: Sequence[Result], runs: Sequence[Curve], block_maps: BlockMaps | None, folder: Path
) -> list[Path]:
    """Draws what the data allow, and returns the files written."""
    # Models that were trained further are compared in tables of their own.
    others = [with_texts(r, in_figure) for r in results if not is_finetuned(r)]
    written = []
    for of in OF_RESULTS:
        written += style.each(of.__name__.rpartition(".")[2], of.groups(others), of.draw, folder)
    named = [replace(run, name=in_figure(run.name)) for run in runs]
    written += style.each("curves", [named] if named else [], curves.draw, folder)
    shown = [] if block_maps is None else [_readable(block_maps)]
    written += style.each("maps", shown, maps.draw_maps, folder)
    written += style.each("masks", shown, maps.draw_masks, folder)
    return written + style.each("choices", shown, maps.draw_choices, folder)


def _readable(found: BlockMaps) -> BlockMaps:
    return replace(found, gates=in_figure(found.gates), systems=[in_figure(name) for name in found.systems])
