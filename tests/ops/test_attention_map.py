"""Laws of `attention_map`, against a dense fp64 oracle that walks the map token by token."""

import math

import pytest
import torch

from seerattn.ops.attention_map import attention_map, reference
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm

DIM = 32
# Published and mass, whose orders of reduction commute; and sums and maxima of either kind with all kinds of powers.
FORMS = (PUBLISHED, MASS, *(MapForm("sum", a) for a in (2, 4, math.inf)), *(MapForm("max", a) for a in (1, 2, 8)))


def make_qkv(batch, heads, kv_heads, q_tokens, k_tokens, dtype=torch.float64):
    gen = torch.Generator().manual_seed(q_tokens + k_tokens)
    shapes = ((batch, heads, q_tokens, DIM), (batch, kv_heads, k_tokens, DIM), (batch, kv_heads, k_tokens, DIM))
    return [(2 * torch.randn(s, generator=gen, dtype=torch.float64)).to(dtype) for s in shapes]


def oracle(q, k, v, block_q, block_k, *, scale=None, softcap=None, sinks=None, segment_ids=None):
    """Output and a map of each of `FORMS` in fp64, of unpadded calls."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q_tokens, k_tokens = q.shape[2], k.shape[2]
    start = k_tokens - q_tokens
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.arange(k_tokens) <= start + torch.arange(q_tokens)[:, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, None] == segment_ids[:, None, start:, None])
    scores = scores.masked_fill(~visible, -torch.inf)
    norm = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        norm = torch.logaddexp(norm, sinks.double().view(1, -1, 1, 1))
    p = (scores - norm).exp()
    rows, columns = (k_tokens - 1) // block_q - start // block_q + 1, -(-k_tokens // block_k)
    maps = torch.zeros(len(FORMS), *q.shape[:2], rows, columns, dtype=torch.float64)
    for t in range(q_tokens):
        i = (start + t) // block_q - start // block_q
        for j in range(columns):
            tile = p[:, :, t, j * block_k : (j + 1) * block_k]
            for x, form in zip(maps, FORMS):
                r = tile.amax(-1) if form.keys == "max" else tile.sum(-1)
                if form.power == math.inf:
                    x[:, :, i, j] = torch.maximum(x[:, :, i, j], r)
                else:
                    x[:, :, i, j] += r**form.power
    for x, form in zip(maps, FORMS):
        if form.power < math.inf:
            x.pow_(1 / form.power)
    return p @ v, *(maps / maps.sum(-1, keepdim=True))


def assert_matches_oracle(q, k, v, block_q, block_k, **kwargs):
    expected_out, *expected = oracle(q, k, v, block_q, block_k, **kwargs)
    call = {"block_q": block_q, "block_k": block_k, "form": FORMS} | kwargs
    out, maps = attention_map(q, k, v, **call)
    torch.testing.assert_close(out, expected_out, rtol=1e-11, atol=1e-12)
    # Maps are computed in fp64 here and rounded to fp32 once.
    assert len(maps) == len(expected)
    for actual, exact in zip(maps, expected):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, exact.float(), rtol=2**-23, atol=1e-12)
    without = attention_map(q, k, **call)
    assert without.out is None and all(torch.equal(a, b) for a, b in zip(without.maps, maps))


@pytest.mark.parametrize("budget", [1, 2 * 3 * 64 * 128, None])
@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 128), (128, 32)])
@pytest.mark.parametrize("q_tokens, past", [(1, 0), (63, 0), (64, 1), (127, 100), (200, 0), (1, 128)])
def test_ragged_calls_match_dense_oracle(q_tokens, past, block_q, block_k, budget, monkeypatch):
    if budget:
        monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", budget)
    assert_matches_oracle(*make_qkv(2, 6, 2, q_tokens, q_tokens + past), block_q, block_k)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (8, 2)])
@pytest.mark.parametrize("extra", [{}, *({"scale": s} for s in (0.4, 0.0, -0.4)), {"softcap": 1.5}, {"sinks": True}])
def test_heads_softcap_and_sinks_match_dense_oracle(heads, kv_heads, extra):
    if "sinks" in extra:
        extra = {"sinks": torch.linspace(-1, 4, heads, dtype=torch.float64)}
    assert_matches_oracle(*make_qkv(2, heads, kv_heads, 90, 110), 32, 32, **extra)


@pytest.mark.parametrize("q_tokens", [150, 60])
def test_packed_documents_match_dense_oracle(q_tokens):
    segment_ids = torch.zeros(2, 150, dtype=torch.int32)
    segment_ids[0, 70:] = 1
    segment_ids[0, 131:] = 2
    segment_ids[1, 5:] = 7
    assert_matches_oracle(*make_qkv(2, 4, 2, q_tokens, 150), 32, 64, segment_ids=segment_ids)


@pytest.mark.parametrize("q_tokens", [200, 90])
@pytest.mark.parametrize("packed", [False, True])
def test_padded_row_matches_the_row_alone(q_tokens, packed):
    lengths = [131, 200, 64, 1, 0]
    q, k, v = make_qkv(len(lengths), 4, 2, q_tokens, 200)
    segment_ids = (torch.arange(200) // 60).repeat(len(lengths), 1) if packed else None
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 200 - n] = torch.inf
        v[b, :, : 200 - n] = torch.nan
    kwargs = {"block_q": 64, "block_k": 32}
    kwargs |= {"form": FORMS, "lengths": torch.tensor(lengths), "segment_ids": segment_ids}
    out, maps = attention_map(q, k, v, **kwargs)
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert (out[b, :, : q_tokens - t] == 0).all()
        if not n:
            assert all((x[b] == 0).all() for x in maps)
            continue
        alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
        own = segment_ids[b : b + 1, 200 - n :] if packed else None
        expected = oracle(*alone, 64, 32, segment_ids=own)
        torch.testing.assert_close(out[b, :, q_tokens - t :], expected[0][0], rtol=1e-11, atol=1e-12)
        for actual, wanted in ((x[b], exact[0]) for x, exact in zip(maps, expected[1:])):
            rows, columns = wanted.shape[1:]
            torch.testing.assert_close(actual[:, :rows, :columns], wanted.float(), rtol=2**-23, atol=1e-12)
            assert (actual[:, rows:] == 0).all() and (actual[..., columns:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_its_error_budget(dtype):
    q, k, v = make_qkv(1, 4, 2, 300, 300, dtype)
    expected_out, *expected = oracle(q, k, v, 64, 64)
    out, maps = attention_map(q, k, v, form=FORMS)
    assert out.dtype == dtype
    # Inside all is fp32: scores of size 2 * 32 / sqrt(32) * 4 carry an absolute error of some 32 roundings, which
    # is a relative error of probabilities and maps; the output is rounded to its dtype at the end.
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT * DIM**-0.5).abs().max()
    band = 32 * torch.finfo(torch.float32).eps * float(scores)
    for actual, exact in zip(maps, expected):
        assert ((actual.double() - exact).abs() <= 2 * band * exact + 1e-12).all()
    rounding = torch.finfo(dtype).eps / 2 * expected_out.abs()
    assert ((out.double() - expected_out).abs() <= rounding + 2 * band * v.double().abs().max()).all()


def test_autocast_does_not_lower_the_precision_inside():
    q, k, v = make_qkv(1, 2, 1, 130, 130, torch.float32)
    expected = attention_map(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attention_map(q, k, v)
    assert torch.equal(actual.out, expected.out) and torch.equal(actual.map, expected.map)


def test_results_carry_no_graph():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 1, 40, 40))
    out, maps = attention_map(q, k, v, form=FORMS)
    assert not any(x.requires_grad for x in (out, *maps))


def test_one_form_is_the_published_one_unless_another_is_named():
    q, k, v = make_qkv(1, 2, 1, 70, 100)
    several = dict(zip(FORMS, attention_map(q, k, form=FORMS).maps))
    assert torch.equal(attention_map(q, k).map, several[PUBLISHED])
    assert torch.equal(attention_map(q, k, v, form=MapForm("sum", 2)).map, several[MapForm("sum", 2)])
    with pytest.raises(ValueError):
        _ = attention_map(q, k, form=FORMS).map


def test_bad_arguments_are_rejected():
    q, k, v = make_qkv(2, 4, 2, 64, 100)
    wrong = {
        "lengths must hold at least one": {"lengths": torch.tensor([0, 0])},
        "lengths must be 0 to": {"lengths": torch.tensor([0, 101])},
        "segment_ids must be int": {"segment_ids": torch.zeros(2, 64, dtype=torch.int64)},
        "block_q and block_k": {"block_q": 0},
        "impl must be one of auto, triton, reference": {"impl": "cuda"},
        r"form must be a MapForm or several, got \(\)": {"form": ()},
        "form must be a MapForm or several, got 'sum:2'": {"form": "sum:2"},
        r"form must be a MapForm or several, got \[2\]": {"form": [2]},
        "form must be a MapForm or several, got 3": {"form": 3},
    }
    for message, kwargs in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention_map(q, k, v, **kwargs)
