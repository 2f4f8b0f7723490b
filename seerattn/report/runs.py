"""Sections of the page on what was run, with which software, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seerattn.report.grid import asked_label
from seerattn.report.parts import Lines, Section, Table
from seerattn.report.select import asked, budget, last_rows_dense
from seerattn.results.record import Result

# Commands that are listed; a page of them helps nobody.
COMMANDS = 40


def run_section(results: Sequence[Result]) -> Section | None:
    """Models, versions, devices, commits, dates, commands and sample sizes."""
    if not results:
        return None
    measured: dict[tuple, list[Result]] = {}
    machines: dict[tuple, list[Result]] = {}
    for r in results:
        if r.what != "failure":
            measured.setdefault((r.what, r.model, r.text), []).append(r)
        versions = ", ".join(f"{name} {number}" for name, number in r.versions.items())
        machines.setdefault((r.device, r.cell.get("dtype", ""), versions, r.git or ""), []).append(r)
    body = [
        [
            what.replace("_", " "),
            model,
            text,
            ", ".join(f"{context:,}" for context in sorted({r.context for r in rows})),
            f"{len(rows):,}",
            f"{_range(r.n for r in rows)} {rows[0].unit}",
        ]
        for (what, model, text), rows in sorted(measured.items())
    ]
    head = ["quantity", "model", "text", "contexts, tokens", "results", "each over"]
    parts: list[Table | Lines] = [Table("Measured", head, body, texts=4)]
    body = [
        [
            device or "not recorded",
            dtype,
            versions,
            _commit(git),
            _range(r.timestamp[:10] for r in rows),
            str(len(rows)),
        ]
        for (device, dtype, versions, git), rows in machines.items()
    ]
    head = ["device", "dtype", "software", "commit", "date", "results"]
    parts.append(Table("With", head, body, ["A + after a commit says that files had been changed."], texts=5))
    commands = list(dict.fromkeys(r.command for r in results if r.command))
    if commands:
        more = [f"# and {len(commands) - COMMANDS} more"] if len(commands) > COMMANDS else []
        parts.append(Lines(f"Commands ({len(commands)})", commands[:COMMANDS] + more))
    read = "Every number of this page stands in the results files that were given; nothing else was read."
    return Section("run", "What was run", read, parts)


def failures(results: Iterable[Result]) -> list[Result]:
    """Cells that could not be measured, but for those that could when they were tried again."""
    results = list(results)
    done = {_cell(r) for r in results if r.value is not None}
    return [r for r in results if "error" in r.samples and _cell(r) not in done]


def _cell(result: Result) -> tuple:
    task = result.cell.get("task", "recall" if result.what.endswith("_recall") else result.what)
    how = (result.gates or result.selector, asked(result), budget(result), last_rows_dense(result))
    # What else tells cells of benchmarks apart.
    bench = [result.cell.get(name) for name in ("impl", "work", "layers", "target_share")]
    return result.model, result.text, result.context, task, *bench, *how


def failure_section(results: Iterable[Result]) -> Section | None:
    """What could not be measured, with the reason."""
    body = [
        [
            r.arm,
            asked_label(r),
            f"{r.context:,}",
            r.text,
            str(last_rows_dense(r)),
            str(r.cell.get("task", r.what)).replace("_", " "),
            "; ".join(r.samples["error"]),
        ]
        for r in failures(results)
    ]
    head = ["selector", "density", "context", "text", "dense last rows", "task", "reason"]
    read = "These cells were tried and have no value; the tables leave them empty or say so."
    return Section("failures", "Failures", read, [Table("", head, body, texts=7)]) if body else None


def _range(values: Iterable) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else value for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _commit(git: str) -> str:
    return "not recorded" if not git else git[:10] + ("+" if git.endswith("+") else "")
