"""Laws of `pooled_attention` and `block_mass`, against a dense fp64 oracle that walks the map token by token."""

import pytest
import torch

from seerattn.ops.pooled_attention import block_mass, pooled_attention, reference

DIM = 32


def make_qkv(batch, heads, kv_heads, q_tokens, k_tokens, dtype=torch.float64):
    gen = torch.Generator().manual_seed(q_tokens + k_tokens)
    shapes = ((batch, heads, q_tokens, DIM), (batch, kv_heads, k_tokens, DIM), (batch, kv_heads, k_tokens, DIM))
    return [(2 * torch.randn(s, generator=gen, dtype=torch.float64)).to(dtype) for s in shapes]


def oracle(q, k, v, block_q, block_k, *, scale=None, softcap=None, sinks=None, segment_ids=None):
    """Output, target and mass in fp64, of unpadded calls."""
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
    target, mass = torch.zeros(2, *q.shape[:2], rows, columns, dtype=torch.float64)
    for t in range(q_tokens):
        i = (start + t) // block_q - start // block_q
        for j in range(columns):
            tile = p[:, :, t, j * block_k : (j + 1) * block_k]
            target[:, :, i, j] = torch.maximum(target[:, :, i, j], tile.amax(-1))
            mass[:, :, i, j] += tile.sum(-1)
    return p @ v, target / target.sum(-1, keepdim=True), mass / mass.sum(-1, keepdim=True)


def assert_matches_oracle(q, k, v, block_q, block_k, **kwargs):
    expected_out, expected_target, expected_mass = oracle(q, k, v, block_q, block_k, **kwargs)
    out, target = pooled_attention(q, k, v, block_q=block_q, block_k=block_k, **kwargs)
    mass, same_target = block_mass(q, k, block_q=block_q, block_k=block_k, return_target=True, **kwargs)
    torch.testing.assert_close(out, expected_out, rtol=1e-11, atol=1e-12)
    # Maps are computed in fp64 here and rounded to fp32 once.
    assert target.dtype == mass.dtype == torch.float32
    torch.testing.assert_close(target, expected_target.float(), rtol=2**-23, atol=1e-12)
    torch.testing.assert_close(mass, expected_mass.float(), rtol=2**-23, atol=1e-12)
    assert torch.equal(target, same_target)


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
    out, target = pooled_attention(q, k, v, lengths=torch.tensor(lengths), segment_ids=segment_ids, **kwargs)
    mass = block_mass(q, k, lengths=torch.tensor(lengths), segment_ids=segment_ids, **kwargs)
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert (out[b, :, : q_tokens - t] == 0).all()
        if not n:
            assert (target[b] == 0).all() and (mass[b] == 0).all()
            continue
        alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
        own = segment_ids[b : b + 1, 200 - n :] if packed else None
        expected = oracle(*alone, 64, 32, segment_ids=own)
        torch.testing.assert_close(out[b, :, q_tokens - t :], expected[0][0], rtol=1e-11, atol=1e-12)
        for actual, wanted in ((target[b], expected[1][0]), (mass[b], expected[2][0])):
            rows, columns = wanted.shape[1:]
            torch.testing.assert_close(actual[:, :rows, :columns], wanted.float(), rtol=2**-23, atol=1e-12)
            assert (actual[:, rows:] == 0).all() and (actual[..., columns:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_its_error_budget(dtype):
    q, k, v = make_qkv(1, 4, 2, 300, 300, dtype)
    expected_out, expected_target, _ = oracle(q, k, v, 64, 64)
    out, target = pooled_attention(q, k, v)
    assert out.dtype == dtype
    # Inside all is fp32: scores of size 2 * 32 / sqrt(32) * 4 carry an absolute error of some 32 roundings, which
    # is a relative error of probabilities and maps; the output is rounded to its dtype at the end.
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT * DIM**-0.5).abs().max()
    band = 32 * torch.finfo(torch.float32).eps * float(scores)
    assert ((target.double() - expected_target).abs() <= 2 * band * expected_target + 1e-12).all()
    rounding = torch.finfo(dtype).eps / 2 * expected_out.abs()
    assert ((out.double() - expected_out).abs() <= rounding + 2 * band * v.double().abs().max()).all()


def test_autocast_does_not_lower_the_precision_inside():
    q, k, v = make_qkv(1, 2, 1, 130, 130, torch.float32)
    expected = pooled_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = pooled_attention(q, k, v)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_results_carry_no_graph():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 1, 40, 40))
    out, target = pooled_attention(q, k, v)
    assert not out.requires_grad and not target.requires_grad


def test_bad_arguments_are_rejected():
    q, k, v = make_qkv(2, 4, 2, 64, 100)
    wrong = {
        "lengths must hold at least one": {"lengths": torch.tensor([0, 0])},
        "lengths must be 0 to": {"lengths": torch.tensor([0, 101])},
        "segment_ids must be int": {"segment_ids": torch.zeros(2, 64, dtype=torch.int64)},
        "block_q and block_k": {"block_q": 0},
        "impl must be one of auto, triton, reference": {"impl": "cuda"},
    }
    for message, kwargs in wrong.items():
        with pytest.raises(ValueError, match=message):
            pooled_attention(q, k, v, **kwargs)
