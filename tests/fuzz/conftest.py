"""A folder with one of everything that commands read, all of it good, and files that are none of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import yaml
from tiny_corpus import write_models_and_gates

from seerattn.eval.tasks import harness_tasks
from seerattn.methods.head_rules import HeadRules
from seerattn.results.file import ResultsFile
from seerattn.results.maps import BlockMaps
from seerattn.results.migration import EARLIER_FIELDS
from seerattn.results.record import Result

METHODS = (("oracle", "oracle", "oracle"), ("gate", "learned", "g"))
SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
EXPERIMENT = {
    "model": "model",
    "contexts": [96],
    "densities": [0.6],
    "times": [],
    "last_rows_dense": [0],
    "methods": [
        "dense",
        "streaming,block_q=16,block_k=16",
        {"method": "minference", "plan": "plan.json", "block_q": 16, "block_k": 16},
        {"method": "gate", "name": "mine", "gates": "gates", "policy": "top_k"},
    ],
    "tasks": [
        {"task": "perplexity", "data": "docs.jsonl", "max_docs": 2},
        {"task": "passkey", "data": ["docs.jsonl"], "n": 1, "depths": [0.5], "seed": 0},
    ],
    "name": "model",
    "batch": 2,
    "tuning_windows": 1,
}


def records() -> list[Result]:
    """Results of most kinds that reports have tables and figures of."""
    dense = {"method": "dense", "kind": "dense", "name": "dense"}
    blank = Result(what="perplexity", value=9.0, n=99, unit="tokens", model="m", **dense, context=96, text="t",
        realised_density=1.0, cell={"data": "d", "dtype": "float32"}, device="cpu")  # fmt: skip
    oracle, gates = ({"method": id, "kind": kind, "name": name} for id, kind, name in METHODS)
    losses = {"documents": [0, 1], "losses": [3.0, 4.0], "tokens": [50, 49], "head_density": [[0.5, 0.6], [0.7, 0.8]]}
    rows = [replace(blank, samples=losses)]
    for method, density in ((gates, 0.5), (gates, 0.2), (oracle, 0.5), (oracle, 0.2)):
        told = method | {"density": density, "realised_density": density}
        told |= {"settings": {"policy": "top_k", "setting": density, "last_rows_dense": 0}}
        block = {"block_q": 64, "block_k": 64, "budget": "density"}
        rows.append(replace(blank, **told, value=9.5, samples=losses, cell=blank.cell | block))
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
    rows += [score, replace(score, what="task_guard", value=-0.1, **oracle, density=0.5, samples=guard)]
    bench = {"impl": "sdpa", "device": "gpu", "dtype": "bfloat16"}
    for what, more in (("attention_ms", {}), ("ttft_s", {"layers": 2}), ("attention_map_ms", {"map": False})):
        rows.append(replace(blank, what=what, cell=bench | more, realised_density=None))
        sparse = bench | more | {"impl": "triton", "block_q": 64, "block_k": 64, "share": "head", "mask_heads": 4}
        told = {"method": "random", "kind": "static", "name": "random"} if what == "attention_ms" else gates
        rows.append(replace(blank, what=what, cell=sparse, density=0.1, realised_density=0.1, **told))
    rows.append(
        replace(blank, what="failure", value=None, samples={"error": ["out of memory"]}, cell={"task": "recall"})
    )
    return rows


def earlier(record: Result) -> str:
    """The line that version 0.1 wrote of a result."""
    values = asdict(record)
    kind, name, settings = (values.pop(field) for field in ("kind", "name", "settings"))
    values |= {"selector": "gate" if kind == "learned" else name, "gates": name if kind == "learned" else None}
    values["policy"] = {"knob" if key == "setting" else key: of for key, of in settings.items()} or None
    del values["method"]
    return json.dumps({key: values[key] for key in EARLIER_FIELDS}) + "\n"


@pytest.fixture(scope="session", autouse=True)
def no_harness() -> Iterator[None]:
    """Every name that is no task of ours is sought in lm-evaluation-harness, whose folders take 17 s to read."""

    def unknown(name: str, metadata: dict) -> NoReturn:
        raise ValueError(f"task must be one of this package, got {name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness_tasks, "_manager", unknown)
        yield


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    folder.mkdir()
    write_models_and_gates(folder)
    (folder / "gates-of-model").rename(folder / "gates")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    rule = {"pattern": "vertical_slash", "columns": 100, "offsets": 800}
    HeadRules("minference", SIZES, [[rule] * 4] * 2, {"variant": "paper", "found": {"density": 0.5}}).save(
        folder / "plan.json"
    )
    official = [{str(head): ["vertical_and_slash", 100, 800, 0.5] for head in range(4)}] * 2
    (folder / "official.json").write_text(json.dumps(official))
    with ResultsFile(folder / "r.jsonl").together() as cell:
        for row in records():
            cell.append(row)
    (folder / "earlier.jsonl").write_text("".join(map(earlier, records())))
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
