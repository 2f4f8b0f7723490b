"""Figure: time to the first token of a whole model, its ratio to dense attention, and the memory it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from seerattn.report.benchmarks import baseline, dense_name, machines
from seerattn.report.figures.lengths import over_length
from seerattn.results.record import Result


def groups(results: Sequence[Result]) -> Iterable[list[Result]]:
    """Prefills of each device and model."""
    return machines(results, "ttft_s", "peak_memory_gib").values()


def draw(rows: list[Result]) -> Figure | None:
    """Lines over the length, one for each dense attention, gate and sparsity."""
    # Peak memory is also measured of training steps.
    rows = [r for r in rows if r.value is not None and "work" not in r.cell]
    # Times of models that were cut to fewer layers stand in the tables.
    layers = max((r.cell["layers"] for r in rows), default=0)
    rows = [r for r in rows if r.cell["layers"] == layers]
    times, memory = ([r for r in rows if r.what == what] for what in ("ttft_s", "peak_memory_gib"))
    reference = baseline(times)
    dense = {r.context: r.value for r in times if r.kind == "dense" and r.cell["impl"] == reference}
    ratios = [(r, dense[r.context] / r.value) for r in times if r.context in dense]
    panels = {
        "time to first token, s": [(r, r.value) for r in times],
        f"speed-up over {dense_name(reference or '')}": ratios,
        "peak memory, GiB": [(r, r.value) for r in memory],
    }

    def label(r: Result) -> str:
        if r.kind == "dense":
            return f"dense, {dense_name(r.cell['impl'])}"
        return f"gates {r.name}, {r.cell['impl']}, sparsity {1 - r.density:.3g}"

    return over_length(panels, label, f"{layers} layers")
