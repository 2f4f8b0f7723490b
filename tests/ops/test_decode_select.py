"""Blocks of single tokens by one kernel: the lists of the torch modules, which are tested against fp64."""

import itertools
from functools import partial

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor

import seerattn
from seerattn import AttnGate, AttnGateConfig, Threshold, TokenBudget, TopK, TopP, gate_decode
from seerattn.gate_decode import GateDecoder, token_rule
from seerattn.hf import state
from seerattn.ops.decode_select import KeyTable, TokenRule, select_blocks
from seerattn.selection.decode_policy import choose_blocks, group_scores
from seerattn.selection.selector import AttentionContext
from tests.gate.test_attn_gate import FORMS, HKV, H, make, qk

triton_one = pytest.importorskip("seerattn.ops.decode_select.triton_one")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A bias by distance is refused.
SERVED = {name: form for name, form in FORMS.items() if not form.distance_bias}
POLICIES = [
    TokenBudget(tokens=200),
    TokenBudget(tokens=1, sink_blocks=2),
    TokenBudget(tokens=100_000),
    TopK(density=0.3),
    TopK(density=0.3, rule="row_share", sink_blocks=0),
    TopK(density=1.0),
]


def context() -> AttentionContext:
    return AttentionContext(layer=0, scale=1.0, softcap=None, unrotate=lambda x, start: x.float())


