"""The gate of one decoded token, against the fp64 gate, and what it keeps from token to token."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattn import AttentionContext, AttnGate, GateSelector, KeepAll, TokenBudget, TopP
from seerattn.gate_decode import GateDecoder
from seerattn.selection.selector import Memory
from tests.gate.test_attn_gate import FORMS, make, oracle, qk

BUDGET = TokenBudget(tokens=96)


def context(memory: Memory | None = None, read: list[int] | None = None) -> AttentionContext:
    """One without rotation, which counts the tokens that it un-rotates."""

    def unrotate(x: Tensor, start: int) -> Tensor:
        if read is not None:
            read.append(x.shape[2])
        return x.float()

    return AttentionContext(layer=0, scale=1.0, softcap=None, unrotate=unrotate, memory=memory)


def shared(scores: Tensor, kv_heads: int, unscored: int) -> Tensor:
    """What the heads of a group make of scores ``[B, Hm, N]`` in fp64: a loop over heads."""
    out = torch.full((scores.shape[0], kv_heads, scores.shape[2]), -math.inf, dtype=torch.float64)
    for b in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            row, own = scores[b, head, unscored:], head * kv_heads // scores.shape[1]
            if len(row):
                out[b, own, unscored:] = torch.maximum(out[b, own, unscored:], row - row.logsumexp(0))
    return out


@pytest.mark.parametrize("tokens", [1, 33, 64, 65, 150])
@pytest.mark.parametrize("name", FORMS)
def test_scores_of_a_token_match_the_fp64_gate_over_finished_blocks(name: str, tokens: int) -> None:
    gate = make(FORMS[name])
    q, k = qk(1, tokens)
    decoder = GateDecoder(gate, BUDGET)
    found = decoder.scores(q, k, context())
    blocks = (tokens - 1) // gate.config.block_k
    # What the fp64 gate adds to a whole row, such as the logarithm of its sum, is the same for all of its blocks.
    expected = shared(oracle(gate, q, k)[:, :, 0, :blocks], k.shape[1], gate.config.exclude_forced)
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["paper", "default", "group", "salient", "norm-bias-norope"])
@pytest.mark.parametrize("prompt", [(), (150,), (70, 150), (64, 128)], ids=str)
def test_state_made_token_by_token_is_that_of_prompts_and_reads_each_key_once(name: str, prompt: tuple) -> None:
    gate, length = make(FORMS[name]), 260
    q, k = qk(length)
    memory, begin, read = Memory(), 0, []
    for end in prompt:
        GateSelector(gate, KeepAll(), impl="reference").select(q[:, :, begin:end], k[:, :, :end], context(memory))
        begin = memory.known = end
    for end in range(begin + 1, length + 1):
        token = q[:, :, end - 1 : end]
        found = GateDecoder(gate, BUDGET).select_token(token, k[:, :, :end], context(memory, read))
        alone = GateDecoder(gate, BUDGET).select_token(token, k[:, :, :end], context())
        assert torch.equal(found.indices, alone.indices) and torch.equal(found.counts, alone.counts)
        memory.known = end
    whole = gate.gate_keys(k.float()).detach()
    count = (length - 1) // gate.config.block_k * gate.config.key_subblocks
    # Products of other shapes may add up in another order.
    torch.testing.assert_close(memory.kept.keys[:, :, :count], whole[:, :, :count], rtol=1e-5, atol=1e-5)
    # One query a step once there is a finished block, and every key of a finished block that no prompt left.
    steps = length - max(begin, gate.config.block_k)
    left = begin // gate.config.k_size * gate.config.k_size
    assert sum(read) == steps + count * gate.config.k_size - left


def test_a_block_that_decoded_tokens_finish_lies_at_its_first_position() -> None:
    """In the released code of the paper it lies at its last one."""
    gate = make(FORMS["paper"])
    q, k = qk(65)
    memory = Memory()
    for end in range(1, 66):
        GateDecoder(gate, BUDGET).select_token(q[:, :, end - 1 : end], k[:, :, :end], context(memory))
        memory.known = end
    second = k[:, :, 32:64].double().repeat_interleave(2, dim=1)
    features = torch.cat((second.amax(2), second.amin(2), second.mean(2)), -1)
    flat = torch.einsum("bhf,hfd->bhd", features, gate.k_weight.double())
    half = flat.shape[-1] // 2
    angle = 32 * gate.inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    first, last = flat[..., :half], flat[..., half:]
    expected = torch.cat((first * cos - last * sin, last * cos + first * sin), -1)
    torch.testing.assert_close(memory.kept.keys[:, :, 1].double(), expected, rtol=1e-4, atol=1e-4)


def test_after_a_crop_the_next_list_is_that_of_what_is_left() -> None:
    gate, (q, k), memory = make(FORMS["default"]), qk(200), Memory()
    decoder = GateDecoder(gate, BUDGET)
    decoder.select_token(q[:, :, -1:], k, context(memory))
    other = torch.cat((k[:, :, :90], qk(110, seed=2)[1]), 2)
    memory.known = 90
    found = decoder.select_token(q[:, :, -1:], other, context(memory))
    assert torch.equal(found.indices, decoder.select_token(q[:, :, -1:], other, context()).indices)


def test_other_weights_and_other_gates_find_nothing_kept() -> None:
    (q, k), memory = qk(100), Memory()
    gates = [make(FORMS["default"], seed) for seed in (0, 1)]
    for gate in gates:
        found = GateDecoder(gate, TopP(p=0.5)).select_token(q[:, :, -1:], k, context(memory))
        alone = GateDecoder(gate, TopP(p=0.5)).select_token(q[:, :, -1:], k, context())
        assert torch.equal(found.indices, alone.indices)
        memory.known = 99
    before = memory.kept
    with torch.no_grad():
        gates[1].k_weight.mul_(2)
    GateDecoder(gates[1], BUDGET).select_token(q[:, :, -1:], k, context(memory))
    assert memory.kept is not before


def test_a_gate_whose_frequencies_are_those_of_a_call_keeps_nothing() -> None:
    gate, (q, k), memory = make(FORMS["default"]), qk(100), Memory()
    called = replace(context(memory), frequencies=lambda width: gate.inv_freq / 2)
    found = GateDecoder(gate, BUDGET).scores(q[:, :, -1:], k, called)
    assert memory.kept is None
    slow: AttnGate = make(FORMS["default"])
    slow.inv_freq /= 2
    torch.testing.assert_close(found, GateDecoder(slow, BUDGET).scores(q[:, :, -1:], k, context()))
