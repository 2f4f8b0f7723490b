"""Section of the page on benchmark tasks: scores of the dense and the sparse model, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.grid import asked_label
from seerattn.report.parts import Section, Table
from seerattn.report.select import arms, asked, budget, kind, last_rows_dense
from seerattn.results.record import Result

WARNING = "⚠ differs"


def task_section(results: Sequence[Result]) -> Section | None:
    """Tasks of lm-evaluation-harness, with a guard line for each that warns where sparse attention changes the "
    "score."""
    guards = [r for r in results if r.what == "task_guard"]
    # Dense scores stand in the guard lines, too.
    guarded = {_place(r) for r in guards} | {(r.model, *_task(r)) for r in guards}
    scores = [r for r in results if r.what == "task_score"]
    scores = [r for r in scores if ((r.model, *_task(r)) if kind(r) == "dense" else _place(r)) not in guarded]
    parts = [_guards([r for r in guards if r.model == model]) for model in sorted({r.model for r in guards})]
    parts += [_scores(scores)] if scores else []
    read = (
        "Scores of lm-evaluation-harness, dense and sparse on the same documents. Perplexity hides what single tasks "
        f"lose, so a difference that is significant at the level of 5% is marked “{WARNING}”. Where nothing differs, "
        "one line in twenty is marked by chance."
    )
    return Section("tasks", "Tasks", read, parts) if parts else None


def _guards(rows: Sequence[Result]) -> Table:
    head = ["task", "tokens", "metric", "selector", "asked", "realised", "dense rows", "dense", "sparse", "difference"]
    body, warned = [], set()
    for r in _ordered(rows):
        (p,), (dense,), (score,) = (r.samples[name] for name in ("p", "dense", "score"))
        if "note" in r.cell:
            warned.add(len(body))
        body.append(
            [
                *_task(r),
                r.arm,
                asked_label(r),
                _number(r.realised_density),
                str(last_rows_dense(r)),
                _number(dense),
                _number(score),
                _with_error(r, "+.3f"),
                "" if p is None else f"{p:.2g}",
                f"{r.n:,}",
                WARNING if len(body) in warned else "",
            ]
        )
    notes = [
        f"{len(warned)} of {len(body)} lines are marked.",
        "The difference is sparse minus dense, ± its standard error; p is of a two-sided test, by flipping the signs "
        "of paired differences where documents have scores of their own.",
    ]
    return Table(f"Guard: {rows[0].model}", [*head, "p", "n", "warning"], body, notes, 4, frozenset(warned))


def _scores(rows: Sequence[Result]) -> Table:
    head = ["task", "tokens", "metric", "selector", "model", "asked", "realised", "score", "n"]
    body = [
        [*_task(r), r.arm, r.model, asked_label(r), _number(r.realised_density), _with_error(r, ".3f"), f"{r.n:,}"]
        for r in _ordered(rows)
    ]
    return Table("Scores", head, body, texts=5)


def _ordered(rows: Sequence[Result]) -> list[Result]:
    order = arms(rows)
    return sorted(rows, key=lambda r: (r.cell["task"], r.context, _task(r), order.index(r.arm), -(asked(r) or 0.0)))


def _task(result: Result) -> tuple[str, str, str]:
    """Task, context and metric, as text."""
    chosen = result.cell.get("filter")
    # RULER's metrics are called by the length.
    metric = "accuracy" if result.cell["metric"] == str(result.context) else result.cell["metric"]
    return result.cell["task"], f"{result.context:,}", metric + (f", {chosen}" if chosen else "")


def _place(result: Result) -> tuple:
    return result.model, result.arm, asked(result), budget(result), last_rows_dense(result), *_task(result)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _with_error(result: Result, form: str) -> str:
    value = "not finite" if result.value is None else format(result.value, form)
    return value if result.stderr is None else f"{value} ± {result.stderr:.3f}"
