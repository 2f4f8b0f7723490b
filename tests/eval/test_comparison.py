import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_corpus import tiny_tokenizer, topical_text, write_documents
from tiny_models import tiny_model

from seerattn.eval import compare, perplexity
from seerattn.eval.arms import Arm, EvalModel, Gates, TunedArm
from seerattn.eval.compare import Comparison, Outcome, gates_of, make_cells, make_jobs
from seerattn.eval.recipe import ModelEntry, Recipe, SelectorEntry, TaskEntry
from seerattn.methods.family import Family
from seerattn.methods.streaming import streaming_family
from seerattn.results.appending import Appended, NotWritten
from seerattn.results.file import ResultsFile, read_results
from seerattn.selection import TopK

MODEL = ModelEntry("tiny", "tiny")
SMALL = {"block_q": 16, "block_k": 16}
CONTEXT = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_documents(tmp_path_factory.mktemp("data") / "docs.jsonl", 450, 500, 550, 600))


@pytest.fixture(scope="module")
def entries(gate_folders) -> dict[str, SelectorEntry]:
    gates = {"": gate_folders[1].path}
    return {
        "dense": SelectorEntry("dense", "dense"),
        "streaming": SelectorEntry("streaming", "streaming", SMALL),
        "oracle": SelectorEntry("oracle", "oracle", SMALL),
        "x": SelectorEntry("xattention", "x", {"block": 32, "stride": 8}),
        "flex": SelectorEntry("flexprefill", "flex", {"block": 32}),
        "slash": SelectorEntry("vertical_slash", "slash", SMALL),
        "gate": SelectorEntry("gate", "gate", {}, gates),
        "heads": SelectorEntry("gate", "heads", {"policy": "head_thresholds"}, gates),
    }


@pytest.fixture(scope="module")
def subject(gate_folders) -> EvalModel:
    # Named as `gates_of` names folders.
    folders = [Gates(folder.path.name, folder.path) for folder in gate_folders]
    return EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny", gates=folders)


def recipe_of(data: str, *selectors: SelectorEntry, **options) -> Recipe:
    tasks = options.pop("tasks", (TaskEntry("perplexity", "t", (data,), (CONTEXT,)),))
    values = {"densities": (0.5,), "tuning_windows": 2, "batch": 2, "calibration": (data,)} | options
    return Recipe((MODEL,), selectors, tasks, **values)


def run(subject: EvalModel, recipe: Recipe, output: ResultsFile) -> list[Outcome]:
    jobs = make_jobs(recipe, subject.tokenizer)
    comparison = Comparison(subject, MODEL, recipe, jobs, output)
    outcomes = list(comparison.run())
    assert [o.cell for o in outcomes] == comparison.cells
    return outcomes


def only(rows: Sequence, what: str):
    (row,) = [row for row in rows if row.what == what]
    return row


def test_all_families_realise_one_density_and_are_dense_where_all_is_asked_for(subject, entries, data) -> None:
    recipe = recipe_of(data, *entries.values(), densities=(1.0, 0.5), tuning_windows=4)
    outcomes = run(subject, recipe, ResultsFile(None))
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
    noted = {o.cell.entry.name: o.note for o in outcomes if o.note}
    assert noted == {
        name: f"density 0.5 cannot be reached by {name} at 400 tokens: the nearest is {nearest:.3f}"
        for name, nearest in {"gate": 13 / 28, "streaming": 154 / 325, "oracle": 154 / 325}.items()
    }


