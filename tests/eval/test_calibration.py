"""Gates that are fitted to text: what is saved is what was checked on other text."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model

from seerattn.data.windows import cut_windows
from seerattn.eval.calibration import Text, calibrate_budgets, calibrate_thresholds, split_windows
from seerattn.eval.tasks.map_recall import RecallMeter
from seerattn.hf.config import save_settings
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.gate import Gate, fixed_selectors
from seerattn.results.file import ResultsFile, read_results
from seerattn.selection import HeadBudgets, Threshold, TopK
from seerattn.selection.map_form import PUBLISHED

CONTEXT = 400  # 7 blocks, 28 causal, 13 of them forced


@pytest.fixture
def folder(gate_folders, tmp_path) -> Path:
    """A copy of gates to write into."""
    return Path(shutil.copytree(gate_folders[0], tmp_path / "gates"))


@pytest.fixture
def text(documents) -> Text:
    windows = cut_windows(documents, context=CONTEXT, count=1, bos_token_id=1)
    return Text(windows, CONTEXT, "t", {"data": "0a1b"})


def fresh() -> EvalModel:
    return EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")


def measure(model, selectors, windows, target=PUBLISHED) -> RecallMeter:
    meter = RecallMeter({"gate": selectors.at(1.0)}, target=target)
    model.observe(windows, meter.see)
    return meter


def check_only_this_changed(folder: Path, before: dict[str, bytes], name: str) -> None:
    """The config holds another value of that name, and everything else is as it was."""
    old, new = json.loads(before["adapter_config.json"]), json.loads((folder / "adapter_config.json").read_text())
    assert old.pop(name) != new.pop(name) and old == new
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["adapter_config.json"]


def test_every_second_document_calibrates_and_the_others_check(text) -> None:
    fitting, checking = split_windows(text.windows)
    assert ([w.document for w in fitting], [w.document for w in checking]) == ([0, 2], [1, 3])
    with pytest.raises(ValueError, match="data"):
        split_windows(text.windows[:1])


def test_saved_thresholds_are_checked_on_other_text_and_load_with_the_gates(folder, text, tmp_path) -> None:
    before, output = {p.name: p.read_bytes() for p in folder.iterdir()}, tmp_path / "r.jsonl"
    method = Gate(gates=folder, name="mine")
    density, recall = calibrate_thresholds(fresh(), method, text, ResultsFile(output), goal="density", value=0.7)
    check_only_this_changed(folder, before, "policy")
    policy = json.loads((folder / "adapter_config.json").read_text())["policy"]
    assert policy["policy"] == "Threshold" and density.settings == policy | {"last_rows_dense": 0}
    assert read_results([output]) == [density, recall]
    assert (density.method, density.kind, density.name) == ("gate", "learned", "mine")

    again, saved = fresh(), Gate(gates=folder, policy="saved")
    assert again.gates(folder).policy.to_dict() == policy and saved.budgets == ("own",)
    _, checking = split_windows(text.windows)
    selectors = saved.selectors(again)
    meter = measure(again, selectors, checking)
    assert density.value == pytest.approx(float(meter.table("gate", "density")[1].mean()))
    assert recall.value == pytest.approx(float(meter.table("gate", "target_recall")[1].mean()))
    assert density.n == 2 and 0.5 < density.value < 0.9 and selectors.settings == policy


def test_gates_without_a_saved_policy_cannot_run_with_it(model, gate_folders) -> None:
    with pytest.raises(ValueError, match="policy"):
        Gate(gates=gate_folders[0], policy="saved").selectors(model)


def test_saved_budgets_are_those_that_were_checked_on_other_text(folder, text, tmp_path) -> None:
    before, output = {p.name: p.read_bytes() for p in folder.iterdir()}, tmp_path / "r.jsonl"
    model, method = fresh(), Gate(gates=folder)
    rows = calibrate_budgets(model, method, text, ResultsFile(output), ladder=(0.3, 0.6, 0.8))
    check_only_this_changed(folder, before, "budgets")
    saved = HeadBudgets.from_dict(json.loads((folder / "adapter_config.json").read_text())["budgets"])
    fitting, checking = split_windows(text.windows)
    assert (saved.text, saved.windows) == ("0a1b", len(fitting))
    # Of .3 the forced blocks take .464 already.
    assert [(r.what, r.density, r.settings.get("heads", "calibrated")) for r in rows] == [
        (what, density, heads)
        for density in (0.6, 0.8)
        for heads in ("calibrated", "equal")
        for what in ("budget_density", "budget_recall")
    ]
    assert read_results([output]) == rows
    again = fresh()
    loaded = again.gates(folder)
    assert loaded.budgets == saved == model.gates(folder).budgets
    target = next(iter(loaded.gates.values())).config.target
    for density, recall in zip(rows[::2], rows[1::2]):
        policy = TopK(density=density.density, heads=density.settings.get("heads", "calibrated"))
        meter = measure(again, fixed_selectors(loaded, policy), checking, target)
        assert density.value == pytest.approx(float(meter.table("gate", "density")[1].mean()))
        assert recall.value == pytest.approx(float(meter.table("gate", "target_recall")[1].mean()))
        calibrated = density.cell["heads"] == "calibrated"
        assert density.settings.get("budgets") == (saved.digest if calibrated else None)


def test_thresholds_of_gates_with_budgets_and_a_saved_density_tell_the_budgets(folder, text) -> None:
    """Other budgets, another result: of the same weights and policy."""
    model, method = fresh(), Gate(gates=folder)
    calibrate_budgets(model, method, text, ResultsFile(None), ladder=(0.6, 0.8))
    digest = model.gates(folder).budgets.digest
    common = {"goal": "density", "value": 0.7, "save": False}
    shared, _ = calibrate_thresholds(model, method, text, ResultsFile(None), per_head=False, **common)
    alone, _ = calibrate_thresholds(model, method, text, ResultsFile(None), per_head=True, **common)
    assert shared.settings["budgets"] == digest and "budgets" not in alone.settings
    save_settings(folder, policy=TopK(density=0.7).to_dict())
    assert Gate(gates=folder, policy="saved").selectors(fresh()).settings["budgets"] == digest


def test_budgets_above_the_density_of_the_saved_policy_are_not_made(folder, text) -> None:
    save_settings(folder, policy=TopK(density=0.55).to_dict())
    before = (folder / "adapter_config.json").read_bytes()
    with pytest.raises(ValueError, match="ladder"):
        calibrate_budgets(fresh(), Gate(gates=folder), text, ResultsFile(None), ladder=(0.6, 0.8))
    assert (folder / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("ladder", [(0.1, 0.4), (0.7, 0.5)], ids=["forced blocks alone exceed it", "descending"])
def test_budgets_of_a_ladder_that_nothing_can_meet_are_not_made(folder, text, ladder) -> None:
    before = (folder / "adapter_config.json").read_bytes()
    with pytest.raises(ValueError, match="ladder"):
        calibrate_budgets(fresh(), Gate(gates=folder), text, ResultsFile(None), ladder=ladder)
    assert (folder / "adapter_config.json").read_bytes() == before


def test_a_policy_is_saved_whole_or_not_at_all(folder, monkeypatch) -> None:
    before = (folder / "adapter_config.json").read_bytes()

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        save_settings(folder, policy=Threshold(threshold=0.1).to_dict())
    assert (folder / "adapter_config.json").read_bytes() == before
    assert not list(folder.glob("*.part"))
