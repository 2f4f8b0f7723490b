"""Steps of training: which rate moves what, gradients of micro-batches, rows of targets, and what is told of breaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_corpus import tiny_tokenizer, write_documents, write_model
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from seerattn.data.samples import collate
from seerattn.gate import AttnGateConfig
from seerattn.hf.chunked_loss import head_losses
from seerattn.hf.finetuning import SparseTraining
from seerattn.training.distill import DistillConfig, distill
from seerattn.training.finetune import FinetuneConfig, finetune
from seerattn.training.finetune_trainer import FinetuneTrainer
from seerattn.training.objective import is_gate

# One sub-block a side, so that no maximum hangs on the order of a sum.
FORM = AttnGateConfig(block_q=32, block_k=32, query_subblocks=1, key_subblocks=1, init="normal")
STEP: dict[str, Any] = {"context": 256, "steps": 1, "batch_size": 4, "warmup_steps": 0, "save_steps": 10}
SPARSE = STEP | {"sparsity": 0.5, "target_share": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a document that fills many samples."""
    folder = tmp_path_factory.mktemp("steps")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 5000)
    return folder


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def train(kind: Callable[..., Any], folder: Path, output: Path, config: Any, model: nn.Module | None = None) -> Any:
    source, model = [folder / "data.jsonl"], load(folder) if model is None else model
    return kind(model, tiny_tokenizer(), source, config, gate=FORM, output=output)


def watch_gradients(
    monkeypatch: pytest.MonkeyPatch, trainer: type[Trainer], change: Callable[[str, Tensor], None] = lambda *_: None
) -> list[dict[str, Tensor]]:
    """The gradients of every step before they are clipped, after a change to them."""
    seen, clip = [], trainer._clip_grad_norm

    def watched(self: Trainer, model: nn.Module) -> Any:
        named = {name: p for name, p in model.named_parameters() if p.grad is not None}
        for name, p in named.items():
            change(name, p.grad)
        seen.append({name: p.grad.clone() for name, p in named.items()})
        return clip(self, model)

    monkeypatch.setattr(trainer, "_clip_grad_norm", watched)
    return seen


def test_each_learning_rate_moves_its_own_weights_and_no_weight_decays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before = watch_gradients(monkeypatch, FinetuneTrainer), {}
    prepare = FinetuneTrainer.create_optimizer

    def noting(self: FinetuneTrainer, model: nn.Module | None = None) -> torch.optim.Optimizer:
        before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return prepare(self, model)

    monkeypatch.setattr(FinetuneTrainer, "create_optimizer", noting)
    rates = {False: 1e-3, True: 4e-3}
    trained = train(finetune, folder, tmp_path / "out", FinetuneConfig(**SPARSE, lr=rates[False], gate_lr=rates[True]))
    [gradients], idle = seen, 0
    for name, weight in trained.named_parameters():
        name = "model." + name
        moved, gradient = (weight.detach() - before[name]).abs(), gradients[name]
        # Adam's first step is the rate itself, less where the gradient is not far above its epsilon of 1e-8.
        assert float(moved.max()) == pytest.approx(rates[is_gate(name)], rel=1e-3), name
        assert bool((moved[gradient == 0] == 0).all())
        idle += int((gradient == 0).sum())
    # Embeddings of tokens that the text has not: decay would move them.
    assert idle > 64


