"""`seerattn finetune` as a user runs it: switches, dry run, errors."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from tiny_corpus import tiny_tokenizer, topical_model, write_documents, write_model
from tiny_models import tiny_model
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

import seerattn
from seerattn.cli import build_app, main
from seerattn.gate import AttnGateConfig
from seerattn.gate.attn_gate import parameter_count
from seerattn.training.finetune import FinetuneConfig, FinetuneRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 600, 300)
    for name, model in {
        "dropout": tiny_model("llama", attention_dropout=0.1),
        "scaled": tiny_model("llama-yarn"),
        "tied": tiny_model("llama", tie_word_embeddings=True),
        "other": tiny_model("llama", num_attention_heads=2, num_key_value_heads=1),
    }.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    gated = seerattn.attach(topical_model(), AttnGateConfig(block_q=32))
    gated.save_pretrained(folder / "gates", save_embedding_layers=False)
    return folder


def call(folder: Path, *arguments: Any, **options: Any) -> int:
    """Exit code of `seerattn finetune` with short defaults for what is not given."""
    given = {"model": folder / "model", "data": folder / "data.jsonl", "context": 128, "steps": 1, "batch-size": 1}
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    pairs = [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *pairs, *map(str, arguments)])
    return stop.value.code or 0


def test_switches_reach_the_run(folder: Path, tmp_path: Path) -> None:
    text = "--sparsity 0.6 --context-factor 2 --lr 0.002 --batch-size 2 --retrieval-share 0 --dtype bfloat16 --layers 1"
    rare = "anneal=0.5 target_share=0.3 target_every=2 loss=mse row_weight=mass gate_lr=0.003 micro_batch_size=2 "
    rare += "warmup_steps=0 gradient_checkpointing=no seed=7 logging_steps=3 save_steps=6 keep_checkpoints=1"
    arguments = [argument for word in rare.split() for argument in ("--set", word)]
    for word in ("block_q=32", "block_k=32", "query_subblocks=2"):
        arguments += ["--gate", word]
    assert call(folder, *text.split(), *arguments, output=tmp_path / "out", context=256, steps=2) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["kind"] == "finetune" and run["gates"] is None and run["layers"] == [1]
    assert run["dtype"] == "bfloat16" and run["autocasts"] is False
    assert AttnGateConfig.from_dict(run["gate"]) == AttnGateConfig(block_q=32, block_k=32, query_subblocks=2)
    assert run["config"] == {
        "context": 256,
        "steps": 2,
        "dense": False,
        "sparsity": 0.6,
        "anneal": 0.5,
        "context_factor": 2.0,
        "target_share": 0.3,
        "target_every": 2,
        "loss": "mse",
        "row_weight": "mass",
        "lr": 0.002,
        "gate_lr": 0.003,
        "batch_size": 2,
        "micro_batch_size": 2,
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "autocast": False,
        "retrieval_share": 0.0,
        "window_lengths": [],
        "budgets": True,
        "logging_steps": 3,
        "save_steps": 6,
        "keep_checkpoints": 1,
        "report_to": "none",
        "seed": 7,
    }
    model = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert model["dtype"] == "bfloat16" and model["max_position_embeddings"] == 2048
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}
    assert model["rope_parameters"] == rope
    adapter = json.loads((tmp_path / "out" / "gates" / "adapter_config.json").read_text())
    assert adapter["policy"]["density"] == pytest.approx(0.4) and adapter["layers"] == [1]
    assert adapter["inference_mode"] and adapter["base_model_name_or_path"] == str(tmp_path / "out" / "model")


@pytest.mark.parametrize(
    ("asked", "weights", "autocast"),
    [
        (None, "float32", True),
        ("auto", "float32", True),
        ("float32", "float32", False),
        ("bfloat16", "bfloat16", False),
    ],
)
def test_weights_are_float32_that_compute_in_bfloat16_unless_a_dtype_is_named(
    asked: str | None, weights: str, autocast: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr("seerattn.cli.finetune.train", lambda kind, config, setup: seen.append((config, setup)))
    assert call(folder, output=tmp_path / "out", dtype=asked) == 0
    [(config, setup)] = seen
    assert (setup.dtype, config.autocast) == (weights, autocast)


def test_dense_arm_and_gates_of_a_folder_reach_the_run(folder: Path, tmp_path: Path) -> None:
    assert call(folder, "--dense", output=tmp_path / "dense") == 0
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {"model", "run.json", "training.jsonl"}
    assert call(folder, "--gates", folder / "gates", output=tmp_path / "out") == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["gates"][0] == str(folder / "gates") and run["gate"]["block_q"] == 32
    assert run["config"]["sparsity"] == 0.9


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(folder, "--dry-run", "--gate", "paper", output=tmp_path / "out", steps=3, batch_size=2) == 0
    shown = " ".join(capsys.readouterr().out.split())
    count = parameter_count(AttnGateConfig.paper(), layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    assert f"{count:,} parameters in 2 layers, fresh" in shown and "768 tokens" in shown
    for way in ("one process", "DDP on 8 processes", "FSDP2 on 8 processes"):
        assert f"memory, {way}" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "layers", "masked"),
    [
        ({"dense": True}, None, True),
        ({"anneal": 0.5}, None, True),
        ({"sparsity": 0.0}, None, True),
        ({}, [1], True),
        ({}, None, False),
        # Whole samples of one document.
        ({"dense": True, "context": 256}, None, False),
    ],
)
def test_plan_counts_a_mask_where_packed_documents_meet_dense_attention(
    values: dict[str, Any], layers: list[int] | None, masked: bool, folder: Path
) -> None:
    config = FinetuneConfig(**{"context": 512, "steps": 4, "batch_size": 1} | values)
    prepared = FinetuneRun.plan(tiny_model("llama"), tiny_tokenizer(), [folder / "data.jsonl"], config, layers=layers)
    assert prepared.config.context == 256 or any(len(segments) > 1 for segments in prepared.samples.plan)
    told = [value for name, value in prepared.describe().items() if name.startswith("memory")]
    assert len(told) == 4 and all(("mask of packed documents" in value) == masked for value in told)


PLANS = {
    "fresh gates": ("model", ["--layers", "1"], {"gate": AttnGateConfig(), "layers": [1]}, {}),
    "trained gates": ("model", ["--gates", "{folder}/gates"], {"gates": "{folder}/gates"}, {}),
    "dense": ("model", ["--dense"], {}, {"dense": True}),
    "longer context": ("model", ["--context-factor", "2"], {}, {"context_factor": 2.0}),
    "tied embeddings": ("tied", [], {}, {}),
    "bfloat16": ("model", ["--dtype", "bfloat16"], {}, {"autocast": False}),
}


@pytest.mark.parametrize("name", PLANS)
def test_dry_run_shows_the_plan_of_the_loaded_model_and_reads_no_weights(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, arguments, options, values = PLANS[name]
    shutil.copytree(folder / source, tmp_path / "model")
    options = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in options.items()}
    config = FinetuneConfig(**{"context": 512, "steps": 1, "batch_size": 1, **values})
    weights = torch.bfloat16 if name == "bfloat16" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=weights)
    wanted = FinetuneRun.plan(loaded, tiny_tokenizer(), [folder / "data.jsonl"], config, **options).describe()
    (tmp_path / "model" / "model.safetensors").unlink()
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("seerattn.cli.training.show_plan", shown.append)
    given = {"model": tmp_path / "model", "context": 512, "output": tmp_path / "out", "device": "cpu"}
    assert call(folder, "--dry-run", *(word.format(folder=folder) for word in arguments), **given) == 0
    assert shown == [wanted]


# What is wrong, and what the sentence must name.
ERRORS = {
    "sparsity": ({}, ["--sparsity", "1"], "sparsity"),
    "dense sparsity": ({}, ["--dense", "--sparsity", "0.5"], "dense"),
    "dense gates": ({}, ["--dense", "--gate", "block_q=32"], "gates"),
    "two gates": ({}, ["--gates", "{folder}/gates", "--gate", "paper"], "gates"),
    "missing gates": ({}, ["--gates", "{folder}/model"], "gates"),
    "gates of another model": ({"model": "{folder}/other"}, ["--gates", "{folder}/gates"], "gates"),
    "context longer than the model's": ({"context": 2048}, [], "1024"),
    "context that packing cannot fill": ({"context": 1024}, [], "900"),
    "context factor that the data cannot fill": ({"context": 768}, ["--context-factor", "2"], "601"),
    "scaled model": ({"model": "{folder}/scaled"}, ["--context-factor", "2"], "context_factor"),
    "dropout": ({"model": "{folder}/dropout"}, [], "attention_dropout"),
    "missing model": ({"model": "{folder}/nowhere"}, [], "model"),
    "missing data": ({"data": "nowhere.jsonl"}, [], "nowhere.jsonl"),
    "batch": ({"batch-size": 3}, ["--set", "micro_batch_size=2"], "batch_size"),
    "target share": ({}, ["--set", "target_share=0"], "target_share"),
    "half precision": ({}, ["--dtype", "float16"], "dtype"),
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, dry: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, arguments, told = ERRORS[name]
    arguments = [*arguments, "--dry-run"] if dry else arguments
    options = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in options.items()}
    monkeypatch.chdir(tmp_path)
    assert call(folder, *(word.format(folder=folder) for word in arguments), output="out", **options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seerattn: ")]
    assert len(errors) == 1 and told in errors[0]
    assert list(tmp_path.iterdir()) == []


def documented_commands() -> list[list[str]]:
    """The words of every `seerattn finetune` in the document, launchers included."""
    text = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    blocks = "\n".join(text.split("```")[1::2]).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in blocks.splitlines() if "seerattn finetune" in line]


def test_documented_commands_have_options_that_exist() -> None:
    lines = documented_commands()
    launchers = [line[: line.index("seerattn")] for line in lines]
    assert [launcher[:1] for launcher in launchers] == [[], [], ["torchrun"], ["accelerate"], ["accelerate"]]
    for line in lines:
        words = line[line.index("seerattn") + 1 :]
        root = typer.main.get_command(build_app(words))
        context = root.commands[words[0]].make_context("seerattn finetune", words[1:])
        given = context.params
        # Both models were made with plain RoPE for 8192 tokens, as `--context-factor` asks for.
        assert given["model"] in ("MODEL", "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-70B")
        assert int(given["context"]) == 8192 * int(given["context_factor"] or 1)
    assert get_args_parser().parse_args(lines[2][1:]).training_script == "seerattn"
    for line in lines[3:]:
        assert line[1] == "launch"
        options = launch_command_parser().parse_args(line[2:])
        assert options.module and options.fsdp_version == "2" and options.mixed_precision == "no"
        assert options.fsdp_transformer_layer_cls_to_wrap == "LlamaDecoderLayer,AttnGate"
