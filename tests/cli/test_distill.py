"""`seerattn distill` as a user runs it: switches, dry run, errors."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import tiny_tokenizer, topical_model, write_documents, write_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import seerattn
from seerattn.cli import main
from seerattn.data.packing import SamplePlan
from seerattn.gate import AttnGateConfig
from seerattn.gate.attn_gate import parameter_count
from seerattn.training.distill import DistillConfig, DistillRun

CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 600, 300)
    write_documents(folder / "short.jsonl", 60, 50)
    (folder / "empty.jsonl").write_text("")
    (folder / "text.csv").write_text("a,b")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    tiny_model("bloom").save_pretrained(folder / "bloom")
    tiny_tokenizer().save_pretrained(folder / "bloom")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress((folder / "data.jsonl").read_bytes())[:-40])
    for name, values in {
        "more": {"num_hidden_layers": 3},
        "cut": {},
        "code": CODE,
        "small": {"vocab_size": 50},
    }.items():
        shutil.copytree(folder / "model", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | values))
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tiny_model("llama", vocab_size=50).save_pretrained(folder / "small")
    gated = seerattn.attach(topical_model(), AttnGateConfig(block_q=32))
    gated.save_pretrained(folder / "gates", save_embedding_layers=False)
    return folder


def call(folder: Path, *arguments: Any, **options: Any) -> int:
    """Exit code of `seerattn distill` with short defaults for what is not given."""
    given = {"model": folder / "model", "data": folder / "data.jsonl", "context": 128, "steps": 1, "batch-size": 1}
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    pairs = [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    with pytest.raises(SystemExit) as stop:
        main(["distill", *pairs, *map(str, arguments)])
    return stop.value.code or 0


def test_plan_shows_names_as_they_are(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = Path(shutil.copytree(folder / "model", tmp_path / ":smile:\x1b[2J[red]x[" / "red]"))
    assert call(folder, "--dry-run", model=model, output=tmp_path / "out") == 0
    assert ":smile:\\x1b[2J[red]x[/red]" in "".join(capsys.readouterr().out.split())


SWITCHES = {
    "default": ("", AttnGateConfig()),
    "paper": ("paper", AttnGateConfig.paper()),
    "paper-variant": (
        "paper block_q=32 block_k=32 q_linear=true gate_dim=16 rope=no share=kv_group init=identity",
        AttnGateConfig.paper(
            block_q=32, block_k=32, q_linear=True, gate_dim=16, rope=False, share="kv_group", init="identity"
        ),
    ),
    "pooling": (
        "q_pooling=max,avg k-pooling=min qk_norm=yes distance_bias=3 init=normal",
        AttnGateConfig(q_pooling=("max", "avg"), k_pooling=("min",), qk_norm=True, distance_bias=3, init="normal"),
    ),
    "blocks": (
        "block_q=32 block_k=64 query_subblocks=2 key_subblocks=4 normalize_subblocks=false exclude_forced=false "
        "rope=true qk_norm=false",
        AttnGateConfig(block_q=32, query_subblocks=2, key_subblocks=4, normalize_subblocks=False, exclude_forced=False),
    ),
    "target": ("target_keys=sum target_power=2", AttnGateConfig(target_keys="sum", target_power=2)),
    "published-target": ("target_keys=max target_power=none", AttnGateConfig(target_keys="max", target_power=None)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_reach_the_saved_gates(name: str, folder: Path, tmp_path: Path) -> None:
    words, expected = SWITCHES[name]
    form = [argument for word in words.split() for argument in ("--gate", word)]
    assert call(folder, *form, "--layers", "1", output=tmp_path / "out") == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert AttnGateConfig.from_dict(saved["gate"]) == expected
    assert saved["layers"] == [1] and saved["base_model_name_or_path"] == str(folder / "model")


def test_training_switches_reach_the_run(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{gate: {block_q: 32, block_k: 32}, drop_rows: 0.25, seed: 7, retrieval_share: 1, lr: 1}")
    rare = "loss=smooth_l1 row_weight=mass density=0.3 micro-batch-size=2 warmup_steps=0 logging_steps=3 save_steps=6"
    rare += " keep_checkpoints=1 target_share=0.5 decode_rows=9"
    text = ["--lr", "0.002", "--batch-size", "2", "--phase", "both", "--dtype", "bfloat16", "--config", str(config)]
    text += [argument for word in rare.split() for argument in ("--set", word)]
    assert call(folder, *text, output=tmp_path / "out", context=256, steps=2) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["config"] == {
        "context": 256,
        "steps": 2,
        "lr": 0.002,
        "batch_size": 2,
        "micro_batch_size": 2,
        "warmup_steps": 0,
        "loss": "smooth_l1",
        "row_weight": "mass",
        "drop_rows": 0.25,
        "retrieval_share": 1.0,
        "window_lengths": [],
        "target_share": 0.5,
        "phase": "both",
        "decode_rows": 9,
        "density": 0.3,
        "logging_steps": 3,
        "save_steps": 6,
        "keep_checkpoints": 1,
        "report_to": "none",
        "seed": 7,
    }
    lines = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2] and json.loads(lines[0])["lr"] == 0.002
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["policy"]["policy"] == "TopK" and saved["policy"]["density"] == 0.3
    assert (saved["gate"]["block_q"], saved["gate"]["block_k"]) == (32, 32)


def test_everything_may_be_told_by_a_file(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    given = {"model": folder / "model", "data": folder / "data.jsonl", "output": tmp_path / "out", "context": 128}
    text = "".join(f"{name}: {value}\n" for name, value in given.items())
    config.write_text(text + "steps: 1\nbatch-size: 1\ngate: paper\nlayers: '1'\n")
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--config", str(config)])
    assert not stop.value.code
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert AttnGateConfig.from_dict(saved["gate"]) == AttnGateConfig.paper() and saved["layers"] == [1]


def test_the_file_of_the_page_plans_a_run(folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "train-gates.md").read_text(encoding="utf-8")
    text = page.split("```yaml\n")[1].split("```")[0]
    config = tmp_path / "run.yaml"
    config.write_text(text.replace("MODEL", str(folder / "model")).replace("books/", str(folder / "data.jsonl")))
    # The documents here are shorter than those of the page.
    small = ("--context", "512", "--steps", "1", "--retrieval-share", "0")
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--config", str(config), *small, "--output", str(tmp_path / "out"), "--dry-run"])
    assert not stop.value.code


def test_gates_of_a_folder_reach_the_run(folder: Path, tmp_path: Path) -> None:
    assert call(folder, "--gates", folder / "gates", output=tmp_path / "out") == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["gates"][0] == str(folder / "gates") and run["gate"]["block_q"] == 32
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder / "model")


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(folder, "--dry-run", "--gate", "paper", output=tmp_path / "out", steps=3, batch_size=2) == 0
    shown = " ".join(capsys.readouterr().out.split())
    count = parameter_count(AttnGateConfig.paper(), layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    assert count == 2 * 4 * 96 * 32
    assert f"{count:,} parameters in 2 layers, fresh" in shown
    assert "the text 0.9 times over" in shown  # 6 samples of 128 tokens
    assert "2 with 900 tokens, 0 too short" in shown and "768 tokens" in shown and "on each process" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dry_run_shows_the_plan_of_the_loaded_model_and_reads_no_weights(
    dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    config = DistillConfig(context=128, steps=1, batch_size=1)
    options = {"gates": folder / "gates"}
    wanted = DistillRun.plan(loaded, tiny_tokenizer(), [folder / "data.jsonl"], config, **options).describe()
    (tmp_path / "model" / "model.safetensors").unlink()
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("seerattn.cli.training.show_plan", shown.append)
    given = {"model": tmp_path / "model", "output": tmp_path / "out", "device": "cpu", "dtype": dtype} | options
    assert call(folder, "--dry-run", **given) == 0
    assert shown == [wanted]
    # A run tells of the way that it takes alone.
    assert len([name for name in wanted if name.startswith("memory")]) > 1
    shown.clear()
    loaded.save_pretrained(tmp_path / "model")
    assert call(folder, **given) == 0
    assert [name for name in shown[0] if name.startswith("memory")] == ["memory, one process"]


# What is wrong, and what the sentence must name.
ERRORS = {
    "missing data": ({"data": "nowhere.jsonl"}, [], "nowhere.jsonl"),
    "empty data": ({"data": "{folder}/empty.jsonl"}, [], "data"),
    "broken data": ({"data": "{folder}/broken.jsonl"}, [], "line 2"),
    "other data": ({"data": "{folder}/text.csv"}, [], "data"),
    "short documents": ({"data": "{folder}/short.jsonl"}, [], "data"),
    "missing model": ({"model": "{folder}/nowhere"}, [], "model"),
    "unknown architecture": ({"model": "{folder}/bloom"}, [], "Bloom"),
    "context longer than the model's": ({"context": 2048}, [], "1024"),
    "context of less than two blocks": ({"context": 64}, [], "context"),
    "context off the grid": ({"context": 200}, [], "context"),
    "density": ({}, ["--set", "density=0"], "density"),
    "block size": ({}, ["--gate", "block_q=48"], "block_q"),
    "no block size": ({}, ["--gate", "block_q=0"], "block_q"),
    "sub-blocks": ({}, ["--gate", "query_subblocks=7"], "query_subblocks"),
    "pooling": ({}, ["--gate", "q_pooling=mean"], "q_pooling"),
    "no pooling": ({}, ["--gate", "k_pooling="], "k_pooling"),
    "gate dim": ({}, ["--gate", "paper", "--gate", "gate_dim=16"], "gate_dim"),
    "share": ({}, ["--gate", "share=layer"], "share"),
    "target keys": ({}, ["--gate", "target_keys=mean"], "target_keys"),
    "target power": ({}, ["--gate", "target_power=0.5"], "target_power"),
    "no target power": ({}, ["--gate", "target_power=nan"], "target_power"),
    "no form": ({}, ["--gate", "papre"], "papre"),
    "no field": ({}, ["--gate", "blocks=32"], "blocks"),
    "no number": ({"steps": "many"}, [], "steps"),
    "option that is none": ({}, ["--set", "blocks=32"], "blocks"),
    "two gates": ({}, ["--gates", "{folder}/gates", "--gate", "paper"], "gates"),
    "missing gates": ({}, ["--gates", "{folder}/model"], "gates"),
    "loss": ({}, ["--set", "loss=hinge"], "loss"),
    "layers": ({}, ["--layers", "0,x"], "layers"),
    "missing layers": ({}, ["--layers", "0-5"], "layers"),
    "batch": ({"batch-size": 3}, ["--set", "micro_batch_size=2"], "batch_size"),
    "retrieval documents": ({}, ["--retrieval-share", "0.5"], "length"),
    "steps": ({"steps": 0}, [], "steps"),
    "device": ({}, ["--device", "toaster"], "device"),
    "device without numbers": ({}, ["--device", "meta"], "device"),
    "device that is not there": ({}, ["--device", "cuda:99"], "device"),
    "seed": ({}, ["--set", "seed=-1"], "seed"),
    "tracker": ({}, ["--set", "report_to=nosuch"], "report_to"),
    "model with code of its own": ({"model": "{folder}/code"}, [], "--trust-remote-code"),
    "tokens unknown to the model": ({"model": "{folder}/small"}, [], "tokens"),
    "deeply nested data": ({"data": "{folder}/deep.jsonl"}, [], "line 1"),
    "half a surrogate": ({"data": "{folder}/half.jsonl"}, [], "line 1"),
    "cut archive": ({"data": "{folder}/cut.jsonl.gz"}, [], "data"),
}


# What a dry run does not read.
WEIGHTS = {
    "model without a layer": ({"model": "{folder}/more"}, [], "model"),
    "model that is cut off": ({"model": "{folder}/cut"}, [], "model"),
}


@pytest.mark.parametrize(
    ("name", "dry"), [*((name, dry) for name in ERRORS for dry in (False, True)), *((name, False) for name in WEIGHTS)]
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, dry: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, arguments, told = (ERRORS | WEIGHTS)[name]
    arguments = [*arguments, "--dry-run"] if dry else arguments
    options = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in options.items()}
    monkeypatch.chdir(tmp_path)
    assert call(folder, *(word.format(folder=folder) for word in arguments), output="out", **options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seerattn: ")]
    assert len(errors) == 1 and told in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_command_that_was_refused_can_be_corrected(folder: Path, tmp_path: Path) -> None:
    every = ["--set", "warmup_steps=0", "--set", "logging_steps=1", "--set", "save_steps=1"]
    for wrong in (["--set", "seed=-1"], ["--set", "report_to=nosuch"], ["--device", "meta"], ["--lr", "1e39"]):
        assert call(folder, *wrong, *every, output=tmp_path / "out") == 2
        left = {path.name for path in tmp_path.iterdir()}
        # A loss was seen and recorded before nothing was finite any more.
        assert left == (set() if wrong[0] != "--lr" else {"out"})
    shutil.rmtree(tmp_path / "out")
    assert call(folder, output=tmp_path / "out") == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_dry_run_of_a_million_steps_looks_at_no_sample(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamplePlan, "__getitem__", lambda *_: pytest.fail("a sample was looked at"))
    monkeypatch.setattr(SamplePlan, "is_synthetic", lambda *_: pytest.fail("a sample was looked at"))
    options = {"output": tmp_path / "out", "steps": 10**6, "batch_size": 16, "context": 512, "retrieval_share": 0.25}
    assert call(folder, "--dry-run", **options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "16000000 of 512 tokens, 25% retrieval documents; 1 documents are packed" in shown
    assert f"the text {0.75 * 16e6 * 512 / 900:,.1f} times over" in shown


def test_output_that_is_taken_is_left_as_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert call(folder, output=tmp_path) == 2
    assert "output must be a new or empty folder" in capsys.readouterr().err
    assert call(folder, output=tmp_path / "notes.txt") == 2
    assert "output must be a folder, got the file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"] and (
        tmp_path / "notes.txt"
    ).read_text() == "mine"


def test_help_imports_no_sub_command() -> None:
    code = (
        "import sys\nfrom seerattn.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'distill' in sys.modules['seerattn.cli'].COMMANDS\n"
        "assert not {'torch', 'transformers', 'seerattn.cli.distill'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("distill", "eval", "report"))


def test_unknown_command_and_missing_option_exit_with_2(capsys: pytest.CaptureFixture) -> None:
    for arguments, told in ((["destill"], "destill"), (["distill", "--steps", "3"], "model")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and told in capsys.readouterr().err
