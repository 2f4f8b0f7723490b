"""Finding results: groups of rows, and the paired errors that belong to them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from seerattn.results.record import Result

BUDGETS = ("density", "time")
# In the order of tables, with their titles there.
KINDS = {
    "dense": "Dense",
    "oracle": "Oracle: chooses by the true map",
    "gate": "Learned gates",
    "system": "Systems without a trained gate",
    "floor": "Floors: look at no query and no key",
}
# What tells sets of documents apart, in the cells of results.
_DOCUMENTS = ("data", "windows", "min_tokens", "dtype", "documents", "pairs", "chains", "hops")
FLOORS = ("streaming", "a_shape", "tri_shape", "random")
# A realised density this near to the one asked for is equal to it, as where knobs are turned (eval/compare.py).
SAME_DENSITY = 0.01
# What names of selectors and gates end with where budgets share a density among heads (eval/arms.py, `Arm.kind`).
PER_HEAD = ", budgets per head"
# How tables name the error of a share of right answers (`results/statistics.py`, `proportion`).
SHARE_ERROR = "± is the standard error of the share, adjusted as by Agresti and Coull: taken at (right + 1) / (n + 2)."


def group(results: Iterable[Result], *names: str) -> dict[tuple, list[Result]]:
    """Results by the values of these attributes, in order of first appearance."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result, name) for name in names), []).append(result)
    return groups


def latest(results: Iterable[Result]) -> list[Result]:
    """The last result of each place in a table: gates that were trained or calibrated anew replace the former.

    Gates that share densities by budgets are named so from here on, as oracles are: with equal heads they are another
    way of choosing blocks.
    """
    found: dict[str, Result] = {}
    for r in map(_with_budgets, results):
        weights, policy = {"model": r.weights.get("model", "")}, {"last_rows_dense": last_rows_dense(r)}
        cell = {name: value for name, value in r.cell.items() if name != "budgets"}
        place = replace(r, weights=weights, policy=policy, cell=cell, samples={}).key
        found.pop(place, None)
        found[place] = r
    return list(found.values())


def _with_budgets(result: Result) -> Result:
    if result.gates is None or "budgets" not in result.cell or result.gates.endswith(PER_HEAD):
        return result
    return replace(result, gates=result.gates + PER_HEAD)


def panels(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Results by what may stand in one table: same model, text, documents, context and kind of budget.

    The dense model has no budget: its rows stand in the tables of every kind.

    Returns:
        Results by (model, text, context, the rest).
    """
    results = list(results)
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        rest = {name: r.cell.get(name) for name in _DOCUMENTS}
        base = (r.model, r.text, r.context, json.dumps([rest, r.weights.get("model"), r.seed]))
        groups.setdefault(base, []).append(r)
    found: dict[tuple, list[Result]] = {}
    for (*place, rest), rows in groups.items():
        budgets = list(dict.fromkeys(budget(r) for r in rows if r.selector != "dense")) or [BUDGETS[0]]
        for of in budgets:
            found[(*place, f"{of} {rest}")] = [r for r in rows if r.selector == "dense" or budget(r) == of]
    return found


def paired(results: Iterable[Result]) -> dict[str, float]:
    """Standard error of the paired difference from dense, by the key of the perplexity that it belongs to."""
    found = (r for r in results if r.what == "perplexity_difference" and r.stderr is not None)
    return {perplexity_key(r): r.stderr for r in found}


def perplexity_key(result: Result) -> str:
    """Key of the perplexity of the same cell; samples are no part of a key, and leaving them out is quicker."""
    return replace(result, what="perplexity", samples={}).key


def last_rows_dense(result: Result) -> int:
    """Query-block rows at the end of the prompt that kept every block."""
    return (result.policy or {}).get("last_rows_dense", 0)


def budget(result: Result) -> str:
    """What was made equal between the ways of choosing blocks, among `BUDGETS`."""
    return result.cell.get("budget", BUDGETS[0])


def asked(result: Result) -> float | None:
    """What was asked for: a density, a share of the time of dense attention, or None for a policy with neither."""
    return result.cell["share"] if budget(result) == "time" else result.density


def realised(rows: Iterable[Result]) -> float | None:
    """Realised density of a cell, a mean of its results; None for the dense model and where it was not recorded."""
    found = [r.realised_density for r in rows if kind(r) != "dense" and r.realised_density is not None]
    return sum(found) / len(found) if found else None


def same_density(one: float, other: float) -> bool:
    """Whether two densities count as equal."""
    return round(abs(one - other), 6) <= SAME_DENSITY


def reached(rows: Sequence[Result]) -> bool:
    """Whether a cell has the density that was asked for.

    True where the realised one was not recorded, False where no density was asked for.
    """
    density = realised(rows)
    return density is None or (rows[0].density is not None and same_density(density, rows[0].density))


def right_answers(rows: Iterable[Result]) -> tuple[int, int]:
    """Right answers that shares of them stand for, and all answers."""
    counts = [(round(r.value * r.n), r.n) for r in rows]
    return sum(right for right, _ in counts), sum(n for _, n in counts)


def kind(result: Result) -> str:
    """The kind of a way of choosing blocks, among `KINDS`.

    Names of variants, such as "oracle-32", begin with that of their kind.
    """
    if result.gates is not None:
        return "gate"
    name = result.selector.replace("-", "_")
    if name.startswith(FLOORS):
        return "floor"
    return next((of for of in ("dense", "oracle") if name.startswith(of)), "system")


def arms(results: Iterable[Result]) -> list[str]:
    """Names of all ways of choosing blocks, by kind and name."""
    order = list(KINDS)
    place = {
        r.arm: (order.index(kind(r)), [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", r.arm)])
        for r in results
    }
    return sorted(place, key=place.__getitem__)
