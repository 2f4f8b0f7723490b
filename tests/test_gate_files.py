"""Folders of gates, read without PEFT."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import seerattn
from seerattn.gate_files import CONFIG, WEIGHTS, read_folder

ROOT = Path(__file__).parents[1]
FOLDERS = ["smollm2-gates", "reference-gates/best", "reference-gates/paper"]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_says_matches_what_peft_reads(name: str) -> None:
    folder = ROOT / "assets" / name
    found, config = read_folder(folder), seerattn.SeerConfig.from_pretrained(str(folder))
    assert found.form.to_dict() == {**found.form.to_dict(), **config.gate}
    assert found.policy.to_dict() == config.policy and found.base == config.base_model
    assert found.listed == (None if config.layers is None else tuple(config.layers))
    assert found.decode_policy is None is config.decode_policy
    assert (found.budgets is None) == (config.budgets is None)
    assert found.budgets is None or found.budgets.to_dict() == config.budgets
    assert list(found.modules) == list(range(config.base_model["num_hidden_layers"]))
    assert found.modules[1] == "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "LORA"}, "must describe gates"),
        ({"gate": None}, "gate config must be a dictionary"),
        ({"base_model": None}, "sizes of the gates' model"),
        ({"layers": [0, 0]}, "must differ"),
        ({"layers": [0, 1]}, "must hold gates of layers"),
        ({"policy": {"policy": "None"}}, "policy must be one of"),
        ({"decode_policy": {"policy": "TopK", "density": 0.1, "last_rows_dense": 1}}, "last_rows_dense"),
        ({"budgets": {}}, "budgets must have"),
    ],
    ids=[
        "another adapter",
        "no form",
        "no sizes",
        "a layer twice",
        "other layers",
        "no policy",
        "no policy of decoding",
        "no budgets",
    ],
)
def test_folder_that_says_what_gates_cannot_have_is_refused(tmp_path: Path, change: dict, sentence: str) -> None:
    folder = Path(shutil.copytree(ROOT / "assets/reference-gates/best", tmp_path / "gates"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=sentence):
        read_folder(folder)


def test_folder_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "assets/reference-gates/paper", tmp_path / "gates"))
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="whole safetensors file"):
        read_folder(folder)


def test_reading_a_folder_imports_neither_transformers_nor_peft() -> None:
    code = f"""
import sys
from pathlib import Path
from seerattn.gate_files import read_folder, read_weights
folder = Path({str(ROOT / "assets/reference-gates/best")!r})
print(len(read_weights(folder, read_folder(folder).modules)), {{"transformers", "peft"}} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "6 set()\n"
