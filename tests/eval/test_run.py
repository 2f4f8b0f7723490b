"""Carrying out experiments: equal densities and times, resumption, failures."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from tiny_corpus import tiny_tokenizer, topical_text, write_documents
from tiny_models import tiny_model

from seerattn.eval import run as running
from seerattn.eval.choice import Choice, at_density
from seerattn.eval.experiment import Experiment
from seerattn.eval.run import Outcome, Runner, make_cells, make_jobs
from seerattn.eval.tasks.map_recall import MapRecall
from seerattn.eval.tasks.perplexity import Perplexity
from seerattn.eval.tasks.retrieval import KeyValue, PassKey, VariableTracking
from seerattn.eval.tasks.task import Job, Setup
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.dense import Dense
from seerattn.methods.flexprefill import FlexPrefill
from seerattn.methods.gate import Gate
from seerattn.methods.method import Method, Selectors
from seerattn.methods.oracle import Oracle
from seerattn.methods.streaming import Streaming, StreamingSelector
from seerattn.methods.vertical_slash import VerticalSlash
from seerattn.methods.xattention import XAttention
from seerattn.results.appending import Appended, NotWritten
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result
from seerattn.selection import TopK

SMALL = {"block_q": 16, "block_k": 16}
CONTEXT = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_documents(tmp_path_factory.mktemp("data") / "docs.jsonl", 450, 500, 550, 600))


@pytest.fixture(scope="module")
def known(gate_folders, data) -> dict[str, Method]:
    """Methods by name."""
    gates = gate_folders[1]
    found = [
        Dense(),
        Streaming(**SMALL),
        Oracle(**SMALL),
        XAttention(name="x", block=32, stride=8),
        FlexPrefill(name="flex", block=32),
        VerticalSlash(name="slash", **SMALL),
        Gate(gates=gates, name="gate"),
        Gate(gates=gates, name="heads", policy="head_thresholds", calibration=(data,)),
    ]
    return {str(method): method for method in found}


def experiment_of(data: str, *methods: Method, **options) -> Experiment:
    common = {"tasks": (Perplexity(),), "contexts": CONTEXT, "densities": 0.5, "tuning_windows": 2, "batch": 2}
    return Experiment(model="tiny", methods=methods, data=data, text="t", **common | options)


def jobs_of(model: EvalModel, experiment: Experiment, limit: int = 0) -> list[Job]:
    return make_jobs(experiment, Setup(model.tokenizer, experiment.contexts, limit, 1024))


def run(model: EvalModel, experiment: Experiment, output: ResultsFile) -> list[Outcome]:
    runner = Runner(model, experiment, jobs_of(model, experiment), output)
    outcomes = list(runner.run())
    assert [o.cell for o in outcomes] == runner.cells
    return outcomes


def only(rows: Sequence[Result], what: str) -> Result:
    (row,) = [row for row in rows if row.what == what]
    return row


def test_all_methods_realise_one_density_and_are_dense_where_all_is_asked_for(model, known, data) -> None:
    outcomes = run(
        model, experiment_of(data, *known.values(), densities=(1.0, 0.5), tuning_windows=4), ResultsFile(None)
    )
    assert not any(outcome.failure for outcome in outcomes)
    dense = only(outcomes[0].rows, "perplexity")
    for outcome in outcomes[1:]:
        row = only(outcome.rows, "perplexity")
        heads = torch.tensor(row.samples["head_density"])
        assert heads.shape == (2, 4) and float(heads.mean()) == pytest.approx(row.realised_density)
        assert row.density == outcome.cell.asked and row.cell["budget"] == "density"
        if outcome.cell.asked == 1:
            assert row.realised_density == pytest.approx(1, abs=0.003)
            assert row.value == pytest.approx(dense.value, rel=2e-3)
        elif outcome.note is None:
            assert row.realised_density == pytest.approx(0.5, abs=0.01)
            assert abs(row.value / dense.value - 1) > 1e-4
    # 400 tokens are 7 blocks of 64 and 25 of 16, in a triangle of 28 and 325: of these top-k comes nearest with 2 and 7
    # a row, as the causal rows allow. Whoever chooses by content is at .5.
    nearest = {"gate": 13 / 28, "streaming": 154 / 325, "oracle": 154 / 325}
    noted = {str(o.cell.method): o.note for o in outcomes if o.note}
    assert noted.keys() == nearest.keys()
    assert all(noted[name].endswith(f"{value:.3f}") for name, value in nearest.items())


def test_rows_say_what_they_are(model, known, data, tmp_path) -> None:
    experiment = experiment_of(data, known["x"], known["gate"], last_rows_dense=(0, 2))
    run(model, experiment, ResultsFile(tmp_path / "r.jsonl"))
    rows = read_results([tmp_path / "r.jsonl"])
    tuned = {row.name: row for row in rows if row.what == "setting"}
    assert set(tuned) == {"x", "gate"} and all(row.n == 2 for row in tuned.values())
    measured = [row for row in rows if row.what == "perplexity" and row.kind != "dense"]
    assert [(r.method, r.kind, r.name, r.line) for r in measured] == [
        ("xattention", "training-free", "x", "x 32")
    ] * 2 + [("gate", "learned", "gate", "gate")] * 2
    for row in measured:
        assert row.settings["setting"] == tuned[row.name].value
        assert row.settings["last_rows_dense"] in (0, 2)
        assert (row.cell["block_q"], row.cell["block_k"]) == ((32, 32) if row.name == "x" else (64, 64))
    settings = [{k: v for k, v in row.settings.items() if k not in ("setting", "last_rows_dense")} for row in measured]
    assert settings == [{"stride": 8}] * 2 + [{"policy": "top_k"}] * 2
    times = [row for row in rows if row.what == "attention_ms"]
    assert len(times) == 1 + len(measured)
    for row in times:
        index, attention = row.samples["index"], row.samples["attention"]
        assert len(index) == len(attention) == row.n == 2
        totals = [a + b for a, b in zip(index, attention)]
        assert row.value == pytest.approx(sum(totals) / 2) and min(attention) > 0
        assert (max(index) == 0) == (row.kind == "dense")


def test_dense_last_rows_come_on_top_and_equal_those_of_the_policy(model, known, data) -> None:
    experiment = experiment_of(data, known["streaming"], last_rows_dense=(0, 2), densities=0.3)
    plain, dense_rows = run(model, experiment, ResultsFile(None))
    (job,) = jobs_of(model, experiment)
    for outcome, rows in ((plain, 0), (dense_rows, 2)):
        selector = StreamingSelector(TopK(density=0.3, last_rows_dense=rows), 16, 16)
        selectors = Selectors(lambda setting, selector=selector: lambda layer: selector, 1.0, 1.0)
        own, _, _ = job.measure(model, [Choice(known["streaming"], selectors, 1.0, 0.3)], ResultsFile(None), batch=2)
        row = only(outcome.rows, "perplexity")
        assert row.samples["losses"] == own.samples["losses"]
        assert row.realised_density == own.realised_density


def test_an_interrupted_experiment_measures_nothing_twice(model, known, data, tmp_path, monkeypatch) -> None:
    tasks = (
        Perplexity(),
        MapRecall(),
        PassKey(n=2, depths=(0.2, 0.8)),
        KeyValue(n=1, depths=(0.5,), pairs=2),
    )
    methods = (known["dense"], known["streaming"], known["x"])
    experiment = experiment_of(data, *methods, tasks=tasks, last_rows_dense=(0, 1))
    path = tmp_path / "r.jsonl"
    begun = Runner(model, experiment, jobs_of(model, experiment), ResultsFile(path)).run()
    for _ in range(4):
        next(begun)
    begun.close()
    before = path.read_text()
    outcomes = run(model, experiment, ResultsFile(path))
    after = path.read_text()
    assert after.startswith(before) and not any(o.failure for o in outcomes)
    rows = read_results([path])
    assert len({row.key for row in rows}) == len(rows)
    assert {row.what for row in rows} == {
        "perplexity", "perplexity_difference", "attention_ms", "setting", "accuracy", "answer_log_prob",
        "target_recall", "mass_recall",
    }  # fmt: skip

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is left to run")

    @contextmanager
    def not_attached(self: EvalModel) -> Iterator[None]:
        yield

    monkeypatch.setattr(type(model.model.base_model), "forward", refuse)
    monkeypatch.setattr(EvalModel, "held", not_attached)
    again = run(model, experiment, ResultsFile(path))
    assert path.read_text() == after
    assert [[r.key for r in o.rows] for o in again] == [[r.key for r in o.rows] for o in outcomes]


def test_tasks_share_a_setting_only_on_the_same_text(model, known, data, tmp_path) -> None:
    tasks = (MapRecall(), Perplexity(), PassKey(n=2, depths=(0.5,)))
    outcomes = run(model, experiment_of(data, known["x"], tasks=tasks), ResultsFile(tmp_path / "r.jsonl"))
    assert [o.cell.job.task for o in outcomes] == ["perplexity", "passkey", "recall"]
    rows = read_results([tmp_path / "r.jsonl"])
    assert sum(row.what == "setting" for row in rows) == 2
    settings = {row.what: row.settings["setting"] for row in rows if "setting" in row.settings}
    assert settings["perplexity"] == settings["target_recall"] != settings["accuracy"]


def test_maps_are_of_the_gates_at_the_lowest_density_and_written_again_where_they_are_gone(
    model, known, data, tmp_path
) -> None:
    path, maps = tmp_path / "r.jsonl", tmp_path / "maps.npz"
    methods = (known["gate"], replace(known["gate"], name="last"), known["streaming"], Streaming(name="wide"))
    task = MapRecall(maps=maps, heads=("1:2", "0:0"))
    experiment = experiment_of(data, *methods, tasks=(task,), densities=(0.7, 0.5, 0.9))
    run(model, experiment, ResultsFile(path))
    found = BlockMaps.load(maps)
    assert (found.gates, found.density, found.heads) == ("last", 0.5, [(1, 2), (0, 0)])
    # Blocks of another size cannot stand beside them.
    assert found.systems == ["gates: gate", "gates: last", "wide"]
    before, content = path.read_bytes(), maps.read_bytes()
    run(model, experiment, ResultsFile(path))
    assert maps.read_bytes() == content
    maps.unlink()
    run(model, experiment, ResultsFile(path))
    assert BlockMaps.load(maps).density == 0.5 and path.read_bytes() == before
    # Heads that do not exist are the failure of gates alone, before anything is measured.
    wrong = replace(experiment, tasks=(replace(experiment.tasks[0], heads=("0:9",), maps=tmp_path / "other.npz"),))
    outcomes = run(model, wrong, ResultsFile(None))
    assert [bool(outcome.failure) for outcome in outcomes] == [True] * 6 + [False] * 6
    assert all("heads" in outcome.failure for outcome in outcomes[:6])


def test_a_cell_that_comes_out_elsewhere_is_tuned_on_all_of_its_text(model, known, data, monkeypatch) -> None:
    real, counts = running.realised_density, []

    def misled(model, selector_at, groups):
        count = sum(map(len, groups))
        counts.append(count)
        # On one sequence alone the density looks a fifth too low.
        return real(model, selector_at, groups) * (0.8 if count == 1 else 1.0)

    monkeypatch.setattr(running, "realised_density", misled)
    output = ResultsFile(None)
    (outcome,) = run(model, experiment_of(data, known["slash"], tuning_windows=1), output)
    row = only(outcome.rows, "perplexity")
    assert set(counts) == {1, 4} and row.realised_density == pytest.approx(0.5, abs=0.01)
    written = [r for r in output._by_key.values() if r.name == "slash"]
    assert [r.what for r in written].count("perplexity") == 1
    assert [r.n for r in written if r.what == "setting"] == [1, 4]
    counts.clear()
    (again,) = run(model, experiment_of(data, known["slash"], tuning_windows=1), output)
    assert not counts and only(again.rows, "perplexity") == row


FAILS = SimpleNamespace(yes=True)


@dataclass(frozen=True, kw_only=True)
class Broken(Streaming):
    """Streaming that runs out of memory where it is to be sparse."""

    id = "broken"
    title = "Broken"
    kind = "static"

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        selectors = super().selectors(model, context=context)

        def at(setting: float):
            if setting < 0.4 and FAILS.yes:
                raise torch.OutOfMemoryError("no memory\nfor this")
            return selectors.at(setting)

        return replace(selectors, at=at)


def test_a_cell_that_fails_is_a_row_and_is_tried_again(model, known, data, tmp_path, monkeypatch) -> None:
    tasks = (Perplexity(), MapRecall())
    experiment = experiment_of(data, Broken(**SMALL), known["oracle"], densities=(0.5, 0.3), tasks=tasks)
    path = tmp_path / "r.jsonl"
    outcomes = run(model, experiment, ResultsFile(path))
    failed = [o for o in outcomes if o.failure]
    assert [(str(o.cell.method), o.cell.asked, o.cell.job.task) for o in failed] == [
        ("broken", 0.3, "perplexity"),
        ("broken", 0.3, "recall"),
    ]
    assert all(o.failure == "OutOfMemoryError: no memory for this" and not o.rows for o in failed)
    rows = [row for row in read_results([path]) if row.what == "failure"]
    assert [(r.method, r.kind, r.name, r.density, r.value, r.samples, r.cell["task"]) for r in rows] == [
        ("broken", "static", "broken", 0.3, None, {"error": [failed[0].failure]}, task)
        for task in ("perplexity", "recall")
    ]
    before = path.read_text()
    run(model, experiment, ResultsFile(path))
    assert path.read_text() == before
    monkeypatch.setattr(FAILS, "yes", False)
    assert not any(o.failure for o in run(model, experiment, ResultsFile(path)))


def test_equal_time_tunes_to_a_share_of_the_dense_time(model, known, data, monkeypatch) -> None:
    def time(self, choice, groups) -> float:
        """Dense takes 8 ms; choosing blocks takes 1 ms, and attention 7 by density."""
        return 8.0 if choice.is_dense else 1.0 + 7.0 * running.realised_density(model, choice.selector_at, groups)

    monkeypatch.setattr(Runner, "_time", time)
    output = ResultsFile(None)
    experiment = experiment_of(data, known["slash"], densities=(), times=(0.7, 0.1))
    reached, missed = run(model, experiment, output)
    row = only(reached.rows, "perplexity")
    assert row.density is None and (row.cell["budget"], row.cell["share"]) == ("time", 0.7)
    # .7 x 8 ms are 1 ms and 4.6 / 7 of the blocks, within 5 % of the time.
    assert reached.note is None and row.realised_density == pytest.approx(4.6 / 7, abs=0.05 * 5.6 / 7 + 0.01)
    assert missed.note.startswith("0.1 of the time") and "8 ms" in missed.note and "slash" in missed.note
    tuned = [r for r in output._by_key.values() if r.what == "setting"]
    assert [r.samples["dense_ms"] for r in tuned] == [[8.0]] * 2 and tuned[1].cell["note"] == missed.note


def test_jobs_cut_to_a_limit_and_cells_leave_recall_without_dense_rows(model, known, data) -> None:
    tasks = (
        Perplexity(contexts=(200, CONTEXT), windows=2),
        MapRecall(),
        PassKey(n=5, depths=(0.2, 0.8)),
        VariableTracking(n=5, depths=(0.2, 0.8), hops=1),
    )
    experiment = experiment_of(data, known["dense"], known["x"], tasks=tasks, last_rows_dense=(0, 2))
    whole, cut = jobs_of(model, experiment), jobs_of(model, experiment, limit=1)
    assert [len(job.sequences) for job in whole] == [8, 4, 10, 10, 4]
    assert [len(job.sequences) for job in cut] == [2, 1, 2, 1, 1]
    assert all(len(ids) == job.context for job in whole for ids in job.sequences)
    per_job = [sum(cell.job is job for cell in make_cells(experiment, whole)) for job in whole]
    assert per_job == [3, 3, 3, 3, 1]


def test_a_saved_policy_is_one_cell_at_its_own_density(gate_folders, data, tmp_path) -> None:
    """Whatever densities are asked for; its record says so and is read again."""
    model = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    folder = gate_folders[0]
    loaded = model.gates(folder)._replace(policy=TopK(density=0.7))
    model._gates[folder] = loaded
    method = Gate(gates=folder, name="own", policy="saved")
    experiment = experiment_of(data, Dense(), method, densities=(0.5, 0.3), times=0.5, last_rows_dense=(0, 2))
    path = tmp_path / "r.jsonl"
    _, own, dense_rows = run(model, experiment, ResultsFile(path))
    row = only(own.rows, "perplexity")
    assert (row.name, row.density, row.cell["budget"]) == ("own", None, "own")
    assert row.settings == TopK(density=0.7).to_dict() | {"last_rows_dense": 0}
    # 3 of 7 blocks in every row.
    assert row.realised_density == pytest.approx((1 + 2 + 5 * 3) / 28)
    assert only(dense_rows.rows, "perplexity").realised_density == pytest.approx((1 + 2 + 3 * 3 + 6 + 7) / 28)
    assert row in read_results([path]) and not any(r.what == "setting" for r in read_results([path]))
    before = path.read_bytes()
    run(model, experiment, ResultsFile(path))
    assert path.read_bytes() == before


def test_the_same_folder_of_gates_is_loaded_once(known, data, monkeypatch) -> None:
    model = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    loaded, load = [], EvalModel._load

    def counted(self, folder):
        loaded.append(folder)
        return load(self, folder)

    monkeypatch.setattr(EvalModel, "_load", counted)
    outcomes = run(model, experiment_of(data, known["gate"], known["heads"]), ResultsFile(None))
    assert loaded == [known["gate"].gates] and not any(o.failure for o in outcomes)


def test_a_held_model_runs_untouched_bit_for_bit(model) -> None:
    ids = torch.tensor([tiny_tokenizer()(topical_text(300, 0), add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        before = model.model(input_ids=ids).logits
        with model.held():
            with at_density(model, Streaming(), 0.1).on(model) as run:
                assert not torch.equal(run.model(input_ids=ids).logits, before)
            assert torch.equal(model.model(input_ids=ids).logits, before)
    assert json.dumps(run.head_density()) and 0 < run.density() < 1


def test_an_experiment_stops_when_its_results_cannot_be_written(model, known, data, tmp_path, monkeypatch) -> None:
    """Going on would measure for nothing, and the next start would not miss what was lost."""
    experiment = experiment_of(data, known["dense"], known["streaming"], tasks=(Perplexity(), MapRecall()))
    for room in range(4):
        pieces, append = [], Appended.append

        def full(self: Appended, piece: bytes, room: int = room, pieces: list = pieces, append=append) -> None:
            """For a moment: what comes after would fit again."""
            pieces.append(piece)
            if len(pieces) == room + 1:
                raise NotWritten("no space left")
            append(self, piece)

        path = tmp_path / f"{room}.jsonl"
        with monkeypatch.context() as patch, pytest.raises(NotWritten, match="no space left"):
            patch.setattr(Appended, "append", full)
            run(model, experiment, ResultsFile(path))
        written = read_results([path]) if room else []
        assert not any(row.what == "failure" for row in written) and path.exists() == bool(room)
