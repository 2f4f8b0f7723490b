"""A method is one file: written into the folder of methods it is known everywhere, and nothing else is told of it."""

import json
import sys

import pytest
from tiny_corpus import write_documents, write_model

from seerattn import methods as package
from seerattn.cli import main
from seerattn.eval.experiment import Experiment
from seerattn.methods import kind_of_method, methods
from seerattn.results.file import read_results

CODE = '''
"""Every other block, as a user would write it."""

from dataclasses import dataclass

import torch

from seerattn.methods.method import TopKMethod
from seerattn.options import option
from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.selector import PolicySelector


@dataclass(frozen=True)
class EveryOther(PolicySelector):
    policy: object
    step: int
    block_q: int
    block_k: int

    def select(self, q, k, context):
        start, columns = k.shape[2] - q.shape[2], -(-k.shape[2] // self.block_k)
        rows = num_query_blocks(start, q.shape[2], self.block_q)
        scores = -(torch.arange(columns) % self.step).float().expand(len(q), k.shape[1], rows, columns)
        return self.policy.select(
            scores, q_start=start, q_len=q.shape[2], block_q=self.block_q, block_k=self.block_k, layer=context.layer
        )


@dataclass(frozen=True, kw_only=True)
class Combs(TopKMethod):
    id = "combs"
    title = "Combs"
    kind = "static"

    step: int = option(2, help="Every so manieth block goes first.", low=1)

    def selector(self, policy):
        return EveryOther(policy, self.step, self.block_q, self.block_k)
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The file in a folder that belongs to the package of methods; afterwards nothing knows of it."""
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "combs.py").write_text(CODE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    methods.cache_clear()
    yield folder
    monkeypatch.undo()
    methods.cache_clear()
    # Its import left it there as a part of the package.
    vars(package).pop("combs", None)
    sys.modules.pop("seerattn.methods.combs", None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_documents(folder / "docs.jsonl", 450, 500)
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--device", "cpu"])
    return stop.value.code


def test_a_method_in_a_file_of_its_own_is_in_experiments_records_and_commands(added, place, tmp_path, capsys) -> None:
    assert methods()["combs"].title == "Combs" and list(methods()).index("combs") > list(methods()).index("a_shape")
    named = {"method": "combs", "name": "wide combs", "step": 3, "block_q": 16, "block_k": 16}
    experiment = Experiment(
        model=str(place / "model"), data=str(place / "docs.jsonl"), contexts=400, densities=0.5,
        methods=("combs,block_q=16,block_k=16", named),
    )  # fmt: skip
    assert [type(method).id for method in experiment.methods] == ["combs", "combs"]
    path, output = tmp_path / "experiment.json", tmp_path / "r.jsonl"
    options = {"model": experiment.model, "data": experiment.data, "contexts": 400, "densities": 0.5}
    path.write_text(json.dumps(options | {"methods": ["dense", "combs,block_q=16,block_k=16", named]}))
    assert run("eval", "--config", str(path), "--output", str(output)) == 0
    rows = [row for row in read_results([output]) if row.what == "perplexity" and row.kind != "dense"]
    assert [(row.method, row.kind, row.name, row.line) for row in rows] == [
        ("combs", "static", "combs", "combs 16"),
        ("combs", "static", "wide combs", "wide combs 16"),
    ]
    for row, step in zip(rows, (2, 3)):
        assert row.settings == {"step": step, "sink_blocks": 1, "last_rows_dense": 0, "setting": 0.5}
        assert row.density == 0.5 and abs(row.realised_density - 0.5) < 0.03
    assert rows[0].value != rows[1].value
    assert "combs 16" in capsys.readouterr().out
    assert run("eval", "--config", str(path), "--output", str(output), "--dry-run", "--only", "wide combs") == 0
    assert "wide combs" in capsys.readouterr().out


def test_its_options_are_refused_as_those_of_others_are(added) -> None:
    for value in ("magic=1", "step=0", "step=wide"):
        with pytest.raises(ValueError, match=value.partition("=")[0]):
            Experiment(model="m", methods=f"combs,{value}")


def test_without_its_file_it_is_unknown() -> None:
    assert "combs" not in methods()
    with pytest.raises(ValueError, match="combs"):
        kind_of_method("combs")
