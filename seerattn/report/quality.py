"""Sections of the page on quality: perplexity, the gap that is closed, retrieval, recall."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from seerattn.report.gap import Closed, closed
from seerattn.report.grid import Grid, Measured, compare
from seerattn.report.parts import Section
from seerattn.report.select import (
    SHARE_ERROR,
    asked,
    budget,
    kind,
    last_rows_dense,
    paired,
    panels,
    perplexity_key,
    right_answers,
)
from seerattn.report.speed import in_models
from seerattn.results.record import Result
from seerattn.results.statistics import proportion

_BUDGETS = {"density": ", by density", "time": ", by share of the time of dense attention"}
# Cell entries that say where and how, not what was asked.
_PLACE = ("task", "depth", "block_q", "block_k", "budget", "budgets", "share", "data", "dtype", "note")


def perplexity_section(results: Sequence[Result]) -> Section | None:
    """Perplexity in the form of the paper's Table 1 (arXiv 2410.13276): lines by selector, columns by context."""
    errors = paired(results)

    def measure(rows: Sequence[Result]) -> Measured:
        return Measured(rows[-1].value, errors.get(perplexity_key(rows[-1])))

    grids = []
    for title, rows in tables([r for r in results if r.what == "perplexity"]):
        notes = []
        for context in sorted({r.context for r in rows}):
            # All of a panel are measured on the same documents.
            row = next(r for r in rows if r.context == context)
            documents = len(row.samples.get("documents", ()))
            counted = f"{documents} document{'s' if documents > 1 else ''}, " if documents else ""
            notes.append(f"{context:,} tokens: {counted}{row.n:,} {row.unit}.")
        grids += compare(
            title,
            rows,
            _context,
            measure,
            group_name=_tokens,
            better="lower",
            form=".2f",
            error_form=".3f",
            notes=[" ".join(notes)],
        )
    read = (
        "Lower is better. ± is the standard error of the paired difference from the dense model on the same "
        "documents, so it is far smaller than that of the perplexity itself. The last small number is the realised "
        "density, in the head of a column where all have the same. Bold is the best of a column, the oracle left "
        "out. Columns of different contexts rest on different amounts of text."
    )
    return Section("perplexity", "Perplexity", read, grids) if grids else None


def gap_section(results: Sequence[Result]) -> Section | None:
    """How far each selector comes from streaming (0) to the oracle (1) at the same density."""
    grids = []
    for title, rows in tables(
        [r for r in results if r.what == "perplexity" and r.value is not None and budget(r) == "density"]
    ):
        shares = {r.key: gap for r in rows if (gap := closed(r, rows)) is not None}

        def measure(rows: Sequence[Result], shares: dict[str, Closed] = shares) -> Measured:
            share, ends, _ = shares[rows[-1].key]
            return Measured(share, None, "" if ends is None else f"ends at {ends:.3f}", equal=ends is None)

        between = [r for r in rows if r.key in shares]
        grids += (
            compare(title, between, _context, measure, group_name=_tokens, better="higher", form=".0%")
            if between
            else []
        )
    read = (
        "100% is the perplexity of the oracle, of several that of the best, 0% that of streaming, all with blocks of "
        "64 tokens, at the same nominal density and in the same setting; below 0% is worse than streaming. Columns "
        "where no oracle is better than streaming have no gap to close and are left out. Where both ends are at "
        "another realised density than the selector, it stands beside the share."
    )
    return Section("gap", "Gap closed from streaming to the oracle", read, grids) if grids else None


def retrieval_section(results: Sequence[Result]) -> Section | None:
    """Share of right answers by task and density."""

    def measure(rows: Sequence[Result]) -> Measured:
        return Measured(*proportion(*right_answers(rows)))

    rows = [r for r in results if r.what == "accuracy" and r.value is not None]
    variants: dict[str, list[str]] = {}
    for r in rows:
        found = variants.setdefault(r.cell["task"], [])
        if _variant(r) not in found:
            found.append(_variant(r))

    def name(group: tuple) -> str:
        task, variant = group
        options = json.loads(variant)
        more = ", ".join(f"{option} {value}" for option, value in options.items()) if len(variants[task]) > 1 else ""
        return task.replace("_", "-") + (f" ({more})" if more else "")

    grids = []
    for title, panel in _options(_by(rows, lambda r: (r.model, r.text, r.context, r.weights.get("model")))):
        sizes: dict[tuple, set[int]] = {}
        for place, line in _by(panel, lambda r: (r.cell["task"], _variant(r), r.arm, asked(r))).items():
            sizes.setdefault(place[:2], set()).add(sum(r.n for r in line))
        counts = ", ".join(f"{name(task)} {' or '.join(map(str, sorted(n)))}" for task, n in sorted(sizes.items()))
        grids += compare(
            f"{panel[0].context:,} tokens, {title}",
            panel,
            lambda r: (r.cell["task"], _variant(r)),
            measure,
            group_name=name,
            better="higher",
            form=".2f",
            notes=[f"Documents a cell: {counts}."],
        )
    read = (
        "Share of documents whose question was answered word for word; higher is better. "
        f"{SHARE_ERROR} Where the last query-block rows are dense, the question itself sees everything: such tables "
        "say little about the selection. Bold is the best of a column, the oracle left out."
    )
    return Section("retrieval", "Retrieval", read, grids) if grids else None


