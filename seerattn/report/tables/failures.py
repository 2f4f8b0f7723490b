"""What could not be measured, with the reason."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.names import name_of
from seerattn.report.parts import Table, plain
from seerattn.report.select import asked, asked_label, budget, last_rows_dense
from seerattn.results.record import Result

ID, TITLE = "failures", "Failures"
READ = "These cells were tried and have no value. The tables leave them empty or say so."


def tables(results: Sequence[Result]) -> list[Table]:
    """Cells that could not be measured, but for those that could when they were tried again."""
    done = {_cell(r) for r in results if r.value is not None}
    body = [
        [
            name_of(r),
            asked_label(r),
            f"{r.context:,}",
            r.text,
            str(last_rows_dense(r)),
            str(r.cell.get("task", r.what)).replace("_", " "),
            "; ".join(r.samples["error"]),
        ]
        for r in results
        if "error" in r.samples and _cell(r) not in done
    ]
    head = ["method", "density", "context", "text", "dense last rows", "task", "reason"]
    return [plain("Not measured", head, body, texts=7)] if body else []


def _cell(result: Result) -> tuple:
    task = result.cell.get("task", "recall" if result.what.endswith("_recall") else result.what)
    how = (result.name, asked(result), budget(result), last_rows_dense(result))
    # What else tells cells of benchmarks apart.
    bench = [result.cell.get(name) for name in ("impl", "work", "layers", "target_share")]
    return result.model, result.text, result.context, task, *bench, *how