def test_rows_say_what_they_are(subject, entries, data, tmp_path) -> None:
    recipe = recipe_of(data, entries["x"], entries["gate"], last_rows_dense=(0, 2))
    run(subject, recipe, ResultsFile(tmp_path / "r.jsonl"))
    rows = read_results([tmp_path / "r.jsonl"])
    knobs = {row.gates or row.selector: row for row in rows if row.what == "knob"}
    assert set(knobs) == {"x", "gate"} and all(row.n == 2 for row in knobs.values())
    measured = [row for row in rows if row.what == "perplexity" and row.selector != "dense"]
    assert [(r.selector, r.gates, r.arm) for r in measured] == [("x", None, "x 32")] * 2 + [
        ("gate", "gate", "gate")
    ] * 2
    for row in measured:
        assert row.policy["knob"] == knobs[row.gates or row.selector].value
        assert row.policy["last_rows_dense"] in (0, 2)
    settings = [{k: v for k, v in row.policy.items() if k not in ("knob", "last_rows_dense")} for row in measured]
    assert settings == [{"stride": 8}] * 2 + [{"policy": "top_k"}] * 2
    times = [row for row in rows if row.what == "attention_ms"]
    assert len(times) == 1 + len(measured)
    for row in times:
        index, attention = row.samples["index"], row.samples["attention"]
        assert len(index) == len(attention) == row.n == 2
        totals = [a + b for a, b in zip(index, attention)]
        assert row.value == pytest.approx(sum(totals) / 2) and min(attention) > 0
        assert (max(index) == 0) == (row.selector == "dense")


def test_dense_last_rows_come_on_top_and_equal_those_of_the_policy(subject, entries, data) -> None:
    recipe = recipe_of(data, entries["streaming"], last_rows_dense=(0, 2), densities=(0.3,))
    plain, dense_rows = run(subject, recipe, ResultsFile(None))
    for outcome, rows in ((plain, 0), (dense_rows, 2)):
        arm = Arm("streaming", TopK(density=0.3, last_rows_dense=rows), None, 16, 16)
        cut = {CONTEXT: make_jobs(recipe, subject.tokenizer)[0].windows}
        own = perplexity.evaluate_perplexity(subject, [arm], cut, ResultsFile(None), text="t", settings={}, batch=2)
        row = only(outcome.rows, "perplexity")
        assert row.samples["losses"] == own[1].samples["losses"]
        assert row.realised_density == own[1].realised_density


def test_an_interrupted_comparison_measures_nothing_twice(subject, entries, data, tmp_path, monkeypatch) -> None:
    tasks = (
        TaskEntry("perplexity", "t", (data,), (CONTEXT,)),
        TaskEntry("recall", "t", (data,), (CONTEXT,)),
        TaskEntry("passkey", "t", (data,), (CONTEXT,), n=2, depths=(0.2, 0.8)),
        TaskEntry("key_value", "t", (data,), (CONTEXT,), n=1, depths=(0.5,), options={"pairs": 2}),
    )
    selectors = (entries["dense"], entries["streaming"], entries["x"])
    recipe = recipe_of(data, *selectors, tasks=tasks, last_rows_dense=(0, 1))
    path = tmp_path / "r.jsonl"
    jobs = make_jobs(recipe, subject.tokenizer)
    comparison = Comparison(subject, MODEL, recipe, jobs, ResultsFile(path))
    running = comparison.run()
    for _ in range(4):
        next(running)
    running.close()
    before = path.read_text()
    outcomes = run(subject, recipe, ResultsFile(path))
    after = path.read_text()
    assert after.startswith(before) and not any(o.failure for o in outcomes)
    rows = read_results([path])
    assert len({row.key for row in rows}) == len(rows)
    assert {row.what for row in rows} == {
        "perplexity", "perplexity_difference", "attention_ms", "knob", "accuracy", "answer_log_prob",
        "target_recall", "mass_recall",
    }  # fmt: skip

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(type(subject.model.base_model), "forward", refuse)
    monkeypatch.setattr(EvalModel, "held", lambda self: nullcontext())
    again = run(subject, recipe, ResultsFile(path))
    assert path.read_text() == after
    assert [[r.key for r in o.rows] for o in again] == [[r.key for r in o.rows] for o in outcomes]


