"""Gradients of block-sparse attention through the kernels, against autograd of the fp64 oracle of the op.

The kernels run in Triton's interpreter where there is no GPU.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from seerattn.ops import resolve
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection.block_indices import BlockIndices
from tests.ops.test_block_sparse_attention import make_blocks, make_qkv, oracle, token_mask
from tests.ops.test_block_sparse_attention_triton import DEVICE, HALVES, eager_attention

triton_bwd = pytest.importorskip("seerattn.ops.block_sparse_attention.triton_bwd")
triton_lists = pytest.importorskip("seerattn.ops.block_sparse_attention.triton_lists")

IMPLS = ["triton"]
if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
    IMPLS.append("gluon")


def on_device(blocks):
    return replace(blocks, indices=blocks.indices.to(DEVICE), counts=blocks.counts.to(DEVICE))


def leaves(*tensors):
    return [x.detach().clone().to(DEVICE).requires_grad_() for x in tensors]


def kernel_gradients(inputs, blocks, dout, dlse=None, impl="triton", **kwargs):
    """Gradients of q, k, v (and sinks) for these gradients of the output and of the log-sum-exp."""
    q, k, v, *sinks = leaves(*inputs)
    if sinks:
        kwargs["sinks"] = sinks[0]
    if "lengths" in kwargs or "cu_seqlens" in kwargs:
        kwargs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    out, lse = block_sparse_attention(q, k, v, on_device(blocks), impl=impl, return_lse=True, **kwargs)
    pairs = [(out, dout), (lse, dlse)]
    outputs, gradients = zip(*((x, g.to(DEVICE)) for x, g in pairs if g is not None))
    return [g.cpu() for g in torch.autograd.grad(outputs, (q, k, v, *sinks), gradients)]


def attention_gradients(attend, inputs, dout, dlse, **kwargs):
    """The same through autograd of `attend`, which returns output and log-sum-exp, or the output alone."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    if len(inputs) == 4:
        kwargs["sinks"] = inputs[3]
    result = attend(*inputs[:3], **kwargs)
    out, lse = result if isinstance(result, tuple) else (result, None)
    pairs = [(x, g) for x, g in ((out, dout), (lse, dlse)) if g is not None]
    outputs, gradients = zip(*((x, g.to(x.dtype)) for x, g in pairs))
    return torch.autograd.grad(outputs, inputs, gradients)


def eager_with_lse(q, k, v, mask, **kwargs):
    """What `eager_attention` computes, and the log-sum-exp of the same scores."""
    group = q.shape[1] // k.shape[1]
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    scores = (q @ k.repeat_interleave(group, 1).transpose(2, 3)).float() * scale
    return eager_attention(q, k, v, mask, **kwargs), scores.masked_fill(~mask, -torch.inf).logsumexp(-1)


def rounding(inputs, dout, mask, **kwargs):
    """What the gradients owe to the rounding of what the forward pass hands over, which cancels in eager gradients.

    The output is rounded to its dtype, which moves delta = sum(dout * out); the log-sum-exp is rounded to fp32, which
    moves every p(x, y) of its row by a factor. ds = p * (dp - delta) then moves by p(x, y) * e(x): dq(x) by
    scale * e(x) * sum of p(x, y) k(y), dk(y) by scale * sum of p(x, y) e(x) q(x).
    """
    q, k, v, *sinks = (x.double() for x in inputs)
    kwargs |= {"sinks": sinks[0]} if sinks else {}
    out, lse = oracle(q, k, v, mask, **kwargs)
    factor = 2 * torch.finfo(torch.float32).eps * (1 + lse.abs())
    error = torch.finfo(inputs[0].dtype).eps * (dout.double() * out).abs().sum(-1)
    error = (error + factor * 2 * dout.double().norm(dim=-1) * v.norm(dim=-1).max())[..., None]
    scale = abs(kwargs.get("scale") or q.shape[-1] ** -0.5)
    values = v.clone().requires_grad_()
    weighted = oracle(q, k, values, mask, **kwargs)[0]
    of_k, of_v = (
        torch.autograd.grad(weighted, values, x, retain_graph=True)[0]
        for x in (error * q.abs(), factor[..., None] * dout.double().abs())
    )
    bands = [scale * error * oracle(q, k, k.abs(), mask, **kwargs)[0], scale * of_k, of_v]
    return bands + [(torch.exp(sinks[0][:, None] - lse) * error[..., 0]).sum((0, 2)) for _ in sinks]


