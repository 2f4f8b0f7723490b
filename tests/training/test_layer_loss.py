"""Loss, gradient and recall of gates inside a model, against formulas written out in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gate_forms import plain
from tiny_models import tiny_model, tokens
from torch import Tensor, nn

import seerattn
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.gate.pooling import Pooled, pool_blocks
from seerattn.hf.distillation import GateLosses
from seerattn.training.layer_loss import LayerLoss

BLOCK = 32
FORM = plain(block_q=BLOCK, block_k=BLOCK, query_subblocks=4, key_subblocks=2)


def gates_of(model: nn.Module) -> list[AttnGate]:
    return [module for module in model.modules() if isinstance(module, AttnGate)]


def perturb(model: nn.Module) -> None:
    """Moves every gate away from its initial values, so that nothing is equal by symmetry."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def gate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if "seer_gate" in name)


def run(model: nn.Module, loss: LayerLoss, **batch: Tensor) -> GateLosses:
    losses = GateLosses(loss)
    model.train()
    model(**batch, gate_losses=losses, logits_to_keep=1, use_cache=False)
    return losses


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention_inputs(base: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q and k before RoPE ``[B, heads, S, D]`` of every layer of a Llama, from its hidden states."""
    hidden = base(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    pairs = []
    for layer, x in zip(base.model.layers, hidden):
        x = layer.input_layernorm(x)
        split = (*ids.shape, -1, layer.self_attn.head_dim)
        pairs.append(
            tuple(proj(x).view(split).transpose(1, 2) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        )
    return pairs


def true_map(q: Tensor, k: Tensor, theta: float, power: float | None) -> Tensor:
    """Row-normalised maxima of the softmax over tiles, or power means of their sums over keys, ``[B, H, N, N]``."""
    positions = torch.arange(q.shape[2], dtype=torch.float64)
    k = rotate(k, positions, theta).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = rotate(q, positions, theta) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    p = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
    tiles = p.unflatten(-1, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    tiles = tiles.amax((3, 5)) if power is None else (tiles.sum(5) ** power).mean(3) ** (1 / power)
    return tiles / tiles.sum(-1, keepdim=True)


def paper_scores(gate: AttnGate, weight: Tensor, q: Tensor, k: Tensor, theta: float) -> Tensor:
    """Scores of the published form: mean queries against max, min and mean keys under one linear a query head."""
    starts = torch.arange(0, q.shape[2], BLOCK, dtype=torch.float64)
    q, k = q.unflatten(2, (-1, BLOCK)), k.unflatten(2, (-1, BLOCK))
    pooled = torch.cat((k.amax(3), k.amin(3), k.mean(3)), -1)
    # The config pools max, min, avg in this order.
    pooled = pooled.repeat_interleave(gate.group, 1) @ weight
    scores = rotate(q.mean(3), starts, theta) @ rotate(pooled, starts, theta).transpose(-1, -2)
    return scores * gate.head_dim**-0.5


@pytest.mark.parametrize("exclude_forced", [False, True])
@pytest.mark.parametrize("power", [None, 1.0, 2.0])
def test_loss_and_gradient_match_a_written_out_fp64_model(exclude_forced: bool, power: float | None) -> None:
    ids = tokens(2, 5 * BLOCK)
    target = {} if power is None else {"target_keys": "sum", "target_power": power}
    config = AttnGateConfig.paper(
        block_q=BLOCK, block_k=BLOCK, k_pooling=("max", "min", "avg"), exclude_forced=exclude_forced, **target
    )
    base = tiny_model("llama", dtype=torch.float64)
    theta = base.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        inputs = attention_inputs(base, ids)
    model = seerattn.attach(tiny_model("llama"), config)
    perturb(model)
    losses = run(model, LayerLoss(drop_rows=0.25), input_ids=ids)
    (losses.total() * 3).backward()

    expected_total = 0.0
    for index, (gate, (q, k)) in enumerate(zip(gates_of(model), inputs)):
        weight = gate.k_weight.detach().double().requires_grad_()
        target, scores = true_map(q, k, theta, power), paper_scores(gate, weight, q, k, theta)
        rows = []
        for head_target, head_scores in zip(target.flatten(0, 1), scores.flatten(0, 1)):
            for i in range(1, 5):  # a quarter of five rows is one
                free = [j for j in range(i + 1) if not (exclude_forced and j in (0, i))]
                if free:
                    t, s = head_target[i, free], head_scores[i, free]
                    t = t / t.sum()
                    rows.append((t * (t.log() - s.log_softmax(-1))).sum())
        loss = torch.stack(rows).mean()
        expected_total = expected_total + loss / 2
        (gradient,) = torch.autograd.grad(loss * 3 / 2, weight)
        # fp32 forward of a 2-layer model: a few times 1e-6 relative.
        torch.testing.assert_close(losses.metrics()[index]["loss"].double(), loss, rtol=2e-5, atol=0)
        assert (gate.k_weight.grad - gradient).norm() / gradient.norm() < 1e-4
    torch.testing.assert_close(losses.total().double(), expected_total, rtol=2e-5, atol=0)


def test_loss_leaves_the_base_model_without_gradient_and_graph() -> None:
    model = seerattn.attach(
        tiny_model("qwen3"), AttnGateConfig(block_q=BLOCK, block_k=BLOCK, distance_bias=4, qk_norm=True)
    )
    losses = run(model, LayerLoss(), input_ids=tokens(1, 96 + 17))
    total = losses.total()
    total.backward()
    for name, parameter in model.named_parameters():
        if "seer_gate" in name:
            assert parameter.requires_grad and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.requires_grad and parameter.grad is None, name


@pytest.mark.parametrize("form", ["best", "paper", "kv_group"])
def test_packed_documents_match_the_same_documents_alone(form: str) -> None:
    overrides = {"block_q": BLOCK, "block_k": BLOCK}
    config = {
        "best": AttnGateConfig(**overrides),
        "paper": AttnGateConfig.paper(**overrides),
        "kv_group": AttnGateConfig(share="kv_group", **overrides),
    }[form]
    model = seerattn.attach(tiny_model("llama"), config)
    perturb(model)
    lengths = [4 * BLOCK, 7 * BLOCK, BLOCK, 3 * BLOCK + 5]
    documents = [tokens(1, length, seed=seed) for seed, length in enumerate(lengths)]
    seen: dict[str, list[Tensor]] = {}

    class Watching(LayerLoss):
        def __call__(self, gate, q, k, target, segment_ids):
            seen.setdefault("packed" if segment_ids is not None else "alone", []).append(target)
            return super().__call__(gate, q, k, target, segment_ids)

    watching = Watching(measure=True)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    numbers = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    packed = run(model, watching, input_ids=torch.cat(documents, 1), position_ids=positions, segment_ids=numbers)
    packed.total().backward()
    gradients = [parameter.grad.clone() for parameter in gate_parameters(model)]

    model.zero_grad()
    # The third document is a single block: nothing to choose. Where forced blocks do not count, the first two rows of
    # a document have nothing to choose either.
    counted = [-(-length // BLOCK) - (2 if config.exclude_forced else 0) for length in lengths]
    weights = [0 if i == 2 else n / (sum(counted) - counted[2]) for i, n in enumerate(counted)]
    alone = [run(model, watching, input_ids=ids) for ids in documents]
    sum(weight * losses.total() for weight, losses in zip(weights, alone)).backward()

    for got, parameter in zip(gradients, gate_parameters(model)):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-7)
    for layer, metrics in packed.metrics().items():
        losses = [losses.metrics()[layer] for losses in alone]
        expected = sum(weight * m["loss"] for weight, m in zip(weights, losses))
        torch.testing.assert_close(metrics["loss"], expected, rtol=1e-5, atol=1e-7)
        for name in metrics.keys() - {"loss"}:
            expected = torch.stack([m[name] for m, length in zip(losses, lengths) if length > BLOCK]).mean()
            torch.testing.assert_close(metrics[name], expected, rtol=1e-5, atol=1e-7)
    for layer in range(2):
        begin = 0
        for index, length in enumerate(lengths):
            size = -(-length // BLOCK)
            part = seen["packed"][layer][:, :, begin : begin + size, begin : begin + size]
            torch.testing.assert_close(part, seen["alone"][2 * index + layer], rtol=1e-5, atol=1e-7)
            begin += size


@pytest.mark.parametrize("row_weight", ["uniform", "mass"])
@pytest.mark.parametrize("some_rows", [False, True])
def test_loss_and_recall_of_a_batch_are_the_means_of_its_samples_alone(some_rows: bool, row_weight: str) -> None:
    # One sample whole, two packed with other numbers of rows that count, and one of which no document counts.
    samples = [[12], [1, 6, 5], [1, 1, 7, 2, 1], [1] * 12]
    ids = torch.stack([torch.cat([torch.full((n * BLOCK,), i) for i, n in enumerate(row)]) for row in samples])
    generator = torch.Generator().manual_seed(0)
    gate = AttnGate(FORM, num_heads=4, num_kv_heads=2, head_dim=32, inv_freq=torch.ones(16))
    q, k = (torch.randn(len(ids), n, ids.shape[1], 32, generator=generator) for n in (4, 2))
    target = torch.rand(len(ids), 4, 12, 12, generator=generator).tril()
    target = target * (ids[:, None, ::BLOCK, None] == ids[:, None, None, ::BLOCK])
    target = target / target.sum(-1, keepdim=True)
    rows = {"rows": torch.tensor([1, 3, 4, 8, 9, 10])} if some_rows else {}
    loss_fn = LayerLoss(measure=True, drop_rows=0.2, row_weight=row_weight)

    def learn(*batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        at = list(batch)
        pooled = (
            Pooled(pool_blocks(x[at], size=size, start=0, kinds=kinds), size, 0, x.shape[2])
            for x, size, kinds in ((q, FORM.q_size, FORM.q_pooling), (k, FORM.k_size, FORM.k_pooling))
        )
        held = target[at][:, :, rows["rows"]] if some_rows else target[at]
        loss, metrics = loss_fn(gate, *pooled, held, None if at == [0] else ids[at], **rows)
        (gradient,) = torch.autograd.grad(loss, gate.k_weight)
        return loss.detach(), gradient, metrics

    losses, grads, metrics = zip(*(learn(sample) for sample in range(4)))
    assert losses[3] == 0 and not grads[3].any() and not metrics[3]
    assert len(set(map(float, losses))) == 4
    loss, gradient, recalls = learn(0, 1, 2, 3)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.stack(grads).mean(0), rtol=1e-4, atol=1e-8)
    assert len(recalls) == 4
    for name, value in recalls.items():
        measured = torch.stack([metrics[sample][name] for sample in range(3)])
        torch.testing.assert_close(value, measured.mean(), rtol=1e-6, atol=0)


def test_gates_that_learn_a_share_of_the_target_see_those_rows_of_it_and_leave_the_model_dense() -> None:
    model = seerattn.attach(tiny_model("llama"), FORM)
    ids, seen = tokens(2, 7 * BLOCK + 5), []

    class Watching(LayerLoss):
        def __call__(self, gate, q, k, target, segment_ids, rows=None):
            seen.append((target, rows))
            return super().__call__(gate, q, k, target, segment_ids, rows)

    def learn(**share: float) -> Tensor:
        return model(input_ids=ids, gate_losses=GateLosses(Watching(), **share), use_cache=False).logits

    learn()
    whole, drawn = [target for target, _ in seen], []
    for step in range(3):
        seen.clear()
        logits = learn(target_share=0.3, seed=1, step=step)
        with seerattn.policy(model, None):
            assert torch.equal(logits, model(input_ids=ids, use_cache=False).logits)
        for target, (part, rows) in zip(whole, seen, strict=True):
            assert len(rows) == 3
            torch.testing.assert_close(part, target[:, :, rows], rtol=1e-5, atol=1e-7)
            drawn.append(tuple(rows.tolist()))
    # Others every step and in every layer.
    assert len(set(drawn)) == len(drawn)
    mask = torch.ones_like(ids)
    mask[1, :BLOCK] = 0
    losses = GateLosses(LayerLoss(), target_share=0.3)
    with pytest.raises(ValueError, match=f"must not be padded, got rows of .*{6 * BLOCK + 5}.*; pack documents"):
        model(input_ids=ids, attention_mask=mask, gate_losses=losses, use_cache=False)


def test_padded_row_too_short_to_measure_has_no_part_in_the_recall() -> None:
    model = seerattn.attach(tiny_model("llama"), FORM)
    ids = tokens(2, 12 * BLOCK)
    mask = torch.ones_like(ids)
    mask[1, BLOCK + 3 :] = 0
    mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for order in ([0, 1], [1, 0]):
        batch = {"input_ids": ids[order], "attention_mask": mask[order], "position_ids": positions[order]}
        found = run(model, LayerLoss(measure=True), **batch).metrics()
        for layer, alone in run(model, LayerLoss(measure=True), input_ids=ids[:1]).metrics().items():
            assert found[layer].keys() == alone.keys() and len(alone) == 5
            for name in alone.keys() - {"loss"}:
                torch.testing.assert_close(found[layer][name], alone[name], rtol=1e-5, atol=0)


def test_packed_documents_within_a_block_are_rejected() -> None:
    model = seerattn.attach(tiny_model("llama"), AttnGateConfig(block_q=BLOCK, block_k=BLOCK))
    ids = tokens(1, 4 * BLOCK)
    with pytest.raises(ValueError, match="packed documents must begin on block boundaries, got one at token 70"):
        run(model, LayerLoss(), input_ids=ids, segment_ids=(torch.arange(4 * BLOCK) >= 70).long()[None])


@pytest.mark.parametrize("some_rows", [False, True])
def test_recall_matches_a_count_over_rows(some_rows: bool) -> None:
    config = plain(block_q=BLOCK, block_k=BLOCK, share="kv_group")
    generator = torch.Generator().manual_seed(0)
    blocks, heads = 24, 4
    gate = AttnGate(config, num_heads=heads, num_kv_heads=2, head_dim=32, inv_freq=torch.ones(16))
    q, k = (torch.randn(1, n, blocks * BLOCK, 32, generator=generator) for n in (heads, 2))
    target = torch.rand(1, heads, blocks, blocks, generator=generator).tril()
    target = target / target.sum(-1, keepdim=True)
    q, k = (
        Pooled(pool_blocks(x, size=size, start=0, kinds=kinds), size, 0, blocks * BLOCK)
        for x, size, kinds in ((q, config.q_size, config.q_pooling), (k, config.k_size, config.k_pooling))
    )
    counted = [0, 3, 4, 11, 22] if some_rows else list(range(blocks))
    known = {"rows": torch.tensor(counted)} if some_rows else {}
    _, metrics = LayerLoss(measure=True)(gate, q, k, target[:, :, counted], None, **known)
    scores = gate(q, k).detach().repeat_interleave(2, 1)
    # Of 300 causal blocks, two a row are 47 and three are 69, which is nearer to .2: the first, the diagonal, the best.
    for name, by in (("recall@0.2", scores), ("oracle_recall@0.2", target)):
        total = 0.0
        for head in range(heads):
            for row in counted:
                ranked = sorted(range(row + 1), key=lambda j, r=row, h=head: (j not in (0, r), -float(by[0, h, r, j])))
                total += float(target[0, head, row, ranked[:3]].sum())
        assert abs(float(metrics[name]) - total / (heads * len(counted))) < 1e-6