def test_tasks_share_a_knob_only_on_the_same_text(subject, entries, data, tmp_path) -> None:
    tasks = (
        TaskEntry("recall", "t", (data,), (CONTEXT,)),
        TaskEntry("perplexity", "t", (data,), (CONTEXT,)),
        TaskEntry("passkey", "t", (data,), (CONTEXT,), n=2, depths=(0.5,)),
    )
    outcomes = run(subject, recipe_of(data, entries["x"], tasks=tasks), ResultsFile(tmp_path / "r.jsonl"))
    assert [o.cell.job.task.task for o in outcomes] == ["perplexity", "passkey", "recall"]
    rows = read_results([tmp_path / "r.jsonl"])
    assert sum(row.what == "knob" for row in rows) == 2
    knobs = {row.what: row.policy["knob"] for row in rows if "knob" in (row.policy or {})}
    assert knobs["perplexity"] == knobs["target_recall"] != knobs["accuracy"]


def test_a_cell_that_comes_out_elsewhere_is_tuned_on_all_of_its_text(subject, entries, data, monkeypatch) -> None:
    real, counts = compare.realised_density, []

    def misled(subject, selector_at, groups):
        count = sum(map(len, groups))
        counts.append(count)
        # On one sequence alone the density looks a fifth too low.
        return real(subject, selector_at, groups) * (0.8 if count == 1 else 1.0)

    monkeypatch.setattr(compare, "realised_density", misled)
    output = ResultsFile(None)
    (outcome,) = run(subject, recipe_of(data, entries["slash"], tuning_windows=1), output)
    row = only(outcome.rows, "perplexity")
    assert set(counts) == {1, 4} and row.realised_density == pytest.approx(0.5, abs=0.01)
    written = [r for r in output._by_key.values() if r.selector == "slash"]
    assert [r.what for r in written].count("perplexity") == 1 and [r.n for r in written if r.what == "knob"] == [1, 4]
    counts.clear()
    (again,) = run(subject, recipe_of(data, entries["slash"], tuning_windows=1), output)
    assert not counts and only(again.rows, "perplexity") == row


def broken_family(fails: int) -> Family:
    family = streaming_family(**SMALL)

    def at(knob: float):
        if knob < 0.4 and fails:
            raise torch.OutOfMemoryError("no memory\nfor this")
        return family.at(knob)

    return replace(family, name="broken", at=at)


def test_a_cell_that_fails_is_a_row_and_is_tried_again(subject, entries, data, tmp_path, monkeypatch) -> None:
    tasks = (TaskEntry("perplexity", "t", (data,), (CONTEXT,)), TaskEntry("recall", "t", (data,), (CONTEXT,)))
    broken = SelectorEntry("streaming", "broken", SMALL)
    recipe = recipe_of(data, broken, entries["oracle"], densities=(0.5, 0.3), tasks=tasks)
    path, real = tmp_path / "r.jsonl", compare.make_family
    fails = [1]
    patched = lambda kind, **given: broken_family(fails[0]) if given["name"] == "broken" else real(kind, **given)  # noqa: E731
    monkeypatch.setattr(compare, "make_family", patched)
    outcomes = run(subject, recipe, ResultsFile(path))
    failed = [o for o in outcomes if o.failure]
    assert [(o.cell.entry.name, o.cell.asked, o.cell.job.task.task) for o in failed] == [
        ("broken", 0.3, "perplexity"),
        ("broken", 0.3, "recall"),
    ]
    assert all(o.failure == "OutOfMemoryError: no memory for this" and not o.rows for o in failed)
    rows = [row for row in read_results([path]) if row.what == "failure"]
    assert [(r.selector, r.density, r.value, r.samples, r.cell["task"]) for r in rows] == [
        ("broken", 0.3, None, {"error": [failed[0].failure]}, task) for task in ("perplexity", "recall")
    ]
    before = path.read_text()
    run(subject, recipe, ResultsFile(path))
    assert path.read_text() == before
    fails[0] = 0
    assert not any(o.failure for o in run(subject, recipe, ResultsFile(path)))


