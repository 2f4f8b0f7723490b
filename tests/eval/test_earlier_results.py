"""An experiment goes on in a file of version 0.1: its records are those of the same cells."""

import json
from dataclasses import asdict
from pathlib import Path

from tiny_corpus import write_documents

from seerattn.eval.experiment import Experiment
from seerattn.eval.run import Runner, make_jobs
from seerattn.eval.tasks.map_recall import MapRecall
from seerattn.eval.tasks.perplexity import Perplexity
from seerattn.eval.tasks.retrieval import KeyValue
from seerattn.eval.tasks.task import Setup
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.dense import Dense
from seerattn.methods.gate import Gate
from seerattn.methods.mean_pooled import MeanPooled
from seerattn.methods.oracle import Oracle
from seerattn.methods.random import Random
from seerattn.methods.vertical_slash import VerticalSlash
from seerattn.methods.xattention import XAttention
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.record import Result

SMALL = {"block_q": 16, "block_k": 16}
# The fields of 0.1 in its order, as far as they are told below.
ORDER = ["what", "value", "n", "unit", "model", "selector", "context", "text", "stderr", "gates", "weights", "policy"]


def earlier(record: Result) -> str:
    """The line that 0.1 wrote for the same cell: 390 of them, of 15 methods in four tasks, were so."""
    values = asdict(record)
    method, kind, name = (values.pop(field) for field in ("method", "kind", "name"))
    settings = values.pop("settings")
    if "setting" in settings:
        settings["knob"] = settings.pop("setting")
    values["selector"] = "gate" if kind == "learned" else "pooled" if name == "mean_pooled" else name
    values["gates"] = name if kind == "learned" else None
    values["policy"] = None if method == "dense" else settings
    if values["what"] == "setting":
        values["what"] = "knob"
        values["samples"]["knobs"] = values["samples"].pop("settings")
    return json.dumps({field: values.pop(field) for field in ORDER} | values) + "\n"


def run(model: EvalModel, experiment: Experiment, path: Path) -> list[list[str]]:
    jobs = make_jobs(experiment, Setup(model.tokenizer, experiment.contexts))
    outcomes = list(Runner(model, experiment, jobs, ResultsFile(path)).run())
    assert not any(outcome.failure for outcome in outcomes)
    return [[row.key for row in outcome.rows] for outcome in outcomes]


def test_an_experiment_measures_nothing_again_that_0_1_has_measured(model, gate_folders, tmp_path, monkeypatch) -> None:
    gates = gate_folders[1]
    data = str(write_documents(tmp_path / "docs.jsonl", 350, 400))
    experiment = Experiment(
        model="tiny",
        methods=(
            Dense(), Oracle(target="sum:2"), MeanPooled(**SMALL), Random(seed=3, **SMALL),
            XAttention(name="x", block=32, stride=8), VerticalSlash(name="slash", **SMALL),
            Gate(gates=gates, name="mine"), Gate(gates=gates, name="shared", policy="top_p"),
            Gate(gates=gates, name="heads", policy="head_thresholds", calibration=(data,)),
        ),
        tasks=(Perplexity(), KeyValue(n=1, depths=(0.5,), pairs=2), MapRecall()),
        data=data, contexts=300, densities=0.6, last_rows_dense=(0, 2), tuning_windows=1,
    )  # fmt: skip
    now, before = tmp_path / "now.jsonl", tmp_path / "earlier.jsonl"
    cells = run(model, experiment, now)
    records = read_results([now])
    before.write_text("".join(map(earlier, records)))
    assert {json.loads(line)["selector"] for line in before.read_text().splitlines()} == {
        "dense", "oracle sum:2", "pooled", "random", "x", "slash", "gate"
    }  # fmt: skip
    assert read_results([before]) == records and [r.key for r in read_results([before])] == [r.key for r in records]

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is left to run")

    content = before.read_bytes()
    for place in ("run.Runner._tune", "tasks.perplexity.document_losses", "tasks.retrieval.answers"):
        monkeypatch.setattr(f"seerattn.eval.{place}", refuse)
    monkeypatch.setattr("seerattn.eval.tasks.map_recall.RecallMeter.see", refuse)
    assert run(model, experiment, before) == cells
    assert before.read_bytes() == content