def with_labels(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = collate(samples)
    return batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize(
    ("kind", "trainer", "config", "labels"),
    [
        (finetune, FinetuneTrainer, FinetuneConfig(**SPARSE), False),
        (finetune, FinetuneTrainer, FinetuneConfig(**SPARSE), True),
        (distill, Trainer, DistillConfig(**STEP), False),
    ],
    ids=["finetune", "finetune with labels", "distill"],
)
def test_gradient_of_four_micro_batches_matches_that_of_one_batch(
    kind: Callable,
    trainer: type[Trainer],
    config: Any,
    labels: bool,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the Trainer finds labels in a batch, by whose number it would rather divide."""
    seen = watch_gradients(monkeypatch, trainer)
    if labels:
        monkeypatch.setattr("seerattn.training.run.collate", with_labels)
    for size in (1, 4):
        values = vars(config) | {"micro_batch_size": size}
        train(kind, folder, tmp_path / str(size), type(config)(**values))
    apart, together = seen
    assert apart.keys() == together.keys() and any(map(is_gate, apart))
    for name, gradient in together.items():
        assert float((apart[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def packed(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch whose documents stay in the rows of their samples."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return batch | {"segment_ids": (batch["position_ids"] == 0).cumsum(1) - 1}


@pytest.mark.parametrize("dense", [False, True])
def test_gradient_of_windows_as_rows_matches_that_of_windows_packed_into_one_row(
    dense: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_gradients(monkeypatch, FinetuneTrainer)
    sparse = {} if dense else {"sparsity": 0.3, "target_share": 1.0}
    config = FinetuneConfig(**STEP, **sparse, dense=dense, window_lengths=(128, 256))
    trained = []
    for name in ("rows", "packed"):
        gate = {} if dense else {"gate": FORM}
        trained.append(
            finetune(load(folder), tiny_tokenizer(), [folder / "data.jsonl"], config, **gate, output=tmp_path / name)
        )
        monkeypatch.setattr("seerattn.training.run.collate", packed)
    rows, alike = seen
    assert rows.keys() == alike.keys() and any(map(is_gate, rows)) != dense
    for name, gradient in alike.items():
        assert float((rows[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_rows_of_the_targets_are_drawn_anew_in_every_step_and_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], SparseTraining.rows

    def rows(self: SparseTraining, layer: int, num_q_blocks: int) -> Tensor:
        found = draw(self, layer, num_q_blocks)
        drawn.append((layer, *found.tolist()))
        return found

    monkeypatch.setattr(SparseTraining, "rows", rows)
    values = SPARSE | {"steps": 3, "batch_size": 2, "context": 1024}
    train(finetune, folder, tmp_path / "out", FinetuneConfig(**values))
    # Micro-batches of a step share them: 3 steps of 2 layers, each seen twice.
    assert len(drawn) == 12 and len(set(drawn)) == 6
    assert len({rows[1:] for rows in drawn}) == 6


def stopped(folder: Path, output: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(ValueError) as error:
        train(finetune, folder, output, FinetuneConfig(**SPARSE), model)
    return str(error.value)


@pytest.mark.parametrize("gates", [False, True], ids=["model", "gates"])
def test_finite_gradients_whose_norm_overflows_are_told_from_broken_ones(
    gates: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swell(name: str, gradient: Tensor) -> None:
        if is_gate(name) == gates:
            gradient.fill_(1e30)

    watch_gradients(monkeypatch, FinetuneTrainer, swell)
    message = stopped(folder, tmp_path / "out")
    assert message.startswith(
        "gradients must have a finite norm, got one that overflows at step 1, though each of them"
    )


def test_gradient_that_broke_first_in_the_backward_pass_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * torch.inf)
    model.model.embed_tokens.weight.register_hook(lambda grad: grad * torch.nan)
    message = stopped(folder, tmp_path / "out", model)
    assert "gradients must be finite, got others at step 1, first seen in that of" in message
    assert "layers.0.mlp.down_proj.weight;" in message
    # What a resumed run refuses is no advice.
    assert message.endswith("otherwise begin anew in another folder with a smaller lr or gate_lr or with other text")


def test_losses_of_rounded_logits_are_taken_in_fp32() -> None:
    model, ids = tiny_model("llama", dtype=torch.bfloat16), tokens(2, 200)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        losses = head_losses(model, hidden[:, :-1], ids[:, 1:])
        logits = model.lm_head(hidden[:, :-1])
    exact = F.cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert losses.dtype == torch.float32
    # Sums of 97 exponentials in fp32; one rounding to bfloat16 is 2^-9.
    torch.testing.assert_close(losses.flatten().double(), exact, rtol=97 * 2**-24, atol=97 * 2**-24)
