"""What was run, and with which software."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seerattn.report.parts import Table, plain
from seerattn.report.select import group
from seerattn.results.record import Result

ID, TITLE = "run", "What was run"
READ = "Every number here stands in the results files that were given; nothing else was read."
# Commands that are listed; a page of them helps nobody.
COMMANDS = 40


def tables(results: Sequence[Result]) -> list[Table]:
    """Models, versions, devices, commits, dates, commands and sample sizes."""
    if not results:
        return []
    measured = group((r for r in results if r.what != "failure"), lambda r: (r.what, r.model, r.text))
    body = []
    for (what, model, text), rows in sorted(measured.items()):
        contexts = ", ".join(f"{context:,}" for context in sorted({r.context for r in rows}))
        of = f"{_range(r.n for r in rows)} {rows[0].unit}"
        body.append([what.replace("_", " "), model, text, contexts, f"{len(rows):,}", of])
    head = ["quantity", "model", "text", "contexts, tokens", "results", "each over"]
    parts = [plain("Measured", head, body, texts=4)]
    body = []
    for (device, dtype, versions, git), rows in group(results, _machine).items():
        date = _range(r.timestamp[:10] for r in rows)
        body.append([device or "not recorded", dtype, versions, _commit(git), date, str(len(rows))])
    head = ["device", "dtype", "software", "commit", "date", "results"]
    parts.append(plain("With", head, body, ["A + after a commit says that files had been changed."], texts=5))
    commands = list(dict.fromkeys(r.command for r in results if r.command))
    if commands:
        more = [f"and {len(commands) - COMMANDS} more"] if len(commands) > COMMANDS else []
        body = [[command] for command in commands[:COMMANDS] + more]
        parts.append(plain(f"Commands ({len(commands)})", ["command"], body))
    return parts


def _machine(r: Result) -> tuple[str, str, str, str]:
    versions = ", ".join(f"{name} {number}" for name, number in r.versions.items())
    return r.device, r.cell.get("dtype", ""), versions, r.git or ""


def _range(values: Iterable) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else value for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _commit(git: str) -> str:
    return "not recorded" if not git else git[:10] + ("+" if git.endswith("+") else "")
