"""Write docs/ablation.md from the records of `research/reference_gates.py`.

python research/ablation_table.py research/records/gate-ablation.jsonl research/records/gate-variants.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from reference_gates import STUDIES, VARIANTS

from seerattn.report.markdown import markdown
from seerattn.results import statistics
from seerattn.results.file import read_results
from seerattn.results.record import Result
from seerattn.saving import write_whole

SEEDS = ("", "-seed1", "-seed2")
BASE = "8x8"
HEAD = """# Which form of gate finds what matters

{variants} variants on the reference model, trained by `research/reference_gates.py`
on the same {steps} steps of {batch} sequences of {context} tokens ({stretch} queries of each), 30 % of them
retrieval documents; AdamW, peak 3e-3, a cosine to zero unless the variant says otherwise. Evaluated on {books}
validation books ({context} tokens of each) and {documents} documents a retrieval task, on one {device}. A variant
differs from the plain form (`8x8`: 8 x 8 sub-blocks of 8 tokens) or the published one (`paper`) in what its name
says. Cells are empty where the evaluation had no time left.

- *gap*: share of the perplexity between streaming (0 %) and the oracle (100 %), both with blocks of the same size.
- *- {base}*: perplexity at density .1 minus that of `{base}`, with its paired standard error over books.
- *scores*: sub-block scores that a pair of 64 x 64 tokens costs.
- *KL*: running mean of the loss at the end; comparable only where blocks, share, target and loss are the same.

Written by

    python research/ablation_table.py research/records/gate-ablation.jsonl research/records/gate-variants.jsonl
"""


def main(
    results: Annotated[Path, typer.Argument(help="ablation.jsonl of the recipe.")],
    variants: Annotated[Path, typer.Argument(help="variants.jsonl of the recipe.")],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("docs/ablation.md"),
) -> None:
    """Write the table of all variants, by study, and one of those that were trained with three seeds."""
    rows = read_results([results])
    trained = {row["name"]: row for row in map(json.loads, variants.read_text().splitlines())}
    table = Table(rows, trained)
    first = trained[BASE]
    some = next(r for r in rows if r.what == "perplexity" and r.gates == BASE)
    facts = {name: first[name] for name in ("steps", "batch", "context", "stretch")}
    documents = next(r.n for r in rows if r.what == "accuracy" and r.cell["task"] == "key_value")
    page = HEAD.format(
        variants=len([n for n in trained if "-seed" not in n]),
        books=len(some.samples["losses"]),
        documents=documents,
        device=some.device,
        base=BASE,
        **facts,
    )
    for study, names in STUDIES.items():
        found = [table.row(name) for name in names if name in trained]
        page += f"\n## {study.capitalize()}\n\n" + markdown(table.header, found) + "\n" if found else ""
    repeated = [n for n in trained if all(n + s in trained for s in SEEDS) and "-seed" not in n]
    page += "\n## Three seeds of gates and data\n\nMean and standard error over seeds.\n\n"
    head = ["variant", "gap at .1", "gap at .2", "key-value at .1"]
    page += markdown(head, [table.seeds(name) for name in repeated]) + "\n"
    write_whole(output, page)


class Table:
    """Looks up what a row of the page needs."""

    header = (
        "variant",
        "scores",
        "perplexity at .1",
        f"- {BASE}",
        "gap at .1",
        "gap at .2",
        "passkey",
        "key-value",
        "KL",
    )

    def __init__(self, rows: list[Result], trained: dict[str, dict]) -> None:
        self._trained = trained
        self._perplexity = {
            (r.arm if r.gates is None else r.gates, r.density): r for r in rows if r.what == "perplexity"
        }
        self._accuracy: dict[tuple, list[float]] = {}
        for r in rows:
            if r.what == "accuracy":
                self._accuracy.setdefault((r.gates, r.density, r.cell["task"]), []).append(r.value)

    def gap(self, name: str, density: float) -> float | None:
        """Share of the gap that is closed, with bounds of the same block size."""
        block = self._trained[name]["config"]["block_k"]
        suffix = "" if block == 64 else f" {block}"
        ends = [self._perplexity.get((bound + suffix, density)) for bound in ("streaming", "oracle")]
        own = self._perplexity.get((name, density))
        if own is None or None in ends:
            return None
        return (ends[0].value - own.value) / (ends[0].value - ends[1].value)

    def row(self, name: str) -> list[str]:
        """Cells of a variant."""
        config, base = VARIANTS[name].config, self._perplexity[BASE, 0.1]
        own = self._perplexity.get((name, 0.1))
        difference = ""
        if own is not None and config.block_k == 64 and name != BASE:
            found = statistics.perplexity_difference(
                own.samples["losses"], base.samples["losses"], own.samples["tokens"]
            )
            difference = f"{found.value:+.3f} ± {found.stderr:.3f}"
        tasks = [self._accuracy.get((name, 0.1, task)) for task in ("passkey", "key_value")]
        return [
            name,
            f"{64 / config.q_size * 64 / config.k_size:g}",
            f"{own.value:.3f}" if own else "",
            difference,
            *(_percent(self.gap(name, density)) for density in (0.1, 0.2)),
            *("" if values is None else f"{sum(values) / len(values):.2f}" for values in tasks),
            f"{self._trained[name]['loss_at_end']:.4f}",
        ]

    def seeds(self, name: str) -> list[str]:
        """Mean and standard error over seeds."""
        cells = [name]
        for density in (0.1, 0.2):
            mean, error = statistics.mean([self.gap(name + seed, density) for seed in SEEDS])
            cells.append(f"{100 * mean:.1f}% ± {100 * error:.1f}")
        found = [self._accuracy.get((name + seed, 0.1, "key_value")) for seed in SEEDS]
        known = [sum(values) / len(values) for values in found if values]
        mean, error = statistics.mean(known)
        return [*cells, f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


if __name__ == "__main__":
    typer.run(main)
