"""Sparse attention with gradients inside a model: against the unpatched model and against masked dense attention."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import seerattn
from seerattn.gate import AttnGate as AttnGate
from seerattn.gate import AttnGateConfig
from seerattn.hf.chunked_loss import head_losses
from seerattn.hf.distillation import GateLosses
from seerattn.hf.finetuning import SparseTraining
from seerattn.hf.state import layer_states
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection import HeadBudgets
from seerattn.selection.block_indices import BlockIndices
from seerattn.training.layer_loss import LayerLoss
from seerattn.training.objective import Objective, is_gate

BLOCK = 32
FORM = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=4, key_subblocks=2, init="normal")
# The last block is a partial one.
IDS = tokens(2, 7 * BLOCK + 5)
# Documents of two rows, on block boundaries, the last ones partial; long enough that there are blocks to choose from.
DOCUMENTS = ((3 * BLOCK, 5 * BLOCK, 6 * BLOCK + 7), (5 * BLOCK, 9 * BLOCK + 7))


def gated(name: str = "llama", form: AttnGateConfig = FORM, **overrides) -> Objective:
    model = tiny_model(name, **overrides)
    torch.manual_seed(1)
    return trainable(seerattn.attach(model, form))


def trainable(model: nn.Module) -> Objective:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return Objective(model).train()


def training(density: float = 0.5, **options) -> SparseTraining:
    return SparseTraining(density=density, **{"loss_fn": LayerLoss()} | options)


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape)


def packed() -> tuple[Tensor, Tensor]:
    """Ids and positions of two rows of packed documents."""
    rows = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    return tokens(*rows.shape), rows


def step(objective: Objective, ids: Tensor, at: Tensor, sparse: SparseTraining | None) -> tuple[Tensor, Tensor | None]:
    """Losses of a batch; their gradients, the gates' with weight 3, are in the parameters."""
    objective.zero_grad()
    loss, gate_loss = objective(ids, at, sparse)
    (loss if gate_loss is None else loss + 3 * gate_loss).backward()
    return loss.detach(), gate_loss if gate_loss is None else gate_loss.detach()


def gradients(objective: Objective, *, gates: bool = False) -> dict[str, Tensor]:
    named = {name: p.grad for name, p in objective.named_parameters() if is_gate(name) == gates}
    return {name.rpartition("model.")[2].replace(".base_layer.", "."): grad for name, grad in named.items()}


def plain_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.rpartition("model.")[2]: p.grad for name, p in model.named_parameters()}


def test_density_1_matches_the_loss_and_gradients_of_the_unpatched_model() -> None:
    plain = tiny_model("qwen3").train()
    expected = plain(input_ids=IDS, labels=IDS, use_cache=False).loss
    expected.backward()
    objective = gated("qwen3")
    loss, gate_loss = step(objective, IDS, positions(IDS), training(1.0))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    found, wanted = gradients(objective), plain_gradients(plain)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        # The order of the sums over tokens differs between the two cross-entropies.
        assert (found[name] - grad).norm() <= 2e-6 * grad.norm(), name
    assert gate_loss > 0 and all(grad.abs().sum() > 0 for grad in gradients(objective, gates=True).values())


def test_heads_attend_to_their_share_of_the_density_where_the_gates_have_budgets() -> None:
    """The counts of every head, from the numbers of blocks that its rows may have."""
    asked = ((0.35, 0.4, 0.6, 0.65), (0.7, 0.4, 0.5, 0.4))
    full = tuple((0.9,) * 4 for _ in asked)
    about = {"block_q": BLOCK, "block_k": BLOCK, "target": str(FORM.target), "gain": "sum:1", "text": "", "windows": 1}
    objective, sparse = gated(), training(0.5)
    attachment = layer_states(objective)[0].attachment
    attachment.budgets[attachment.active] = HeadBudgets((0.5, 0.9), (100,), ((asked, full),), **about)
    attachment.refresh()
    step(objective, IDS, positions(IDS), sparse)
    rows = torch.arange(1, 9)
    reachable = torch.stack([rows.clamp(max=k).sum() for k in range(2, 9)]) / 36
    for layer, heads in enumerate(asked):
        found = sparse.blocks[layer][0][0].density()
        expected = [float(reachable[(reachable - density).abs().argmin()]) for density in heads]
        assert found.tolist() == [pytest.approx(expected)] * 2


