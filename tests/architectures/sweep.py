"""Writes docs/architectures.md: what `seerattn.attach` makes of every family.

python tests/architectures/sweep.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from configs import is_known
from verdicts import EXPECTED, LEFT_OUT, PARTLY, REFUSED, SERVED, agrees, verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
INTRODUCTION = """# Architectures

What `seerattn.attach` makes of each family of causal language models in transformers {transformers}, and of the text
layers of some that also see images. Every family was built with two to eight small random layers, so this page tells
what the code does with a kind of model, and nothing about quality. There is no list of names in the library: a model
is proven when it is attached to, or refused with the reason, and one that is not here is tried just the same.

Written by `python tests/architectures/sweep.py`; do not edit. `make test-architectures` holds every row to it, and
every family that is served to its unpatched model: all blocks give its logits, in one call, against a cache and in
padded batches; a sparse policy changes them; `detach` brings them back bit for bit.

{counts}
"""
SECTIONS = {
    SERVED: ("Served", "All attention layers."),
    PARTLY: (
        "Served partly",
        "Layers with a sliding window, recurrent layers and others without full attention run as they always do. "
        '*In one call only*: a prompt in several calls is refused, or dense under `impl="auto"`.',
    ),
    REFUSED: ("Refused", "With this sentence; the model stays as it was."),
    LEFT_OUT: ("Not tried", "transformers itself does not build or run them at this size; with its error."),
}


def row(name: str, found: str) -> str:
    """The line of a family in its table."""
    _, _, why = found.partition(": ")
    why = why.replace("|", "\\|").replace("<", "&lt;")
    return f"| {name} | {why} |" if why else f"| {name} |"


def page(found: dict[str, str]) -> str:
    """The whole page, of verdicts by family."""
    kinds = {kind: {n: v for n, v in sorted(found.items()) if v.partition(": ")[0] == kind} for kind in SECTIONS}
    counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in kinds.items())
    parts = [INTRODUCTION.format(transformers=transformers.__version__, counts=f"{len(found)} families: {counts}.")]
    for kind, (title, text) in SECTIONS.items():
        head = "| family |\n|---|" if kind == SERVED else "| family | |\n|---|---|"
        rows = "\n".join(row(name, verdict_) for name, verdict_ in kinds[kind].items())
        parts.append(f"## {title}\n\n{text}\n\n{head}\n{rows}\n")
    return "\n".join(parts)


def main() -> int:
    torch.set_num_threads(1)
    found = {name: verdict(name) for name in sorted(EXPECTED) if is_known(name)}
    PAGE.write_text(page(found), encoding="utf-8")
    changed = [name for name, one in found.items() if not agrees(one, EXPECTED[name])]
    for name in changed:
        print(f"{name}: {found[name]}, where verdicts.py has {EXPECTED[name]}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
