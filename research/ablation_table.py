"""The tables of docs/ablation.md, from records of `research/reference_gates.py`; `docs/draw_pages.py` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reference_gates import STUDIES, VARIANTS

from seerattn.report.parts import Table, plain
from seerattn.report.select import group
from seerattn.results import statistics
from seerattn.results.record import Result

SEEDS = ("", "-seed1", "-seed2")
BASE = "8x8"
HEAD = ["variant", "scores", "perplexity at 0.1", f"- {BASE}", "gap at 0.1", "gap at 0.2", "passkey", "key-value", "KL"]


def tables(results: Sequence[Result], variants: Mapping[str, Mapping]) -> list[Table]:
    """A table of the variants of every study, and one of those that were trained with three seeds.

    Args:
        results: what was measured.
        variants: what was trained, by name.
    """
    found = _Found(results, variants)
    parts = []
    for study, names in STUDIES.items():
        body = [found.line(name) for name in names if name in variants]
        parts += [plain(study.capitalize(), HEAD, body)] if body else []
    repeated = [name for name in variants if all(name + seed in variants for seed in SEEDS)]
    head = ["variant", "gap at 0.1", "gap at 0.2", "key-value at 0.1"]
    note = "Mean and standard error over seeds."
    return [*parts, plain("Three seeds of gates and data", head, [found.seeds(name) for name in repeated], [note])]


class _Found:
    """Looks up what a line needs."""

    def __init__(self, results: Sequence[Result], variants: Mapping[str, Mapping]) -> None:
        self._variants = variants
        self._perplexity = {(r.line, r.density): r for r in results if r.what == "perplexity"}
        answers = (r for r in results if r.what == "accuracy")
        self._accuracy = group(answers, lambda r: (r.name, r.density, r.cell["task"]))

    def gap(self, name: str, density: float) -> float | None:
        """Share of the gap that is closed, with ends of the same block size."""
        block = self._variants[name]["config"]["block_k"]
        names = (name, *(end if block == 64 else f"{end} {block}" for end in ("streaming", "oracle")))
        rows = [self._perplexity.get((of, density)) for of in names]
        if None in rows:
            return None
        own, streaming, oracle = (r.value for r in rows)
        return (streaming - own) / (streaming - oracle)

    def answers(self, name: str, task: str) -> float | None:
        """Share of right answers at density .1."""
        rows = self._accuracy.get((name, 0.1, task))
        return statistics.mean([r.value for r in rows]).value if rows else None

    def line(self, name: str) -> list[str]:
        """Cells of a variant; empty where the evaluation had no time left."""
        config, base, own = VARIANTS[name].config, self._perplexity[BASE, 0.1], self._perplexity.get((name, 0.1))
        difference = ""
        if own is not None and config.block_k == 64 and name != BASE:
            losses, theirs = own.sampled("losses"), base.sampled("losses")
            gap = statistics.perplexity_difference(losses, theirs, own.sampled("tokens"))
            difference = f"{gap.value:+.3f} ± {gap.stderr:.3f}"
        return [
            name,
            f"{64 / config.q_size * 64 / config.k_size:g}",
            f"{own.value:.3f}" if own else "",
            difference,
            *(_text(self.gap(name, density), ".0%") for density in (0.1, 0.2)),
            *(_text(self.answers(name, task), ".2f") for task in ("passkey", "key_value")),
            f"{self._variants[name]['loss_at_end']:.4f}",
        ]

    def seeds(self, name: str) -> list[str]:
        """Mean and standard error over seeds."""
        gaps = [statistics.mean([100 * self.gap(name + seed, density) for seed in SEEDS]) for density in (0.1, 0.2)]
        known = [share for seed in SEEDS if (share := self.answers(name + seed, "key_value")) is not None]
        mean, error = statistics.mean(known)
        told = f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        return [name, *(f"{gap.value:.1f}% ± {gap.stderr:.1f}" for gap in gaps), told]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
