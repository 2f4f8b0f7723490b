"""Code that comes with a model runs in no command unless that command is told so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_corpus import write_models_and_gates

from seerattn.cli import main

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Path({folder!r}, "model ran").touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
Path({folder!r}, "code ran").touch()
"""
MAPS = {
    "config.json": {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    },
}
EXPERIMENT = {
    "model": "model",
    "contexts": [128],
    "densities": [0.6],
    "methods": ["dense"],
    "tasks": [{"task": "perplexity", "data": "docs.jsonl"}],
}

TEXT = "--model model --data docs.jsonl --device cpu"
FEW = f"{TEXT} --max-docs 2"
SEARCH = f"{FEW} --output plan.json --set"
# Commands, and whether they make the model itself beside its config or tokenizer.
COMMANDS = {
    "eval, perplexity": (f"eval {FEW} --contexts 96 --methods dense", True),
    "eval, retrieval": (f"eval {FEW} --contexts 128 --methods dense --tasks passkey,n=1,depths=0.5", True),
    "eval, recall": (f"eval {FEW} --contexts 96 --methods oracle --densities 0.6 --tasks recall", True),
    "eval, a file": ("eval --config experiment.yaml --device cpu --limit 1", True),
    "eval --dry-run": ("eval --config experiment.yaml --device cpu --limit 1 --dry-run", False),
    "calibrate": (
        f"calibrate {TEXT} --gates gates-of-model --contexts 256 --density 0.9 --set max_docs=2 --dry-run",
        True,
    ),
    "search minference": (
        f"search minference {SEARCH} context=128 --set block_q=32 --set block_k=32 --set density=0.9",
        True,
    ),
    "search, an official plan": ("search minference --model model --set official=official.json --output p.json", True),
    "search moa": (f"search moa {SEARCH} context=256 --set lengths=256 --set samples=1", True),
    "search xattention": (
        f"search xattention {SEARCH} context=128 --set stride=8 --set block=32 --set windows=1",
        True,
    ),
    "distill": ("distill --model model --data docs.jsonl --device cpu --context 128 --steps 1 --output new", True),
    "finetune": ("finetune --model model --data docs.jsonl --device cpu --context 128 --steps 1 --output new", True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with code of its own, gates, documents, and what else commands read."""
    folder = tmp_path_factory.mktemp("trust")
    write_models_and_gates(folder)
    layer = {str(head): ["vertical_and_slash", 1000, 6096, 0.5] for head in range(4)}
    (folder / "official.json").write_text(json.dumps([layer, layer]))
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    for name, values in MAPS.items():
        path = folder / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, whose code leaves its marks there."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (folder / "model" / "own.py").write_text(CODE.format(folder=str(folder)))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.chdir(folder)
    return folder


def run(command: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    return stop.value.code or 0


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs_code_of_a_model_only_where_it_is_told_to(
    name: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    command, runs_model = COMMANDS[name]
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    assert run(command) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("seerattn: model must ") and sentence.endswith("allow it with --trust-remote-code")
    assert {path.relative_to(folder) for path in folder.rglob("*")} == before
    assert run(f"{command} --trust-remote-code") == 0, capsys.readouterr().err
    assert (folder / "code ran").exists() and (folder / "model ran").exists() == runs_model


def test_tasks_command_runs_code_of_a_model_only_where_it_is_told_to(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    command = "eval --model model --tasks nosuch --contexts 96 --device cpu"
    assert run(command) == 2 and "allow it with --trust-remote-code" in capsys.readouterr().err
    assert not (folder / "code ran").exists()
    # Tasks are looked for when the tokenizer is there, and then refused: by name, or for want of the harness.
    assert run(f"{command} --trust-remote-code") == 2 and "seerattn: task must " in capsys.readouterr().err
    assert (folder / "code ran").exists() and not (folder / "model ran").exists()


def test_ruler_runs_no_code_of_a_tokenizer_that_transformers_knows_by_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The harness reads the tokenizer once more, and would run what comes with it."""
    monkeypatch.chdir(tmp_path)
    write_models_and_gates(tmp_path)
    path = tmp_path / "model" / "tokenizer_config.json"
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    (tmp_path / "model" / "own.py").write_text(CODE.format(folder=str(tmp_path)))
    command = "eval --model model --tasks niah_single_1 --contexts 256 --limit 1 --methods dense --device cpu"
    # Documents are made with the tokenizer, and this one cannot end a text.
    assert run(command) == 2 and "must have an end-of-sequence token" in capsys.readouterr().err
    assert not (tmp_path / "code ran").exists()
