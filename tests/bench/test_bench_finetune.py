"""The fine-tuning benchmark: what its steps compute, the check before them, and the rows that follow."""

from dataclasses import replace

import pytest
import torch

from seerattn.bench.dense import dense_attention
from seerattn.bench.finetune import (
    ALL_BLOCKS,
    FinetuneBench,
    check_step,
    layer_step,
    losses,
    sparse_training,
    trainable,
)
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.model import TINY, BenchModel
from seerattn.bench.model_runs import random_batch
from seerattn.bench.session import Session
from seerattn.hf import distillation, finetuning
from seerattn.hf.state import layer_states
from seerattn.results.file import ResultsFile

CPU = torch.device("cpu")
# Six heads do not divide the width of the checked model.
SHAPES = [Shape(4, 2, 32, torch.float32), Shape(4, 2, 32, torch.bfloat16), Shape(6, 2, 32, torch.float32)]
TOKENS = 330


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_check_passes_all_blocks_and_fails_fewer_or_wrong_ones(shape, monkeypatch) -> None:
    sizes = {"form": "paper", "impl": "reference", "tokens": TOKENS}
    error, bound = check_step(shape, CPU, **sizes)
    assert 0 < error <= bound
    error, bound = check_step(shape, CPU, **sizes, density=0.3)
    assert error > bound
    right = finetuning.block_sparse_attention
    for wrong in (
        lambda q, k, v, *args, **kwargs: right(q, k, v.detach(), *args, **kwargs),
        lambda *args, **kwargs: right(*args, **kwargs) * torch.nan,
    ):
        monkeypatch.setattr(finetuning, "block_sparse_attention", wrong)
        error, bound = check_step(shape, CPU, **sizes)
        assert not error <= bound


def test_all_blocks_are_kept_by_the_sparse_path_in_every_layer() -> None:
    training, batch = sparse_training(ALL_BLOCKS, 0.5), random_batch(TINY, TOKENS, CPU)
    objective = trainable(BenchModel(TINY, CPU, "reference").gated("paper"))
    total, loss = losses(objective, batch, training)
    assert training.meter.layers == [0, 1] and training.meter.mean() == 1.0
    assert total.item() == pytest.approx(loss.item() + training.total().item(), rel=1e-6)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_layer_step_with_all_blocks_matches_gradients_of_dense_attention(monkeypatch) -> None:
    model, q_blocks = BenchModel(TINY, CPU, "reference").gated("paper"), -(-TOKENS // 64)
    seen = []
    right = distillation.attention_map
    monkeypatch.setattr(
        distillation, "attention_map", lambda q, k, **o: seen.append(o["query_blocks"]) or right(q, k, **o)
    )
    torch.manual_seed(5)
    dq, dk, dv, *of_gate = layer_step(model, TINY.shape, TOKENS, CPU)(sparse_training(ALL_BLOCKS, 0.5))
    torch.manual_seed(5)
    inputs = [x.double().requires_grad_() for x in random_qkv(TINY.shape, TOKENS, CPU)]
    dout = torch.randn(1, 4, TOKENS, 32)
    exact = torch.autograd.grad(dense_attention("sdpa", *inputs)(), inputs, dout.double())
    for found, wanted in zip((dq, dk, dv), exact):
        # Sums of 330 terms in fp32.
        assert float((found - wanted).norm()) <= 330 * 2**-24 * float(wanted.norm())
    assert [len(rows) for rows in seen] == [q_blocks // 2]
    gate = layer_states(model)[0].gate
    assert [g.shape for g in of_gate] == [p.shape for p in gate.parameters()]
    assert all(bool(g.any()) and bool(g.isfinite().all()) for g in of_gate)


def test_finetune_rows_have_counted_densities_and_speeds_of_their_steps() -> None:
    session = Session(CPU, ResultsFile(None))
    bench = FinetuneBench(
        contexts=[256, 130],
        densities=[0.4, 1.0],
        target_shares=[0.5],
        baselines=["sdpa", "cudnn"],
        gates=["paper"],
        impl="reference",
        repeats=2,
    )
    rows = bench.run(session, TINY)
    assert not session.failures and len(rows) == 3 * (2 + 2 * 2)
    # 4 rows of blocks, sink and diagonal kept: 1 + 2 + 2 + 2 of 10; 3 rows: 1 + 2 + 2 of 6. At sparsity 0 all.
    counted = {(r.context, r.density): r.realised_density for r in rows}
    assert counted == {
        (130, None): 1.0, (256, None): 1.0, (130, 0.4): 5 / 6, (256, 0.4): 0.7, (130, 1.0): 1.0, (256, 1.0): 1.0,
    }  # fmt: skip
    for layer, step, speed in zip(rows[::3], rows[1::3], rows[2::3]):
        assert (layer.what, step.what, speed.what) == ("finetune_layer_ms", "finetune_step_ms", "tokens_per_second")
        assert layer.cell["work"] == "fine-tuning layer" and layer.value > 0 and layer.n >= 3
        seconds = sum(step.samples["seconds"]) / 2
        assert step.value == pytest.approx(1e3 * seconds, abs=0.02) and step.cell["layers"] == 2
        assert speed.value == pytest.approx(step.context / seconds, rel=0.01) and speed.samples == step.samples
        assert {r.cell.get("target_share") for r in (layer, step)} == {None if layer.density is None else 0.5}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_sparse_training_of_a_layer_never_waits_for_the_gpu() -> None:
    gpu, shape = torch.device("cuda"), Shape(4, 2, 64, torch.bfloat16)
    model = BenchModel(replace(TINY, hidden=256, shape=shape), gpu).gated("paper")
    step = layer_step(model, shape, 1000, gpu)
    for _ in range(2):
        step(sparse_training(0.5, 0.5))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(sparse_training(0.5, 0.5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
