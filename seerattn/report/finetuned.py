"""Tables of models that were trained further: a line for each way of training, a column for each sparsity.

Results of such models say so in their cell: ``training`` holds the "name" of the way of training, the "sparsity" that
the model was trained at (None for a model that was not trained sparsely), and what else decided the training. They
stand in these tables and in no other: their weights differ, so what they are compared with is the model that was
trained densely, whose name is `REFERENCE`, and not the same model run densely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from seerattn.report.markdown import markdown
from seerattn.report.parts import Table
from seerattn.report.select import SHARE_ERROR, group, right_answers
from seerattn.results.record import Result
from seerattn.results.statistics import perplexity_difference, proportion

REFERENCE = "dense"
RUN_DENSE = ", run dense"

Lines = dict[str, dict[float, list[Result]]]


def is_finetuned(result: Result) -> bool:
    """Whether a result is of a model that was trained further, or stands beside those."""
    return "training" in result.cell


def finetuned_markdown(results: Iterable[Result]) -> list[str]:
    """All tables, as titles, sentences and Markdown."""
    tables = finetuned_tables(results)
    return [part for t in tables for part in (f"### {t.title}", *t.notes, markdown(t.head, t.body))]


def finetuned_tables(results: Iterable[Result]) -> list[Table]:
    """Perplexity and retrieval by way of training and sparsity, and what targets of some rows cost; none without."""
    results = [r for r in results if is_finetuned(r)]
    measured = [r for r in results if r.what == "perplexity"]
    found = [r for r in results if r.what == "accuracy"]
    parts = [_perplexity(rows) for rows in _places(measured).values()]
    parts += [_partial_targets(rows) for rows in group(measured, "model").values() if _full_targets(rows)]
    return parts + [_retrieval(rows) for rows in _places(found).values()]


def _places(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Results that may stand in one table: the same documents at the same length."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        documents = (r.cell.get("data"), r.cell.get("windows"), r.cell.get("task"), r.seed)
        groups.setdefault((r.model, r.text, r.context, *documents), []).append(r)
    return groups


def _perplexity(rows: Sequence[Result]) -> Table:
    reference = _reference(rows)

    def cell(found: Sequence[Result]) -> str:
        row = found[-1]
        if row.value is None:
            return "not finite"
        if reference is None or row is reference:
            return f"{row.value:.2f}"
        return f"{row.value:.2f} ({_percent(row, reference)})"

    notes = ["Columns are the sparsity asked for, realised in brackets; the first one is dense attention."]
    if reference is not None:
        size = f"{len(reference.sampled('documents'))} documents, {reference.n} tokens"
        notes.append(f"{size}; in brackets the difference from {REFERENCE}, ± its paired standard error.")
    first = rows[0]
    return _table(f"Fine-tuned: perplexity, {_place(first)}", rows, cell, notes)


def _retrieval(rows: Sequence[Result]) -> Table:
    def cell(found: Sequence[Result]) -> str:
        share, error = proportion(*right_answers(found))
        return f"{share:.2f} ± {error:.2f}"

    lines = _lines(rows)
    n = max((right_answers(found)[1] for line in lines.values() for found in line.values()), default=0)
    task = rows[0].cell["task"].replace("_", "-")
    notes = [f"{n} documents a cell; {SHARE_ERROR}"]
    return _table(f"Fine-tuned: {task}, {_place(rows[0])}", rows, cell, notes)


def _partial_targets(rows: Sequence[Result]) -> Table:
    """Models that differ in the share of rows with a target alone, beside the one that was trained on all of them."""
    full = _full_targets(rows)
    lines: dict[str, list[str]] = {}
    columns = list(dict.fromkeys((r.text, r.context) for r in full.values()))
    for r in rows:
        training = r.cell["training"]
        base = full.get(_target_place(r))
        if r.selector != "gate" or base is None or r.value is None or training.get("annealed"):
            continue
        every = training["target_every"]
        name = f"{training['sparsity']:g}, {training['target_share']:.0%} of the rows"
        line = lines.setdefault(name + (f", every {every} steps" if every > 1 else ""), [""] * len(columns))
        difference = "" if r is base else f" ({_percent(r, base)})"
        line[columns.index((r.text, r.context))] = f"{r.value:.3f}{difference}"
    head = ["sparsity and target", *(f"{text}, {context:,}" for text, context in columns)]
    note = "In brackets the difference from the model trained on whole targets, ± its paired standard error."
    # Whole targets, which the others are compared with, come first.
    body = sorted(([name, *line] for name, line in lines.items()), key=lambda line: "(" in line[1])
    return Table(f"Fine-tuned: targets of some rows, {rows[0].model}", head, body, [note])


def _full_targets(rows: Iterable[Result]) -> dict[tuple, Result]:
    """Models trained on whole targets at every step, measured at the sparsity of their training."""
    found = {}
    for r in rows:
        training = r.cell["training"]
        whole = training.get("target_share") == 1.0 and training["target_every"] == 1 and not training["annealed"]
        if whole and r.selector == "gate" and r.value is not None:
            found[_target_place(r)] = r
    return found


def _target_place(r: Result) -> tuple:
    return r.text, r.context, r.cell.get("data"), r.cell["training"]["sparsity"], r.density


def _reference(rows: Iterable[Result]) -> Result | None:
    """The model that was trained densely."""
    return next((r for r in rows if r.cell["training"]["name"] == REFERENCE and r.value is not None), None)


def _percent(row: Result, base: Result) -> str:
    """Difference of two perplexities of the same documents in percent of the second."""
    losses, tokens = row.sampled("losses"), base.sampled("tokens")
    gap = perplexity_difference(losses, base.sampled("losses"), tokens)
    error = "" if gap.stderr is None else f" ± {100 * gap.stderr / base.value:.2f}"
    return f"{100 * gap.value / base.value:+.2f}{error} %"


def _lines(rows: Iterable[Result]) -> Lines:
    """Results by way of training and sparsity, in order of first appearance; sparse models run dense come last."""
    rows = list(rows)
    reference = _reference(rows)
    lines: Lines = {}
    for r in rows:
        training = r.cell["training"]
        name, column = training["name"], 0.0
        if r.selector != "dense":
            column = round(1 - r.density, 6)
        elif training["sparsity"] is not None:
            name, column = name + RUN_DENSE, training["sparsity"]
        elif reference is not None and name != REFERENCE and r.weights.get("model") == reference.weights.get("model"):
            # Gates added afterwards: without them the model is the reference.
            continue
        lines.setdefault(name, {}).setdefault(column, []).append(r)
    return dict(sorted(lines.items(), key=lambda line: line[0].endswith(RUN_DENSE)))


def _table(title: str, rows: Sequence[Result], cell: Callable[[Sequence[Result]], str], notes: Sequence[str]) -> Table:
    lines = _lines(rows)
    columns = sorted({column for line in lines.values() for column in line})
    head = ["trained", *(_heading(column, lines) for column in columns)]
    body = [[name, *(cell(line[c]) if c in line else "" for c in columns)] for name, line in lines.items()]
    return Table(title, head, body, notes)


def _heading(column: float, lines: Lines) -> str:
    if not column:
        return "0"
    found = [1 - r.realised_density for line in lines.values() for r in line.get(column, []) if r.selector != "dense"]
    ends = sorted({f"{sparsity:.3f}" for sparsity in found})
    return f"{column:g}" + (f" ({' to '.join(dict.fromkeys((ends[0], ends[-1])))})" if ends else "")


def _place(row: Result) -> str:
    return f"{row.text}, {row.context} tokens, {row.model}"
