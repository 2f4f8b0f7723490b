"""Finding results: groups of rows, and the paired errors that belong to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from seerattn.results.record import KINDS as ORDER
from seerattn.results.record import Result

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

BUDGETS = ("density", "time", "tokens")
# Where the cell of a result says what was asked for that is no density.
_ASKED = {"time": "share", "tokens": "tokens"}
# Titles of the kinds in tables.
KINDS = {
    "dense": "Dense",
    "oracle": "Oracle: chooses by the true map",
    "learned": "Learned gates",
    "training-free": "Training-free: look at the prompt alone",
    "static": "Static baselines: look at no query and no key",
}
# What tells sets of documents apart, in the cells of results.
_DOCUMENTS = ("data", "windows", "min_tokens", "dtype", "documents", "pairs", "chains", "hops")
# A realised density this near to the one asked for is equal to it, as where settings are tuned (`seerattn compare`).
SAME_DENSITY = 0.01
# What names of lines end with where budgets share a density among heads.
PER_HEAD = ", budgets per head"
BLOCK = 64


def group(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Results, or what is made of them, by a key, in order of first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_line(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by the name of their line, in the order of tables: by kind, then by name, numbers by their value."""
    groups = group(results, lambda r: r.line)

    def place(line: str) -> tuple:
        parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", line)]
        return ORDER.index(groups[line][0].kind), parts

    return {line: groups[line] for line in sorted(groups, key=place)}


def latest(results: Iterable[Result]) -> list[Result]:
    """The last result of each place in a table: gates that were trained or calibrated anew replace the former.

    What shares densities by budgets is named so from here on: with equal heads it is another way of choosing blocks.
    """
    found: dict[str, Result] = {}
    for r in map(_with_budgets, results):
        weights, settings = {"model": r.weights.get("model", "")}, {"last_rows_dense": last_rows_dense(r)}
        place = replace(r, weights=weights, settings=settings, samples={}).key
        found.pop(place, None)
        found[place] = r
    return list(found.values())


def _with_budgets(result: Result) -> Result:
    named = "budgets" not in result.settings or result.name.endswith(PER_HEAD)
    return result if named else replace(result, name=result.name + PER_HEAD)


def panels(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Results by what may stand in one table: same model, text, documents, context and kind of budget.

    The dense model has no budget: its rows stand in the tables of every kind.

    Returns:
        Results by (model, text, context, the rest).
    """
    found: dict[tuple, list[Result]] = {}
    for (*place, rest), rows in group(results, _documents).items():
        budgets = list(dict.fromkeys(budget(r) for r in rows if r.kind != "dense")) or [BUDGETS[0]]
        for of in budgets:
            found[(*place, f"{of} {rest}")] = [r for r in rows if r.kind == "dense" or budget(r) == of]
    return found


def titled(results: Iterable[Result], title: Callable[[Result], str]) -> dict[str, list[Result]]:
    """Results by title, in the order of texts, tasks and contexts; sets of other documents have titles of their own."""
    found: dict[tuple, list[Result]] = {}
    taken: dict[str, int] = {}
    for (_, text, context, _), panel in panels(results).items():
        for name, rows in group(panel, title).items():
            taken[name] = number = taken.get(name, 0) + 1
            place = text, rows[0].cell.get("task", ""), context, number
            found[(*place, f"{name} ({number})" if number > 1 else name)] = rows
    return {place[-1]: found[place] for place in sorted(found)}


def _documents(r: Result) -> tuple:
    rest = {name: r.cell.get(name) for name in _DOCUMENTS}
    return r.model, r.text, r.context, json.dumps([rest, r.weights.get("model"), r.seed])


def at_density(results: Iterable[Result], *whats: str) -> list[Result]:
    """Finite results of these quantities at equal density, without dense last rows."""
    found = (r for r in results if r.what in whats and r.value is not None)
    return [r for r in found if budget(r) == "density" and not last_rows_dense(r)]


def paired(results: Iterable[Result]) -> dict[str, float]:
    """Standard error of the paired difference from dense, by the key of the perplexity that it belongs to."""
    found = (r for r in results if r.what == "perplexity_difference" and r.stderr is not None)
    return {perplexity_key(r): r.stderr for r in found}


def perplexity_key(result: Result) -> str:
    """Key of the perplexity of the same cell; samples are no part of a key, and leaving them out is quicker."""
    return replace(result, what="perplexity", samples={}).key


def last_rows_dense(result: Result) -> int:
    """Query-block rows at the end of the prompt that kept every block."""
    return result.settings.get("last_rows_dense", 0)


def budget(result: Result) -> str:
    """What was made equal between methods, among `BUDGETS`; policies of their own stand beside equal densities."""
    found = result.cell.get("budget")
    return found if found in BUDGETS else "density"


def asked(result: Result) -> float | None:
    """What was asked for: a density, a share of the time of dense attention, tokens that a decoded one may read.

    None for a policy with none of them.
    """
    return result.cell[_ASKED[budget(result)]] if budget(result) in _ASKED else result.density


def density_label(density: float | None) -> str:
    """A nominal density as tables and figures write it."""
    return "own policy" if density is None else f"{density:g}"


def asked_label(result: Result) -> str:
    """What was asked of one result; "" for the dense model."""
    unit = {"time": " of the time", "tokens": " tokens"}.get(budget(result), "")
    return "" if result.kind == "dense" else density_label(asked(result)) + unit


def realised(rows: Iterable[Result]) -> float | None:
    """Realised density of a cell, a mean of its results; None for the dense model and where it was not recorded."""
    found = [r.realised_density for r in rows if r.kind != "dense" and r.realised_density is not None]
    return sum(found) / len(found) if found else None


def ends(values: Iterable[float]) -> str:
    """The least and the greatest of some densities, as text."""
    found = [f"{value:.3f}" for value in values]
    return " to ".join(dict.fromkeys((min(found), max(found)))) if found else ""


def same_density(one: float, other: float) -> bool:
    """Whether two densities count as equal."""
    return round(abs(one - other), 6) <= SAME_DENSITY


def reached(rows: Sequence[Result]) -> bool:
    """Whether a cell has the density that was asked for.

    True where the realised one was not recorded, False where no density was asked for.
    """
    density = realised(rows)
    return density is None or (rows[0].density is not None and same_density(density, rows[0].density))


def missed(rows: Sequence[Result]) -> str:
    """The realised density of a cell that has not the one asked for; "" where it has, and of the dense model."""
    return "" if rows[0].kind == "dense" or reached(rows) else f"{realised(rows):.3f}"


def right_answers(rows: Iterable[Result]) -> tuple[int, int]:
    """Right answers that shares of them stand for, and all answers."""
    counts = [(round(r.value * r.n), r.n) for r in rows]
    return sum(right for right, _ in counts), sum(n for _, n in counts)


def is_finetuned(result: Result) -> bool:
    """Whether a result is of a model that was trained further, or stands beside those."""
    return "training" in result.cell
