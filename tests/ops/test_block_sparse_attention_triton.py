"""`impl="triton"` against the fp64 oracle of the op, in Triton's interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch

from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection.block_indices import BlockIndices
from tests.ops.test_block_sparse_attention import make_blocks, make_qkv, oracle, token_mask

triton_kernel = pytest.importorskip("seerattn.ops.block_sparse_attention.triton_kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(q, k, v, blocks, impl="triton", **kwargs):
    """Output and log-sum-exp, computed on the GPU where there is one."""
    blocks = replace(blocks, indices=blocks.indices.to(DEVICE), counts=blocks.counts.to(DEVICE))
    kwargs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    inputs = (x.to(DEVICE) for x in (q, k, v))
    out, lse = block_sparse_attention(*inputs, blocks, impl=impl, return_lse=True, **kwargs)
    return out.cpu(), lse.cpu()


def assert_within_budget(q, k, v, blocks, impl="triton", **kwargs):
    """Error at most twice that of plain torch in the same dtype, plus one rounding of the output."""
    out, lse = run(q, k, v, blocks, impl, **kwargs)
    mask = token_mask(blocks, q.shape[1], q.shape[2], k.shape[2])
    exact, exact_lse = oracle(q, k, v, mask, **kwargs)
    eager = eager_attention(q, k, v, mask, **kwargs)
    eps = torch.finfo(q.dtype).eps
    budget = 2 * (eager - exact).abs().max() + eps * exact.abs().max()
    assert out.dtype == q.dtype
    assert (out - exact).abs().max() <= budget
    # Scores are fp32 sums of D products of q and k as given.
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def eager_attention(q, k, v, mask, scale=None, softcap=None, sinks=None):
    """What a model computes without a fused kernel: scores and softmax in fp32, products in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., : k.shape[2]].to(q.dtype) @ v


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 128), (128, 32), (64, 32), (128, 128)])
@pytest.mark.parametrize("q_tokens, past", [(1, 0), (63, 0), (64, 7), (65, 0), (27, 100), (65, 135), (1, 200)])
def test_ragged_calls_stay_within_the_fp64_budget(block_q, block_k, q_tokens, past):
    q, k, v = make_qkv(1, 4, 2, q_tokens, q_tokens + past, torch.float32)
    assert_within_budget(q, k, v, make_blocks(1, 4, q_tokens, q_tokens + past, block_q, block_k))


# The interpreter multiplies the bit patterns of bf16.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("tokens", [1000, 4097])
def test_long_ragged_calls_stay_within_the_fp64_budget(tokens):
    q, k, v = make_qkv(1, 1, 1, tokens, tokens, torch.float32)
    assert_within_budget(q, k, v, make_blocks(1, 1, tokens, tokens, 128, 128, keep=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "heads, kv_heads, mask_heads", [(2, 2, 2), (3, 1, 1), (6, 2, 2), (4, 1, 1), (8, 2, 2), (4, 2, 4), (8, 1, 1)]
)
def test_grouped_heads_stay_within_the_fp64_budget(heads, kv_heads, mask_heads, dtype):
    q, k, v = make_qkv(2, heads, kv_heads, 70, 90, dtype)
    assert_within_budget(q, k, v, make_blocks(2, mask_heads, 70, 90, 64, 32))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_head_dims_stay_within_the_fp64_budget(dim, dtype):
    gen = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(1, h, 70, dim, generator=gen).to(dtype) for h in (2, 1, 1))
    assert_within_budget(q, k, v, make_blocks(1, 2, 70, 70, 64, 32))


