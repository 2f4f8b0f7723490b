"""Tables of forms of gates of a public model, from records of `research/public_gates.py`, for `docs/draw_pages.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from public_gates import FORMS

from seerattn.gate import AttnGateConfig
from seerattn.report.benchmarks import tokens
from seerattn.report.parts import Cell, Table, plain
from seerattn.report.select import PER_HEAD, latest, missed
from seerattn.report.tables.cost import over
from seerattn.results.record import Result

# With those that were measured and are not trained any more.
MEASURED = FORMS | {"power-2-salient": replace(FORMS["largest-salient"], target_keys="sum", target_power=2.0)}
HEADS = {"equal heads": "", "budgets": PER_HEAD}


class Place(NamedTuple):
    """Where a loss was measured; what is added to the name of a line says whether heads have budgets."""

    text: str
    context: int
    density: float
    heads: str = ""


def targets(results: Sequence[Result]) -> Table:
    """Every form by its target and its sub-blocks, with equal heads and with budgets, at the longest context."""
    rows = _perplexities(results)
    shown = sorted(_forms(rows), key=lambda name: _order(MEASURED[name]))
    told = {
        name: (str(MEASURED[name].target), f"{MEASURED[name].query_subblocks} x {MEASURED[name].key_subblocks}")
        for name in shown
    }
    columns = {
        f"{text.removesuffix('-test')} {density:g}, {heads}": Place(text, _longest(rows), density, end)
        for text, density, (heads, end) in product(sorted({key.text for _, key in rows}), (0.2, 0.1), HEADS.items())
    }
    return _table(rows, ("target", "sub-blocks"), told, columns)


def rope(results: Sequence[Result]) -> Table:
    """The published form with gate RoPE and without it, by length."""
    rows = _perplexities(results)
    told = {name: ("on" if MEASURED[name].rope else "off",) for name in ("published", "published-no-rope")}
    columns = {
        f"{tokens(context)} at {density:g}, {heads}": Place("books-test", context, density, end)
        for (heads, end), density, context in product(
            HEADS.items(), (0.2, 0.1), sorted({key.context for _, key in rows})
        )
    }
    return _table(rows, ("gate RoPE",), told, columns)


def poolings(results: Sequence[Result]) -> Table:
    """The published form with other poolings of queries and of keys, by density, at the longest context."""
    rows = _perplexities(results)
    pooled = ("published", "published-k-maxmin", "published-k-avg", "published-q-max")
    told = {name: ("+".join(MEASURED[name].q_pooling), "+".join(MEASURED[name].k_pooling)) for name in pooled}
    densities = sorted({key.density for _, key in rows if key.density is not None}, reverse=True)
    columns = {
        f"{density:g}, {heads}": Place("books-test", _longest(rows), density, end)
        for (heads, end), density in product(HEADS.items(), densities)
    }
    return _table(rows, ("queries", "keys"), told, columns)


TABLES = {"targets": targets, "rope": rope, "poolings": poolings}

# Perplexities by the name of their line and their place.
Rows = Mapping[tuple[str, Place], Result]


def _perplexities(results: Iterable[Result]) -> Rows:
    return {(r.line, Place(r.text, r.context, r.density)): r for r in latest(results) if r.what == "perplexity"}


def _forms(rows: Rows) -> list[str]:
    return [name for name in MEASURED if any(line == name for line, _ in rows)]


def _longest(rows: Rows) -> int:
    return max(place.context for _, place in rows)


def _order(config: AttnGateConfig) -> tuple:
    return config.query_subblocks * config.key_subblocks, config.target_keys, config.target.power


def _table(rows: Rows, about: Sequence[str], told: Mapping[str, Sequence[str]], columns: Mapping[str, Place]) -> Table:
    """A line for each form, with what is told of it and its perplexity over that of the dense model."""
    body = [[name, *words, *(_cost(rows, name, place) for place in columns.values())] for name, words in told.items()]
    streaming = [_cost(rows, "streaming", place) for place in columns.values()]
    if any(cell.text for cell in streaming):
        body.append(["streaming", *("" for _ in about), *streaming])
    dense = {place.text: rows["dense", Place(place.text, place.context, None)] for place in columns.values()}
    counts = [f"{text}: {len(of.samples['documents'])} documents" for text, of in dense.items()]
    note = f"Perplexity over that of the dense model of the same length. {'; '.join(counts)}."
    return plain("", ["gates", *about, *columns], body, [note], texts=1 + len(about))


def _cost(rows: Rows, line: str, place: Place) -> Cell:
    row = rows.get((line + place.heads, place._replace(heads="")))
    dense = rows.get(("dense", Place(place.text, place.context, None)))
    if row is None or dense is None:
        return Cell("")
    found = over(row, dense)
    return Cell(f"{found.value:+.1f} ± {found.stderr:.1f} %", at=missed([row]))