def assert_within_budget(inputs, blocks, *, lse=False, impl="triton", seed=5, **kwargs):
    """Error at most twice that of plain torch in the same dtype, `rounding`, and one unit of the largest gradient."""
    q, k = inputs[:2]
    gen = torch.Generator().manual_seed(seed)
    dout = torch.randn(q.shape, generator=gen).to(q.dtype)
    dlse = torch.randn(q.shape[:3], generator=gen) if lse else None
    mask = token_mask(blocks, q.shape[1], q.shape[2], k.shape[2])
    exact = attention_gradients(oracle, [x.double() for x in inputs], dout, dlse, mask=mask, **kwargs)
    eager = attention_gradients(eager_with_lse if lse else eager_attention, inputs, dout, dlse, mask=mask, **kwargs)
    actual = kernel_gradients(inputs, blocks, dout, dlse, impl, **kwargs)
    bands = rounding(inputs, dout, mask, **kwargs)
    for name, a, e, x, given, band in zip(("dq", "dk", "dv", "dsinks"), actual, eager, exact, inputs, bands):
        assert a.dtype == given.dtype and a.shape == given.shape
        budget = 2 * (e.double() - x).abs().max() + torch.finfo(a.dtype).eps * x.abs().max() + band
        assert ((a.double() - x).abs() <= budget).all(), name


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 128), (128, 32), (64, 32), (128, 128)])
@pytest.mark.parametrize("q_tokens, past", [(1, 0), (63, 0), (64, 7), (65, 0), (27, 100), (65, 135), (1, 200)])
def test_ragged_gradients_stay_within_the_fp64_budget(block_q, block_k, q_tokens, past):
    inputs = make_qkv(1, 4, 2, q_tokens, q_tokens + past, torch.float32)
    assert_within_budget(inputs, make_blocks(1, 4, q_tokens, q_tokens + past, block_q, block_k))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "heads, kv_heads, mask_heads", [(2, 2, 2), (3, 1, 1), (6, 2, 2), (4, 1, 1), (8, 2, 2), (4, 2, 4)]
)
def test_gradients_of_grouped_heads_stay_within_the_fp64_budget(heads, kv_heads, mask_heads, dtype):
    inputs = make_qkv(2, heads, kv_heads, 70, 90, dtype)
    assert_within_budget(inputs, make_blocks(2, mask_heads, 70, 90, 64, 32))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 192, 256])
def test_gradients_of_head_dims_stay_within_the_fp64_budget(dim, dtype):
    gen = torch.Generator().manual_seed(dim)
    inputs = [torch.randn(1, h, 70, dim, generator=gen).to(dtype) for h in (2, 1, 1)]
    assert_within_budget(inputs, make_blocks(1, 2, 70, 70, 64, 32))


@pytest.mark.parametrize(
    "extra", [{"scale": 0.3}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True, "scale": -0.2}]
)
def test_gradients_with_scale_softcap_and_sinks_stay_within_the_fp64_budget(extra):
    inputs = make_qkv(1, 4, 2, 60, 100, torch.float32)
    if extra.pop("sinks", False):
        inputs.append(torch.linspace(-2, 5, 4))
    assert_within_budget(inputs, make_blocks(1, 2, 60, 100, 32, 32), **extra)


def test_gradient_of_the_log_sum_exp_stays_within_the_fp64_budget():
    assert_within_budget(make_qkv(1, 4, 2, 70, 90, torch.float32), make_blocks(1, 4, 70, 90, 32, 64), lse=True)