@pytest.mark.parametrize("extra", [{"scale": 0.3}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
def test_scale_softcap_and_sinks_stay_within_the_fp64_budget(extra):
    q, k, v = make_qkv(1, 4, 2, 60, 100, torch.float32)
    if "sinks" in extra:
        extra = extra | {"sinks": torch.linspace(-2, 30, 4)}
    assert_within_budget(q, k, v, make_blocks(1, 2, 60, 100, 32, 32), **extra)


@pytest.mark.parametrize("rows, keys, block_k", [(16, 32, 32), (32, 16, 64), (128, 32, 128), (256, 64, 64)])
def test_the_tile_does_not_change_the_result(rows, keys, block_k, monkeypatch):
    q, k, v = make_qkv(1, 4, 1, 200, 230, torch.float32)
    blocks = make_blocks(1, 1, 200, 230, 128, block_k)
    launch = triton_kernel.Launch(rows=rows, keys=keys, num_warps=4, num_stages=2)
    monkeypatch.setattr(triton_kernel, "choose_launch", lambda **_: launch)
    out, lse = run(q, k, v, blocks, scale=0.2)
    exact, exact_lse = oracle(q, k, v, token_mask(blocks, 4, 200, 230), scale=0.2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q_tokens", [100, 40])
def test_padding_is_not_read_and_its_output_is_zero(q_tokens):
    lengths = [100, 64, 1, 0]
    q, k, v = make_qkv(len(lengths), 4, 2, q_tokens, 100, torch.float32)
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 100 - n] = torch.inf
        v[b, :, : 100 - n] = torch.nan
    rows = [make_blocks(1, 2, min(q_tokens, n), n, 64, 32, seed=n) for n in lengths[:-1]]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows.append(BlockIndices(empty, empty[..., 0], 64, 32, none, none))
    out, lse = run(q, k, v, BlockIndices.stack(rows), lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert (out[b, :, : q_tokens - t] == 0).all()
        assert (lse[b, :, : q_tokens - t] == -torch.inf).all()
        if n:
            alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
            exact, exact_lse = oracle(*alone, token_mask(rows[b], 4, t, n))
            torch.testing.assert_close(out[b, :, q_tokens - t :].double(), exact[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b, :, q_tokens - t :].double(), exact_lse[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_packed_sequences_match_each_alone_even_beside_nan(impl):
    lengths = [70, 1, 0, 64, 33]
    bounds = torch.tensor([0, 70, 71, 71, 135, 168])
    q, k, v = make_qkv(1, 4, 2, 168, 168, torch.float32)
    rows = [make_blocks(1, 2, n, n, 64, 32, seed=n) for n in lengths if n]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows.insert(2, BlockIndices(empty, empty[..., 0], 64, 32, none, none))
    blocks = BlockIndices.stack(rows)
    k[:, :, 71:135], v[:, :, 71:135] = torch.nan, torch.nan
    out, lse = run(q, k, v, blocks, impl=impl, cu_seqlens=bounds)
    for i, n in enumerate(lengths):
        part = slice(int(bounds[i]), int(bounds[i + 1]))
        if i == 3:
            assert out[:, :, part].isnan().all()
        elif n:
            exact, exact_lse = oracle(*(x[:, :, part] for x in (q, k, v)), token_mask(rows[i], 4, n, n))
            torch.testing.assert_close(out[:, :, part].double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[:, :, part].double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unselected_blocks_are_not_read():
    q, k, v = make_qkv(1, 2, 1, 128, 128, torch.float32)
    mask = torch.eye(4, dtype=torch.bool)[None, None].clone()
    mask[..., 3, 0] = True
    blocks = BlockIndices.from_mask(mask, block_q=32, block_k=32)
    clean, _ = run(q, k, v, blocks)
    k[:, :, 32:64], v[:, :, 32:64] = torch.nan, torch.nan
    out, _ = run(q, k, v, blocks)
    assert torch.equal(out[:, :, :32], clean[:, :, :32])
    assert torch.equal(out[:, :, 64:], clean[:, :, 64:])


@pytest.mark.parametrize("layout", ["tokens first", "strided channels", "sliced cache", "expanded"])
def test_inputs_of_any_memory_layout_give_the_same_result(layout):
    q, k, v = make_qkv(1, 4, 2, 65, 65, torch.float32)
    blocks = make_blocks(1, 4, 65, 65, 32, 32)
    change = {
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided channels": lambda x: torch.stack((x, x), -1).flatten(3)[..., ::2],
        "sliced cache": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 7), value=torch.nan)[:, :, :65],
        "expanded": lambda x: x[:, :1].expand(x.shape),
    }[layout]
    expected, _ = run(*(change(x).contiguous() for x in (q, k, v)), blocks)
    assert torch.equal(run(*map(change, (q, k, v)), blocks)[0], expected)


def test_an_empty_batch_gives_an_empty_result():
    q, k, v = make_qkv(0, 4, 2, 10, 10, torch.float32)
    none = torch.zeros(0, dtype=torch.int32)
    blocks = BlockIndices(torch.zeros(0, 4, 0, 1, dtype=torch.int32), torch.zeros(0, 4, 0), 32, 32, none, none)
    assert run(q, k, v, blocks)[0].shape == (0, 4, 10, 32)


def test_two_runs_are_bitwise_equal():
    q, k, v = make_qkv(1, 4, 2, 130, 130, torch.float16)
    blocks = make_blocks(1, 4, 130, 130, 64, 64)
    assert torch.equal(run(q, k, v, blocks)[0], run(q, k, v, blocks)[0])


def test_what_it_cannot_do_is_refused_in_a_sentence():
    q, k, v = make_qkv(1, 4, 2, 40, 40)
    blocks = make_blocks(1, 4, 40, 40, 32, 32)
    with pytest.raises(ValueError, match=r"it takes fp16, bf16 or fp32, got torch\.float64; use another impl"):
        run(q, k, v, blocks)
    with pytest.raises(ValueError, match=r"it takes blocks of .* got 16 x 32"):
        run(q.float(), k.float(), v.float(), make_blocks(1, 4, 40, 40, 16, 32))
    with pytest.raises(ValueError, match="it takes head dims of whole 16 bytes, got 34 x 4 bytes"):
        run(*(torch.zeros(1, h, 40, 34) for h in (4, 2, 2)), blocks)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive_are_refused_and_served_by_auto(scale):
    q, k, v = make_qkv(1, 4, 2, 60, 90, torch.float32)
    blocks = make_blocks(1, 4, 60, 90, 32, 32)
    with pytest.raises(ValueError, match=f"it takes positive scales, got {scale}; use another impl"):
        run(q, k, v, blocks, scale=scale)
    assert_within_budget(q, k, v, blocks, "auto", scale=scale)
    assert_within_budget(q, k, v, blocks, "triton", scale=scale, softcap=2.0)
