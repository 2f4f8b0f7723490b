"""Runs under accelerate's FSDP2: the first process alone reads weights, and two processes train as one.

What accelerate would do with GPUs it does here with CPUs, see `two_processes.ON_CPUS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from tiny_corpus import tiny_tokenizer, write_documents, write_model
from tiny_models import tiny_model
from two_processes import FSDP, ON_CPUS

from seerattn.cli import main
from seerattn.gate import AttnGateConfig
from seerattn.training.finetune import FinetuneConfig, FinetuneRun
from seerattn.training.objective import stand_in

OPTIONS = {
    "--context": 256,
    "--steps": 4,
    "--batch-size": 4,
    "--lr": 1e-3,
}
SETTINGS = ("logging_steps=2", "save_steps=2")
# One sub-block a side, so that no maximum hangs on the order of a sum.
GATE = ("block_q=32", "block_k=32", "query_subblocks=1", "key_subblocks=1", "init=normal")
ONLY_FINETUNE = {"--sparsity": 0.5, "--context-factor": 2}
ONLY_FINETUNE_SETTINGS = ("target_share=0.5", "target_every=2", "gate_lr=1e-3")
RUN = (
    ON_CPUS
    + """
def step(self, model, *args, run=FinetuneTrainer.training_step, **kwargs):
    loss = run(self, model, *args, **kwargs)
    # Gradients that were not reduced yet would be whole, and held by FSDP out of the parameters.
    missing = [name for name, p in model.named_parameters() if p.grad is None and "seer_gate" not in name]
    assert not missing, f"gradients were not reduced after a micro-batch: {missing}"
    return loss

FinetuneTrainer.training_step = step
if sys.argv.pop() == "autocast":
    FinetuneRun.autocasts = True
main(sys.argv[1:])
"""
)
# Something breaks in the second process alone; what each process says of it goes to a file of its own.
BREAK = (
    ON_CPUS
    + """
from pathlib import Path

def break_loss(self, model, *args, run=FinetuneTrainer.training_step, **kwargs):
    if dist.get_rank() == 1 and self.state.global_step == 1:
        layer = self.accelerator.unwrap_model(model).layers()[1]
        layer.register_forward_hook(lambda module, args, out: out * torch.nan)
    return run(self, model, *args, **kwargs)

def break_gradient(self, model, run=FinetuneTrainer._clip_grad_norm):
    for name, p in model.named_parameters():
        if name.endswith("layers.0.mlp.down_proj.weight") and dist.get_rank() == 1:
            p.grad.to_local().fill_(torch.inf)
    return run(self, model)

def swell_gradient(self, model, run=FinetuneTrainer._clip_grad_norm):
    for name, p in model.named_parameters():
        p.grad.to_local().fill_(1e30)
    return run(self, model)

where, told = sys.argv.pop(), Path(sys.argv.pop())
if where == "loss":
    FinetuneTrainer.training_step = break_loss
else:
    FinetuneTrainer._clip_grad_norm = break_gradient if where == "gradient" else swell_gradient

def run_and_tell(*args, run=FinetuneRun.run, **kwargs):
    try:
        run(*args, **kwargs)
    except ValueError as error:
        (told / str(dist.get_rank())).write_text(str(error))

FinetuneRun.run = run_and_tell
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
dist.barrier()
"""
)
PROBE = """
import os
import sys
from contextlib import nullcontext
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from transformers.models.llama import modeling_llama
sys.path.insert(0, {tests!r})
from tiny_models import tiny_model
from two_processes import FSDP, ON_CPUS
from seerattn.hf.probe import probe

def facts(layers):
    return [(x.name, x.layer, x.num_heads, x.num_kv_heads, x.head_dim, x.rotation and x.rotation.width) for x in layers]

names = ("llama", "llama-yarn", "smollm3", "phi", "glm", "gemma3")
wanted = {{name: probe(tiny_model(name)) for name in names}}
dist.init_process_group("gloo")
positions = torch.tensor([[3, 70]])
for name in names:
    with nullcontext() if dist.get_rank() == 0 else init_empty_weights():
        model = tiny_model(name)
    found = probe(model)
    assert facts(found) == facts(wanted[name]), name
    for layer, own in zip(found, wanted[name]):
        assert layer.module is model.get_submodule(layer.name)
        if own.rotation is None:
            continue
        x = torch.randn(1, 2, 2, own.head_dim)
        tables = layer.rotation.tables(positions, x), own.rotation.tables(positions, x)
        assert all(torch.equal(a, b) for a, b in zip(*tables)), name
        assert torch.equal(layer.rotation.rotate(x, *tables[0]), own.rotation.rotate(x, *tables[1])), name

def refused(model, message):
    try:
        probe(model)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("the model was not refused")

with init_empty_weights():
    refused(tiny_model("llama"), "must have weights in the first process")
# The first process alone can see that this model is to be refused.
rotate = modeling_llama.apply_rotary_pos_emb
if dist.get_rank() == 0:
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: (rotate(q, k, cos, sin)[0] + sin[:, None], k)
with nullcontext() if dist.get_rank() == 0 else init_empty_weights():
    model = tiny_model("llama")
