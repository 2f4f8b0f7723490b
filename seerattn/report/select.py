"""Finding results: groups of rows, and the paired errors that belong to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from seerattn.eval.results import Result


def group(results: Iterable[Result], *names: str) -> dict[tuple, list[Result]]:
    """Results by the values of these attributes, in order of first appearance."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result, name) for name in names), []).append(result)
    return groups


def latest(results: Iterable[Result]) -> list[Result]:
    """The last result of each place in a table: gates that were trained or calibrated anew replace the former."""
    found: dict[str, Result] = {}
    for r in results:
        weights, policy = {"model": r.weights.get("model", "")}, {"last_rows_dense": last_rows_dense(r)}
        place = replace(r, weights=weights, policy=policy).key
        found.pop(place, None)
        found[place] = r
    return list(found.values())


def panels(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Results by what may stand in one table: same model, same text, same documents, same context.

    Returns:
        Results by (model, text, context, the rest).
    """
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        rest = {name: r.cell.get(name) for name in ("data", "windows", "min_tokens", "dtype", "documents", "pairs")}
        place = (r.model, r.text, r.context, json.dumps([rest, r.weights.get("model"), r.seed]))
        groups.setdefault(place, []).append(r)
    return groups


def paired(results: Iterable[Result]) -> dict[str, float]:
    """Standard error of the paired difference from dense, by the key of the perplexity that it belongs to."""
    return {
        replace(r, what="perplexity").key: r.stderr
        for r in results
        if r.what == "perplexity_difference" and r.stderr is not None
    }


def last_rows_dense(result: Result) -> int:
    """Query-block rows at the end of the prompt that kept every block."""
    return (result.policy or {}).get("last_rows_dense", 0)


def arms(results: Sequence[Result]) -> list[str]:
    """Names of all ways of choosing blocks: dense, the oracle, gates, streaming."""
    place = {"dense": 0, "oracle": 1, "streaming": 3}
    return sorted({r.arm for r in results}, key=lambda arm: (place.get(arm, 2), arm))
