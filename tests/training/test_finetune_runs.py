"""Whole fine-tuning runs: what is saved, resuming after SIGKILL, several processes, losses that are not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_corpus import run_card, tiny_tokenizer, write_documents, write_model
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import seerattn
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.hf.config import SeerConfig, save_settings
from seerattn.hf.distillation import GateLosses
from seerattn.hf.yarn import extend_context
from seerattn.selection import HeadBudgets, TopK
from seerattn.training.finetune import FinetuneConfig, FinetuneRun, finetune
from seerattn.training.finetune_trainer import FinetuneTrainer

FORM = AttnGateConfig(block_q=32, block_k=32, query_subblocks=4, key_subblocks=2, init="normal")
RUN = FinetuneConfig(
    context=256,
    steps=8,
    batch_size=2,
    logging_steps=2,
    save_steps=2,
    keep_checkpoints=1,
    sparsity=0.5,
    anneal=0.5,
    target_share=0.5,
    target_every=2,
    retrieval_share=0.25,
    lr=1e-3,
    gate_lr=3e-3,
)
TIMED = ("tokens_per_second",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and documents."""
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 1200, 700, 300, 150, 100, 70, 20)
    write_documents(folder / "long.jsonl", 5000)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    train(folder, folder / "uninterrupted")
    return folder / "uninterrupted"


def train(folder: Path, output: Path, config: FinetuneConfig = RUN, **options: Any) -> nn.Module:
    if not config.dense and "gates" not in options:
        options = {"gate": FORM} | options
    return finetune(model_of(folder), tiny_tokenizer(), [folder / "data.jsonl"], config, output=output, **options)


def model_of(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "training.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors") | load_file(output / "gates" / "adapter_model.safetensors")


def assert_same_result(output: Path, expected: Path) -> None:
    """The same weights bit for bit, the same records, and nothing else left behind."""
    for file in ("model/model.safetensors", "gates/adapter_model.safetensors"):
        assert (output / file).read_bytes() == (expected / file).read_bytes()
    assert records(output) == records(expected)
    assert {path.name for path in output.iterdir()} == {"model", "gates", "run.json", "training.jsonl"}


def test_saved_model_and_gates_give_the_logits_of_the_trained_model(folder: Path, tmp_path: Path) -> None:
    config = replace(RUN, context_factor=2.0, context=1536, steps=2, retrieval_share=0.0, anneal=0.0)
    model = model_of(folder)
    options = {"gate": FORM, "output": tmp_path / "out"}
    trained = finetune(model, tiny_tokenizer(), [folder / "long.jsonl"], config, **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert base.config.max_position_embeddings == 2048
    loaded = seerattn.attach(base, tmp_path / "out" / "gates", impl="sparse")
    seerattn.set_policy(trained, seerattn.TopK(density=0.5), impl="sparse")
    ids = tokens(1, 1500)
    with torch.no_grad(), seerattn.hf.meters.record_density(loaded) as meter:
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert meter.mean() == pytest.approx(0.5, abs=0.03)
    before = model_of(folder).state_dict()
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in after)
    # The adapter names the weights that it belongs to.
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "gates")
    assert torch.equal(by_name.model.embed_tokens.weight, base.model.embed_tokens.weight)
    by_card = run_card(tmp_path / "out" / "gates")
    seerattn.set_policy(by_card, seerattn.TopK(density=0.5), impl="sparse")
    with torch.no_grad():
        assert torch.equal(by_card(ids).logits, trained(ids).logits)
    card = (tmp_path / "out" / "gates" / "README.md").read_text()
    assert "2 steps of 2 samples of 1536 tokens" in card and "extended 2" in card


