"""A folder with one of everything that commands read, all of it good, and files that are none of theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_corpus import write_models_and_gates

from seerattn.methods.head_rules import Plan
from seerattn.results.file import ResultsFile
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result

SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
RECIPE = {
    "models": ["model"],
    "contexts": [96],
    "densities": [0.6],
    "last_rows_dense": [0],
    "budgets": {"time": []},
    "selectors": [
        "dense",
        {"selector": "streaming", "block_q": 16, "block_k": 16},
        {"selector": "minference", "plan": "plan.json", "block_q": 16, "block_k": 16},
        {"selector": "gate", "name": "mine", "gates": "gates", "policy": "top_k"},
    ],
    "tasks": [
        {"task": "perplexity", "data": "docs.jsonl", "max_docs": 2},
        {"task": "passkey", "haystack": ["docs.jsonl"], "n": 1, "depths": [0.5], "seed": 0},
    ],
    "batch": 2,
    "tuning_windows": 1,
}


def records() -> list[Result]:
    """Results of most kinds that reports have tables and figures of."""
    blank = Result(what="perplexity", value=9.0, n=99, unit="tokens", model="m", selector="dense", context=96, text="t",
        realised_density=1.0, cell={"data": "d", "dtype": "float32"}, device="cpu")  # fmt: skip
    losses = {"documents": [0, 1], "losses": [3.0, 4.0], "tokens": [50, 49], "head_density": [[0.5, 0.6], [0.7, 0.8]]}
    rows = [replace(blank, samples=losses)]
    for name, density in (("g", 0.5), ("g", 0.2), (None, 0.5), (None, 0.2)):
        arm = {"gates": name, "selector": "gate" if name else "oracle", "density": density, "realised_density": density}
        arm |= {"policy": {"policy": "TopK", "density": density, "last_rows_dense": 0}}
        block = {"block_q": 64, "block_k": 64, "budget": "density"}
        rows.append(replace(blank, **arm, value=9.5, samples=losses, cell=blank.cell | block))
        rows.append(replace(rows[-1], what="perplexity_difference", value=0.5, stderr=0.1, samples={}))
        needle = {"task": "passkey", "depth": 0.5, "documents": 4}
        rows.append(replace(rows[-1], what="accuracy", value=0.5, n=4, cell=blank.cell | needle, seed=0))
        rows.append(replace(rows[-2], what="target_recall", value=0.8, cell=blank.cell))
        times = {"index": [1.0], "attention": [2.0]}
        rows.append(
            replace(
                rows[-2], what="attention_ms", value=3.0, n=1, samples=times, cell=blank.cell | block | {"batch": 1}
            )
        )
    score = replace(
        blank, what="task_score", value=0.5, n=4, cell={"task": "r", "metric": "acc"}, samples={"scores": [1.0, 0.0]}
    )
    guard = {"score": [0.4], "dense": [0.5], "p": [0.01], "test": ["x"]}
    rows += [score, replace(score, what="task_guard", value=-0.1, selector="oracle", density=0.5, samples=guard)]
    bench = {"impl": "sdpa", "device": "gpu", "dtype": "bfloat16"}
    for what, more in (("attention_ms", {}), ("ttft_s", {"layers": 2}), ("pooled_ms", {"map": False})):
        rows.append(replace(blank, what=what, cell=bench | more, realised_density=None))
        sparse = bench | more | {"impl": "triton", "block_q": 64, "block_k": 64, "share": "head", "mask_heads": 4}
        arm = {"selector": "random"} if what == "attention_ms" else {"selector": "gate", "gates": "paper"}
        rows.append(replace(blank, what=what, cell=sparse, density=0.1, realised_density=0.1, **arm))
    rows.append(
        replace(blank, what="failure", value=None, samples={"error": ["out of memory"]}, cell={"task": "recall"})
    )
    return rows


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    folder.mkdir()
    write_models_and_gates(folder)
    (folder / "gates-of-model").rename(folder / "gates")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    rule = {"pattern": "vertical_slash", "columns": 100, "offsets": 800}
    Plan("minference", SIZES, [[rule] * 4] * 2, {"variant": "paper", "found": {"density": 0.5}}).save(
        folder / "plan.json"
    )
    official = [{str(head): ["vertical_and_slash", 100, 800, 0.5] for head in range(4)}] * 2
    (folder / "official.json").write_text(json.dumps(official))
    with ResultsFile(folder / "r.jsonl").together() as cell:
        for row in records():
            cell.append(row)
    ones = np.tril(np.full((2, 4, 4), 0.25, np.float32))
    BlockMaps([(0, 0), (1, 2)], ones, ones, ones > 0, np.eye(4) > 0, "g", 0.5).save(folder / "maps.npz")
    training = [{"step": n, "loss": 2.0 / n, "tokens_per_second": 9.0, "sparsity": 0.5} for n in range(1, 5)]
    (folder / "training.jsonl").write_text("".join(json.dumps(one) + "\n" for one in training))
    # None of these is ours.
    (folder / "notes.txt").write_text("my notes")
    (folder / "settings.json").write_text('{"lr": 1}')
    (folder / "mine").mkdir()
    (folder / "mine" / "table.md").write_text("# mine\n")
    return folder