def time_grids(results: Sequence[Result]) -> list[Grid]:
    """Measured times of attention, the choice of blocks included."""

    def measure(rows: Sequence[Result]) -> Measured:
        index, attention = (sum(rows[-1].sampled(name)) for name in ("index", "attention"))
        total = index + attention
        more = f"{index / total:.0%} choice" if index and total else ""
        return Measured(rows[-1].value, None, more)

    grids = []
    for batch, timed in sorted(in_models(results).items()):
        for title, rows in tables(timed):
            counts = f"Median over {', '.join(sorted({f'{r.n} {r.unit}' for r in rows}))}; on {rows[0].device}."
            title = f"Milliseconds of attention a sequence, all layers, batch {batch}: {title}"
            options = {"group_name": _tokens, "better": "lower", "form": ".3g", "notes": [counts]}
            grids += compare(title, rows, _context, measure, **options)
    return grids


def recall_section(results: Sequence[Result]) -> Section | None:
    """Recall of the true maps."""
    titles = {"mass_recall": "attention mass", "target_recall": "target map"}
    grids = []
    for what, title in titles.items():
        rows = [r for r in results if r.what == what and "layer" not in r.cell]
        for place, panel in tables(rows):
            grids += compare(
                f"{title.capitalize()}: {place}",
                panel,
                _context,
                lambda found: Measured(found[-1].value, found[-1].stderr),
                group_name=_tokens,
                better="higher",
                form=".3f",
                notes=[f"{panel[0].n} {panel[0].unit}."],
            )
    read = (
        "Share of the true block map that lies in the chosen blocks, a mean over layers and heads. Mass alone "
        "misleads: a window of recent blocks can hold as much of it as the oracle's choice and still lose all that "
        "was to be retrieved."
    )
    return Section("recall", "Recall of the true map", read, grids) if grids else None


def tables(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    """Rows that may share a table with the contexts side by side, each with a title.

    Where one context was measured on several sets of documents, each set beyond the first has a table of its own.
    """
    merged: dict[tuple, list[Result]] = {}
    taken: dict[tuple, int] = {}
    for (model, text, context, rest), rows in panels(results).items():
        place = model, text, rest.split(" ", 1)[0], context
        taken[place] = number = taken.get(place, -1) + 1
        merged.setdefault((model, text, number, place[2]), []).extend(rows)
    return _options(merged)


def _options(groups: dict[tuple, list[Result]]) -> list[tuple[str, list[Result]]]:
    """The groups, cut apart by budget and dense last rows, with titles; dense rows stand in every part."""
    found = []
    for rows in groups.values():
        sparse = [r for r in rows if kind(r) != "dense"]
        for option in sorted({(budget(r), last_rows_dense(r)) for r in sparse}) or [("density", 0)]:
            of, last = option
            part = [r for r in rows if kind(r) == "dense" or (budget(r), last_rows_dense(r)) == option]
            kept = f"last {last} query-block rows dense" if last else "no dense last rows"
            found.append((f"{rows[0].text}, {rows[0].model}, {kept}{_BUDGETS[of]}", part))
    return found


def _by(results: Iterable[Result], key: Callable[[Result], tuple]) -> dict[tuple, list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        groups.setdefault(key(r), []).append(r)
    return groups


def _variant(result: Result) -> str:
    return json.dumps({name: value for name, value in sorted(result.cell.items()) if name not in _PLACE})


def _context(result: Result) -> int:
    return result.context


def _tokens(context: int) -> str:
    return f"{context:,} tokens"