def test_tokenised_text_trains_as_the_files_that_it_is_of(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    corpus = FinetuneRun.plan(
        model_of(folder), tiny_tokenizer(), [folder / "data.jsonl"], RUN, gate=FORM
    ).samples.corpus
    finetune(model_of(folder), tiny_tokenizer(), corpus, RUN, gate=FORM, output=tmp_path / "out")
    assert_same_result(tmp_path / "out", uninterrupted)
    assert (tmp_path / "out" / "run.json").read_text() == (uninterrupted / "run.json").read_text()


def test_training_lowers_both_losses_and_follows_the_schedule(folder: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(
        context=512, steps=24, batch_size=1, logging_steps=1, save_steps=24, sparsity=0.6, anneal=0.5, lr=3e-3,
        gate_lr=1e-2, target_share=0.5,
    )  # fmt: skip
    options = {"gate": FORM, "output": tmp_path / "out"}
    finetune(model_of(folder), tiny_tokenizer(), [folder / "long.jsonl"], config, **options)
    found = records(tmp_path / "out")
    assert [record["step"] for record in found] == list(range(1, 25))
    first, last = (sum(r["loss"] for r in some) / 4 for some in (found[:4], found[-4:]))
    assert first > 4.5 and last < 0.8 * first
    early, late = (sum(r["gate_loss"] for r in some) / 4 for some in (found[8:12], found[-4:]))
    assert late < 0.9 * early
    assert found[0]["sparsity"] == 0
    for record in found:
        # Of 16 blocks a row, whole numbers of blocks come near to what was asked.
        assert record["sparsity"] == pytest.approx(min(0.6, 0.6 * (record["step"] - 1) / 12), abs=0.05)
        assert record["gate_loss"] == pytest.approx(sum(record["layer_gate_loss"].values()) / 2)
    assert found[0]["lr"] == 0 and found[2]["lr"] == 3e-3 and found[-1]["lr"] < 3e-4
    assert found[-1]["tokens"] == 24 * 512


@pytest.mark.parametrize(("gate_lr", "told"), [(30.0, 1), (1e-3, 0)])
def test_gates_that_unlearn_are_told_of_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, gate_lr: float, told: int
) -> None:
    config = FinetuneConfig(context=256, steps=8, batch_size=1, gate_lr=gate_lr, logging_steps=1, save_steps=8)
    train(folder, tmp_path / "out", config)
    first, *later = [record["gate_loss"] for record in records(tmp_path / "out")]
    assert (max(later) > 2 * first) == bool(told)
    warnings = [r.getMessage() for r in caplog.records if r.name == "seerattn.training.trainer"]
    assert len(warnings) == told and all("gate_lr" in text for text in warnings)


def test_learning_rate_of_gates_falls_with_the_width_of_heads_and_is_that_of_the_run(folder: Path) -> None:
    config, data = replace(RUN, gate_lr=None), [folder / "data.jsonl"]
    run = FinetuneRun.plan(model_of(folder), tiny_tokenizer(), data, config, gate=FORM)
    assert run.config.gate_lr == run.facts()["config"]["gate_lr"] == 1e-3
    assert run.config.lr == RUN.lr
    wide = tiny_model("llama", head_dim=128)
    run = FinetuneRun.plan(wide, tiny_tokenizer(), data, config, gate=FORM)
    assert run.config.gate_lr == pytest.approx(1e-3 * 0.5**1.5)
    kept = FinetuneRun.plan(model_of(folder), tiny_tokenizer(), data, RUN, gate=FORM)
    assert kept.config.gate_lr == RUN.gate_lr


def test_dense_run_has_no_gates_and_matches_density_1(folder: Path, tmp_path: Path) -> None:
    options = {"sparsity": 0.0, "target_every": 1, "anneal": 0.0}
    for name, config in (
        ("dense", replace(RUN, dense=True, **options)),
        ("sparse", replace(RUN, **options)),
    ):
        torch.manual_seed(0)
        # The default form has blocks of 64 tokens, to which a dense run cuts its documents too.
        trained = train(folder, tmp_path / name, config, **({} if config.dense else {"gate": AttnGateConfig()}))
        assert any(isinstance(m, AttnGate) for m in trained.modules()) != config.dense
    assert not (tmp_path / "dense" / "gates").exists()
    for dense, sparse in zip(records(tmp_path / "dense"), records(tmp_path / "sparse"), strict=True):
        assert dense.keys() == sparse.keys() - {"gate_loss", "layer_gate_loss"}
        assert all(dense[name] == sparse[name] for name in dense)
    states = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("dense", "sparse")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], weight) for name, weight in states[0].items())