def test_equal_time_tunes_to_a_share_of_the_dense_time(subject, entries, data, monkeypatch) -> None:
    def time(self, arm, groups) -> float:
        """Dense takes 8 ms; choosing blocks takes 1 ms, and attention 7 by density."""
        if not isinstance(arm, TunedArm):
            return 8.0
        return 1.0 + 7.0 * compare.realised_density(subject, arm.selector_at, groups)

    monkeypatch.setattr(Comparison, "_time", time)
    output = ResultsFile(None)
    recipe = recipe_of(data, entries["slash"], densities=(), times=(0.7, 0.1))
    reached, missed = run(subject, recipe, output)
    row = only(reached.rows, "perplexity")
    assert row.density is None and (row.cell["budget"], row.cell["share"]) == ("time", 0.7)
    # .7 x 8 ms are 1 ms and 4.6 / 7 of the blocks, within 5 % of the time.
    assert reached.note is None and row.realised_density == pytest.approx(4.6 / 7, abs=0.05 * 5.6 / 7 + 0.01)
    assert missed.note.startswith("0.1 of the time of dense attention (8 ms a sequence) cannot be reached by slash")
    knobs = [r for r in output._by_key.values() if r.what == "knob"]
    assert [k.samples["dense_ms"] for k in knobs] == [[8.0]] * 2 and knobs[1].cell["note"] == missed.note


def test_jobs_cut_to_a_limit_and_cells_leave_recall_without_dense_rows(subject, entries, data) -> None:
    tasks = (
        TaskEntry("perplexity", "t", (data,), (200, CONTEXT), windows=2),
        TaskEntry("recall", "t", (data,), (CONTEXT,)),
        TaskEntry("passkey", "t", (data,), (CONTEXT,), n=5, depths=(0.2, 0.8)),
        TaskEntry("variable_tracking", "t", (data,), (CONTEXT,), n=5, depths=(0.2, 0.8), options={"hops": 1}),
    )
    recipe = recipe_of(data, entries["dense"], entries["x"], tasks=tasks, last_rows_dense=(0, 2))
    whole, cut = make_jobs(recipe, subject.tokenizer), make_jobs(recipe, subject.tokenizer, limit=1)
    assert [len(job.inputs) for job in whole] == [8, 4, 10, 10, 4]
    assert [len(job.inputs) for job in cut] == [2, 1, 2, 1, 1]
    assert all(len(ids) == job.context for job in whole for ids in job.inputs)
    per_job = [sum(cell.job is job for cell in make_cells(recipe, whole)) for job in whole]
    assert per_job == [3, 3, 3, 3, 1]


def test_the_same_folder_of_gates_is_loaded_once(entries, data) -> None:
    recipe = recipe_of(data, entries["gate"], entries["heads"])
    assert [gates.name for gates in gates_of(recipe, MODEL)] == ["best"]


def test_arms_held_run_the_untouched_model_bit_for_bit(subject) -> None:
    ids = torch.tensor([tiny_tokenizer()(topical_text(300, 0), add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        before = subject.model(input_ids=ids).logits
        with subject.held():
            with subject.attached(Arm("streaming", TopK(density=0.1))) as run:
                assert not torch.equal(run.model(input_ids=ids).logits, before)
            assert torch.equal(subject.model(input_ids=ids).logits, before)
    assert json.dumps(run.head_density()) and 0 < run.density() < 1


def test_a_comparison_stops_when_its_results_cannot_be_written(subject, entries, data, tmp_path, monkeypatch) -> None:
    """Going on would measure for nothing, and the next start would not miss what was lost."""
    tasks = tuple(TaskEntry(task, "t", (data,), (CONTEXT,)) for task in ("perplexity", "recall"))
    recipe = recipe_of(data, entries["dense"], entries["streaming"], tasks=tasks)
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
            run(subject, recipe, ResultsFile(path))
        written = read_results([path]) if room else []
        assert not any(row.what == "failure" for row in written) and path.exists() == bool(room)
