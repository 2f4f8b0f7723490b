"""The fused gate against the torch modules that it replaces: un-rotation, `AttnGate`, `Policy`."""

from dataclasses import replace

import pytest
import torch
from gate_forms import plain
from interpreted import large_steps
from torch import Tensor

from seerattn.bench.check import GATE_TOKENS, check_selection
from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form, layer_context, random_gate, rotary_tables
from seerattn.gate import AttnGate, AttnGateConfig, Pairing
from seerattn.gate_selector import GateSelector, pool
from seerattn.ops.gate_scores import triton_pool, triton_select
from seerattn.selection import (
    AttentionContext,
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 32
# What lies outside of a row of scores is whatever the memory held.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    large_steps(monkeypatch)


def angles(length: int, pairs: int) -> Tensor:
    return torch.arange(length)[:, None] * 1000.0 ** -(torch.arange(pairs) / pairs)


def turn(x: Tensor, angle: Tensor, width: int, interleaved: bool) -> Tensor:
    """Rotates the first ``width`` channels of ``x [B, h, n, D]`` by ``angle [n, width / 2]``, as complex numbers."""
    first, second = (
        (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(0, width // 2), slice(width // 2, width))
    )
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angle), angle)
    out = x.clone()
    out[..., first], out[..., second] = z.real, z.imag
    return out


def turned_back(x: Tensor, start: int, width: int = D, interleaved: bool = False, scale: float = 1.25) -> Tensor:
    """Tokens from position ``start`` on before RoPE by tables of that scale, in fp64."""
    angle = angles(start + x.shape[2], width // 2).double()
    back = turn(x.double().cpu() / scale, -angle[start:], width, interleaved)
    back[..., width:] *= scale
    return back.to(x.device)


def make_context(
    length: int, *, width: int = D, interleaved: bool = False, column_step: int = 1, columns: int | None = None,
    scale: float = 1.25, dtype: torch.dtype = torch.float32,
) -> AttentionContext:  # fmt: skip
    """A layer with rotary tables of a scale, as YaRN has them; `unrotate` knows nothing of the tables."""
    angle = angles(length, width // 2).double()
    spread = angle.repeat_interleave(2, -1) if column_step == 2 else torch.cat((angle, angle), -1)
    spread = spread[:, : width if columns is None else columns]
    tables = RotaryTables(
        (spread.cos() * scale)[None].to(DEVICE, dtype), (spread.sin() * scale)[None].to(DEVICE, dtype),
        width, interleaved, column_step,
    )  # fmt: skip

    def unrotate(x: Tensor, start: int) -> Tensor:
        return turned_back(x, start, width, interleaved, scale).float()

    return AttentionContext(layer=0, scale=1.0, softcap=None, unrotate=unrotate, rotary=tables)


def make_gate(
    config: AttnGateConfig, heads: int = 4, kv_heads: int = 2, dim: int = D, seed: int = 0,
    pairing: Pairing | None = None,
) -> AttnGate:  # fmt: skip
    torch.manual_seed(seed)
    gate_dim = config.gate_dim or dim
    pairs = gate_dim // 2 if pairing is None else pairing.width // 2
    inv_freq = 1000.0 ** -(torch.arange(gate_dim // 2) / pairs) * (torch.arange(gate_dim // 2) < pairs)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    gate = AttnGate(config, **sizes, inv_freq=inv_freq, pairing=pairing)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.3)
    return gate.to(DEVICE)


def make_qk(q_len: int, k_len: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 1, dim: int = D, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    # The memory layout of models, [B, T, H, D], in the middle of a tensor of NaN.
    q = torch.full((batch, q_len + 2, heads, dim), torch.nan)
    k = torch.full((batch, k_len + 2, kv_heads, dim), torch.nan)
    q[:, 1:-1] = torch.randn(batch, q_len, heads, dim, generator=g)
    k[:, 1:-1] = torch.randn(batch, k_len, kv_heads, dim, generator=g)
    return q.to(DEVICE)[:, 1:-1].transpose(1, 2), k.to(DEVICE)[:, 1:-1].transpose(1, 2)


@torch.no_grad()
def modules(gate: AttnGate, policy: Policy, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
    return GateSelector(gate, policy, "reference").select(q, k, context)


@torch.no_grad()
def both(gate: AttnGate, policy: Policy, q: Tensor, k: Tensor, context: AttentionContext) -> list[BlockIndices]:
    return [modules(gate, policy, q, k, context), GateSelector(gate, policy, "triton").select(q, k, context)]


def assert_equal(expected: BlockIndices, got: BlockIndices) -> None:
    assert torch.equal(expected.counts, got.counts)
    assert torch.equal(expected.indices, got.indices)
    for name in ("block_q", "block_k"):
        assert getattr(expected, name) == getattr(got, name)
    for name in ("q_start", "q_len"):
        assert torch.equal(getattr(expected, name), getattr(got, name))


PAPER = AttnGateConfig.paper(block_q=32, block_k=32)
FINE = plain(block_q=32, block_k=32, query_subblocks=4, key_subblocks=4)  # multiplied in one plane
FORMS = {
    "paper": PAPER,
    "default": AttnGateConfig(block_q=32, block_k=32),
    "queries": plain(block_q=32, block_k=32, query_subblocks=4, key_subblocks=1),
    "keys": plain(block_q=32, block_k=64, query_subblocks=1, key_subblocks=4, rope=False),
    "max": plain(
        block_q=64, block_k=32, query_subblocks=4, key_subblocks=2, normalize_subblocks=False, q_pooling=("max",),
        k_pooling=("min", "avg"), gate_dim=12, qk_norm=True,
    ),
    "group": plain(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, share="kv_group"),
    "salient": plain(
        block_q=32, block_k=32, query_subblocks=2, key_subblocks=4, q_pooling=("max", "salient"),
        k_pooling=("salient", "min", "avg", "max"),
    ),
    "salient-group": plain(
        block_q=64, block_k=32, query_subblocks=4, key_subblocks=2, share="kv_group", q_pooling=("salient", "min"),
        k_pooling=("min", "salient"),
    ),
    "salient-unprojected": replace(PAPER, q_pooling=("salient",), k_pooling=("salient",)),
    "sum-2": plain(
        block_q=32, block_k=64, query_subblocks=2, key_subblocks=4, target_keys="sum", target_power=2
    ),
    "sum-1.5-raw": plain(
        block_q=64, block_k=32, query_subblocks=4, key_subblocks=2, normalize_subblocks=False, target_keys="sum",
        target_power=1.5, share="kv_group",
    ),
    "sum-largest": plain(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, target_keys="sum"),
    "max-1": plain(block_q=32, block_k=32, query_subblocks=4, key_subblocks=1, target_power=1),
}  # fmt: skip
MEAN_SQUARE = {"target_keys": "sum", "target_power": 2}
SALIENT_ALONE = {"q_pooling": ("salient",), "k_pooling": ("salient",)}
TOKENS = {"block_k": 128, "key_subblocks": 128, "query_subblocks": 1}  # a key sub-block is one token


@pytest.mark.parametrize(("q_len", "k_len"), [(290, 290), (100, 330), (1, 33)])
@pytest.mark.parametrize("name", FORMS)
def test_choice_matches_the_torch_modules(name: str, q_len: int, k_len: int) -> None:
    gate, context = make_gate(FORMS[name], heads=6), make_context(k_len)
    q, k = make_qk(q_len, k_len, heads=6, batch=2)
    assert_equal(*both(gate, TokenBudget(tokens=5 * 32), q, k, context))


@pytest.mark.parametrize("length", [300, 131072])
@pytest.mark.parametrize(
    "changes", [{}, {"share": "kv_group"}, SALIENT_ALONE, MEAN_SQUARE, {"gate_dim": 144}, TOKENS], ids=str
)
def test_choice_of_many_subblocks_differs_only_where_scores_are_closer_than_a_rounding(
    changes: dict, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the launches of short prompts and of long ones."""
    gate, context = make_gate(replace(FINE, **changes)), make_context(400)
    choose = triton_select.choose_launch
    blocks = length // gate.config.block_q
    monkeypatch.setattr(
        triton_select, "choose_launch", lambda form, **sizes: choose(form, **sizes | {"num_q_blocks": blocks})
    )
    q, k = make_qk(300, 400)
    policy = TokenBudget(tokens=max(4 * 32, 3 * gate.config.block_k))
    expected, got = both(gate, policy, q, k, context)
    with torch.no_grad():
        q, k = context.unrotate(q, 100), context.unrotate(k, 0)
        scores, gate_q, gate_k = gate(q, k), gate.gate_queries(q, 100), gate.gate_keys(k)
    # Entries of both vectors are rounded to 11 bits, relative to themselves; two scores are compared.
    products = gate_q.abs().amax((1, 2)) @ gate_k.abs().amax((1, 2)).T
    rounding = 2 * 2 * 2.0**-11 * float(products.max()) * gate.gate_dim**-0.5
    missed = expected.to_mask() & ~got.to_mask()
    instead = got.to_mask() & ~expected.to_mask()
    assert torch.equal(expected.counts, got.counts)
    worst = scores.masked_fill(~missed, -torch.inf).amax(-1) - scores.masked_fill(~instead, torch.inf).amin(-1)
    assert (worst[missed.any(-1)] <= rounding).all()
    assert float(missed.float().mean()) < 0.01


@pytest.mark.parametrize("changes", [{}, {"share": "kv_group"}], ids=str)
def test_powers_of_two_that_move_between_tokens_and_weights_change_nothing(changes: dict) -> None:
    """Features and weights are multiplied in fp16, which could hold none of these, and some heads need other ones."""
    context, (q, k) = make_context(290), make_qk(290, 290)
    gate, moved = (make_gate(replace(FINE, **changes)) for _ in range(2))
    up, down = 2.0**40, torch.tensor([2.0**-40, 2.0**-50])
    with torch.no_grad():
        moved.q_weight.mul_(down.repeat_interleave(moved.q_weight.shape[0] // 2)[:, None, None])
        moved.k_weight.mul_(down[:, None, None].to(moved.k_weight))
    heads = 2.0**10 ** torch.arange(2.0).to(DEVICE)
    q_moved = q * up * heads.repeat_interleave(q.shape[1] // 2)[:, None, None]
    k_moved = k * up * heads[:, None, None]
    plain, other = (
        GateSelector(g, TokenBudget(tokens=4 * 32), "triton").select(*tokens, context)
        for g, tokens in ((gate, (q, k)), (moved, (q_moved, k_moved)))
    )
    assert_equal(plain, other)


POLICIES = [
    TopK(density=0.4, rule="row_share", sink_blocks=2),
    TopK(density=[[0.1, 0.3, 0.6, 0.9]]),
    TopK(density=[[0.1, 0.3, 0.6, 0.9]], rule="row_share", last_rows_dense=2),
    TopK(density=0.2, length=1000, sink_blocks=0),
    TokenBudget(tokens=100),
    Threshold(threshold=0.05),
    Threshold(threshold=[[0.01, 0.05, 0.2, 0.5]], last_rows_dense=1),
    Threshold(threshold=-2.5, on="score", sink_blocks=0),
    TopP(p=0.8),
    TopP(p=[[0.2, 0.5, 0.7, 0.95]], sink_blocks=0),
    KeepAll(),
]


@pytest.mark.parametrize("exclude_forced", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_matches_the_torch_modules(policy: Policy, exclude_forced: bool) -> None:
    gate = make_gate(replace(FORMS["queries"], exclude_forced=exclude_forced))
    q, k = make_qk(150, 215)
    assert_equal(*both(gate, policy, q, k, make_context(215)))


@pytest.mark.parametrize(
    "policy",
    [
        TopK(density=0.4),
        TopK(density=0.45, length=1000),
        TopK(density=0.3, rule="row_share"),
        TopK(density=0.4, heads="equal"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("q_len", "k_len"), [(215, 215), (150, 215)])
def test_budgets_of_heads_match_the_torch_modules(policy: TopK, q_len: int, k_len: int) -> None:
    tables = (
        (((0.1, 0.2, 0.4, 0.5),), ((0.2, 0.4, 0.8, 1.0),)),
        (((0.6, 0.2, 0.2, 0.2),), ((0.9, 0.5, 0.5, 0.5),)),
    )
    about = {"block_q": 32, "block_k": 32, "target": "max:inf", "gain": "max:inf", "text": "", "windows": 1}
    budgets = HeadBudgets((0.3, 0.6), (128, 1024), tables, **about)
    gate, context, (q, k) = make_gate(FORMS["queries"]), make_context(k_len), make_qk(q_len, k_len)
    with torch.no_grad():
        expected, got = (
            GateSelector(gate, policy, impl, budgets).select(q, k, context) for impl in ("reference", "triton")
        )
    assert_equal(expected, got)
    # And they are the densities by head that the table has for this call.
    tokens = policy.length or (1024 if policy.rule == "row_share" else k_len)
    own = policy if policy.heads == "equal" else replace(policy, density=budgets.at(policy.density, tokens))
    assert_equal(modules(gate, own, q, k, context), got)
    assert (len({int(head.sum()) for head in got.counts[0]}) > 1) == (policy.heads == "calibrated")


@pytest.mark.parametrize("name", ["sum-2", "sum-1.5-raw", "max-1"])
def test_scores_themselves_match_the_torch_modules_where_first_and_last_blocks_are_partial(name: str) -> None:
    """A level tells the same blocks of every row apart only if the scores have no constant of their own."""
    gate, context, (q, k) = make_gate(FORMS[name]), make_context(330), make_qk(100, 330)
    with torch.no_grad():
        scores = gate(context.unrotate(q, 230), context.unrotate(k, 0))
    for row in (0, -1):
        levels = scores[:, :, row].flatten()
        levels = levels[levels.isfinite()].sort().values
        for at in range(len(levels) // 8, len(levels) - 1, len(levels) // 4):
            policy = Threshold(threshold=float(levels[at : at + 2].mean()), on="score", sink_blocks=0)
            assert_equal(*both(gate, policy, q, k, context))


@pytest.mark.parametrize("policy", [TokenBudget(tokens=5 * 32), TopP(p=0.43), Threshold(threshold=0.17)], ids=str)
def test_equal_scores_are_taken_from_the_left(policy: Policy) -> None:
    # Halves and quarters, and 16 channels whose scale is a quarter: all products and sums are exact. Else the order of
    # a matrix product, which is the processor's own and differs from column to column, would tell equal blocks apart.
    gate = make_gate(replace(PAPER, q_linear=True, gate_dim=16))
    q, k = ((2 * x).round() / 2 for x in make_qk(320, 320))
    with torch.no_grad():
        for weight in gate.parameters():
            weight.copy_((4 * weight).round() / 4)
    k = k.contiguous()
    k[:, :, 64:] = k[:, :, :32].repeat(1, 1, 8, 1)  # before a rotation by nothing
    gate.inv_freq.zero_()
    context = make_context(320, scale=1.0)
    context = replace(
        context,
        unrotate=lambda x, start: x.float(),
        rotary=RotaryTables(torch.ones_like(context.rotary.cos), torch.zeros_like(context.rotary.sin), D),
    )
    with torch.no_grad():
        assert gate(q, k)[0, 0, -1, 2:].unique().numel() == 1
    assert_equal(*both(gate, policy, q, k, context))


@pytest.mark.parametrize("name", ["paper", "queries"])
def test_scores_that_fp16_cannot_tell_apart_are_told_apart(name: str) -> None:
    """Key blocks that differ by 1e-4 of themselves: a fifth of a rounding to 11 bits."""
    gate = make_gate(replace(FORMS[name], rope=False))
    q, k = make_qk(320, 320)
    k = k[:, :, :1] + 1e-4 * k.unflatten(2, (10, 32))[:, :, :, :1].expand(-1, -1, -1, 32, -1).flatten(2, 3)
    context = AttentionContext(
        layer=0, scale=1.0, softcap=None, unrotate=lambda x, start: x.float(), rotary=RotaryTables()
    )
    assert_equal(*both(gate, TokenBudget(tokens=5 * 32), q, k, context))


@pytest.mark.parametrize("programs", [1, 3])
def test_many_strips_share_few_slots_of_scratch(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_select, "multiprocessors", lambda device: programs)
    gate, context = make_gate(FORMS["queries"]), make_context(700)
    q, k = make_qk(700, 700, batch=2)
    launch = triton_select.Launch(16, 64, 4, 2, 1, 2, pool_step=8)
    monkeypatch.setattr(triton_select, "choose_launch", lambda *args, **kwargs: launch)
    assert_equal(*both(gate, TopK(density=0.3), q, k, context))


def test_two_runs_are_equal_bit_by_bit() -> None:
    gate, context, (q, k) = make_gate(FINE), make_context(300), make_qk(300, 300)
    first, second = (GateSelector(gate, TopP(p=0.6), "triton").select(q, k, context) for _ in range(2))
    assert_equal(first, second)


ROTATIONS = {
    "halves": {},
    "halves-half-tables": {"columns": D // 2},
    "interleaved": {"interleaved": True, "column_step": 2},
    "interleaved-concatenated-tables": {"interleaved": True},
    "part": {"width": 16},
    "part-interleaved": {"width": 16, "interleaved": True, "column_step": 2},
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_pooled_windows_match_torch_for_every_rotation(name: str) -> None:
    context = make_context(150, **ROTATIONS[name])
    x, _ = make_qk(91, 91, batch=2)
    kinds = ("min", "avg", "max")
    expected, got = (
        pool(x, context, start=59, size=8, kinds=kinds, impl=impl).features for impl in ("reference", "triton")
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", ROTATIONS)
def test_salient_windows_match_fp64_for_every_rotation(name: str, size: int) -> None:
    assert_salient_windows_match_fp64(size=size, **ROTATIONS[name])


@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
def test_salient_windows_match_fp64_when_tokens_are_read_in_pairs(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights from those of the average to one token's alone, whose logits no exponential could hold."""
    monkeypatch.setattr(triton_pool, "STEP", 2)
    assert_salient_windows_match_fp64(size=8, strength=strength)


def assert_salient_windows_match_fp64(*, size: int, strength: float = 1.0, **rotation) -> None:
    start, length, eps = 59, 91, torch.finfo(torch.float32).eps
    context, (x, _) = make_context(150, **rotation), make_qk(length, length, batch=2)
    salience = strength * torch.randn(4, D, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    arguments = {"start": start, "size": size, "kinds": ("max", "salient", "avg"), "salience": salience}
    eager, got = (
        pool(x, context, impl=impl, **arguments).features[..., D : 2 * D].double() for impl in ("reference", "triton")
    )
    tokens = turned_back(x, start, **{k: v for k, v in rotation.items() if k in ("width", "interleaved")})
    logits = tokens @ salience.double()[..., None]
    inside = [slice(max(0, w * size - start), (w + 1) * size - start) for w in range(start // size, 149 // size + 1)]
    exact = torch.stack([(tokens[:, :, i] * logits[:, :, i].softmax(2)).sum(2) for i in inside], 2)
    # Un-rotation rounds tables and products: each token is off by some roundings of its length, its logit by as many
    # of the product of lengths, and twice that is what a weight is off by, relative to itself.
    largest = float(tokens.norm(dim=-1).max())
    band = 4 * eps * largest * (1 + 2 * largest * float(salience.norm(dim=-1).max()))
    assert float((got - exact).abs().max()) <= 2 * float((eager - exact).abs().max()) + band


@pytest.mark.parametrize("form", ["salient-4x4", "salient-4x4-group"])
def test_choice_of_salient_gates_matches_fp64(form: str) -> None:
    shape, device = Shape(4, 2, D, torch.bfloat16), torch.device(DEVICE)
    context, tables = layer_context(shape, GATE_TOKENS, device), rotary_tables(shape, GATE_TOKENS, device)
    gate = random_gate(gate_form(form), shape, device)
    selector = GateSelector(gate, TopK(density=0.3), "triton")
    error, bound = check_selection(lambda q, k: selector.select(q, k, context), gate, shape, tables, density=0.3)
    assert error <= bound


@pytest.mark.parametrize("name", ["interleaved", "part"])
def test_choice_matches_the_torch_modules_for_other_rotations(name: str) -> None:
    q, k = make_qk(70, 150)
    assert_equal(*both(make_gate(PAPER), TopK(density=0.5), q, k, make_context(150, **ROTATIONS[name])))


PAIRED_FORMS = {
    "paper": PAPER,
    "paper-norm": replace(PAPER, qk_norm=True),
    "salient-unprojected": FORMS["salient-unprojected"],
    "max": FORMS["max"],
    "group-norm": replace(FORMS["group"], qk_norm=True),
    "salient": FORMS["salient"],
    "no-rope": replace(PAPER, rope=False),
}


@pytest.mark.parametrize("form", PAIRED_FORMS)
@pytest.mark.parametrize("rotation", ["interleaved", "part", "part-interleaved"])
def test_choice_matches_the_torch_modules_for_all_pairs_of_channels(rotation: str, form: str) -> None:
    """Those of the gate are those of the model; a gate of 12 channels has all or 8 of them turn."""
    config, model = PAIRED_FORMS[form], ROTATIONS[rotation]
    share = model.get("width", D) / D
    pairing = Pairing({1.0: config.gate_dim or D, 0.5: 8 if config.gate_dim else 16}[share], "interleaved" in model)
    gate, context = make_gate(config, pairing=pairing), make_context(330, **model)
    q, k = make_qk(200, 330)
    blocks = both(gate, TokenBudget(tokens=5 * 32), q, k, context)
    assert_equal(*blocks)
    plain = make_gate(config)
    if config.rope:
        assert not torch.equal(modules(plain, TokenBudget(tokens=5 * 32), q, k, context).indices, blocks[0].indices)


@pytest.mark.parametrize("width", [80, 20])
@pytest.mark.parametrize("interleaved", [False, True])
def test_choice_of_unprojected_queries_matches_torch_where_halves_are_no_power_of_two(
    width: int, interleaved: bool
) -> None:
    gate = make_gate(PAPER, dim=80, pairing=Pairing(width, interleaved))
    q, k = make_qk(200, 200, dim=80)
    context = make_context(200, width=width, interleaved=interleaved, column_step=1 + interleaved)
    assert_equal(*both(gate, TokenBudget(tokens=3 * 32), q, k, context))


@pytest.mark.parametrize("name", ["paper", "queries"])
def test_frequencies_of_a_call_take_the_place_of_the_gates_own(name: str) -> None:
    gate, other = make_gate(FORMS[name]), make_gate(FORMS[name])
    other.inv_freq.mul_(0.3)
    q, k = make_qk(200, 330)
    context = make_context(330)
    of_call = replace(context, frequencies=lambda width: 0.3 * gate.inv_freq)
    policy = TokenBudget(tokens=5 * 32)
    expected, got = modules(other, policy, q, k, context), both(gate, policy, q, k, of_call)
    assert_equal(expected, got[0])
    assert_equal(expected, got[1])
    assert not torch.equal(modules(gate, policy, q, k, context).indices, got[0].indices)


@pytest.mark.parametrize(
    ("dim", "size", "dtype"), [(80, 16, torch.float16), (96, 64, torch.bfloat16), (256, 4, torch.float32)]
)
def test_pooled_windows_match_torch_for_other_widths_and_types(dim: int, size: int, dtype: torch.dtype) -> None:
    context = make_context(130, width=dim, dtype=dtype if dtype == torch.float32 else torch.float32)
    x, _ = make_qk(130, 130, dim=dim)
    x = x.to(dtype)
    expected, got = (
        pool(x, context, start=0, size=size, kinds=("avg", "max"), impl=impl).features
        for impl in ("reference", "triton")
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


def test_choice_matches_the_torch_modules_for_other_widths() -> None:
    config = plain(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2)
    q, k = make_qk(100, 100, dim=80)
    assert_equal(*both(make_gate(config, dim=80), TopK(density=0.5), q, k, make_context(100, width=80)))


def test_unknown_rotation_is_undone_in_torch_first() -> None:
    context = make_context(129)
    q, k = make_qk(129, 129)
    gate = make_gate(PAPER)
    assert_equal(*both(gate, TopK(density=0.5), q, k, replace(context, rotary=None)))


def test_layer_without_rope_needs_no_tables() -> None:
    context = AttentionContext(
        layer=0, scale=1.0, softcap=None, unrotate=lambda x, start: x.float(), rotary=RotaryTables()
    )
    q, k = make_qk(129, 129)
    assert_equal(*both(make_gate(PAPER), TopK(density=0.5), q, k, context))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (replace(PAPER, distance_bias=4), "it has no distance bias"),
        (PAPER, r"it takes fp16, bf16 or fp32, got torch.float64"),
    ],
)
def test_what_the_kernels_lack_is_refused_by_name_and_left_to_torch_by_auto(
    config: AttnGateConfig, sentence: str
) -> None:
    gate, context, (q, k) = make_gate(config), make_context(65), make_qk(65, 65)
    if config == PAPER:
        q, k = q.double(), k.double()
    with pytest.raises(ValueError, match=f"cannot run this gate_scores: {sentence}"):
        GateSelector(gate, KeepAll(), "triton").select(q, k, context)
    assert_equal(*(GateSelector(gate, KeepAll(), impl).select(q, k, context) for impl in ("auto", "reference")))


def test_bad_arguments_are_rejected() -> None:
    gate, context, (q, k) = make_gate(PAPER), make_context(65), make_qk(65, 65)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference"):
        GateSelector(gate, KeepAll(), "cuda")
    with pytest.raises(ValueError, match="a setting per head must have 4 values a layer, got 3"):
        GateSelector(gate, TopP(p=[[0.5, 0.5, 0.5]]), "triton").select(q, k, context)
    with pytest.raises(ValueError, match=r"salience must be \[4, 32\] for salient pooling, got \[2, 32\]"):
        pool(q, context, start=0, size=8, kinds=("salient",), salience=torch.zeros(2, D, device=DEVICE), impl="triton")


def test_lists_follow_weights_that_were_written_to() -> None:
    gate, context = make_gate(FORMS["default"]), make_context(200)
    q, k = make_qk(200, 200)
    policy = TokenBudget(tokens=4 * 32)
    before = both(gate, policy, q, k, context)[1]
    with torch.no_grad():
        gate.k_weight.copy_(gate.k_weight.flip(0) - 0.1)
    after = both(gate, policy, q, k, context)
    assert_equal(*after)
    assert not torch.equal(before.indices, after[1].indices)
