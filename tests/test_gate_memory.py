"""Lists of a prompt in chunks that are cut anywhere, from what was kept of earlier ones, against those of one call."""

import random
from dataclasses import replace

import pytest
import torch
from gate_forms import plain
from interpreted import large_steps
from torch import Tensor

from seerattn import AttentionContext, AttnGate, AttnGateConfig, GateSelector
from seerattn.selection import (
    BlockIndices,
    HeadBudgets,
    KeepAll,
    Policy,
    RotaryTables,
    Threshold,
    TokenBudget,
    TopK,
    TopP,
)
from seerattn.selection.selector import Memory

# What lies outside of a row of scores is whatever the memory held.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
D, LENGTH = 32, 700
BLOCKS = {"block_q": 64, "block_k": 32}
FORMS = {
    "paper": AttnGateConfig.paper(**BLOCKS),
    "default": AttnGateConfig(**BLOCKS),
    "small-queries": AttnGateConfig(block_q=32, block_k=64),
    "group": plain(**BLOCKS, query_subblocks=4, key_subblocks=2, share="kv_group", qk_norm=True),
    "every-pooling": plain(
        **BLOCKS, query_subblocks=2, key_subblocks=4, q_pooling=("max", "salient", "avg"),
        k_pooling=("salient", "min", "avg", "max"), target_keys="sum", target_power=2,
    ),
    "biased": plain(**BLOCKS, distance_bias=5, normalize_subblocks=False),
}  # fmt: skip
POLICIES = [
    KeepAll(),
    TopK(density=0.3, length=LENGTH),
    TopK(density=[[0.1, 0.3, 0.6, 0.9]], length=LENGTH, sink_blocks=0),
    TopK(density=0.3, rule="row_share", sink_blocks=2),
    TokenBudget(tokens=130),
    Threshold(threshold=0.05),
    Threshold(threshold=-2.5, on="score", sink_blocks=0),
    TopP(p=0.7),
]


