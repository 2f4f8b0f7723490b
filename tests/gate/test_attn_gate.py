"""The gate against a written-out fp64 recomputation, and its invariances."""

import itertools
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from seerattn.gate import AttnGate, AttnGateConfig, Pairing
from seerattn.gate import attn_gate as module
from seerattn.gate.attn_gate import parameter_count
from seerattn.gate.config import PUBLISHED_TARGET
from seerattn.gate.pooling import Pooled, pool_blocks
from seerattn.selection.map_form import PUBLISHED, MapForm

D, H, HKV = 16, 4, 2
INV_FREQ = 10_000.0 ** -(torch.arange(D // 2) / (D // 2))


def make(config: AttnGateConfig, seed: int = 0, pairing: Pairing | None = None) -> AttnGate:
    torch.manual_seed(seed)
    inv_freq = INV_FREQ if config.gate_dim is None else 10_000.0 ** -(torch.arange(config.gate_dim // 2) / 4)
    if pairing is not None:  # the model has no frequencies for channels beyond
        inv_freq = inv_freq * (torch.arange(len(inv_freq)) < pairing.width // 2)
    gate = AttnGate(config, num_heads=H, num_kv_heads=HKV, head_dim=D, inv_freq=inv_freq, pairing=pairing)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.3)
    return gate


def qk(length: int, keys: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, H, length, D, generator=g), torch.randn(2, HKV, keys or length, D, generator=g)


def turning(gate: AttnGate) -> list[tuple[int, int]]:
    """Channels that rotate together, in the order of their frequencies."""
    half = gate.pairing.width // 2
    return [(2 * i, 2 * i + 1) if gate.pairing.interleaved else (i, i + half) for i in range(half)]


def oracle(gate: AttnGate, q: Tensor, k: Tensor) -> Tensor:
    """Scores in fp64, a Python loop over every head and pair of sub-blocks."""
    c, q, k = gate.config, q.double(), k.double()
    q_size, k_size = c.block_q // c.query_subblocks, c.block_k // c.key_subblocks
    start, keys = k.shape[2] - q.shape[2], k.shape[2]
    reduce = {"avg": lambda x: x.mean(0), "max": lambda x: x.amax(0), "min": lambda x: x.amin(0)}

    def windows(x: Tensor, first: int, size: int, kinds, salience: Tensor | None) -> dict[int, Tensor]:
        def salient(rows: Tensor) -> Tensor:
            weights = torch.stack([math.e ** (row @ salience.double()) for row in rows])
            return sum(weight * row for weight, row in zip(weights, rows)) / weights.sum()

        reduce["salient"] = salient
        cut: dict[int, list[Tensor]] = {}
        for t in range(x.shape[0]):
            cut.setdefault((first + t) // size, []).append(x[t])
        return {w: torch.cat([reduce[kind](torch.stack(rows)) for kind in kinds]) for w, rows in cut.items()}

    def place(x: Tensor, position: int, norm) -> Tensor:
        if c.qk_norm:
            x = x / (x.square().mean() + 1e-6).sqrt() * norm.weight.double()
        if not c.rope:
            return x
        out = x.clone()
        for (i, j), frequency in zip(turning(gate), gate.inv_freq.tolist()):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            out[i], out[j] = x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin
        return out

    batch, group = q.shape[0], H // HKV
    num_q = (start + q.shape[2] - 1) // c.block_q - start // c.block_q + 1
    out = torch.full((batch, gate.mask_heads, num_q, -(-keys // c.block_k)), -math.inf, dtype=torch.float64)
    pieces: dict[tuple[int, ...], list[Tensor]] = {}
    for b, m in itertools.product(range(batch), range(gate.mask_heads)):
        kv = m if c.share == "kv_group" else m // group
        members = range(m * group, (m + 1) * group) if c.share == "kv_group" else [m]
        q_own, k_own = gate.q_salience, gate.k_salience
        pooled = [windows(q[b, h], start, q_size, c.q_pooling, None if q_own is None else q_own[h]) for h in members]
        gq = {w: torch.cat([p[w] for p in pooled]) for w in pooled[0]}
        if gate.q_weight is not None:
            gq = {w: x @ gate.q_weight[m].double() for w, x in gq.items()}
        gq = {w: place(x, w * q_size, gate.q_norm) for w, x in gq.items()}
        k_weight = gate.k_weight[kv if gate.k_weight.shape[0] == HKV else m].double()
        gk = windows(k[b, kv], 0, k_size, c.k_pooling, None if k_own is None else k_own[kv])
        gk = {w: place(x @ k_weight, w * k_size, gate.k_norm) for w, x in gk.items()}
        for i, x in gq.items():
            last = min((i + 1) * q_size, keys) - 1
            row = {}
            for j, y in gk.items():
                if j * k_size > last:
                    continue
                row[j] = x @ y / math.sqrt(gate.gate_dim)
                if c.distance_bias:
                    apart = (i // c.query_subblocks * c.block_q - j // c.key_subblocks * c.block_k) // c.block_k
                    row[j] = row[j] + gate.distance_bias[m, min(max(apart, 0), c.distance_bias - 1)].double()
            if c.normalize_subblocks:
                total = torch.stack(list(row.values())).logsumexp(0)
                row = {j: s - total for j, s in row.items()}
            given: dict[int, list[Tensor]] = {}  # what this piece of a query block gives to each key block
            for j, s in row.items():
                given.setdefault(j // c.key_subblocks, []).append(s)
            for kj, s in given.items():
                share = torch.stack(s).amax(0) if c.target_keys == "max" else torch.stack(s).exp().sum(0).log()
                pieces.setdefault((b, m, i // c.query_subblocks - start // c.block_q, kj), []).append(share)
    for place, shares in pieces.items():
        a, block = c.target_power, place[2] + start // c.block_q
        count = sum(i // c.query_subblocks == block for i in gq)  # those that see nothing of the block give it nothing
        s = torch.stack(shares)
        out[place] = s.amax(0) if a is None else ((s * a).exp().sum(0) / count).log() / a
    return out


POOLED = ("avg", "max", "min")
FORMS = {
    "paper": AttnGateConfig.paper(block_q=32, block_k=32),
    "default": AttnGateConfig(block_q=32, block_k=32),
    "plain": AttnGateConfig(
        block_q=32, block_k=32, q_pooling=POOLED, k_pooling=POOLED, query_subblocks=8, **PUBLISHED_TARGET
    ),
    "group": AttnGateConfig(block_q=32, block_k=64, share="kv_group", query_subblocks=2, key_subblocks=4),
    "norm-bias-norope": AttnGateConfig(block_q=64, block_k=32, rope=False, qk_norm=True, distance_bias=3),
    "max-min-narrow": AttnGateConfig(block_q=32, block_k=32, q_pooling=("max",), k_pooling=("min",), gate_dim=8),
    "queries-only": AttnGateConfig(block_q=32, block_k=32, key_subblocks=1, normalize_subblocks=False),
    "salient": AttnGateConfig(
        block_q=32, block_k=32, q_pooling=("salient", "max"), k_pooling=("min", "salient"), key_subblocks=4
    ),
    "salient-keys": AttnGateConfig.paper(block_q=32, block_k=64, k_pooling=("salient", "avg")),
    "salient-queries-group": AttnGateConfig(
        block_q=64, block_k=32, q_pooling=("avg", "salient"), k_pooling=("avg",), share="kv_group", query_subblocks=4
    ),
    "mass": AttnGateConfig(block_q=32, block_k=32, target_keys="sum", target_power=1),
    "sum-2": AttnGateConfig(block_q=32, block_k=64, target_keys="sum", target_power=2, query_subblocks=4),
    "sum-largest-row": AttnGateConfig(block_q=64, block_k=32, target_keys="sum", share="kv_group"),
    "max-4": AttnGateConfig(block_q=32, block_k=32, target_power=4, normalize_subblocks=False, distance_bias=2),
    "sum-8-unpieced-queries": AttnGateConfig(
        block_q=32, block_k=32, target_keys="sum", target_power=8, query_subblocks=1, normalize_subblocks=False
    ),
}


def hand_on(gate: AttnGate, q: Tensor, k: Tensor, row_starts: int = 0) -> tuple[Pooled, Pooled]:
    """What a gate may be given in place of q and k: pooled, or single tokens where pooling is learned."""
    c = gate.config
    sides = ((q, c.q_size, row_starts, c.q_pooling), (k, c.k_size, 0, c.k_pooling))
    pooled = []
    for x, size, start, kinds in sides:
        if "salient" in kinds:
            size, kinds = 1, ("avg",)
        pooled.append(Pooled(pool_blocks(x, size=size, start=start, kinds=kinds), size, start, x.shape[2]))
    return pooled[0], pooled[1]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (31, 31), (100, 100), (33, 100), (70, 131), (1, 65)])
def test_scores_match_a_written_out_fp64_loop(name: str, length: int, keys: int) -> None:
    assert_matches_oracle(make(FORMS[name]), length, keys)


@pytest.mark.parametrize("name", ["paper", "default", "group", "max-min-narrow", "salient-keys", "norm"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_scores_match_the_loop_for_all_pairs_of_channels(name: str, interleaved: bool, share: float) -> None:
    config = replace(FORMS["paper"], qk_norm=True) if name == "norm" else FORMS[name]
    pairing = Pairing(int((config.gate_dim or D) * share) // 2 * 2, interleaved)
    assert_matches_oracle(make(config, pairing=pairing), 70, 131)


def assert_matches_oracle(gate: AttnGate, length: int, keys: int) -> None:
    q, k = (x[:1] for x in qk(length, keys))
    expected, got = oracle(gate, q, k), gate(q, k)
    assert got.dtype == torch.float32
    assert torch.equal(got.isneginf(), expected.isneginf())
    finite = ~expected.isneginf()
    # fp32 products of 3 * 16 terms: a few hundred roundings of 6e-8 relative to the largest score.
    assert (got.double() - expected)[finite].abs().max() <= 3e-5 * expected[finite].abs().max().clamp_min(1)


@pytest.mark.parametrize("name", FORMS)
def test_strips_and_one_shot_give_the_same_scores_and_gradients(name: str, monkeypatch) -> None:
    gate = make(FORMS[name])
    q, k = qk(150, 200)
    whole = gate(q, k)
    gradients = torch.autograd.grad(whole[whole.isfinite()].square().sum(), gate.parameters())
    monkeypatch.setattr(module, "STRIP_ELEMENTS_CPU", 1)
    strips = gate(q, k)
    assert torch.allclose(strips, whole, rtol=1e-5, atol=1e-5)
    again = torch.autograd.grad(strips[strips.isfinite()].square().sum(), gate.parameters())
    for a, b in zip(gradients, again):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("name", FORMS)
def test_chunks_cut_on_block_boundaries_score_like_one_shot(name: str) -> None:
    gate = make(FORMS[name])
    q, k = qk(200)
    whole = gate(q, k)
    step = 64
    rows = []
    for begin in range(0, 200, step):
        end = min(begin + step, 200)
        part = gate(q[:, :, begin:end], k[:, :, :end])
        rows.append(torch.nn.functional.pad(part, (0, whole.shape[-1] - part.shape[-1]), value=-math.inf))
    # Matrix products of other shapes may add in another order: a few roundings apart, no more.
    torch.testing.assert_close(torch.cat(rows, dim=2), whole, rtol=1e-5, atol=1e-5)


def test_cached_gate_keys_of_finished_blocks_score_like_recomputed_ones() -> None:
    gate = make(FORMS["default"])
    q, k = qk(40, 200)
    old = gate.gate_keys(k[:, :, :160], 0)
    new = gate.gate_keys(k[:, :, 160:], 160)
    cached = gate.scores(gate.gate_queries(q, 160), torch.cat((old, new), dim=2), q_start=160, q_len=40)
    torch.testing.assert_close(cached, gate(q, k), rtol=1e-5, atol=1e-5)


def test_scores_of_future_tokens_do_not_reach_earlier_rows() -> None:
    gate = make(FORMS["default"])
    q, k = qk(128)
    changed = k.clone()
    changed[:, :, 64:] = 100.0
    assert torch.equal(gate(q, k)[:, :, :2], gate(q, changed)[:, :, :2])


@pytest.mark.parametrize("target", ["max:inf", "max:2", "sum:1", "sum:2", "sum:4", "sum:inf"])
def test_a_gate_that_sees_every_token_predicts_its_target_exactly(target: str) -> None:
    """Windows of one token, projected by nothing: scores are the logarithm of the true map of any form, undivided."""
    form = MapForm.parse(target)
    config = AttnGateConfig(
        block_q=32, block_k=32, query_subblocks=32, key_subblocks=32, q_pooling=("avg",), k_pooling=("avg",),
        rope=False, target_keys=form.keys, target_power=form.power,
    )  # fmt: skip
    gate = AttnGate(config, num_heads=H, num_kv_heads=HKV, head_dim=32)
    with torch.no_grad():
        for weight in gate.parameters():
            weight.copy_(torch.eye(32).expand_as(weight))
    g = torch.Generator().manual_seed(2)
    q, k = 2 * torch.randn(1, H, 75, 32, generator=g), 2 * torch.randn(1, HKV, 139, 32, generator=g)
    p = q.double() @ k.double().repeat_interleave(H // HKV, 1).mT * 32**-0.5
    p = p.masked_fill(torch.arange(139) > torch.arange(64, 139)[:, None], -math.inf).softmax(-1)
    rows = []
    for queries in p.split(32, 2):
        shares = torch.stack([x.amax(-1) if form.keys == "max" else x.sum(-1) for x in queries.split(32, 3)], -1)
        rows.append(shares.amax(2) if form.power == math.inf else shares.pow(form.power).mean(2).pow(1 / form.power))
    torch.testing.assert_close(gate(q, k).double().exp(), torch.stack(rows, 2), rtol=1e-4, atol=1e-12)


def test_identity_init_starts_as_mean_pooled_attention() -> None:
    torch.manual_seed(0)
    config = AttnGateConfig(rope=False, query_subblocks=1, key_subblocks=1, normalize_subblocks=False)
    gate = AttnGate(config, num_heads=H, num_kv_heads=HKV, head_dim=D)
    with torch.no_grad():  # remove the noise on top of the identity
        gate.q_weight.copy_(torch.where(gate.q_weight > 0.5, 1.0, 0.0))
        gate.k_weight.copy_(torch.where(gate.k_weight > 0.5, 1.0, 0.0))
    q, k = qk(128)
    mean_q, mean_k = (x.double().unflatten(2, (2, 64)).mean(3) for x in (q, k.repeat_interleave(H // HKV, 1)))
    expected = mean_q @ mean_k.transpose(-1, -2) / math.sqrt(D)
    got = gate(q, k)
    assert torch.allclose(got[:, :, 1].double(), expected[:, :, 1], atol=1e-6)


def test_published_layout_of_llama_3_1_8b_has_50331648_parameters() -> None:
    shape = {"layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    assert parameter_count(AttnGateConfig.paper(), **shape) == 50_331_648


@pytest.mark.parametrize("name", FORMS)
def test_config_survives_a_round_trip_through_json_types(name: str) -> None:
    assert AttnGateConfig.from_dict(FORMS[name].to_dict()) == FORMS[name]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"block_q": 48}, "block_q"),
        ({"query_subblocks": 7}, "query_subblocks"),
        ({"key_subblocks": 0}, "key_subblocks"),
        ({"q_pooling": ()}, "q_pooling"),
        ({"q_pooling": ("avg", "avg")}, "q_pooling"),
        ({"k_pooling": ("avg", "median")}, "k_pooling"),
        ({"q_linear": False, "q_pooling": ("avg", "max")}, "q_linear"),
        ({"q_linear": False, "share": "kv_group"}, "q_linear"),
        ({"share": "layer"}, "share"),
        ({"init": "zeros"}, "init"),
        ({"gate_dim": 7}, "gate_dim"),
        ({"gate_dim": 1026}, "gate_dim"),
        ({"distance_bias": -1}, "distance_bias"),
        ({"target_keys": "mean"}, "target_keys"),
        ({"target_power": 0.5}, "target_power"),
        ({"target_power": 1025}, "target_power"),
        ({"target_power": -math.inf}, "target_power"),
    ],
)
def test_config_rejects_what_no_gate_can_be(values: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must "):
        AttnGateConfig(**values)


# Whole numbers may be written with a point.
FIT = {"block_q": 64.0, "block_k": 64.0, "gate_dim": 64.0, "query_subblocks": 64.0, "key_subblocks": 64.0}
FIT |= {"distance_bias": 64.0}


@pytest.mark.parametrize("field", AttnGateConfig().to_dict())
@pytest.mark.parametrize(
    "value",
    [[], [64], ["avg", 1], {}, "x", "", 1.5, 64.0, -2, 10**9, 10**400, math.nan, math.inf, None, True, b"avg"],
    ids=lambda value: str(value)[:20],
)
def test_config_takes_values_of_its_own_kinds_alone(field: str, value: object) -> None:
    if (field, value) == ("gate_dim", None) or (value is True and isinstance(getattr(AttnGateConfig(), field), bool)):
        return
    if field == "target_power" and value in (1.5, 64.0, math.inf, None):
        return
    if isinstance(value, float) and FIT.get(field) == value:
        assert getattr(AttnGateConfig(**{field: value}), field) == value
        return
    for make_config in (AttnGateConfig.from_dict, lambda values: AttnGateConfig(**values)):
        with pytest.raises(ValueError, match=rf"^{field} must .{{0,400}}$"):
            make_config({field: value})


def test_target_of_saved_gates_that_do_not_tell_it_and_of_the_published_form_is_the_published_one(monkeypatch) -> None:
    told = AttnGateConfig(target_keys="sum", target_power=2).to_dict()
    assert AttnGateConfig.from_dict(json.loads(json.dumps(told))).target == MapForm("sum", 2)
    # Whatever becomes the default of fresh gates.
    monkeypatch.setattr(AttnGateConfig.__init__, "__defaults__", _defaults(target_keys="sum", target_power=2.0))
    assert AttnGateConfig().target == MapForm("sum", 2)
    silent = {name: value for name, value in told.items() if not name.startswith("target")}
    assert AttnGateConfig.from_dict(silent).target == AttnGateConfig.paper().target == PUBLISHED


def _defaults(**changes: object) -> tuple:
    return tuple(changes.get(f.name, f.default) for f in fields(AttnGateConfig))


def test_an_infinite_power_is_the_largest_row_and_saved_without_infinity() -> None:
    config = AttnGateConfig(target_keys="max", target_power=math.inf)
    assert config == AttnGateConfig(target_keys="max", target_power=None) and config.target == PUBLISHED
    assert json.loads(json.dumps(config.to_dict(), allow_nan=False))["target_power"] is None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (33, 100), (70, 131)])
def test_gradients_of_all_that_is_causal_are_finite(name: str, length: int, keys: int) -> None:
    """Blocks without a causal pair of sub-blocks must not reach the gradient, not even as 0 times infinity."""
    gate = make(FORMS[name])
    gradients = torch.autograd.grad(gate(*qk(length, keys)).softmax(-1).square().sum(), gate.parameters())
    assert all(g.isfinite().all() for g in gradients)
    if keys > gate.config.block_k:
        assert float(gradients[0].abs().max()) > 0


@pytest.mark.parametrize("values", [None, [], "x", 3, [("block_q", 64)]])
def test_config_is_made_of_dictionaries_alone(values: object) -> None:
    with pytest.raises(ValueError, match="gate config must be a dictionary"):
        AttnGateConfig.from_dict(values)


def test_config_rejects_unknown_fields() -> None:
    for values, told in (({"block": 64}, "'block'"), ({3: 1, "block": 64, None: 2}, "3")):
        with pytest.raises(ValueError, match=f"got {told}$"):
            AttnGateConfig.from_dict(values)


def test_pooled_frequencies_of_a_call_take_the_place_of_the_gates_own() -> None:
    gate, other = make(FORMS["salient"]), make(FORMS["salient"])
    other.inv_freq = 0.3 * INV_FREQ
    q, k = qk(150)
    of_call = [replace(x, inv_freq=0.3 * INV_FREQ) for x in hand_on(gate, q, k)]
    assert torch.equal(gate(*of_call), other(q, k))
    assert not torch.allclose(gate(*of_call), gate(q, k))
    cut = gate(*(x.cut(slice(1, 2), 64, 150) for x in of_call))
    torch.testing.assert_close(cut, other(q[1:, :, 64:], k[1:, :, 64:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0, 7, 18])
def test_gate_rejects_pairs_that_it_does_not_have(width: int) -> None:
    with pytest.raises(ValueError, match=f"pairing must rotate an even number of 2 to 16 channels, got {width}"):
        make(FORMS["paper"], pairing=Pairing(width))


def test_gate_rejects_missing_frequencies_and_a_query_without_its_key() -> None:
    with pytest.raises(ValueError, match="inv_freq must be"):
        AttnGate(AttnGateConfig(), num_heads=H, num_kv_heads=HKV, head_dim=D)
    q, k = qk(10)
    with pytest.raises(ValueError, match="k must hold the keys"):
        make(FORMS["paper"])(q, k[:, :, :5])


@pytest.mark.parametrize("name", FORMS)
def test_pooled_inputs_score_like_the_tokens_they_come_from(name: str) -> None:
    gate = make(FORMS[name])
    q, k = qk(70, 131)
    got, expected = gate(*hand_on(gate, q, k, 61)), gate(q, k)
    assert torch.equal(got, expected)
    gradients = [
        torch.autograd.grad(scores[scores.isfinite()].square().sum(), gate.parameters()) for scores in (got, expected)
    ]
    for (parameter, _), a, b in zip(gate.named_parameters(), *gradients):
        assert torch.equal(a, b), parameter
        assert parameter not in ("q_salience", "k_salience") or bool((a != 0).all())


@pytest.mark.parametrize("name", ["default", "salient", "salient-keys"])
def test_a_document_cut_out_of_pooled_rows_scores_as_if_alone(name: str) -> None:
    gate = make(FORMS[name])
    q, k = qk(150)
    # Matrix products of other shapes may add in another order.
    torch.testing.assert_close(
        gate(*(x.cut(slice(1, 2), 64, 150) for x in hand_on(gate, q, k))),
        gate(q[1:, :, 64:], k[1:, :, 64:]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("start", [0, 5])
def test_salient_pooling_starts_as_the_average_and_weighs_by_softmax(start: int) -> None:
    x, _ = qk(43)
    zeros = pool_blocks(x, size=8, start=start, kinds=("salient",), salience=torch.zeros(H, D))
    # The same 8 terms, divided before or after they are added: a few roundings apart.
    torch.testing.assert_close(zeros, pool_blocks(x, size=8, start=start, kinds=("avg",)), rtol=1e-6, atol=1e-6)
    one = torch.zeros(H, D)
    one[:, 3] = 1e4  # so steep that one token takes all
    got = pool_blocks(x, size=8, start=start, kinds=("max", "salient"), salience=one)
    assert torch.equal(got[..., D + 3], got[..., 3])


def test_salient_gate_starts_as_the_average_gate() -> None:
    gates = []
    for kind in ("avg", "salient"):
        torch.manual_seed(0)
        config = AttnGateConfig(block_q=32, block_k=32, q_pooling=(kind, "max"), k_pooling=("min", kind))
        gates.append(AttnGate(config, num_heads=H, num_kv_heads=HKV, head_dim=D, inv_freq=INV_FREQ))
    average, salient = gates
    assert torch.equal(average.q_weight, salient.q_weight) and torch.equal(average.k_weight, salient.k_weight)
    q, k = qk(70, 131)
    torch.testing.assert_close(salient(q, k), average(q, k), rtol=1e-5, atol=1e-5)


def test_salient_pooling_adds_one_vector_a_head_and_only_where_it_is_used() -> None:
    shape = {"num_heads": H, "num_kv_heads": HKV, "head_dim": D}
    counts = [
        parameter_count(AttnGateConfig(q_pooling=(q,), k_pooling=(k,)), layers=3, **shape)
        for q, k in (("avg", "avg"), ("salient", "avg"), ("avg", "salient"), ("salient", "salient"))
    ]
    assert [n - counts[0] for n in counts] == [0, 3 * H * D, 3 * HKV * D, 3 * (H + HKV) * D]
    assert set(make(FORMS["plain"]).state_dict()) == {"q_weight", "k_weight"}


def test_learned_pooling_of_single_token_windows_has_a_gradient_of_zero() -> None:
    gate = make(AttnGateConfig(block_q=32, block_k=32, q_pooling=("salient",), query_subblocks=32))
    q, k = qk(40)
    scores = gate(*hand_on(gate, q, k))
    assert torch.equal(scores, gate(q, k))
    (gradient,) = torch.autograd.grad(scores[scores.isfinite()].sum(), [gate.q_salience])
    assert torch.equal(gradient, torch.zeros(H, D))


def test_gate_rejects_tokens_pooled_for_another_gate() -> None:
    gate = make(FORMS["plain"])
    q, k = qk(40)
    with pytest.raises(ValueError, match="windows of 4 tokens or 1, got 2"):
        gate(Pooled(pool_blocks(q, size=2, start=0, kinds=("avg",)), 2, 0, 40), k)


@pytest.mark.parametrize("kinds", [("avg",), ("avg", "max", "min"), ("salient", "max")])
def test_a_window_of_one_token_is_that_token_whether_gradients_are_taken_or_not(kinds: tuple[str, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, salience = torch.randn(2, 3, 4, 8, generator=g), torch.randn(3, 8, generator=g)
    pooled = pool_blocks(x, size=1, start=5, kinds=kinds, salience=salience)
    with torch.no_grad():
        assert torch.equal(pool_blocks(x, size=1, start=5, kinds=kinds, salience=salience), pooled)
    assert torch.equal(pooled, torch.cat([x] * len(kinds), -1))