def test_loss_of_packed_documents_matches_the_documents_alone() -> None:
    ids, at = packed()
    objective = trainable(tiny_model("llama"))
    with torch.no_grad():
        found, _ = objective(ids, at)
        samples = []
        for row, lengths in zip(ids, DOCUMENTS):
            parts = row.split(lengths)
            losses = [objective.base(input_ids=part[None], labels=part[None]).loss * (len(part) - 1) for part in parts]
            samples.append(sum(losses) / sum(len(part) - 1 for part in parts))
    torch.testing.assert_close(found, torch.stack(samples).mean(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_loss_in_pieces_matches_the_loss_of_all_logits_at_once(name: str) -> None:
    model = tiny_model(name)
    labels = IDS[:, 1:].clone()
    labels[0, 3:9] = -100
    logits = model(input_ids=IDS[:, :-1], use_cache=False).logits
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected.sum().backward()
    wanted = {parameter: p.grad for parameter, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.model(input_ids=IDS[:, :-1], use_cache=False).last_hidden_state
    # Five pieces, the last one short.
    losses = head_losses(model, hidden, labels, elements=2 * 97 * 50)
    losses.sum().backward()
    assert (losses - expected).norm() <= 2e-6 * expected.norm() and (losses[0, 3:9] == 0).all()
    for parameter, p in model.named_parameters():
        assert (p.grad - wanted[parameter]).norm() <= 5e-6 * wanted[parameter].norm(), parameter


def masked_attention(module, query, key, value, attention_mask, *, scaling, softcap=None, s_aux=None, **kwargs):
    """Dense attention with a mask over tokens ``[B, H, S, S]``, which the test puts on the module."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    keep = getattr(module, "keep", attention_mask)
    scores = scores.masked_fill(~keep, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    p = scores.softmax(-1)[..., : key.shape[2]]
    return (p @ value).transpose(1, 2), None


AttentionInterface.register("masked_oracle", masked_attention)
AttentionMaskInterface.register("masked_oracle", sdpa_mask)


def token_masks(
    sparse: SparseTraining, documents: tuple[tuple[int, ...], ...] | None, length: int
) -> dict[int, Tensor]:
    """The tokens that each layer's lists let see each other, bool ``[B, H, S, S]``."""

    def tiles(blocks: BlockIndices) -> Tensor:
        mask = blocks.to_mask().repeat_interleave(4 // blocks.num_heads, 1)
        return mask.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)

    found = {}
    for layer, lists in sparse.blocks.items():
        if documents is None:
            rows = [tiles(lists[0][0])[:, :, :length, :length]]
        else:
            rows = []
            for groups, lengths in zip(lists, documents, strict=True):
                # No two documents of a row are of equal length.
                masks = {int(n): mask for blocks in groups for n, mask in zip(blocks.q_len, tiles(blocks))}
                parts = [masks[n][:, :n, :n] for n in lengths]
                rows.append(torch.stack([torch.block_diag(*(part[head] for part in parts)) for head in range(4)])[None])
        found[layer] = torch.cat(rows).expand(2, -1, -1, -1).bool() & torch.ones(length, length).tril().bool()
    return found


CASES = {
    "llama": ("llama", FORM, False),
    "llama-packed": ("llama", FORM, True),
    "yarn-kv-group": ("llama-yarn", AttnGateConfig(block_q=BLOCK, block_k=BLOCK, share="kv_group"), False),
    "softcap-and-windows": ("gemma2", FORM, False),
    "sinks": ("gpt-oss", FORM, False),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_fp64_dense_attention_under_the_same_mask(case: str) -> None:
    name, form, is_packed = CASES[case]
    ids, at = packed() if is_packed else (IDS, positions(IDS))
    objective = gated(name, form)
    sparse = training(0.6)
    loss, _ = step(objective, ids, at, sparse)

    oracle = trainable(tiny_model(name, dtype=torch.float64))
    oracle.base.set_attn_implementation("masked_oracle")
    # The grouped product of experts has no fp64.
    oracle.base.config._experts_implementation = "eager"
    masks = token_masks(sparse, DOCUMENTS if is_packed else None, ids.shape[1])
    assert masks.keys() == {s.layer for s in layer_states(objective.base) if s.gate is not None}
    for layer, mask in masks.items():
        # Something is left out, else this would say nothing of sparse attention.
        document = (at == 0).cumsum(1)
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        causal = (causal & (document[:, :, None] == document[:, None]))[:, None]
        assert mask.sum() < 0.8 * causal.expand(mask.shape).sum()
        oracle.layers()[layer].self_attn.keep = mask
    expected, _ = step(oracle, ids, at, None)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=2e-6, atol=0)
    found = gradients(objective)
    for parameter, grad in gradients(oracle).items():
        # fp32 forward and backward of two layers against fp64.
        assert (found[parameter] - grad).norm() <= 2e-5 * grad.norm(), parameter


def test_training_attends_as_inference_does_and_packed_documents_as_alone() -> None:
    objective = gated()
    objective.eval()
    seerattn.set_policy(objective.model, seerattn.TopK(density=0.6), impl="sparse")
    ids, at = packed()
    with torch.no_grad():
        whole = objective.model(ids, position_ids=at, seer_training=training(0.6), use_cache=False).logits
        for row, lengths, logits in zip(ids, DOCUMENTS, whole):
            parts = zip(row.split(lengths), logits.split(lengths))
            for part, found in parts:
                expected = objective.model(part[None], use_cache=False).logits[0]
                # Another choice of a block would show in the first digits.
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
                dense = objective.model(part[None], seer_training=training(1.0), use_cache=False).logits[0]
                assert len(part) < 6 * BLOCK or (dense - expected).abs().max() > 0.1


def test_gradients_of_packed_documents_match_the_documents_alone() -> None:
    """In fp64, with one document far longer than the others, so that a row is attended to in several calls."""
    objective = trainable(seerattn.attach(tiny_model("llama", dtype=torch.float64), FORM))
    rows = ((2 * BLOCK, 11 * BLOCK, BLOCK, 3 * BLOCK), (3 * BLOCK, 6 * BLOCK, 2 * BLOCK, 2 * BLOCK, 3 * BLOCK + 32))
    at = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    ids, generator = tokens(*at.shape), torch.Generator().manual_seed(0)
    weights = torch.randn(*ids.shape, 97, generator=generator, dtype=torch.float64)
    sparse = training(0.4, loss_fn=None)
    logits = objective.model(ids, position_ids=at, seer_training=sparse, use_cache=False).logits
    assert [[len(blocks.q_len) for blocks in groups] for groups in sparse.blocks[0]] == [[2, 1, 1], [3, 2]]
    (logits * weights).sum().backward()
    found = {name: grad.clone() for name, grad in gradients(objective).items()}
    objective.zero_grad()
    densities = []
    for row, lengths, weight, together in zip(ids, rows, weights, logits):
        counted = []
        for part, w, expected in zip(row.split(lengths), weight.split(lengths), together.split(lengths)):
            alone = training(0.4, loss_fn=None)
            out = objective.model(part[None], seer_training=alone, use_cache=False).logits[0]
            assert (out - expected).abs().max() < 1e-12
            (out * w).sum().backward()
            counted.append(alone.blocks)
        for layer in (0, 1):
            kept = sum(int(blocks[layer][0][0].counts.sum()) for blocks in counted)
            densities.append(kept / sum(4 * n * (n + 1) / 2 for n in (size // BLOCK for size in lengths)))
    # What is counted of a batch is the mean over its samples, though the first has more causal blocks.
    assert sparse.meter.layers == [0, 1] and sparse.meter.mean() == pytest.approx(sum(densities) / 4, rel=1e-12)
    assert abs(densities[0] - densities[2]) > 0.02
    for parameter, grad in gradients(objective).items():
        assert (found[parameter] - grad).norm() <= 1e-12 * grad.norm(), parameter


def test_lists_of_long_and_short_documents_stay_near_those_of_each_alone() -> None:
    objective = gated()
    lengths = [2 * BLOCK] * 20 + [40 * BLOCK] + [3 * BLOCK, 5 * BLOCK] * 6
    at = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = tokens(*at.shape)
    sparse = training(0.2, loss_fn=None)
    with torch.no_grad():
        objective.model(ids, position_ids=at, seer_training=sparse, use_cache=False)
        alone = []
        for part in ids.split(lengths, 1):
            alone.append(training(0.2, loss_fn=None))
            objective.model(part, seer_training=alone[-1], use_cache=False)

    def entries(*parts: BlockIndices) -> int:
        return sum(blocks.indices.numel() for blocks in parts)

    def area(*parts: BlockIndices) -> int:
        """Of the map that the backward pass makes of the lists."""
        return sum(blocks.counts.numel() * blocks.num_k_blocks for blocks in parts)

    for layer in (0, 1):
        own = [each.blocks[layer][0][0] for each in alone]
        (groups,) = sparse.blocks[layer]
        for size in (entries, area):
            assert size(*own) <= size(*groups) < 1.5 * size(*own)
            assert size(BlockIndices.stack(own)) > 10 * size(*own)


def test_documents_of_similar_length_are_attended_to_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
        seen.append((q, k, v))
        return block_sparse_attention(q, k, v, *args, **options)

    monkeypatch.setattr("seerattn.hf.finetuning.block_sparse_attention", attend)
    inputs: list[tuple[Tensor, ...]] = []

    class Watching(SparseTraining):
        def learn(self, query: Tensor, key: Tensor, value: Tensor, *args) -> Tensor | None:
            inputs.append((query, key, value))
            return super().learn(query, key, value, *args)

    for lengths in ([7 * BLOCK + 5], [4 * BLOCK, 7 * BLOCK, 5 * BLOCK]):
        at = torch.cat([torch.arange(n) for n in lengths])[None]
        numbers = (at == 0).cumsum(1) - 1
        sparse = Watching(density=0.5, loss_fn=None, segment_ids=numbers)
        gated().model(tokens(*at.shape), position_ids=at, seer_training=sparse, use_cache=False)
    assert len(seen) == len(inputs) == 4
    for ours, theirs in zip(seen, inputs):
        assert all(x.data_ptr() == y.data_ptr() and x.shape == y.shape for x, y in zip(ours, theirs))


@pytest.mark.parametrize("form", [FORM, replace(FORM, target_keys="sum", target_power=2)], ids=["published", "sum-2"])
def test_loss_on_all_rows_matches_distillation(form: AttnGateConfig) -> None:
    """The dense forward sees the same q and k as distillation, so the gates get the same loss and gradients."""
    for ids, at in ((IDS, positions(IDS)), packed()):
        objective = gated(form=form)
        sparse = training(1.0, target_share=1.0)
        _, loss = step(objective, ids, at, sparse)
        found = gradients(objective, gates=True)
        objective.zero_grad()
        losses = GateLosses(LayerLoss())
        objective.model(input_ids=ids, position_ids=at, gate_losses=losses, logits_to_keep=1, use_cache=False)
        (3 * losses.total()).backward()
        torch.testing.assert_close(loss, losses.total().detach(), rtol=1e-5, atol=0)
        for name, grad in gradients(objective, gates=True).items():
            assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_loss_on_some_rows_matches_those_rows_of_the_whole_loss() -> None:
    ids, at = packed()
    kept: dict[int, Tensor] = {}

    class Whole(LayerLoss):
        """All rows, those that were not drawn with an empty target."""

        def __call__(self, gate, q, k, target, segment_ids, rows):
            number = len(kept)
            kept[number] = torch.zeros(target.shape[2], dtype=torch.bool)
            kept[number][some.rows(number, target.shape[2])] = True
            return super().__call__(gate, q, k, target * kept[number][:, None], segment_ids)

    for batch in ((ids, at), (IDS, positions(IDS))):
        kept.clear()
        objective = gated()
        some = training(1.0, target_share=0.4, seed=3, step=2)
        _, loss = step(objective, *batch, some)
        found = gradients(objective, gates=True)
        _, expected = step(objective, *batch, training(1.0, loss_fn=Whole()))
        assert {int(mask.sum()) for mask in kept.values()} == {math.ceil(0.4 * len(kept[0]))} and not torch.equal(
            kept[0], kept[1]
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for name, grad in gradients(objective, gates=True).items():
            assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_rows_are_a_function_of_seed_step_and_layer() -> None:
    drawn = {
        (seed, at, layer): tuple(training(target_share=0.1, seed=seed, step=at).rows(layer, 41).tolist())
        for seed in range(2)
        for at in range(30)
        for layer in range(2)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert all(list(rows) == sorted(set(rows)) and len(rows) == 5 for rows in drawn.values())
    assert {row for rows in drawn.values() for row in rows} == set(range(41))
    assert tuple(training(target_share=0.1, seed=1, step=7).rows(1, 41).tolist()) == drawn[1, 7, 1]


def test_gates_and_model_get_no_gradient_of_each_others_loss() -> None:
    objective = gated()
    at = positions(IDS)
    loss, gate_loss = objective(IDS, at, training())
    gate_loss.backward()
    assert all(grad is None for grad in gradients(objective).values())
    alone = gradients(objective, gates=True)
    assert all(grad.abs().sum() > 0 for grad in alone.values())
    alone = {name: grad.clone() for name, grad in alone.items()}
    loss.backward()
    assert all(torch.equal(grad, alone[name]) for name, grad in gradients(objective, gates=True).items())
    together = {name: grad.clone() for name, grad in gradients(objective).items()}
    step(objective, IDS, at, training(loss_fn=None))
    assert all(grad is None for grad in gradients(objective, gates=True).values())
    assert all(torch.equal(grad, together[name]) for name, grad in gradients(objective).items())


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_matches_keeping_everything(reentrant: bool, density: float) -> None:
    ids, at = packed() if density < 1 else (IDS, positions(IDS))
    objective = gated()
    expected = step(objective, ids, at, training(density))
    wanted = gradients(objective) | gradients(objective, gates=True)

    calls: list[int] = []

    class Counting(LayerLoss):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    runs: list[int] = []
    objective.layers()[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    objective.set_checkpointing(True)
    for layer in objective.layers():
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    sparse = training(density, loss_fn=Counting())
    found = step(objective, ids, at, sparse)
    assert len(runs) == 2 and len(calls) == 2
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for name, grad in (gradients(objective) | gradients(objective, gates=True)).items():
        assert torch.equal(grad, wanted[name]), name


def test_autocast_matches_fp32_within_bf16_and_keeps_the_gates_in_fp32() -> None:
    objective = gated()
    at = positions(IDS)
    expected = step(objective, IDS, at, training(1.0))
    seen: list[torch.dtype] = []

    class Watching(LayerLoss):
        def __call__(self, gate, q, k, *args, **kwargs):
            seen.append(gate.forward(q, k).dtype)
            return super().__call__(gate, q, k, *args, **kwargs)

    with torch.autocast("cpu", torch.bfloat16):
        dense = step(objective, IDS, at, training(1.0, loss_fn=Watching()))
        sparse = step(objective, IDS, at, training(0.999, loss_fn=Watching()))
    assert set(seen) == {torch.float32}
    for loss, reference in zip(dense, expected):
        # Rounding of two layers to 8 bits.
        torch.testing.assert_close(loss, reference, rtol=2e-2, atol=0)
    # A density of nearly 1 keeps every block, so only the order of rounding differs.
    torch.testing.assert_close(sparse[0], dense[0], rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"attention_mask": torch.arange(64)[None].expand(2, -1) >= 5}, "must not be padded"),
        ("dropout", {}, "attention dropout must be 0"),
        ("llama", {"position_ids": torch.cat((torch.arange(40), torch.arange(24)))[None]}, "on block boundaries"),
    ],
)
def test_training_rejects(name: str, options: dict, message: str) -> None:
    objective = gated("llama", **({"attention_dropout": 0.1} if name == "dropout" else {}))
    with pytest.raises(ValueError, match=message):
        objective.model(input_ids=tokens(2, 64), seer_training=training(), use_cache=False, **options)


FSDP = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path[:0] = {paths!r}
from test_finetune_attention import IDS, AttnGate, gated, gradients, positions, step, training
from seerattn.training.objective import is_gate
objective = gated()
step(objective, IDS, positions(IDS), training(0.4, target_share=0.5))
wanted = {{name: p.grad for name, p in objective.named_parameters()}}
dist.init_process_group("gloo")
for own in (True, False):
    sharded = gated()
    sharded.set_checkpointing(own)
    for module in [m for m in sharded.modules() if own and isinstance(m, AttnGate)]:
        fully_shard(module)
    for layer in sharded.layers():
        fully_shard(layer)
    fully_shard(sharded)
    for _ in range(2):
        rank = slice(dist.get_rank(), dist.get_rank() + 1)
        step(sharded, IDS[rank], positions(IDS[rank]), training(0.4, target_share=0.5))
    for name, parameter in sharded.named_parameters():
        grad = parameter.grad.full_tensor()
        error = float((grad - wanted[name]).norm() / wanted[name].norm())
        assert error < 1e-6, (own, name, error)
dist.barrier()
# Without taking torch's threads down: in 1 of some 60 runs that aborted the process.
os._exit(0)
"""


def test_fsdp2_on_two_processes_matches_one() -> None:
    """With gates as units of their own, and with gates inside the units of their layers."""
    here = Path(__file__).parent
    code = FSDP.format(paths=[str(here), str(here.parent)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
