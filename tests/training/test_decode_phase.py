"""Gates that learn to choose for single tokens: targets, scores and losses against fp64, and whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gate_forms import plain
from tiny_corpus import tiny_tokenizer, write_documents, write_model
from tiny_models import tiny_model, tokens
from torch import Tensor

import seerattn
from seerattn.gate import AttnGateConfig
from seerattn.gate.pooling import Pooled, pool_blocks
from seerattn.hf.distillation import GateLosses
from seerattn.training.distill import DistillConfig, distill
from seerattn.training.layer_loss import LayerLoss
from seerattn.training.output import check_same_run
from seerattn.training.trainer import DistillTrainer
from tests.gate.test_attn_gate import FORMS, HKV, H, make, oracle, qk
from tests.training.test_layer_loss import attention_inputs, gate_parameters, perturb, rotate

BLOCK = 32
FORM = plain(block_q=BLOCK, block_k=BLOCK, query_subblocks=4, key_subblocks=2)
SUMS = replace(FORM, target_keys="sum", target_power=4.0)


class Watching(LayerLoss):
    """Notes what single tokens are to learn."""

    def __call__(self, gate, q, k, target, segment_ids, **rows: Tensor):
        if "tokens" in rows:
            seen.append((target, rows["tokens"]))
        return super().__call__(gate, q, k, target, segment_ids, **rows)


seen: list[tuple[Tensor, Tensor]] = []


@pytest.fixture(autouse=True)
def _unseen() -> None:
    seen.clear()


def true_rows(q: Tensor, k: Tensor, theta: float, keys: str, begin: int) -> Tensor:
    """What each token of one document gives to each of its blocks, ``[B, H, S, N]``, by a loop over tokens in fp64."""
    places = torch.arange(q.shape[2], dtype=torch.float64)
    k = rotate(k, places, theta).repeat_interleave(q.shape[1] // k.shape[1], 1)
    q = rotate(q, places, theta)
    out = torch.zeros(*q.shape[:3], -(-q.shape[2] // BLOCK), dtype=torch.float64)
    for t in range(q.shape[2]):
        p = (torch.einsum("bhd,bhkd->bhk", q[:, :, t], k[:, :, : t + 1]) * q.shape[-1] ** -0.5).softmax(-1)
        for j in range(t // BLOCK + 1):
            part = p[..., j * BLOCK : (j + 1) * BLOCK]
            out[:, :, t, j] = part.amax(-1) if keys == "max" else part.sum(-1)
    return out / out.sum(-1, keepdim=True)


@pytest.mark.parametrize("config", [FORM, SUMS], ids=["max", "sum"])
def test_target_of_a_token_is_its_softmax_row_in_whole_packed_and_padded_sequences(config: AttnGateConfig) -> None:
    base = tiny_model("llama", dtype=torch.float64)
    theta = base.config.rope_parameters["rope_theta"]
    model = seerattn.attach(tiny_model("llama"), config)
    lengths = [4 * BLOCK, 3 * BLOCK + 7]
    documents = [tokens(1, n, seed=seed) for seed, n in enumerate(lengths)]
    with torch.no_grad():
        inputs = [attention_inputs(base, ids) for ids in documents]
    rows = [[true_rows(*layer, theta, config.target_keys, 0) for layer in pairs] for pairs in inputs]

    def learn(**batch: Tensor) -> None:
        seen.clear()
        model(**batch, gate_losses=GateLosses(Watching(), phase="decode", decode_rows=40), use_cache=False)

    learn(input_ids=documents[1])
    for layer, (target, at) in enumerate(seen):
        assert len(at) == len(set(at.tolist())) == 40 and at.tolist() == sorted(at.tolist())
        torch.testing.assert_close(target.double(), rows[1][layer][:, :, at], rtol=1e-4, atol=1e-6)

    places = torch.cat([torch.arange(n) for n in lengths])[None]
    learn(input_ids=torch.cat(documents, 1), position_ids=places)
    for layer, (target, at) in enumerate(seen):
        expected = torch.zeros_like(target, dtype=torch.float64)
        for row, t in enumerate(at.tolist()):
            second = t >= lengths[0]
            own = rows[second][layer][:, :, t - lengths[0] * second]
            begin = lengths[0] // BLOCK * second
            expected[:, :, row, begin : begin + own.shape[-1]] = own
        torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-6)

    pad = lengths[0] - lengths[1]
    ids = torch.cat([documents[0], torch.nn.functional.pad(documents[1], (pad, 0))])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    learn(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for number, (target, at) in enumerate(seen):
        layer, row = divmod(number, 2)
        torch.testing.assert_close(target.double(), rows[row][layer][:, :, at], rtol=1e-4, atol=1e-6)


def learned(
    gate, q: Tensor, k: Tensor, target: Tensor, at: Tensor, ids: Tensor | None = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of single tokens, of q and k before RoPE."""
    size, kinds = gate.config.k_size, gate.config.k_pooling
    if "salient" in kinds:
        size, kinds = 1, ("avg",)
    keys = Pooled(pool_blocks(k, size=size, start=0, kinds=kinds), size, 0, k.shape[2])
    return LayerLoss(**options)(gate, Pooled(q, 1, 0, q.shape[2]), keys, target, ids, tokens=at)


