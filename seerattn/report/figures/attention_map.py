"""Figure: time and memory of attention that also makes the map gates learn from, beside dense attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from seerattn.report.benchmarks import dense_name, form, machines
from seerattn.report.figures.lengths import over_length
from seerattn.report.select import group
from seerattn.results.record import Result

TITLES = {"attention_map_ms": "time, ms", "extra_memory_mib": "memory beyond inputs and results, MiB"}


def groups(results: Sequence[Result]) -> Iterable[list[Result]]:
    """Times and memory of each device and shape."""
    return machines(results, *TITLES).values()


def draw(rows: list[Result]) -> Figure | None:
    """Lines over the length; grey ones make no map."""
    found = group((r for r in rows if r.value), lambda r: r.what)
    panels = {title: [(r, r.value) for r in found.get(what, [])] for what, title in TITLES.items()}

    def label(r: Result) -> str:
        if not r.cell.get("map"):
            return f"{dense_name(r.cell['impl'])} (no map)"
        ours = r.cell["impl"] != "pytorch"
        return (f"seerattn, {r.cell['impl']}" if ours else dense_name("pytorch")) + form(r)

    return over_length(panels, label)
