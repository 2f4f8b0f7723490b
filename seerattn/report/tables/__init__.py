"""All tables of a report, computed once; `report/render/` shows them in a terminal, as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from seerattn.report.parts import Section, Table
from seerattn.report.select import is_finetuned

from seerattn.report.tables import continuation, cost, failures, finetuned, gap, heads, patterns  # isort: skip
from seerattn.report.tables import perplexity, recall, retrieval, runs, speed, summary, tasks, time  # isort: skip
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result


def sections(results: Sequence[Result], maps: BlockMaps | None = None) -> list[Section]:
    """All sections in their order, those without tables too: what was measured first, what was run last.

    Args:
        results: results, the last of each cell (`select.latest`).
        maps: block maps.
    """
    # Models that were trained further are compared in tables of their own.
    others = [r for r in results if not is_finetuned(r)]
    measured = (summary, cost, perplexity, gap, retrieval, continuation, recall, time, heads)
    found = [_section(of, of.tables(others)) for of in measured]
    found += [_section(patterns, patterns.tables(maps)), _section(tasks, tasks.tables(others))]
    found.append(_section(finetuned, finetuned.tables(results)))
    # There is nothing to tell of curves but their figure.
    found.append(Section("training", "Training", "Losses of training runs over their steps."))
    found.append(_section(speed, speed.tables(others)))
    return found + [_section(of, of.tables(results)) for of in (failures, runs)]


def _section(module: ModuleType, tables: Sequence[Table]) -> Section:
    return Section(module.ID, module.TITLE, module.READ, tables)
