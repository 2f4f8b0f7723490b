"""Experiments: the same one from Python, YAML and flags, what is kept of one, and what none can be."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_corpus import write_models_and_gates
from tiny_models import tiny_model

from seerattn.cli import main
from seerattn.eval.experiment import Experiment
from seerattn.eval.tasks.harness import HarnessTask
from seerattn.eval.tasks.map_recall import MapRecall
from seerattn.eval.tasks.perplexity import Perplexity
from seerattn.eval.tasks.retrieval import PassKey, VariableTracking
from seerattn.methods.dense import Dense
from seerattn.methods.gate import Gate
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.minference import MInference
from seerattn.methods.oracle import Oracle
from seerattn.methods.streaming import Streaming
from seerattn.methods.xattention import XAttention

RULE = {"pattern": "vertical_slash", "columns": 100, "offsets": 800}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, gates, documents and a plan."""
    folder = tmp_path_factory.mktemp("experiments")
    write_models_and_gates(folder)
    sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
    HeadRules("minference", sizes, [[RULE] * 4] * 2, {}).save(folder / "plan.json")
    return folder


def from_python(folder: Path) -> Experiment:
    return Experiment(
        model=str(folder / "model"),
        methods=(
            Dense(),
            Gate(gates=folder / "gates-of-model", name="mine"),
            Oracle(target="sum:2", block_q=16, block_k=16),
            Streaming(name="recent", sink_blocks=2),
            Gate(gates=folder / "gates-of-model", name="shared", policy="top_p"),
            MInference(plan=folder / "plan.json"),
        ),
        tasks=(
            Perplexity(windows=2, timed=False),
            PassKey(n=3, depths=(0.2, 0.8), contexts=(256,)),
            VariableTracking(hops=3, chains=1, max_docs=1),
            HarnessTask(name="ruler_fwe", data_dir=folder),
        ),
        data=(str(folder / "docs.jsonl"),),
        text="words",
        densities=(0.6, 0.5),
        times=(0.25,),
        contexts=(300, 400),
        max_docs=2,
        last_rows_dense=(2, 0),
        batch=2,
        tuning_windows=1,
        name="tiny",
    )


# Places are relative to the folder of the file.
FILE = """
model: model
gates: mine=gates-of-model
methods:
  - dense
  - "oracle,target=sum:2,block_q=16,block_k=16"
  - {method: streaming, name: recent, sink_blocks: 2}
  - {method: gate, name: shared, gates: gates-of-model, policy: top_p}
  - {method: minference, plan: plan.json}
tasks:
  - {task: perplexity, windows: 2, timed: false}
  - passkey,n=3,depths=0.2 0.8,contexts=256
  - {task: variable_tracking, hops: 3, chains: 1, max_docs: 1}
  - {task: ruler_fwe, data_dir: .}
data: docs.jsonl
text: words
densities: [0.6, 0.5]
times: 0.25
contexts: [300, 400]
max-docs: 2
last_rows_dense: [0, 2]
batch: 2
tuning_windows: 1
name: tiny
"""
FLAGS = [
    *("--model", "@model", "--gates", "mine=@gates-of-model", "--data", "@docs.jsonl", "--text", "words"),
    *(
        "--methods",
        "dense,oracle,target=sum:2,block_q=16,block-k=16",
        "--methods",
        "streaming,name=recent,sink_blocks=2",
    ),
    *("--methods", "gate,name=shared,gates=@gates-of-model,policy=top_p,minference,plan=@plan.json"),
    *("--tasks", "perplexity,windows=2,timed=no,passkey,n=3,depths=0.2 0.8,contexts=256"),
    *("--tasks", "variable_tracking,hops=3,chains=1,max_docs=1", "--tasks", "ruler_fwe,data_dir=@"),
    *("--densities", "0.6,0.5", "--times", "0.25", "--contexts", "300,400", "--max-docs", "2", "--batch", "2"),
    *("--set", "last_rows_dense=0,2", "--set", "tuning_windows=1", "--set", "name=tiny"),
]


class Built(Exception):
    """An experiment has been built from flags."""


def from_flags(folder: Path, flags: list[str], monkeypatch) -> Experiment:
    def keep(self: Experiment, names) -> Experiment:
        raise Built(self)

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "keep", keep)
        with pytest.raises(Built) as built:
            main(["eval", *(flag.replace("@", f"{folder}/") for flag in flags)])
    return built.value.args[0]


def test_one_experiment_is_equal_from_python_yaml_and_flags(folder, monkeypatch) -> None:
    path = folder / "experiment.yaml"
    path.write_text(FILE)
    expected = from_python(folder)
    assert Experiment.from_file(path) == expected
    assert from_flags(folder, FLAGS, monkeypatch) == expected
    assert from_flags(folder, ["--config", str(path)], monkeypatch) == expected
    # And another one is not.
    for change in ({"densities": 0.5}, {"methods": expected.methods[:-1]}, {"batch": 1}, {"times": (0.25, 0.5)}):
        assert replace(expected, **change) != expected
    assert Experiment.from_file(path, batch=1) == replace(expected, batch=1)
    assert from_flags(folder, ["--config", str(path), "--batch", "1"], monkeypatch) == replace(expected, batch=1)


