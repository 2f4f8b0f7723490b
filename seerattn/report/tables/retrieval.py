"""Retrieval: shares of right answers by task, how likely these are, and the shares of pass keys by depth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from seerattn.report import select
from seerattn.report.names import name_of
from seerattn.report.parts import Table, plain
from seerattn.report.tables.grid import Measured, by_setting, compare
from seerattn.results.record import Result
from seerattn.results.statistics import proportion

ID, TITLE = "retrieval", "Retrieval"
# How tables name the error of a share of right answers.
SHARE_ERROR = "± is the standard error of the share, adjusted as by Agresti and Coull: taken at (right + 1) / (n + 2)."
READ = (
    f"Share of documents whose question was answered word for word; higher is better. {SHARE_ERROR} Where the last "
    "query-block rows are dense, the question itself sees everything. Such tables say little of the choice."
)
LIKELY = (
    "Log-likelihood of the right answer as a whole, in nats: a mean over documents ± its standard error; higher is "
    "better. It tells ways apart where a model answers few questions word for word."
)
# Cell entries that say where and how, not what was asked.
_PLACE = ("task", "depth", "block_q", "block_k", "budget", "share", "tokens", "data", "dtype", "note")


def tables(results: Sequence[Result]) -> list[Table]:
    """Tables of tasks for each text, context and setting, and pass keys by depth."""
    rows = [r for r in results if r.what == "accuracy" and r.value is not None]
    found = _by_task("Retrieval", rows, _share)
    # What prompts retrieve is told by shares: models that they are asked of were trained to answer.
    likely = [r for r in results if r.what == "answer_log_prob" and r.value is not None]
    likely = [r for r in likely if r.cell.get("phase") == "decode"]
    found += _by_task("Likelihood of answers", likely, _likelihood, [LIKELY])
    depths = [r for r in rows if "depth" in r.cell]
    return found + [_by_depth(panel) for panel in select.panels(depths).values()]


def _by_task(
    title: str, rows: Sequence[Result], measure: Callable[[Sequence[Result]], Measured], more: Sequence[str] = ()
) -> list[Table]:
    variants = select.group(dict.fromkeys(map(_task, rows)), lambda task: task[0])

    def name(task: tuple[str, str]) -> str:
        more = ", ".join(f"{option} {value}" for option, value in json.loads(task[1]).items())
        return task[0].replace("_", "-") + (f" ({more})" if len(variants[task[0]]) > 1 else "")

    found = []
    for of_place in select.group(rows, lambda r: (r.model, r.text, r.context, r.weights.get("model"))).values():
        for setting, panel in by_setting(of_place):
            notes = {task: _sizes(of) for task, of in select.group(panel, _task).items()}
            options = {"better": "higher", "form": ".2f", "group_name": name, "group_notes": notes, "notes": more}
            whole = f"{title}: {panel[0].context:,} tokens, {setting}"
            found.append(compare(whole, panel, measure, group_of=_task, **options))
    return found


def _share(rows: Sequence[Result]) -> Measured:
    return Measured(*proportion(*select.right_answers(rows)))


def _likelihood(rows: Sequence[Result]) -> Measured:
    """The mean over the documents of all rows, pass keys of every depth say."""
    total = sum(r.n for r in rows)
    error = math.sqrt(sum((r.n * (r.stderr or 0.0)) ** 2 for r in rows)) / total
    return Measured(sum(r.n * r.value for r in rows) / total, error)


def _task(r: Result) -> tuple[str, str]:
    """The task, and what tells it from others of its name."""
    return r.cell["task"], json.dumps({name: value for name, value in sorted(r.cell.items()) if name not in _PLACE})


def _sizes(rows: Sequence[Result]) -> str:
    sizes = {sum(r.n for r in cell) for cell in select.group(rows, lambda r: (r.line, select.asked(r))).values()}
    return f"{' or '.join(map(str, sorted(sizes)))} documents a cell."


def _by_depth(rows: Sequence[Result]) -> Table:
    depths = sorted({r.cell["depth"] for r in rows})
    body = []
    for of_line in select.by_line(rows).values():
        lines = select.group(of_line, lambda r: (select.last_rows_dense(r), -(select.asked(r) or 0.0)))
        for (last, _), line in sorted(lines.items()):
            found = {r.cell["depth"]: r for r in line}
            dense = line[0].kind == "dense"
            label = select.asked_label(line[0]) + (
                "" if dense or select.reached(line) else f" at {select.realised(line):.3f}"
            )
            values = [f"{found[d].value:.2f}" if d in found else "" for d in depths]
            body.append([name_of(line[0]), label, "" if dense else str(last), *values])
    head = ["method", "density", "dense last rows", *(f"depth {d:g}" for d in depths)]
    title = f"Pass keys by depth: {rows[0].context:,} tokens, {rows[0].text}, {rows[0].model}"
    return plain(title, head, body)