refused(model, "negating the sine")
dist.barrier()
# Without taking torch's threads down: in 1 of some 60 runs that aborted the process.
os._exit(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_model(folder / "model")
    # Packed documents: how many a process has must not decide how often it gathers a gate.
    write_documents(folder / "distill.jsonl", 1200, 700, 300, 150, 100, 70)
    write_documents(folder / "finetune.jsonl", 2000, 700, 300, 150, 100, 70)
    return folder


# Stops after a checkpoint.
STOP = (
    ON_CPUS
    + """
def step(self, model, *args, run=FinetuneTrainer.training_step, **kwargs):
    if self.state.global_step == 3:
        raise ValueError("enough for today")
    return run(self, model, *args, **kwargs)

FinetuneTrainer.training_step = step
main(sys.argv[1:])
"""
)


def two_processes(code: str, *arguments: str, count: int = 2, **variables: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | FSDP | variables
    command = [*launch, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def command(kind: str, folder: Path, output: Path) -> list[str]:
    options: dict[str, Any] = {"--model": folder / "model", "--data": folder / f"{kind}.jsonl", "--output": output}
    options |= OPTIONS | (ONLY_FINETUNE if kind == "finetune" else {})
    settings = SETTINGS + (ONLY_FINETUNE_SETTINGS if kind == "finetune" else ())
    pairs = [*options.items(), *(("--set", word) for word in settings), *(("--gate", word) for word in GATE)]
    return [kind, *(str(word) for pair in pairs for word in pair)]


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "precision"), [("finetune", "float32"), ("finetune", "autocast"), ("distill", "float32")]
)
def test_two_processes_with_the_weights_of_one_match_one_process(
    kind: str, precision: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast, which a CPU is not asked for, is what one process gets of accelerate and two do by themselves."""
    if precision == "autocast":
        monkeypatch.setattr(FinetuneRun, "autocasts", True)
    done = two_processes(RUN, *command(kind, folder, tmp_path / "two"), precision, ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit) as stop:
        main(command(kind, folder, tmp_path / "one"))
    assert not stop.value.code
    for two, one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in two.keys() - {"tokens_per_second"}:
            assert two[name] == pytest.approx(one[name], abs=2e-6), name
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors")}
    assert len(files) == (2 if kind == "finetune" else 1)
    for file in files:
        one, two = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for name, weight in one.items():
            # Adam divides by the square root of tiny second moments, which magnifies the order of summation.
            torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)


def test_a_sharded_run_goes_on_with_more_processes_and_not_as_one_that_is_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped = command("finetune", folder, tmp_path / "stopped")
    done = two_processes(STOP, *stopped, ACCELERATE_TORCH_DEVICE="cpu")
    assert "enough for today" in done.stderr
    with pytest.raises(SystemExit) as refused:
        main([*stopped, "--resume"])
    assert refused.value.code == 2 and "a run that was begun with FSDP must go on so" in capsys.readouterr().err
    go_on = [*stopped, "--resume", "float32"]
    done = two_processes(RUN, *go_on, count=4, ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit):
        main(command("finetune", folder, tmp_path / "one"))
    for four, one in zip(records(tmp_path / "stopped"), records(tmp_path / "one"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], abs=2e-6)
    for file in (f"{part}/{name}.safetensors" for part, name in (("model", "model"), ("gates", "adapter_model"))):
        one, four = load_file(tmp_path / "one" / file), load_file(tmp_path / "stopped" / file)
        for name, weight in one.items():
            # See above.
            torch.testing.assert_close(four[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("loss", "loss must be finite, got nan at step 2, first seen in the output of layer 1; "),
        ("gradient", "gradients must be finite, got others at step 1, first seen in that of "),
        ("norm", "gradients must have a finite norm, got one that overflows at step 1, though each of them is finite"),
    ],
)
def test_what_breaks_in_one_process_is_told_alike_by_all(
    broken: str, message: str, folder: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    told.mkdir()
    arguments = [*command("finetune", folder, tmp_path / "out"), str(told), broken]
    done = two_processes(BREAK, *arguments, ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    first, second = ((told / rank).read_text() for rank in "01")
    assert first == second and first.startswith(message)
    assert broken != "gradient" or "layers.0.mlp.down_proj.weight;" in first


def test_the_first_process_proves_a_model_for_all() -> None:
    done = two_processes(PROBE.format(tests=str(Path(__file__).parents[1])))
    assert done.returncode == 0, done.stderr


def test_fsdp_where_accelerate_would_not_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    code = "import sys; from seerattn.cli import main; main(sys.argv[1:])"
    done = two_processes(code, *command("finetune", folder, tmp_path / "out"), "--device", "cpu")
    assert done.returncode != 0
    assert "seerattn: FSDP needs an accelerator for every process, got device cpu" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version must be 2, got 1"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision must be no with FSDP"),
    ],
)
def test_fsdp_that_would_train_otherwise_is_refused(
    variables: dict[str, str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name, value in (FSDP | variables | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main([*command("finetune", folder, tmp_path / "out"), "--device", "cpu"])
    assert stop.value.code == 2 and f"seerattn: {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_stand_ins_have_an_address_each_and_hold_one_number() -> None:
    with init_empty_weights():
        model = tiny_model("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    model.tie_weights()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.model.norm.weight.requires_grad_(False)
    stand_in(model)
    stands = dict(model.named_parameters())
    assert {name: p.shape for name, p in stands.items()} == shapes and "lm_head.weight" not in stands
    assert len({p.data_ptr() for p in stands.values()}) == len(stands)
    assert all(p.untyped_storage().nbytes() == 2 and p.dtype == torch.bfloat16 for p in stands.values())
    assert [name for name, p in stands.items() if not p.requires_grad] == ["model.norm.weight"]


def test_plan_computes_for_the_device_that_trains(folder: Path) -> None:
    config = FinetuneConfig(context=256, steps=1, batch_size=1)
    for device, autocasts in (("cuda", True), ("cpu", False)):
        with init_empty_weights():
            model = tiny_model("llama")
        options = {"gate": AttnGateConfig(block_q=32, block_k=32), "device": torch.device(device)}
        prepared = FinetuneRun.plan(model, tiny_tokenizer(), [folder / "distill.jsonl"], config, **options)
        assert prepared.autocasts == autocasts
        assert ("working copies" in prepared.describe()["memory, one process"]) == autocasts
