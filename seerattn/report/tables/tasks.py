"""Benchmark tasks: scores of the dense and the sparse model, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.names import name_of
from seerattn.report.parts import Cell, Table, plain
from seerattn.report.select import asked, asked_label, budget, by_line, group, last_rows_dense
from seerattn.report.tables.task_grid import grids
from seerattn.results.record import Result

ID, TITLE = "tasks", "Tasks"
WARNING = "⚠ differs"
READ = (
    "Scores of lm-evaluation-harness, dense and sparse on the same documents. Perplexity hides what single tasks lose. "
    f"So a difference that is significant at the level of 5% is marked “{WARNING}”. Where nothing differs, one line in "
    "twenty is marked by chance."
)


def tables(results: Sequence[Result]) -> list[Table]:
    """For each model systems by tasks, a guard line for each task, and the scores that have none."""
    guards = [r for r in results if r.what == "task_guard"]
    # Dense scores stand in the guard lines, too.
    guarded = {_place(r) for r in guards} | {(r.model, *_task(r)) for r in guards}
    scores = [r for r in results if r.what == "task_score"]
    scores = [r for r in scores if ((r.model, *_task(r)) if r.kind == "dense" else _place(r)) not in guarded]
    of_models = [rows for _, rows in sorted(group(guards, lambda r: r.model).items())]
    found = [table for rows in of_models for table in grids(rows)] + [_guards(rows) for rows in of_models]
    return found + ([_scores(scores)] if scores else [])


def _guards(rows: Sequence[Result]) -> Table:
    head = ["task", "tokens", "metric", "method", "asked", "realised", "dense last rows", "dense", "sparse"]
    body, warned = [], set()
    for r in _ordered(rows):
        (p,), (dense,), (score,) = (r.samples[name] for name in ("p", "dense", "score"))
        warning = WARNING if "note" in r.cell else ""
        warned |= {len(body)} if warning else set()
        place = [*_task(r), name_of(r), asked_label(r), _number(r.realised_density), str(last_rows_dense(r))]
        told = [_difference(r, "+.3f"), "" if p is None else f"{p:.2g}", f"{r.n:,}", warning]
        body.append([*place, _number(dense), _number(score), *told])
    notes = [
        f"{len(warned)} of {len(body)} lines are marked.",
        "The difference is sparse minus dense, ± its standard error. p is of a two-sided test. Where documents have "
        "scores of their own, it flips the signs of paired differences.",
    ]
    head += ["difference", "p", "n", "warning"]
    return plain(f"Guard: {rows[0].model}", head, body, notes, texts=4, warned=warned)


def _scores(rows: Sequence[Result]) -> Table:
    head = ["task", "tokens", "metric", "method", "model", "asked", "realised", "score", "n"]
    body = [
        [*_task(r), name_of(r), r.model, asked_label(r), _number(r.realised_density), _difference(r, ".3f"), f"{r.n:,}"]
        for r in _ordered(rows)
    ]
    return plain("Scores", head, body, texts=5)


def _ordered(rows: Sequence[Result]) -> list[Result]:
    order = list(by_line(rows))
    return sorted(rows, key=lambda r: (r.cell["task"], r.context, _task(r), order.index(r.line), -(asked(r) or 0.0)))


def _task(result: Result) -> tuple[str, str, str]:
    """Task, context and metric, as text."""
    chosen = result.cell.get("filter")
    # RULER's metrics are called by the length.
    metric = "accuracy" if result.cell["metric"] == str(result.context) else result.cell["metric"]
    return result.cell["task"], f"{result.context:,}", metric + (f", {chosen}" if chosen else "")


def _place(result: Result) -> tuple:
    return result.model, result.line, asked(result), budget(result), last_rows_dense(result), *_task(result)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _difference(result: Result, form: str) -> Cell:
    value = "not finite" if result.value is None else format(result.value, form)
    return Cell(value, "" if result.stderr is None else f"{result.stderr:.3f}")