def test_trained_gates_are_where_a_run_starts(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    gates = uninterrupted / "gates"
    prepared = FinetuneRun.plan(model_of(folder), tiny_tokenizer(), [folder / "data.jsonl"], RUN, gates=gates)
    held = {n.replace(".default", ""): p for n, p in prepared.model.named_parameters() if "seer_gate" in n}
    saved = load_file(gates / "adapter_model.safetensors")
    assert held.keys() == saved.keys() and all(torch.equal(held[name], saved[name]) for name in saved)
    assert all(p.requires_grad for p in prepared.model.parameters())
    assert prepared.facts()["gates"][0] == str(gates) and "from " + str(gates) in prepared.describe()["gates"]
    train(folder, tmp_path / "out", replace(RUN, steps=1), gates=gates)
    trained = load_file(tmp_path / "out" / "gates" / "adapter_model.safetensors")
    assert trained.keys() == saved.keys()


def test_budgets_of_the_gates_to_start_from_stay_with_those_that_they_become(
    folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    start, shape = tmp_path / "start", model_of(folder).config
    shutil.copytree(uninterrupted / "gates", start)
    heads = [(0.3, 0.7) * (shape.num_attention_heads // 2)] * shape.num_hidden_layers
    about = {"block_q": 32, "block_k": 32, "target": str(FORM.target), "gain": str(FORM.target), "text": ""}
    budgets = HeadBudgets(ladder=(0.5,), lengths=(256,), densities=((heads,),), windows=1, **about).to_dict()
    save_settings(start, budgets=budgets, policy=TopK(density=0.5).to_dict())
    config = replace(RUN, steps=1, anneal=0.0, retrieval_share=0.0)
    trained = train(folder, tmp_path / "kept", config, gates=start)
    assert trained.active_peft_config.budgets == budgets
    assert SeerConfig.from_pretrained(str(tmp_path / "kept" / "gates")).budgets == budgets
    prepared = FinetuneRun.plan(
        model_of(folder), tiny_tokenizer(), [folder / "data.jsonl"], replace(config, budgets=False), gates=start
    )
    assert prepared.model.active_peft_config.budgets is None
    # A lower mean than they were read off at is refused before anything is written.
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.5 with the budgets"):
        train(folder, tmp_path / "low", replace(config, sparsity=0.9), gates=start)
    assert not (tmp_path / "low").exists()


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
sys.path[:0] = {paths!r}
import test_finetune_runs
saves = 0
save = torch.save
def save_or_die(state, path, *args, **kwargs):
    global saves
    if Path(path).name == "optimizer.pt":
        saves += 1
        if saves == {fatal_save}:
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
    return save(state, path, *args, **kwargs)
torch.save = save_or_die
if {at_the_end}:
    import seerattn.saving
    replace = os.replace
    def replace_or_die(old, new):
        replace(old, new)
        if Path(new).name == "gates":
            os.kill(os.getpid(), signal.SIGKILL)
    seerattn.saving.os.replace = replace_or_die
test_finetune_runs.train(Path({folder!r}), Path({output!r}), resume=True)
"""


def run_until_killed(folder: Path, output: Path, *, fatal_save: int = 99, at_the_end: bool = False) -> None:
    """A run in a process of its own, which kills itself in its n-th checkpoint or between the gates and the model."""
    here = Path(__file__).parent
    values = {"folder": str(folder), "output": str(output), "fatal_save": fatal_save, "at_the_end": at_the_end}
    code = CHILD.format(paths=[str(here.parent), str(here)], **values)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_run_that_is_killed_and_resumed_matches_an_uninterrupted_one(
    folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run_until_killed(folder, output, fatal_save=3)
    assert [p.name for p in (output / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    assert records(output)[-1]["step"] == 6
    with (output / "training.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    run_until_killed(folder, output, at_the_end=True)
    assert (output / "gates").exists() and not (output / "model").exists()
    train(folder, output, resume=True)
    assert_same_result(output, uninterrupted)
    # A finished run stays as it is, and is loaded.
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    finished = train(folder, output, resume=True)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == stamps
    held = {name.replace(".default", ""): p for name, p in finished.named_parameters()}
    for name, weight in weights(output).items():
        name = name if "seer_gate" in name else "base_model.model." + name
        found = held.get(name, held.get(name.replace("self_attn.", "self_attn.base_layer.")))
        assert torch.equal(found, weight), name


def test_resumed_run_rejects_another_run_and_says_what_differs(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"another: sparsity was 0\.5 and is 0\.7"):
        train(folder, uninterrupted, replace(RUN, sparsity=0.7), resume=True)
    rounded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="another: dtype was float32 and is bfloat16"):
        options = {"gate": FORM, "output": uninterrupted, "resume": True}
        finetune(rounded, tiny_tokenizer(), [folder / "data.jsonl"], RUN, **options)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="another: autocasts was False and is True"):
        patched.setattr(FinetuneRun, "autocasts", True)
        train(folder, uninterrupted, resume=True)
    with pytest.raises(ValueError, match="kind was None and is finetune"):
        other = folder / "distilled"
        other.mkdir()
        (other / "run.json").write_text('{"config": {}, "data_hash": ""}')
        train(folder, other, resume=True)
    with pytest.raises(ValueError, match="output must be a new or empty folder"):
        train(folder, uninterrupted)


def test_two_processes_match_one_at_the_same_global_batch(folder: Path, tmp_path: Path) -> None:
    options = {
        "--model": folder / "model",
        "--data": folder / "data.jsonl",
        "--context": 256,
        "--steps": 4,
        "--batch-size": 4,
        "--lr": 1e-3,
        "--sparsity": 0.5,
        "--output": tmp_path / "two",
    }
    arguments = [str(x) for pair in options.items() for x in pair]
    for value in ("logging_steps=2", "save_steps=4", "target_share=0.5", "target_every=2", "gate_lr=1e-3"):
        arguments += ["--set", value]
    for value in ("block_q=32", "block_k=32", "query_subblocks=1", "key_subblocks=1", "init=normal"):
        arguments += ["--gate", value]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "seerattn"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, "finetune", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = FinetuneConfig(
        context=256, steps=4, batch_size=4, logging_steps=2, save_steps=4, lr=1e-3, sparsity=0.5, target_share=0.5,
        target_every=2,
    )  # fmt: skip
    # One sub-block a side, so that no maximum hangs on the order of a sum.
    train(folder, tmp_path / "one", config, gate=replace(FORM, query_subblocks=1, key_subblocks=1))
    for two, one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in two.keys() & {"loss", "gate_loss", "sparsity", "layer_gate_loss"}:
            assert two[name] == pytest.approx(one[name], abs=2e-6), name
        assert (two["step"], two["lr"], two["tokens"]) == (one["step"], one["lr"], one["tokens"])
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in one.items():
        # Adam divides by the square root of tiny second moments, which magnifies the order of summation.
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)


def poison(step: int, where: str) -> Any:
    """A Trainer's step after which the weights, or the gates' losses, of layer 1 are not finite."""
    before = FinetuneTrainer.training_step

    def training_step(self: FinetuneTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == step:
            names = {"layer": "layers.1.mlp.up_proj.weight", "gate": "layers.1.self_attn.seer_gate.default.k_weight"}
            found = next(p for name, p in model.named_parameters() if name.endswith(names[where]))
            found.data[..., 0] = torch.nan
        return before(self, model, *args, **kwargs)

    return training_step


@pytest.mark.parametrize(("where", "message"), [("layer", "the output of layer 1"), ("gate", "gate's loss of layer 1")])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(
    where: str, message: str, folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTrainer, "training_step", poison(4, where))
        with pytest.raises(ValueError, match=rf"finite, got nan at step 5, first seen in (the )?{message}"):
            train(folder, output)
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["checkpoint-4"]
    state = load_file(output / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in state.values())
    if where == "layer":
        train(folder, output, resume=True)
        assert_same_result(output, uninterrupted)


def test_model_and_gates_are_clipped_each_by_themselves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, seen = FinetuneTrainer._clip_grad_norm, []

    def norms(model: nn.Module) -> list[Tensor]:
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        groups = ([g for name, g in named if ("seer_gate" in name) == gates] for gates in (False, True))
        return [torch.cat([grad.flatten() for grad in group]).norm() for group in groups]

    def watched(self: FinetuneTrainer, model: nn.Module) -> Tensor:
        for name, p in model.named_parameters():
            if "seer_gate" in name:
                p.grad.mul_(100)
        before = norms(model)
        norm = clip(self, model)
        seen.append((before, norms(model)))
        assert float(norm) == pytest.approx(float(before[0]), rel=1e-5)
        return norm

    monkeypatch.setattr(FinetuneTrainer, "_clip_grad_norm", watched)
    train(folder, tmp_path / "out", replace(RUN, steps=2, target_every=1))
    for before, after in seen:
        assert all(norm > 1.5 for norm in before)
        assert [float(norm) for norm in after] == pytest.approx([1.0, 1.0], rel=1e-5)


def test_gates_without_gradient_stop_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GateLosses, "total", lambda self: torch.zeros(()))
    with pytest.raises(
        ValueError, match="every gate must have a gradient after the first step, got none for 8 weights"
    ):
        train(folder, tmp_path / "out")


def test_tied_weights_are_saved_and_resumed(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = replace(RUN, steps=2, save_steps=2)

    def tied(output: str, **options: Any) -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        source = [folder / "data.jsonl"]
        return finetune(base, tiny_tokenizer(), source, config, gate=FORM, output=tmp_path / output, **options)

    trained = tied("out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FinetuneRun, "_save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tied("again")
    resumed = tied("again", resume=True)
    base = resumed.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    for (name, found), wanted in zip(resumed.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model" / "model.safetensors")


def test_extended_context_matches_a_model_that_was_made_with_yarn() -> None:
    model = tiny_model("llama")
    extend_context(model, 4)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
    config = LlamaConfig(**{**model.config.to_dict(), "rope_parameters": rope, "max_position_embeddings": 4096})
    expected = LlamaRotaryEmbedding(config)
    at = torch.arange(0, 4096, 37)[None]
    for found, wanted in zip(model.model.rotary_emb(torch.zeros(1), at), expected(torch.zeros(1), at)):
        assert torch.equal(found, wanted)
    assert model.config.max_position_embeddings == 4096 and expected.attention_scaling > 1.1
    gated = seerattn.attach(model, AttnGateConfig())
    frequencies = next(m for m in gated.modules() if isinstance(m, AttnGate)).inv_freq
    assert torch.equal(frequencies, expected.inv_freq)
    extend_context(tiny_model("llama-yarn"), 1)
    for name in ("llama-yarn", "llama-llama3", "gemma3"):
        with pytest.raises(ValueError, match="context_factor needs a model with"):
            extend_context(tiny_model(name), 2)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"anneal": 1.5}, "anneal"),
        ({"target_share": 0.0}, "target_share"),
        ({"target_every": 0}, "target_every"),
        ({"context_factor": 0.5}, "context_factor"),
        ({"context_factor": float("inf")}, "context_factor"),
        ({"gate_lr": float("nan")}, "gate_lr"),
        ({"lr": 0.0}, "lr"),
        ({"lr": None}, "lr"),
        ({"steps": 0}, "steps"),
        ({"dense": True, "sparsity": 0.5}, "dense"),
        ({"dense": True, "anneal": 0.5}, "dense"),
    ],
)
def test_config_rejects_values_out_of_range(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must "):
        FinetuneConfig(**{"context": 256, "steps": 10} | values)


def test_sparsity_rises_linearly_and_stays() -> None:
    config = FinetuneConfig(context=256, steps=10, sparsity=0.8, anneal=0.4)
    assert [config.sparsity_at(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    assert replace(config, anneal=0.0).sparsity_at(0) == 0.8