def test_gradients_of_the_log_sum_exp_alone_match_the_dense_oracle():
    inputs = make_qkv(1, 2, 1, 70, 70, torch.float32)
    blocks = make_blocks(1, 2, 70, 70, 32, 32)
    dlse = torch.randn(1, 2, 70, generator=torch.Generator().manual_seed(1))
    mask = token_mask(blocks, 2, 70, 70)
    exact = torch.autograd.grad(
        oracle(*(y := [x.double().requires_grad_() for x in inputs]), mask)[1], y[:2], dlse.double()
    )
    dq, dk, dv = kernel_gradients(inputs, blocks, None, dlse)
    for actual, expected in zip((dq, dk), exact):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert dv.count_nonzero() == 0


@pytest.mark.parametrize("q_tokens, k_tokens", [(200, 200), (70, 200)])
def test_gradients_with_all_blocks_are_those_of_dense_sdpa(q_tokens, k_tokens):
    inputs = make_qkv(1, 4, 2, q_tokens, k_tokens, torch.float32)
    blocks = BlockIndices.dense(batch=1, heads=2, q_len=q_tokens, k_len=k_tokens, block_q=64, block_k=64)
    dout = torch.randn(1, 4, q_tokens, 32, generator=torch.Generator().manual_seed(1))
    causal = torch.ones(q_tokens, k_tokens, dtype=torch.bool).tril(k_tokens - q_tokens)

    def dense(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)

    exact = attention_gradients(dense, [x.double() for x in inputs], dout, None)
    for actual, expected in zip(kernel_gradients(inputs, blocks, dout), exact):
        # fp32 sums of up to 200 products.
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_long_lists_stay_within_the_fp64_budget(impl):
    tokens, dim, dtype = (2100, 128, torch.bfloat16) if DEVICE == "cuda" else (700, 32, torch.float16)
    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, tokens, dim, generator=gen).to(dtype) for h in (2, 1, 1)]
    assert_within_budget(inputs, make_blocks(1, 2, tokens, tokens, 64, 64, keep=0.3), impl=impl)