def chosen(gate: AttnGate, policy, q: Tensor, k: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Lists and counts by modules or by the kernel, on the GPU where there is one."""
    blocks = GateDecoder(gate.to(DEVICE), policy, impl=impl).select_token(q.to(DEVICE), k.to(DEVICE), context())
    return blocks.indices.cpu(), blocks.counts.cpu()


@pytest.mark.parametrize("length", [1, 32, 65, 129, 700])
@pytest.mark.parametrize("name", SERVED)
def test_lists_of_every_form_are_those_of_the_modules(name: str, length: int) -> None:
    gate = make(SERVED[name])
    q, k = qk(1, length)
    for policy in POLICIES[:: 1 if name in ("default", "paper") else 3]:
        found, expected = (chosen(gate, policy, q, k, impl) for impl in ("triton", "reference"))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), policy


def test_equal_scores_are_told_apart_as_the_modules_do_it() -> None:
    """Whole numbers, so that no product and no sum is rounded: the earlier block of equals is kept."""
    generator = torch.Generator().manual_seed(0)
    gate_q = torch.randint(-1, 2, (2, 4, 16), generator=generator).float() * 4
    gate_k = torch.randint(0, 2, (2, 2, 90, 16), generator=generator).float()
    for setting, pieces, over in itertools.product((3, 7, 20, 44), (1, 2), ("max", "sum")):
        rule = TokenRule(
            block_k=32, pieces=pieces, over_pieces=over, kind="count", setting=setting, sink_blocks=1, unscored=1
        )
        blocks = 90 // pieces
        tokens = blocks * 32 + 5
        found = select_blocks(
            gate_q.to(DEVICE), gate_k.to(DEVICE), rule, kv_heads=2, width=min(setting, blocks + 1), tokens=tokens
        )
        s = torch.einsum("bgmd,bgwd->bgmw", gate_q.unflatten(1, (2, 2)), gate_k) / 4
        s = s.unflatten(-1, (blocks, pieces))
        s = (s.amax(-1) if over == "max" else s.logsumexp(-1)).flatten(1, 2)
        policy = TokenBudget(tokens=setting * 32)
        expected = choose_blocks(group_scores(s, 2, unscored=1), policy, tokens=tokens, block_k=32, forced_scored=False)
        assert torch.equal(found.indices.cpu(), expected.indices), rule
        assert torch.equal(found.counts.cpu(), expected.counts)
        if over == "max":
            assert len(s.unique()) < 20


@pytest.mark.parametrize(("unscored", "kept"), [(0, [0, 7, 9]), (1, [0, 5, 9])])
def test_a_block_without_a_score_of_meaning_takes_no_probability(unscored: int, kept: list[int]) -> None:
    """Two heads want a block each: the surer one's first choice counts, and the first block may make it unsure."""
    gate_k = torch.zeros(1, 1, 9, 32)
    gate_k[0, 0, 0, 0], gate_k[0, 0, 5, 1], gate_k[0, 0, 7, 2] = 1, 1, 1
    gate_q = torch.zeros(1, 2, 32)
    # By the root of 32: the first head gives block 0 a score of 20 and block 5 of 8, the second one block 7 of 4.
    gate_q[0, 0, 0], gate_q[0, 0, 1], gate_q[0, 1, 2] = (32**0.5 * x for x in (20, 8, 4))
    rule = TokenRule(block_k=32, pieces=1, over_pieces="max", kind="count", setting=3, sink_blocks=1, unscored=unscored)
    found = select_blocks(gate_q.to(DEVICE), gate_k.to(DEVICE), rule, kv_heads=1, width=3, tokens=9 * 32 + 1)
    assert found.indices[0, 0].tolist() == kept


@pytest.mark.parametrize("policy", [TokenBudget(tokens=150), TopK(density=0.2)], ids=str)
@pytest.mark.parametrize("name", ["default", "paper", "group"])
def test_sequences_of_many_lengths_get_what_each_gets_alone(name: str, policy, poisoned_memory) -> None:
    gate = make(SERVED[name])
    size, pieces = gate.config.block_k, gate.config.key_subblocks
    lengths = [3 * size + 1, 1, 11 * size, size, 0, 7 * size + size // 2]
    q = torch.randn(len(lengths), H, 1, 16, generator=torch.Generator().manual_seed(5))
    k = torch.randn(len(lengths), HKV, max(lengths), 16, generator=torch.Generator().manual_seed(6))
    windows = (max(lengths) - 1) // size * pieces
    gate_k = torch.full((len(lengths), gate.gate_keys(k[:1, :, :1]).shape[1], windows, gate.gate_dim), torch.nan)
    gate_q = torch.zeros(len(lengths), gate.mask_heads, gate.gate_dim)
    for row, n in enumerate(lengths):
        vectors = (
            GateDecoder(gate, policy)._vectors(
                q[row : row + 1], k[row : row + 1, :, : max(n, 1)], context(), (max(n, 1) - 1) // size
            )
            if n > size
            else None
        )
        if vectors is not None:
            gate_q[row], gate_k[row, :, : vectors[1].shape[2]] = vectors[0][0, :, 0].detach(), vectors[1][0].detach()
    width = max(lengths) // size + 1
    found = select_blocks(
        gate_q.to(DEVICE),
        gate_k.to(DEVICE),
        token_rule(gate, policy),
        kv_heads=HKV,
        width=width,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )
    for row, n in enumerate(lengths):
        if not n:
            assert not found.counts[row].any() and (found.indices[row] == -1).all()
            continue
        indices, counts = chosen(gate, policy, q[row : row + 1], k[row : row + 1, :, :n], "reference")
        assert torch.equal(found.counts[row].cpu(), counts[0])
        most = min(width, indices.shape[2])
        assert torch.equal(found.indices[row, :, :most].cpu(), indices[0, :, :most])
        assert (found.indices[row, :, most:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SERVED)
def test_gate_keys_of_16_bits_give_the_lists_of_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    """Queries may be of any size: what fp16 cannot hold, it need not."""
    gate = make(SERVED[name])
    generator = torch.Generator().manual_seed(4)
    # Every policy with every number of blocks; sizes take turns, so that all of them meet over the forms and types.
    turn = list(SERVED).index(name) + (dtype == torch.bfloat16)
    for (p, policy), (b, blocks) in itertools.product(enumerate(POLICIES[::3]), enumerate((1, 20, 45))):
        size = (1e-9, 1.0, 1e6)[(turn + p + b) % 3]
        rule = token_rule(gate, policy)
        gate_q = torch.randn(2, gate.mask_heads, gate.gate_dim, generator=generator).to(DEVICE) * size
        keys = torch.randn(2, gate.k_weight.shape[0], blocks * rule.pieces, gate.gate_dim, generator=generator)
        gate_k = keys.to(DEVICE, dtype)
        lengths = torch.tensor([blocks * rule.block_k + 1, 1 + blocks * rule.block_k // 2], dtype=torch.int32)
        sizes = {"kv_heads": HKV, "width": blocks + 1, "lengths": lengths.to(DEVICE)}
        found, expected = (select_blocks(gate_q, k, rule, **sizes) for k in (gate_k, gate_k.float()))
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.counts, expected.counts)


@pytest.mark.parametrize("name", ["default", "group"])
def test_gate_keys_that_lie_apart_give_the_lists_of_those_in_one_tensor(name: str) -> None:
    gate = make(SERVED[name])
    rule, generator = token_rule(gate, TokenBudget(tokens=150)), torch.Generator().manual_seed(3)
    lengths, heads, dim = [9 * rule.block_k, 5, 3 * rule.block_k + 1], gate.k_weight.shape[0], gate.gate_dim
    gate_q = torch.randn(3, gate.mask_heads, dim, generator=generator).to(DEVICE)
    together = torch.full((3, heads, 8 * rule.pieces, dim), torch.nan, device=DEVICE)
    apart: list[Tensor | None] = []
    for row, length in enumerate(lengths):
        windows = (length - 1) // rule.block_k * rule.pieces
        # The first ones of others lie with other strides than those that end there.
        whole = torch.randn(1, heads, windows + row, dim, generator=generator).to(DEVICE)
        together[row, :, :windows] = whole[0, :, :windows]
        apart.append(whole[:, :, :windows] if windows else None)
    sizes = {"kv_heads": HKV, "width": 9, "lengths": torch.tensor(lengths, dtype=torch.int32, device=DEVICE)}
    expected = select_blocks(gate_q, together, rule, **sizes)
    table = KeyTable.of(apart, heads=heads, dim=dim, device=together.device)
    # Copied where their pieces are spread, and told wherever they begin.
    spread = [None if x is None else x.mT.contiguous().mT for x in apart]
    base = torch.randn(apart[0].numel() + 1, device=DEVICE)
    base[1:] = apart[0].flatten()
    odd = [base[1:].view(apart[0].shape), *apart[1:]]
    of = {"heads": heads, "dim": dim, "device": together.device}
    tables = [table, KeyTable.of(spread, **of), KeyTable.of(odd, **of)]
    assert [one.aligned for one in tables] == [True, True, False]
    for one in tables:
        found = select_blocks(gate_q, one, rule, **sizes)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.counts, expected.counts)
    assert table.is_of(apart) and not table.is_of(apart[::-1]) and not table.is_of(apart[:2])


def test_gate_keys_of_another_form_are_refused_for_a_table() -> None:
    of = {"heads": 2, "dim": 16, "device": torch.device("cpu")}
    for keys in (torch.zeros(2, 5, 16), torch.zeros(1, 3, 5, 16), torch.zeros(1, 2, 5, 16).half()):
        with pytest.raises(ValueError, match=r"gate keys must be fp32 \[1, 2, W, 16\]"):
            KeyTable.of([None, keys], **of)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the kernel is what runs anyway")
def test_a_model_decodes_padded_rows_by_the_kernel_as_by_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seerattn.attach(tiny_model("llama"), AttnGateConfig(block_q=32, block_k=32), impl="reference")
    seerattn.set_policy(model, None, decode_policy=TokenBudget(tokens=96))
    ids = tokens(2, 200)
    mask = torch.ones_like(ids)
    mask[1, :77] = 0

    def written() -> tuple[Tensor, float]:
        with seerattn.record_density(model) as meter, torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return out, meter.decode.mean()

    expected = written()
    monkeypatch.setattr(state, "GateDecoder", partial(GateDecoder, impl="triton"))
    seerattn.set_policy(model, None, decode_policy=TokenBudget(tokens=96))
    chosen, of = [], triton_one.select_blocks
    monkeypatch.setattr(triton_one, "select_blocks", lambda *a, **k: chosen.append(of(*a, **k)) or chosen[-1])
    found = written()
    assert len(chosen) == 3 * 2 * 2
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("step", [1, 4])
def test_steps_of_the_walk_change_nothing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, (q, k) = make(SERVED["default"]), qk(1, 900)
    expected = chosen(gate, POLICIES[0], q, k, "triton")
    for splits in (1, 2, 5, 40):
        monkeypatch.setattr(
            triton_one, "choose_launch", lambda splits=splits, **_: triton_one.Launch(step, 4, 2, splits)
        )
        found = chosen(gate, POLICIES[0], q, k, "triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), splits


def test_programs_share_the_blocks_of_few_sequences_alone() -> None:
    def splits(rows: int, tokens: int) -> int:
        sizes = {"pieces": 8, "gate_dim": 128, "keys": 1, "multiprocessors": 132}
        return triton_one.choose_launch(rows=rows, number_of_blocks=tokens // 64, **sizes).splits

    # Two for each multiprocessor together, and work for two steps each.
    assert splits(8, 131072) == 33 and splits(32, 131072) == 9 and splits(128, 131072) == 3 and splits(8, 32768) == 32
    assert splits(8, 1024) == 1 and splits(1000, 131072) == 1


def test_gate_keys_that_are_a_part_of_others_are_read_where_they_lie() -> None:
    gate, (q, k) = make(SERVED["default"]), qk(1, 500)
    blocks = 499 // gate.config.block_k
    vectors = GateDecoder(gate, POLICIES[0])._vectors(q, k, context(), blocks)
    gate_q, gate_k, _ = (x.detach().to(DEVICE) for x in vectors)
    rule = token_rule(gate, POLICIES[0])
    sizes = {"kv_heads": HKV, "width": blocks + 1, "tokens": 500}
    expected = select_blocks(gate_q[:, :, 0], gate_k, rule, **sizes)
    spread = torch.full((2, HKV, 3 * gate_k.shape[2], gate_k.shape[3]), torch.nan, device=DEVICE)
    spread[:, :, 1 : 1 + 2 * gate_k.shape[2] : 2] = gate_k
    found = select_blocks(gate_q[:, :, 0], spread[:, :, 1 : 1 + 2 * gate_k.shape[2] : 2], rule, **sizes)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize(
    ("form", "policy", "reason"),
    [
        (SERVED["default"], TopP(p=0.5), "it serves TopK and TokenBudget alone"),
        (SERVED["default"], Threshold(threshold=0.1), "it serves TopK and TokenBudget alone"),
        (FORMS["norm-bias-norope"], TokenBudget(tokens=64), "it has no bias by distance"),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused_by_name_and_left_to_the_modules(form, policy, reason: str) -> None:
    gate, (q, k) = make(form), qk(1, 200)
    with pytest.raises(ValueError, match=reason):
        chosen(gate, policy, q, k, "triton")
    if DEVICE == "cuda":
        gate_decode._warn_of_modules.cache_clear()
        with pytest.warns(UserWarning, match=reason):
            found = chosen(gate, policy, q, k, "auto")
    else:
        found = chosen(gate, policy, q, k, "auto")
    assert torch.equal(found[0], chosen(gate, policy, q, k, "reference")[0])


def test_arguments_that_do_not_fit_are_refused() -> None:
    rule = token_rule(make(SERVED["group"]), POLICIES[0])
    q, k = torch.zeros(2, 4, 16, device=DEVICE), torch.zeros(2, 2, 8, 16, device=DEVICE)
    short, long = (torch.zeros(2, 2, n * rule.pieces, 16, device=DEVICE) for n in (6, 8192))
    for gate_q, gate_k, options, reason in (
        (q, k[:1], {}, "gate_q must be"),
        (q, k[..., :8], {}, "gate_q must be"),
        (q, k, {"kv_heads": 3}, "multiple of 3 heads"),
        (q, k.mT.contiguous().mT, {}, "adjacent channels"),
        (q, k, {"lengths": torch.tensor([1, 2], device=DEVICE)}, "lengths must be int32"),
        (q, long, {"width": 9000}, "at most 8192 blocks, got 8193"),
        (q, short, {}, "width must be at least 4, what a row may keep, got 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            select_blocks(gate_q, gate_k, rule, **({"kv_heads": 2, "width": 3, "tokens": 70} | options))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_a_captured_call_follows_what_lengths_and_gate_keys_hold_later() -> None:
    gate = make(AttnGateConfig(share="kv_group")).cuda()
    rule = token_rule(gate, TokenBudget(tokens=256))
    gate_q = torch.randn(2, gate.mask_heads, gate.gate_dim, device="cuda")
    gate_k = torch.randn(2, HKV, 20 * rule.pieces, gate.gate_dim, device="cuda")
    lengths = torch.tensor([700, 1200], dtype=torch.int32, device="cuda")
    call = {"kv_heads": HKV, "width": 4, "lengths": lengths}
    select_blocks(gate_q, gate_k, rule, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select_blocks(gate_q, gate_k, rule, **call)
    lengths.copy_(torch.tensor([64, 1281], dtype=torch.int32))
    gate_k.normal_()
    graph.replay()
    expected = select_blocks(gate_q, gate_k, rule, **call)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.counts, expected.counts)