def random_target(q: Tensor, at: Tensor, block: int, seed: int = 3) -> Tensor:
    """Rows ``[B, H, R, N]`` over the blocks up to that of each token."""
    number = -(-q.shape[2] // block)
    target = torch.rand(*q.shape[:2], len(at), number, generator=torch.Generator().manual_seed(seed))
    target = target * (torch.arange(number) <= at[:, None] // block)
    return target / target.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", FORMS)
def test_loss_is_that_of_what_decoding_computes_in_fp64_for_each_token_alone(name: str) -> None:
    gate = make(FORMS[name])
    block, forced = gate.config.block_k, gate.config.exclude_forced
    q, k = qk(150)
    at = torch.tensor([0, 5, 31, 32, 63, 64, 70, 95, 96, 97, 128, 140, 149])
    target = random_target(q, at, block)
    loss, metrics = learned(gate, q, k, target, at, measure=True)
    losses = []
    for b in range(len(q)):
        rows = []
        for row, t in enumerate(at.tolist()):
            blocks = t // block
            scores = oracle(gate, q[b : b + 1, :, t : t + 1], k[b : b + 1, :, : t + 1])[0, :, 0, :blocks]
            scores, wanted = scores[:, forced:], target[b, :, row, forced:blocks].double()
            if not scores.shape[1]:
                continue
            for head in range(HKV):
                of = slice(head * len(scores) // HKV, (head + 1) * len(scores) // HKV)
                given = scores[of].softmax(-1).amax(0)
                given = given / given.sum()
                asked = wanted[head * H // HKV : (head + 1) * H // HKV].amax(0)
                asked = asked / asked.sum()
                rows.append((asked * (asked.log() - given.log())).sum())
        losses.append(torch.stack(rows).mean())
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(loss, list(gate.parameters()))
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert set(metrics) == {f"{o}decode_recall@{d}" for o in ("", "oracle_") for d in (0.1, 0.2)}


def test_tokens_of_packed_documents_learn_as_they_do_alone() -> None:
    gate = make(FORMS["default"])
    block = gate.config.block_k
    lengths = [4 * block, block, 6 * block, 3 * block + 5]
    q, k = qk(sum(lengths))
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, -1)
    at = torch.arange(1, sum(lengths), 3)
    target = torch.zeros(2, H, len(at), -(-sum(lengths) // block))
    total, count, begin, recalls = 0.0, 0, 0, []
    for n in lengths:
        here = (at >= begin) & (at < begin + n)
        own = at[here] - begin
        rows = random_target(q[:, :, begin : begin + n], own, block, seed=begin)
        first = begin // block
        target[:, :, here, first : first + rows.shape[-1]] = rows
        part = (x[:, :, begin : begin + n] for x in (q, k))
        loss, metrics = learned(gate, *part, rows, own, measure=True)
        counted = int((own // block > 1).sum()) if n >= 2 * block else 0
        total, count, begin = total + loss.double() * counted, count + counted, begin + n
        recalls += [metrics] if counted else []
        assert bool(metrics) == bool(counted)
    loss, metrics = learned(gate, q, k, target, at, ids, measure=True)
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-5, atol=1e-7)
    assert len(recalls) == 3
    for name, value in metrics.items():
        torch.testing.assert_close(value, torch.stack([m[name] for m in recalls]).mean(), rtol=1e-5, atol=0)


def test_first_tokens_are_left_out_by_their_share_of_a_document() -> None:
    gate, (q, k), at = make(FORMS["default"]), qk(200), torch.arange(0, 200, 7)
    target = random_target(q, at, gate.config.block_k)
    kept = at >= 100
    expected, _ = learned(gate, q, k, target[:, :, kept], at[kept])
    assert torch.equal(learned(gate, q, k, target, at, drop_rows=0.5)[0], expected)


def test_recall_of_tokens_matches_a_count_over_rows() -> None:
    gate, (q, k) = make(FORMS["group"]), qk(32 * 24)
    block, at = gate.config.block_k, torch.tensor([128, 200, 383, 500, 767])
    target = random_target(q, at, block)
    _, metrics = learned(gate, q, k, target, at, measure=True)
    found = {"decode_recall@0.2": 0.0, "oracle_decode_recall@0.2": 0.0}
    for b in range(len(q)):
        for row, t in enumerate(at.tolist()):
            own = t // block
            scores = oracle(gate, q[b : b + 1, :, t : t + 1], k[b : b + 1, :, : t + 1])[0, :, 0].detach()
            for head in range(H):
                group = head * HKV // H
                members = target[b, group * H // HKV : (group + 1) * H // HKV, row]
                for name, by in (("decode_recall@0.2", scores[group]), ("oracle_decode_recall@0.2", members.amax(0))):
                    ranked = sorted(range(own + 1), key=lambda j, by=by: (j not in (0, own), -float(by[j])))
                    count = max(2, math.ceil(0.2 * (own + 1)))
                    found[name] += float(target[b, head, row, ranked[:count]].sum()) / (len(at) * H * len(q))
    for name, value in found.items():
        assert abs(float(metrics[name]) - value) < 1e-5


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_both_phases_add_their_losses_and_prefill_stays_as_it_is_alone_bit_for_bit(share: float) -> None:
    ids, found = tokens(2, 7 * BLOCK + 5), {}
    for phase in ("prefill", "decode", "both"):
        model = seerattn.attach(tiny_model("llama"), SUMS)
        perturb(model)
        losses = GateLosses(LayerLoss(measure=True), target_share=share, phase=phase, decode_rows=50, step=4)
        out = model(input_ids=ids, gate_losses=losses, use_cache=False)
        out["loss"].backward()
        found[phase] = (losses, out, [p.grad for p in gate_parameters(model)])
    (alone, prompt, first), (single, token, second), (together, both, all_) = found.values()
    for a, b, c in zip(first, second, all_):
        torch.testing.assert_close(c, a + b, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(both["loss"], prompt["loss"] + token["loss"])
    for layer, metrics in together.metrics().items():
        one, other = alone.metrics()[layer], single.metrics()[layer]
        assert metrics["loss"] == one["loss"] + metrics["decode_loss"]
        assert all(torch.equal(metrics[name], one[name]) for name in one.keys() - {"loss"})
        # Where the walk that makes targets makes the output too, later layers see it rounded otherwise.
        torch.testing.assert_close(metrics["decode_loss"], other["loss"], rtol=1e-4, atol=0)
        for name in other.keys() - {"loss"}:
            torch.testing.assert_close(metrics[name], other[name], rtol=1e-4, atol=0)
    # Where a prompt's targets are not computed the output is the model's own.
    assert torch.equal(both.logits, prompt.logits)
    with seerattn.policy(gated := seerattn.attach(tiny_model("llama"), SUMS), None):
        assert torch.equal(token.logits, gated(input_ids=ids, use_cache=False).logits)


def test_padded_rows_learn_as_they_do_alone_and_other_tokens_every_step_and_layer() -> None:
    model = seerattn.attach(tiny_model("llama"), SUMS)
    perturb(model)
    ids, pad = tokens(2, 9 * BLOCK), 2 * BLOCK + 5
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0

    def learn(step: int = 0, **batch: Tensor) -> dict[int, dict[str, Tensor]]:
        losses = GateLosses(Watching(), phase="decode", decode_rows=60, step=step)
        model(**batch, gate_losses=losses, use_cache=False)
        return losses.metrics()

    places = (mask.cumsum(1) - 1).clamp(min=0)
    batch = learn(input_ids=ids, attention_mask=mask, position_ids=places)
    first, second = learn(input_ids=ids[:1]), learn(input_ids=ids[1:, pad:])
    sizes = [9 * BLOCK, 9 * BLOCK - pad]
    for layer, metrics in batch.items():
        expected = (first[layer]["loss"] * sizes[0] + second[layer]["loss"] * sizes[1]) / sum(sizes)
        torch.testing.assert_close(metrics["loss"], expected, rtol=1e-4, atol=1e-6)
    seen.clear()
    for step in range(3):
        learn(step, input_ids=ids)
    assert len({tuple(at.tolist()) for _, at in seen}) == len(seen) == 6


RUN = DistillConfig(
    context=384, steps=8, batch_size=1, lr=3e-3, phase="both", logging_steps=2, save_steps=4, retrieval_share=0.25
)


def train(folder: Path, output: Path, config: DistillConfig = RUN, **options: Any) -> list[dict[str, Any]]:
    """The records of a run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    gate = plain(block_q=32, block_k=32, query_subblocks=4, key_subblocks=2, init="normal")
    text = folder / ("data.jsonl" if config.retrieval_share else "long.jsonl")
    distill(model, tiny_tokenizer(), [text], config, gate=gate, output=output, **options)
    lines = (output / "training.jsonl").read_text().splitlines()
    return [{n: x for n, x in json.loads(line).items() if n != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decode-phase")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 3000, 1200, 300, 100)
    write_documents(folder / "long.jsonl", 9000)
    return folder


def test_a_run_of_both_phases_goes_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(folder, tmp_path / "whole")
    compute = DistillTrainer.compute_loss

    def stop(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DistillTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "stopped")
    assert train(folder, tmp_path / "stopped", resume=True) == expected
    name = "adapter_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"| target recall of single tokens at density 0.1 | {expected[0]['decode_recall@0.1']:.4f} |" in card


@pytest.mark.parametrize("phase", ["decode", "both"])
def test_gates_learn_what_single_tokens_read(folder: Path, tmp_path: Path, phase: str) -> None:
    config = replace(RUN, phase=phase, context=768, steps=24, retrieval_share=0.0, logging_steps=12, save_steps=12)
    first, *_, last = train(folder, tmp_path / "out", config)
    name = "decode_loss" if phase == "both" else "loss"
    assert last[name] < 0.75 * first[name]
    missed = [record["oracle_decode_recall@0.2"] - record["decode_recall@0.2"] for record in (first, last)]
    assert missed[1] < 0.75 * missed[0]


def test_a_run_of_an_earlier_version_is_resumed_as_one_of_prompts_alone(folder: Path, tmp_path: Path) -> None:
    config = replace(RUN, phase="prefill", steps=2, logging_steps=1, save_steps=2)
    train(folder, tmp_path / "out", config)
    path = tmp_path / "out" / "run.json"
    facts = json.loads(path.read_text())
    told = {n: x for n, x in facts["config"].items() if n not in ("phase", "decode_rows")}
    path.write_text(json.dumps(facts | {"config": told}))
    check_same_run(facts, tmp_path / "out")
    with pytest.raises(ValueError, match="phase was prefill and is both"):
        check_same_run(facts | {"config": facts["config"] | {"phase": "both"}}, tmp_path / "out")
