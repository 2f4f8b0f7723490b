"""Laws of `block_sparse_attention`, against a dense fp64 oracle that masks the whole map."""

import pytest
import torch
import torch.nn.functional as F

from seerattn.ops.attention_map import attention_map
from seerattn.ops.block_sparse_attention import block_sparse_attention, reference
from seerattn.selection.block_indices import BlockIndices

DIM = 32


def make_qkv(batch, heads, kv_heads, q_tokens, k_tokens, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_tokens, DIM), (batch, kv_heads, k_tokens, DIM), (batch, kv_heads, k_tokens, DIM))
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def make_blocks(batch, heads, q_tokens, k_tokens, block_q, block_k, keep=0.4, seed=0):
    """Random blocks with the diagonal, of one unpadded geometry."""
    start = k_tokens - q_tokens
    rows = (k_tokens - 1) // block_q - start // block_q + 1
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, rows, -(-k_tokens // block_k), generator=gen) < keep
    for t in range(start, k_tokens):
        mask[:, :, t // block_q - start // block_q, t // block_k] = True
    return BlockIndices.from_mask(mask, block_q=block_q, block_k=block_k, q_start=start, q_len=q_tokens)


def token_mask(blocks, heads, q_tokens, k_tokens):
    """Bool ``[B, H, T, S]`` straight from the lists, for unpadded calls."""
    start = k_tokens - q_tokens
    mask = torch.zeros(blocks.indices.shape[0], heads, q_tokens, k_tokens, dtype=torch.bool)
    members = heads // blocks.num_heads
    for b in range(mask.shape[0]):
        for h in range(heads):
            for t in range(q_tokens):
                row = (start + t) // blocks.block_q - start // blocks.block_q
                for j in blocks.indices[b, h // members, row].tolist():
                    if j >= 0:
                        mask[b, h, t, j * blocks.block_k : min((j + 1) * blocks.block_k, start + t + 1)] = True
    return mask


def oracle(q, k, v, mask, scale=None, softcap=None, sinks=None):
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
        v = F.pad(v, (0, 0, 0, 1))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def assert_exact(actual, expected):
    """fp64 against fp64: only the order of sums differs."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 128), (128, 32), (64, 32), (16, 16)])
@pytest.mark.parametrize("k_tokens, past", [(1, 0), (63, 0), (64, 7), (65, 0), (127, 100), (200, 0), (65, 135)])
def test_ragged_calls_match_dense_oracle(block_q, block_k, k_tokens, past):
    q_tokens, k_tokens = k_tokens, k_tokens + past
    q, k, v = make_qkv(2, 4, 2, q_tokens, k_tokens)
    blocks = make_blocks(2, 4, q_tokens, k_tokens, block_q, block_k)
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True)
    expected, expected_lse = oracle(q, k, v, token_mask(blocks, 4, q_tokens, k_tokens))
    assert_exact(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "heads, kv_heads, mask_heads", [(2, 2, 2), (3, 1, 1), (6, 2, 6), (6, 2, 2), (4, 1, 4), (8, 2, 2)]
)
def test_grouped_heads_match_dense_oracle(heads, kv_heads, mask_heads):
    q, k, v = make_qkv(2, heads, kv_heads, 150, 170)
    blocks = make_blocks(2, mask_heads, 150, 170, 32, 32)
    out = block_sparse_attention(q, k, v, blocks)
    assert_exact(out, oracle(q, k, v, token_mask(blocks, heads, 150, 170))[0])


@pytest.mark.parametrize("budget", [1, 3 * 2 * 32 * 32])
def test_chunking_does_not_change_the_result(budget, monkeypatch):
    q, k, v = make_qkv(2, 4, 2, 300, 300)
    blocks = make_blocks(2, 2, 300, 300, 32, 32, keep=0.5)
    expected = oracle(q, k, v, token_mask(blocks, 4, 300, 300))[0]
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", budget)
    assert_exact(block_sparse_attention(q, k, v, blocks), expected)


@pytest.mark.parametrize("q_tokens, k_tokens", [(200, 200), (1, 130), (70, 200)])
def test_all_blocks_selected_matches_sdpa(q_tokens, k_tokens):
    q, k, v = make_qkv(1, 8, 2, q_tokens, k_tokens)
    blocks = BlockIndices.dense(batch=1, heads=2, q_len=q_tokens, k_len=k_tokens, block_q=64, block_k=64)
    causal = torch.ones(q_tokens, k_tokens, dtype=torch.bool).tril(k_tokens - q_tokens)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    assert_exact(block_sparse_attention(q, k, v, blocks), expected)


@pytest.mark.parametrize(
    "extra",
    [
        {"scale": 0.3},
        {"scale": 0.0},
        {"scale": -0.4, "sinks": True},
        {"scale": -0.4, "softcap": 2.0},
        {"softcap": 2.0},
        {"sinks": True},
        {"softcap": 3.0, "sinks": True},
    ],
)
def test_scale_softcap_and_sinks_match_dense_oracle(extra):
    q, k, v = make_qkv(2, 6, 2, 100, 140)
    if "sinks" in extra:
        extra = extra | {"sinks": torch.linspace(-2, 3, 6, dtype=torch.float64)}
    blocks = make_blocks(2, 6, 100, 140, 32, 32)
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, **extra)
    expected, expected_lse = oracle(q, k, v, token_mask(blocks, 6, 100, 140), **extra)
    assert_exact(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q_tokens", [200, 90])
@pytest.mark.parametrize("block_q, block_k", [(64, 64), (128, 32), (32, 128)])
def test_padded_row_matches_the_row_alone(block_q, block_k, q_tokens):
    lengths = [200, 131, 64, 1, 0]
    q, k, v = make_qkv(len(lengths), 4, 2, q_tokens, 200)
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 200 - n] = torch.inf
        v[b, :, : 200 - n] = torch.nan
    rows = [make_blocks(1, 2, min(q_tokens, n), n, block_q, block_k, seed=n) for n in lengths[:-1]]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows.append(BlockIndices(empty, empty[..., 0], block_q, block_k, none, none))
    out, lse = block_sparse_attention(q, k, v, BlockIndices.stack(rows), lengths=torch.tensor(lengths), return_lse=True)
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert (out[b, :, : q_tokens - t] == 0).all()
        assert (lse[b, :, : q_tokens - t] == -torch.inf).all()
        if n:
            alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
            expected, expected_lse = block_sparse_attention(*alone, rows[b], return_lse=True)
            assert_exact(out[b, :, q_tokens - t :], expected[0])
            torch.testing.assert_close(lse[b, :, q_tokens - t :], expected_lse[0])


def test_unselected_blocks_are_not_read():
    q, k, v = make_qkv(1, 2, 1, 256, 256)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., range(4), range(4)] = True
    mask[..., 3, 0] = True
    blocks = BlockIndices.from_mask(mask, block_q=64, block_k=64)
    clean = block_sparse_attention(q, k, v, blocks)
    k[:, :, 64:128], v[:, :, 64:128] = torch.nan, torch.nan
    out = block_sparse_attention(q, k, v, blocks)
    assert torch.equal(out[:, :, :64], clean[:, :, :64])
    assert torch.equal(out[:, :, 128:], clean[:, :, 128:])
    assert out[:, :, 64:128].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_its_error_budget(dtype):
    q, k, v = make_qkv(1, 4, 2, 300, 300, dtype)
    blocks = make_blocks(1, 4, 300, 300, 64, 64)
    mask = token_mask(blocks, 4, 300, 300)
    expected = oracle(q, k, v, mask)[0]
    eager = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    # Twice the error of eager attention of this dtype, and half a unit in the last place for the final rounding.
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    budget = 2 * (eager.double() - expected).abs().max() + rounding
    out = block_sparse_attention(q, k, v, blocks)
    assert out.dtype == dtype
    assert ((out.double() - expected).abs() <= budget).all()


@pytest.mark.parametrize(
    "block_q, block_k, softcap, sinks", [(16, 16, None, False), (32, 16, 2.0, False), (16, 32, None, True)]
)
def test_gradients_match_finite_differences(block_q, block_k, softcap, sinks):
    q, k, v = make_qkv(2, 2, 1, 21, 37)
    lengths = torch.tensor([37, 18])
    inputs = [x.requires_grad_() for x in (q, k, v, torch.tensor([0.5, -1.0], dtype=q.dtype))][: 4 if sinks else 3]
    blocks = BlockIndices.stack([make_blocks(1, 2, min(21, n), n, block_q, block_k) for n in (37, 18)])

    def run(q, k, v, sinks=None):
        return block_sparse_attention(q, k, v, blocks, lengths=lengths, softcap=softcap, sinks=sinks)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradients_match_dense_oracle(monkeypatch):
    monkeypatch.setitem(reference.TRAIN_ELEMENTS, "cpu", 1024)  # several chunks even at this size
    inputs = [x.requires_grad_() for x in make_qkv(1, 4, 2, 180, 200)]
    blocks = make_blocks(1, 2, 180, 200, 128, 32)
    weight = torch.randn(1, 4, 180, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((oracle(*inputs, token_mask(blocks, 4, 180, 200))[0] * weight).sum(), inputs)
    actual = torch.autograd.grad((block_sparse_attention(*inputs, blocks) * weight).sum(), inputs)
    for a, e in zip(actual, expected):
        assert_exact(a, e)


def test_lse_gradient_matches_dense_oracle():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 1, 70, 70))
    blocks = make_blocks(1, 2, 70, 70, 32, 32)
    expected = torch.autograd.grad(oracle(q, k, v, token_mask(blocks, 2, 70, 70))[1].sum(), (q, k))
    lse = block_sparse_attention(q, k, v, blocks, return_lse=True)[1]
    actual = torch.autograd.grad(lse.sum(), (q, k))
    for a, e in zip(actual, expected):
        # The sum of the fp32 LSE is rounded, its gradient (1) is not.
        assert_exact(a, e)


def test_autocast_does_not_lower_the_precision_inside():
    q, k, v = make_qkv(1, 2, 1, 130, 130, torch.float32)
    blocks = make_blocks(1, 2, 130, 130, 64, 64)
    expected = block_sparse_attention(q, k, v, blocks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_sparse_attention(q.requires_grad_(), k, v, blocks), expected)


def test_non_contiguous_inputs_match_contiguous_ones():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(2, 4, 2, 130, 130))
    assert not q.is_contiguous()
    blocks = make_blocks(2, 2, 130, 130, 64, 64)
    expected = block_sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), blocks)
    assert torch.equal(block_sparse_attention(q, k, v, blocks), expected)


def test_bad_arguments_are_rejected():
    q, k, v = make_qkv(2, 4, 2, 64, 100)
    blocks = make_blocks(2, 4, 64, 100, 32, 32)
    wrong = {
        "heads of k": (q[:, :3], k, v, blocks, {}),
        "shape of k": (q, k, v[:, :1], blocks, {}),
        "share B and D": (q[:1], k, v, blocks, {}),
        "share a float dtype": (q.float(), k, v, blocks, {}),
        "head dim": (q[..., :8], k[..., :8], v[..., :8], blocks, {}),
        "last query is the last key": (k.repeat(1, 2, 2, 1), k, v, blocks, {}),
        "q_start, q_len": (q[:, :, 1:], k, v, blocks, {}),
        "2 batch rows": (q, k, v, make_blocks(1, 4, 64, 100, 32, 32), {}),
        "got 1$": (q, k, v, make_blocks(2, 1, 64, 100, 32, 32), {}),
        "block_q": (q, k, v, make_blocks(2, 4, 64, 100, 8, 32), {}),
        "lengths must be 0 to": (q, k, v, blocks, {"lengths": torch.tensor([101, 5])}),
        "lengths must be int": (q, k, v, blocks, {"lengths": torch.tensor([10])}),
        "with the lengths of this call": (q, k, v, blocks, {"lengths": torch.tensor([100, 90])}),
        "sinks must be": (q, k, v, blocks, {"sinks": torch.zeros(2)}),
        "impl must be one of auto, gluon, triton, flash4, reference": (q, k, v, blocks, {"impl": "cutlass"}),
    }
    for message, (q_, k_, v_, blocks_, kwargs) in wrong.items():
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q_, k_, v_, blocks_, **kwargs)


MEANINGLESS = [
    ("scale", float("nan")),
    ("scale", float("inf")),
    ("scale", -float("inf")),
    ("scale", "x"),
    ("scale", [1.0]),
    ("scale", True),
    ("scale", 1e39),
    ("scale", 10**400),
    ("softcap", 0.0),
    ("softcap", -1.0),
    ("softcap", float("nan")),
    ("softcap", float("inf")),
    ("softcap", "x"),
    ("softcap", 10**400),
]


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("name, value", MEANINGLESS, ids=lambda x: f"{x!s:.9}")
def test_logits_without_a_meaning_are_rejected_by_every_impl(name, value, impl):
    q, k, v = make_qkv(1, 2, 1, 40, 40, torch.float32)
    blocks = make_blocks(1, 2, 40, 40, 32, 32)
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        block_sparse_attention(q, k, v, blocks, impl=impl, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        attention_map(q, k, v, impl=impl, **{name: value})