LAUNCHES = [(32, 32, 64, 64), (128, 32, 32, 64), (128, 64, 64, 32), (128, 128, 128, 128)]


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (128, 128)])
@pytest.mark.parametrize("launches", LAUNCHES)
def test_the_tiles_do_not_change_the_gradients(launches, block_q, block_k, monkeypatch):
    dq_queries, dq_keys, queries, keys = launches
    pick = {
        "choose_query_launch": triton_bwd.Launch(dq_queries, min(block_k, dq_keys), 4, 1),
        "choose_key_launch": triton_bwd.Launch(min(block_q, queries), min(block_k, keys), 4, 1),
    }
    for name, launch in pick.items():
        monkeypatch.setattr(triton_bwd, name, lambda launch=launch, **_: launch)
    inputs = make_qkv(1, 4, 1, 150, 170, HALVES[-1])
    assert_within_budget(inputs, make_blocks(1, 1, 150, 170, block_q, block_k), scale=0.2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("q_tokens", [100, 40])
def test_padding_is_not_read_and_its_gradients_are_zero(q_tokens, impl):
    lengths, dim = [100, 70, 64, 1, 0], 128 if impl == "gluon" else 32
    gen = torch.Generator().manual_seed(0)
    dtype = torch.float16 if impl == "gluon" else torch.float32
    q, k, v, dout = (
        torch.randn(len(lengths), h, n, dim, generator=gen).to(dtype)
        for h, n in ((4, q_tokens), (2, 100), (2, 100), (4, q_tokens))
    )
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        dout[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 100 - n] = torch.nan
        v[b, :, : 100 - n] = torch.nan
    rows = [make_blocks(1, 2, min(q_tokens, n), n, 64, 64, seed=n) for n in lengths[:-1]]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    blocks = BlockIndices.stack([*rows, BlockIndices(empty, empty[..., 0], 64, 64, none, none)])
    actual = kernel_gradients((q, k, v), blocks, dout, impl=impl, lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        for gradient, m in zip(actual, (t, n, n)):
            assert gradient[b, :, : gradient.shape[2] - m].count_nonzero() == 0
        if n:
            alone = [x[b : b + 1, :, x.shape[2] - m :].double() for x, m in ((q, t), (k, n), (v, n), (dout, t))]
            exact = attention_gradients(oracle, alone[:3], alone[3], None, mask=token_mask(rows[b], 4, t, n))
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            for gradient, m, expected in zip(actual, (t, n, n), exact):
                mine = gradient[b, :, gradient.shape[2] - m :].double()
                torch.testing.assert_close(mine, expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_packed_sequences_have_the_gradients_of_each_alone(poisoned):
    sizes = [70, 1, 64, 45]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    q, k, v = make_qkv(1, 4, 2, sum(sizes), sum(sizes), torch.float32)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    # What is not a number in one sequence stays there.
    at = slice(int(bounds[poisoned]), int(bounds[poisoned + 1]))
    for x in (q, k, v, dout):
        x[:, :, at] = torch.nan
    rows = [make_blocks(1, 2, n, n, 64, 32, seed=n) for n in sizes]
    actual = kernel_gradients((q, k, v), BlockIndices.stack(rows), dout, cu_seqlens=bounds)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        if n == poisoned:
            continue
        alone = [x[:, :, begin:end].double() for x in (q, k, v, dout)]
        mask = token_mask(rows[n], 4, sizes[n], sizes[n])
        for gradient, expected in zip(actual, attention_gradients(oracle, alone[:3], alone[3], None, mask=mask)):
            torch.testing.assert_close(gradient[:, :, begin:end].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unselected_blocks_are_not_read():
    inputs = make_qkv(1, 2, 1, 128, 128, torch.float32)
    mask = torch.eye(4, dtype=torch.bool)[None, None].clone()
    mask[..., 3, 0] = True
    blocks = BlockIndices.from_mask(mask, block_q=32, block_k=32)
    dout = torch.randn(1, 2, 128, 32, generator=torch.Generator().manual_seed(1))
    clean = kernel_gradients(inputs, blocks, dout)
    for x in (*inputs, dout):
        x[:, :, 32:64] = torch.nan
    for after, before in zip(kernel_gradients(inputs, blocks, dout), clean):
        for part in (slice(0, 32), slice(64, 128)):
            assert torch.equal(after[:, :, part], before[:, :, part])


@pytest.mark.parametrize("impl", IMPLS)
def test_two_backward_passes_are_bitwise_equal(impl):
    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, 130, 64, generator=gen).to(torch.float16) for h in (4, 2, 2)]
    blocks, dout = make_blocks(1, 4, 130, 130, 64, 64), torch.randn(1, 4, 130, 64, generator=gen).to(torch.float16)
    first, second = (kernel_gradients(inputs, blocks, dout, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_change_the_gradients(reentrant):
    inputs = make_qkv(1, 4, 2, 65, 65, torch.float32)
    blocks, dout = make_blocks(1, 4, 65, 65, 32, 32), torch.ones(1, 4, 65, 32)
    expected = kernel_gradients(inputs, blocks, dout)
    q, k, v = leaves(*inputs)

    def run(q, k, v):
        return block_sparse_attention(q, k, v, on_device(blocks), impl="triton")

    checkpoint(run, q, k, v, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad.cpu(), e) for x, e in zip((q, k, v), expected))


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    q, k, v = leaves(*make_qkv(1, 2, 1, 40, 40, torch.float32))
    blocks = on_device(make_blocks(1, 2, 40, 40, 32, 32))
    whole = torch.autograd.grad(block_sparse_attention(q, k, v, blocks, impl="triton").square().sum(), (q, v))
    only_v = block_sparse_attention(q.detach(), k.detach(), v, blocks, impl="triton").square().sum()
    assert torch.equal(torch.autograd.grad(only_v, v)[0], whole[1])
    monkeypatch.setattr(triton_bwd, "key_gradients", None)
    only_q = block_sparse_attention(q, k.detach(), v.detach(), blocks, impl="triton").square().sum()
    assert torch.equal(torch.autograd.grad(only_q, q)[0], whole[0])


@pytest.mark.parametrize("layout", ["tokens first", "strided channels", "expanded", "expanded gradient"])
def test_memory_layouts_do_not_change_the_gradients(layout):
    change = {
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided channels": lambda x: torch.stack((x, x), -1).flatten(3)[..., ::2],
        "expanded": lambda x: x[:, :1].expand(x.shape),
        "expanded gradient": lambda x: x,
    }[layout]
    inputs = [change(x) for x in make_qkv(1, 4, 2, 65, 65, torch.float32)]
    blocks = on_device(make_blocks(1, 4, 65, 65, 32, 32))
    dout = torch.ones(1, 1, 1, 1).expand(1, 4, 65, 32) if layout.endswith("gradient") else torch.ones(1, 4, 65, 32)

    def run(inputs, dout):
        inputs = [x.to(DEVICE).requires_grad_() for x in inputs]
        out = block_sparse_attention(*inputs, blocks, impl="triton")
        return torch.autograd.grad(out, inputs, dout.to(DEVICE))

    expected = run([x.contiguous() for x in inputs], dout.contiguous())
    assert all(torch.equal(a, e) for a, e in zip(run(inputs, dout), expected))


@pytest.mark.parametrize("heads, kv_heads, mask_heads", [(4, 2, 4), (4, 2, 2)])
@pytest.mark.parametrize("block_q, block_k, q_tokens, k_tokens", [(32, 64, 500, 530), (64, 32, 130, 130)])
def test_key_lists_hold_every_listed_pair_once(block_q, block_k, q_tokens, k_tokens, heads, kv_heads, mask_heads):
    blocks = make_blocks(2, mask_heads, q_tokens, k_tokens, block_q, block_k)
    lists = triton_lists.key_lists(on_device(blocks), kv_heads, None)
    start = k_tokens - q_tokens
    rows, counts = blocks.transpose()
    shares = mask_heads // kv_heads
    assert sorted(lists.order.tolist()) == list(range(2 * kv_heads * blocks.num_k_blocks))
    for n in range(len(lists.counts)):
        b, g, j = n // (kv_heads * blocks.num_k_blocks), n // blocks.num_k_blocks % kv_heads, n % blocks.num_k_blocks
        expected = [
            (s, i) for s in range(shares) for i in rows[b, g * shares + s, j, : counts[b, g * shares + s, j]].tolist()
        ]

        def masked(entry, j=j):
            first = (start // block_q + entry[1]) * block_q
            return first < start or first + block_q > k_tokens or first < (j + 1) * block_k - 1

        expected.sort(key=lambda entry: (not masked(entry), entry))
        begin, count = int(lists.starts[n]), int(lists.counts[n])
        entries = lists.entries[begin : begin + count].tolist()
        assert [(e >> triton_lists.ROW_BITS, e & ((1 << triton_lists.ROW_BITS) - 1)) for e in entries] == expected
        assert int(lists.masked[n]) == sum(map(masked, expected))


def test_much_longer_lists_go_first():
    mask = torch.eye(40, dtype=torch.bool)[None, None].repeat(1, 2, 1, 1)
    mask[:, 1, :, 3] = True
    blocks = on_device(BlockIndices.from_mask(mask, block_q=32, block_k=32))
    order = triton_lists.key_lists(blocks, 2, None).order.tolist()
    assert order == [43, *range(43), *range(44, 80)]


def test_auto_takes_the_kernels_with_gradients(monkeypatch):
    q, k, v = leaves(*make_qkv(1, 4, 2, 65, 65, torch.float32))
    blocks = on_device(make_blocks(1, 4, 65, 65, 32, 32))
    monkeypatch.setattr(resolve, "_available", lambda op, device: iter(("gluon", "triton", "reference")))
    out = block_sparse_attention(q, k, v, blocks)
    assert type(out.grad_fn).__name__ == "_BlockSparseAttentionBackward"
    with torch.no_grad():
        assert block_sparse_attention(q, k, v, blocks).grad_fn is None
    # fp64 goes to the reference.
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    assert type(block_sparse_attention(*double, blocks).grad_fn).__name__ != "_BlockSparseAttentionBackward"