def test_an_experiment_of_a_model_alone_has_the_usual_methods_and_tasks(folder) -> None:
    plain = Experiment(model="m")
    assert plain.methods == (Dense(), Oracle(), Streaming()) and plain.tasks == (Perplexity(),)
    assert (plain.densities, plain.times, plain.contexts) == ((0.2, 0.1), (), (4096,))
    assert Experiment(model="m", times=0.5).densities == ()
    gated = Experiment(model="m", gates=(str(folder / "gates-of-model"), f"x={folder / 'gates-of-model'}"))
    assert list(map(str, gated.methods)) == ["dense", "gates-of-model", "x", "oracle", "streaming"]


def test_text_of_an_experiment_is_that_of_tasks_that_name_none(folder) -> None:
    tasks = ("perplexity", {"task": "recall", "data": "own.txt", "max_docs": 3})
    experiment = Experiment(model="m", tasks=tasks, data="all.txt", text="all", max_docs=9)
    assert experiment.tasks == (
        Perplexity(data=("all.txt",), text="all", max_docs=9),
        MapRecall(data=("own.txt",), text="all", max_docs=3),
    )


def test_results_call_a_model_by_its_name_or_else_its_folder(folder) -> None:
    assert Experiment(model=f"{folder}/model/").called == "model"
    assert Experiment(model="org/name").called == "name"
    assert Experiment(model="org/name", name="mine").called == "mine"


def test_what_is_named_is_kept_beside_dense(folder) -> None:
    experiment = from_python(folder)
    assert experiment.keep(()) == experiment
    few = experiment.keep(("recent", "mine"))
    assert list(map(str, few.methods)) == ["dense", "mine", "recent"] and few.tasks == experiment.tasks
    one = experiment.keep(("ruler_fwe", "passkey"))
    assert [task.id for task in one.tasks] == ["passkey", "harness"] and one.methods == experiment.methods
    assert experiment.keep(("oracle sum:2", "perplexity")).tasks == experiment.tasks[:1]
    with pytest.raises(ValueError, match="magic"):
        experiment.keep(("recent", "magic"))


BAD = {
    "no model": ({"model": None}, "model"),
    "method": ({"methods": "magic"}, "magic"),
    "method's option": ({"methods": "oracle,magic=1"}, "magic"),
    "option before a method": ({"methods": "share=kv_group"}, "share"),
    "method without a name": ({"methods": ({"share": "kv_group"},)}, "method"),
    "number for a method": ({"methods": (3,)}, "method"),
    "same names": ({"methods": ("oracle", "oracle,share=kv_group")}, "oracle"),
    "gates that are none": ({"gates": "./none"}, "gates"),
    "gates of a method that are none": ({"methods": "gate"}, "gates"),
    "task's option": ({"tasks": "recall,n=3"}, "n"),
    "no task": ({"tasks": ()}, "tasks"),
    "no density": ({"densities": 0.0}, "densities"),
    "density": ({"densities": 1.5}, "densities"),
    "density that is none": ({"densities": float("nan")}, "densities"),
    "word for a density": ({"densities": "few"}, "densities"),
    "time": ({"times": 0}, "times"),
    "context": ({"contexts": 1}, "contexts"),
    "no context": ({"contexts": ()}, "contexts"),
    "no number of dense rows": ({"last_rows_dense": ()}, "last_rows_dense"),
    "batch": ({"batch": 0}, "batch"),
    "endless batch": ({"batch": 10**400}, "batch"),
    "infinite batch": ({"batch": float("inf")}, "batch"),
    "dense rows": ({"last_rows_dense": 0.5}, "last_rows_dense"),
    "tuning windows": ({"tuning_windows": 0}, "tuning_windows"),
    "truth for a number": ({"batch": True}, "batch"),
    "depths": ({"tasks": "passkey,depths=1.5"}, "depths"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_experiment_rejects_what_no_experiment_can_be(name: str) -> None:
    values, named = BAD[name]
    with pytest.raises(ValueError, match=named):
        Experiment(**{"model": "m"} | values)


def test_contexts_texts_gates_and_plans_are_checked_before_a_model_is_loaded(folder, tmp_path) -> None:
    config = tiny_model("llama").config
    good = from_python(folder)
    good.check(config)
    with pytest.raises(ValueError, match="contexts"):
        replace(good, contexts=2000).check(config)
    with pytest.raises(ValueError, match="contexts"):
        replace(good, tasks=(Perplexity(contexts=(2000,)),)).check(config)
    with pytest.raises(ValueError, match="data"):
        replace(good, tasks=(Perplexity(data=("./none.txt",)),)).check(config)
    with pytest.raises(ValueError, match="gates"):
        replace(good, methods=(Gate(gates=folder / "gates-of-other"),)).check(config)
    with pytest.raises(ValueError, match="plan"):
        replace(good, methods=(XAttention(plan=folder / "plan.json"),)).check(config)
    with pytest.raises(OSError, match="none"):
        replace(good, methods=(MInference(plan=tmp_path / "none.json"),)).check(config)
