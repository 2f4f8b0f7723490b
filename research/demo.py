"""The main job end to end on a CPU: distil gates for a real model on real books, evaluate them, draw the result.

    make demo          # or: python research/demo.py

Every step is a `seerattn` command that is printed before it runs. Results go to outputs/demo; a step that was
interrupted continues there, and one that is finished is not run again. Delete the folder to start over.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

MODEL = "assets/reference-model"
FOLDER = Path("outputs/demo")
FRESH = FOLDER / "gates"
RESULTS = FOLDER / "results.jsonl"
MAPS = FOLDER / "maps.npz"
GATES = f"--gates best=assets/reference-gates/best --gates paper=assets/reference-gates/paper --gates fresh={FRESH}"
EVALUATION = f"--model {MODEL} {GATES} --methods dense,oracle,streaming --data assets/books/evaluate --contexts 4096"

console = Console(width=118)


def run(title: str, command: str) -> None:
    """Prints and runs one `seerattn` command; its failure ends the demo with its exit code."""
    console.rule(f"[bold]{title}")
    console.print(f"[bold]$ seerattn {command}", soft_wrap=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "seerattn", *shlex.split(command)]).returncode
    if code:
        sys.exit(code)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s[/dim]\n")


def distil() -> None:
    """Trains fresh gates for a few minutes and says what changed."""
    if not (FRESH / "adapter_model.safetensors").exists():
        resume = " --resume" if (FRESH / "run.json").exists() else ""
        run(
            "1. Distil gates on two books (about 3 minutes on 2 cores)",
            f"distill --model {MODEL} --data assets/books/distill --context 4096 --steps 36 --batch-size 4 "
            f"--retrieval-share 0.25 --set logging_steps=6 --set save_steps=12 --output {FRESH}{resume}",
        )
    records = [json.loads(line) for line in (FRESH / "training.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    for density in ("0.1", "0.2"):
        before, after = first[f"recall@{density}"], last[f"recall@{density}"]
        console.print(
            f"Recall of the target map at density {density}: {before:.4f} before training "
            f"(best possible {first[f'oracle_recall@{density}']:.4f}), {after:.4f} after "
            f"(best possible {last[f'oracle_recall@{density}']:.4f})"
        )
    console.print(f"Loss {first['loss']:.4f} before, {last['loss']:.4f} after, on {last['tokens']:,} tokens.\n")


def main() -> None:
    """Runs all steps."""
    start = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    distil()
    run(
        "2. Perplexity of fresh and shipped gates against realised density, two other books",
        f"eval {EVALUATION} --tasks perplexity,windows=2 --densities .5,.2,.1 --output {RESULTS}",
    )
    run(
        "3. Retrieval: pass keys and key-value pairs hidden in the books",
        f"eval {EVALUATION} --tasks passkey,n=2,key_value,n=2 --densities .1 --output {RESULTS}",
    )
    run(
        "4. Recall of the true map by layer, and maps to look at",
        f"eval {EVALUATION} --tasks 'recall,maps={MAPS},heads=0:0 3:2 4:5' --densities .2,.1 --output {RESULTS}",
    )
    run("5. Table and pictures", f"report {RESULTS} {MAPS} --output {FOLDER}")
    console.print(Markdown((FOLDER / "table.md").read_text()))
    console.print(
        f"\nDone in {time.perf_counter() - start:.0f} s. Table: {FOLDER}/table.md; pictures: {FOLDER}/perplexity.png "
        f"and {FOLDER}/maps.png; every number: {RESULTS}."
    )


if __name__ == "__main__":
    main()
