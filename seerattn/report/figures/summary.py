"""Figure: perplexity against density at the longest context, of a few lines that stand for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from seerattn.report.figures import perplexity
from seerattn.report.figures.perplexity import Rows, perplexities
from seerattn.report.select import by_line, group, paired, reached
from seerattn.results.record import Result

LINES = 9
draw = perplexity.draw


def groups(results: Sequence[Result]) -> list[Rows]:
    """Some lines of each model at the longest context; none where the figure of all lines is as clear."""
    found = []
    for rows in group(perplexities(results), lambda r: r.model).values():
        longest = max(r.context for r in rows)
        rows = [r for r in rows if r.context == longest]
        lines = representatives(rows)
        if len(lines) < len(by_line(rows)):
            found.append(([r for r in rows if r.line in lines], paired(results)))
    return found


def representatives(rows: Sequence[Result]) -> list[str]:
    """The lines that stand for the others, in the order of tables, at most `LINES`.

    The dense model, the oracle, and the best static baseline; the best, the middle and the worst of the gates; of each
    training-free method its best line, best methods first, as far as there is room. Lines that reached more of the
    densities that were asked for come before others, then a lower mean loss is better.
    """
    lines = by_line(rows)
    of: dict[str, list[str]] = {}
    for line in sorted(lines, key=lambda line: _rank(lines[line])):
        of.setdefault(lines[line][0].kind, []).append(line)
    gates = of.get("learned", [])
    shown = [*of.get("dense", []), *of.get("oracle", [])[:1], *of.get("static", [])[:1]]
    shown += [gates[place] for place in sorted({0, len(gates) // 2, len(gates) - 1}) if gates]
    methods: dict[str, str] = {}
    for line in of.get("training-free", []):
        methods.setdefault(lines[line][0].method, line)
    shown += list(methods.values())[: max(0, LINES - len(shown))]
    return [line for line in lines if line in shown]


def _rank(line: Sequence[Result]) -> tuple[int, float]:
    return -sum(reached([r]) for r in line), sum(math.log(r.value) for r in line) / len(line)