def make_gate(config: AttnGateConfig) -> AttnGate:
    torch.manual_seed(0)
    inv_freq = 1000.0 ** -(torch.arange(D // 2) / (D // 2))
    gate = AttnGate(config, num_heads=4, num_kv_heads=2, head_dim=D, inv_freq=inv_freq)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.3)
    return gate


def make_qk(batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, LENGTH, D, generator=g), torch.randn(batch, 2, LENGTH, D, generator=g)


def make_context() -> AttentionContext:
    """A layer that rotates by halves; its tables and its function are the same rotation."""
    angle = torch.arange(LENGTH)[:, None] * 1000.0 ** -(torch.arange(D // 2) / (D // 2))
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))

    def unrotate(x: Tensor, start: int) -> Tensor:
        here = slice(start, start + x.shape[2])
        first, second = x.float().chunk(2, -1)
        return x.float() * cos[here] - torch.cat((-second, first), -1) * sin[here]

    return AttentionContext(
        layer=0, scale=1.0, softcap=None, unrotate=unrotate, rotary=RotaryTables(cos[None], sin[None], D)
    )


def cuts_of(seed: int, least: int) -> list[int]:
    """Ends of chunks of at least so many tokens, cut anywhere."""
    draw, ends = random.Random(seed), [0]
    while LENGTH - ends[-1] >= 2 * least:
        ends.append(min(ends[-1] + draw.randint(least, 3 * least), LENGTH - least))
    return [*ends[1:], LENGTH]


def in_chunks(
    selector: GateSelector, q: Tensor, k: Tensor, context: AttentionContext, ends: list[int]
) -> list[BlockIndices]:
    """Lists of every chunk; keys of blocks that were finished before it are no numbers any more."""
    memory, lists, begin = Memory(), [], 0
    for end in ends:
        keys = k[:, :, :end].clone()
        keys[:, :, : begin // selector.gate.config.block_k * selector.gate.config.block_k] = torch.nan
        memory = Memory(begin, memory.kept)
        lists.append(selector.select(q[:, :, begin:end], keys, replace(context, memory=memory)))
        begin = end
    return lists


@torch.no_grad()
def assert_chunks_are_one_shot(
    selector: GateSelector, ends: list[int], context: AttentionContext | None = None
) -> None:
    """A row has the list that one call of all tokens so far gives it: of the whole prompt, if its block is full."""
    length, context = ends[-1], context or make_context()
    q, k = (x[:, :, :length] for x in make_qk())
    block_q, begin = selector.gate.config.block_q, 0
    whole = selector.select(q, k, context).to_mask()
    for end, blocks in zip(ends, in_chunks(selector, q, k, context, ends)):
        assert blocks.q_start.tolist() == [begin] * 2 and blocks.q_len.tolist() == [end - begin] * 2
        so_far = selector.select(q[:, :, :end], k[:, :, :end], context)
        first, found = begin // block_q, blocks.to_mask()
        assert torch.equal(found, so_far.to_mask()[:, :, first:])
        assert torch.equal(blocks.counts, so_far.counts[:, :, first:])
        full = end // block_q - first + (end == length)
        assert torch.equal(found[:, :, :full], whole[:, :, first : first + full, : found.shape[3]])
        begin = end


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMS)
def test_chunks_cut_anywhere_choose_as_one_shot_and_read_no_finished_block_again(name: str, seed: int) -> None:
    gate = make_gate(FORMS[name])
    selector = GateSelector(gate, TopK(density=0.3, length=LENGTH), "reference")
    assert_chunks_are_one_shot(selector, cuts_of(seed, gate.config.block_q))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_chunks_choose_as_one_shot_by_every_policy_that_looks_at_a_row_alone(policy: Policy) -> None:
    gate = make_gate(FORMS["default"])
    assert_chunks_are_one_shot(GateSelector(gate, policy, "reference"), cuts_of(3, 64))


def test_chunks_share_budgets_as_one_shot() -> None:
    gate = make_gate(FORMS["default"])
    tables = ((((0.1, 0.2, 0.4, 0.5),), ((0.3, 0.5, 0.7, 0.9),)),)
    about = {"target": str(gate.config.target), "gain": "max:inf", "text": "", "windows": 1}
    budgets = HeadBudgets((0.3, 0.6), (LENGTH,), tables, **BLOCKS, **about)
    for policy in (TopK(density=0.4, length=LENGTH), TopK(density=0.4, rule="row_share")):
        assert_chunks_are_one_shot(GateSelector(gate, policy, "reference", budgets), cuts_of(4, 64))


@pytest.mark.parametrize("name", ["paper", "default", "group"])
def test_chunks_of_the_fused_op_choose_as_its_one_shot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    large_steps(monkeypatch)
    selector = GateSelector(make_gate(FORMS[name]), TopK(density=0.3, length=LENGTH), "triton")
    assert_chunks_are_one_shot(selector, [100, 230, 290])


def test_chunks_of_the_fused_op_choose_as_one_shot_where_the_lists_tell_their_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    large_steps(monkeypatch)
    assert_chunks_are_one_shot(GateSelector(make_gate(FORMS["group"]), TopP(p=0.7), "triton"), [100, 290])


def test_a_rotation_that_kernels_do_not_know_keeps_gate_keys_as_well() -> None:
    selector = GateSelector(make_gate(FORMS["default"]), TokenBudget(tokens=130), "reference")
    assert_chunks_are_one_shot(selector, [100, 333, LENGTH], replace(make_context(), rotary=None))


@torch.no_grad()
def selected(selector: GateSelector, begin: int, end: int, memory: Memory | None) -> BlockIndices:
    q, k = make_qk()
    return selector.select(q[:, :, begin:end], k[:, :, :end], replace(make_context(), memory=memory))


def test_only_what_is_known_of_what_was_kept_is_used() -> None:
    """Kept of a prompt of 500 tokens, of which 290 are still the same."""
    gate = make_gate(FORMS["default"])
    selector, memory = GateSelector(gate, TokenBudget(tokens=130), "reference"), Memory()
    q, k = make_qk()
    selector.select(q[:, :, :500], -k[:, :, :500].roll(1, 2), replace(make_context(), memory=memory))
    other = Memory()
    selector.select(q[:, :, :290], k[:, :, :290], replace(make_context(), memory=other))
    mixed = memory.kept.keys.clone()
    mixed[:, :, : 290 // 4] = other.kept.keys
    known = Memory(290, replace(memory.kept, keys=mixed))
    assert torch.equal(selected(selector, 400, 500, known).indices, selected(selector, 400, 500, None).indices)


def test_other_weights_another_gate_and_another_length_of_the_past_use_nothing_of_it() -> None:
    gate, memory = make_gate(FORMS["default"]), Memory()
    selector = GateSelector(gate, TokenBudget(tokens=130), "reference")
    selected(selector, 0, 300, memory)
    copies = [replace(memory, known=300), replace(memory, known=300), replace(memory, known=300)]
    # The queries of the cut block belong to position 300 alone.
    assert torch.equal(selected(selector, 330, 500, copies[0]).indices, selected(selector, 330, 500, None).indices)
    other = GateSelector(make_gate(FORMS["group"]), TokenBudget(tokens=130), "reference")
    assert torch.equal(selected(other, 300, 500, copies[1]).indices, selected(other, 300, 500, None).indices)
    before = selected(selector, 300, 500, replace(memory, known=300)).indices
    with torch.no_grad():
        gate.k_weight.mul_(-1)
    after = selected(selector, 300, 500, copies[2]).indices
    assert torch.equal(after, selected(selector, 300, 500, None).indices)
    assert not torch.equal(after, before)


def test_frequencies_of_a_call_keep_nothing() -> None:
    gate, memory = make_gate(FORMS["default"]), Memory()
    q, k = make_qk()
    context = replace(make_context(), memory=memory, frequencies=lambda width: 0.3 * gate.inv_freq)
    GateSelector(gate, TokenBudget(tokens=130), "reference").select(q, k, context)
    assert memory.kept is None


def test_what_is_kept_is_gate_keys_and_less_than_a_block_of_queries() -> None:
    """Of the default form: one vector in eight tokens, fp32 as modules make it."""
    gate, memory = make_gate(AttnGateConfig()), Memory()
    selected(GateSelector(gate, TokenBudget(tokens=130), "reference"), 0, LENGTH, memory)
    windows, queries = -(-LENGTH // 8), LENGTH % 64
    assert memory.kept.keys.shape == (2, 2, LENGTH // 8, D)
    assert memory.kept.nbytes == 2 * (2 * windows + 4 * queries) * D * 4
