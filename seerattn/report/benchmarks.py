"""Finding results of benchmarks: what was measured where, and under which names figures and tables show it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seerattn.report.select import group
from seerattn.results.record import Result

DENSE_NAMES = {
    "flash": "FlashAttention-2",
    "cudnn": "cuDNN",
    "flash4": "flash-attn-4",
    "flex": "FlexAttention",
    "sdpa": "SDPA",
    "pytorch": "plain PyTorch",
}
# What figures compare with: the first of these that was measured.
BASELINES = ("flash", "sdpa", "cudnn", "flash4", "flex")


def machines(results: Iterable[Result], *whats: str) -> dict[tuple[str, str, str], list[Result]]:
    """Benchmark results of these quantities by (device, model, dtype), which alone may be compared.

    Times of calls among others like them, of which the crossover table is made, are not among them.
    """
    found = (r for r in results if r.what in whats and is_benchmark(r) and r.cell.get("clock") != "pipeline")
    return group(found, lambda r: (r.cell["device"], r.model, r.cell.get("dtype", "")))


def is_benchmark(result: Result) -> bool:
    """Whether a time was measured by itself, and not for a comparison of methods on one model."""
    return "device" in result.cell and "budget" not in result.cell


def in_models(results: Iterable[Result]) -> dict[int, list[Result]]:
    """Times of attention that models took with a method, by the number of sequences that ran at once."""
    found = (r for r in results if r.what == "attention_ms" and r.value is not None and not is_benchmark(r))
    return group(found, lambda r: r.cell.get("batch", 1))


def baseline(results: Sequence[Result]) -> str | None:
    """The dense attention to compare with, None if none was measured."""
    found = {r.cell["impl"] for r in results if r.kind == "dense" and r.value is not None}
    return next((name for name in BASELINES if name in found), None)


def blocks(result: Result) -> str:
    """Block sizes and who shares a list, for people."""
    alike = result.cell.get("rows_alike", 1)
    more = f", {alike} rows alike" if alike > 1 else ""
    return f"{result.cell['block_q']}x{result.cell['block_k']} per {result.cell['share']}{more}"


def form(result: Result) -> str:
    """Which map was made, where it is not the published target: " sum:2"."""
    return f" {result.cell['form']}" if "form" in result.cell else ""


def tokens(context: int) -> str:
    """A length as axes show it: 8k is 8192."""
    return f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"


def dense_name(impl: str) -> str:
    """The full name of a dense attention."""
    return DENSE_NAMES.get(impl, impl)


def caption(row: Result, *more: str) -> tuple[str, ...]:
    """What was measured on which device, for a line above a figure."""
    return row.cell["device"], row.model, *more, row.cell.get("dtype", "")
