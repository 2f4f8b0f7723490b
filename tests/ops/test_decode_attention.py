"""Laws of `decode_attention`, against an fp64 oracle that masks all keys of one sequence after the other."""

import pytest
import torch

from seerattn.ops.decode_attention import decode_attention
from seerattn.selection.decode_blocks import DecodeBlocks
from tests.ops.paged import make_cache
from tests.ops.test_block_sparse_attention import oracle

triton_split = pytest.importorskip("seerattn.ops.decode_attention.triton_split")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("triton", "reference")
# The interpreter multiplies the bit patterns of bf16.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
# A cut block, whole blocks, one token, one block, a place that no sequence has.
LENGTHS = [200, 256, 1, 64, 0]


def make_call(lengths=LENGTHS, heads=4, kv_heads=2, dim=32, dtype=torch.float32, seed=0):
    """Queries ``[B, H, D]``, and keys and values ``[B, HKV, S, D]`` with NaN behind every sequence."""
    gen = torch.Generator().manual_seed(seed)
    tokens = max(lengths)
    shapes = ((len(lengths), heads, dim), *[(len(lengths), kv_heads, tokens, dim)] * 2)
    q, k, v = (torch.randn(s, generator=gen).to(dtype) for s in shapes)
    for x in (k, v):
        for b, n in enumerate(lengths):
            x[b, :, n:] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


def make_mask(lengths, kv_heads=2, block_k=64, keep=0.5, seed=0):
    """Random blocks ``[B, HKV, Nk]`` and the last one."""
    lengths = lengths.tolist()
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(lengths), kv_heads, -(-max(lengths) // block_k), generator=gen) < keep
    for b, n in enumerate(lengths):
        mask[b, :, -(-n // block_k) :] = False
        mask[b, :, max(0, n - 1) // block_k] = n > 0
    return mask


def run(q, k, v, lengths, blocks=None, impl="triton", **kwargs):
    """Output and log-sum-exp, computed on the GPU where there is one."""
    if blocks is not None:
        blocks = DecodeBlocks(blocks.indices.to(DEVICE), blocks.counts.to(DEVICE), blocks.block_k)
    kwargs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    q, k, v, lengths = (x.to(DEVICE) for x in (q, k, v, lengths))
    out, lse = decode_attention(q, k, v, lengths=lengths, blocks=blocks, impl=impl, return_lse=True, **kwargs)
    return out.cpu(), lse.cpu()


def exact_row(q, k, v, n, b, mask=None, block_k=64, **kwargs):
    """Output ``[H, D]`` and log-sum-exp ``[H]`` of a sequence in fp64."""
    seen = torch.ones(1, k.shape[1], 1, n, dtype=torch.bool)
    if mask is not None:
        seen &= mask[b].repeat_interleave(block_k, 1)[None, :, None, :n]
    row = (q[b][None, :, None], k[b, None, :, :n], v[b, None, :, :n])
    out, lse = oracle(*row, seen.repeat_interleave(q.shape[1] // k.shape[1], 1), **kwargs)
    return out[0, :, 0], lse[0, :, 0]


def check(found, call, mask=None, block_k=64, **kwargs):
    """Every sequence against fp64; scores are fp32 sums of products of q and k as given."""
    q, k, v, lengths = call
    out, lse = found
    for b, n in enumerate(lengths.tolist()):
        if n:
            exact, exact_lse = exact_row(q, k, v, n, b, mask, block_k, **kwargs)
            torch.testing.assert_close(out[b].double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b].double(), exact_lse, rtol=1e-5, atol=1e-5)
        else:
            sinks = kwargs.get("sinks", torch.full((q.shape[1],), -torch.inf))
            assert (out[b] == 0).all()
            torch.testing.assert_close(lse[b], sinks)


def split_in(monkeypatch, splits, keys=32):
    launch = triton_split.Launch(keys=keys, num_warps=4, num_stages=3, splits=splits)
    monkeypatch.setattr(triton_split, "choose_launch", lambda **_: launch)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
def test_listed_blocks_match_the_fp64_oracle(block_k, impl, poisoned_memory):
    call = make_call()
    mask = make_mask(call[3], block_k=block_k)
    found = run(*call, DecodeBlocks.from_mask(mask, block_k=block_k), impl)
    check(found, call, mask, block_k)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_the_number_of_splits_does_not_change_the_result(splits, monkeypatch, poisoned_memory):
    call = make_call()
    mask = make_mask(call[3], block_k=128)
    split_in(monkeypatch, splits)
    check(run(*call, DecodeBlocks.from_mask(mask, block_k=128)), call, mask, 128)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (6, 2), (20, 1)])
def test_grouped_heads_match_the_fp64_oracle(heads, kv_heads, impl, monkeypatch):
    call = make_call([130, 70], heads, kv_heads)
    mask = make_mask(call[3], kv_heads)
    split_in(monkeypatch, 2)
    check(run(*call, DecodeBlocks.from_mask(mask, block_k=64), impl), call, mask)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("impl", IMPLS)
def test_scale_softcap_and_sinks_match_the_fp64_oracle(impl, splits, monkeypatch):
    call = make_call()
    mask = make_mask(call[3])
    split_in(monkeypatch, splits)
    extra = {"scale": 0.3, "softcap": 2.0, "sinks": torch.linspace(-2, 3, 4)}
    check(run(*call, DecodeBlocks.from_mask(mask, block_k=64), impl, **extra), call, mask, **extra)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [16, 48, 64, 256])
def test_sequences_in_pages_are_those_in_one_piece_bit_for_bit(size, packed, impl, monkeypatch):
    q, k, v, lengths = make_call()
    for b in (1, 3):  # a beginning that sequences share
        k[b, :, :64], v[b, :, :64] = k[0, :, :64], v[0, :, :64]
    blocks = DecodeBlocks.from_mask(make_mask(lengths), block_k=64)
    split_in(monkeypatch, 2)
    rows = [(k[b, :, :n], v[b, :, :n]) for b, n in enumerate(lengths.tolist()) if n]
    cache = make_cache(rows, size, shared=64, packed=packed)
    table = torch.cat((cache.table, torch.full_like(cache.table[:1], 1 << 30)))
    for lists in (blocks, None):
        out, lse = run(q, cache.k, cache.v, lengths, lists, impl, block_table=table)
        expected, expected_lse = run(q, k, v, lengths, lists, impl)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("listed", [True, False], ids=["lists", "all keys"])
def test_sequences_that_begin_later_in_their_rows_are_those_that_begin_at_once_bit_for_bit(listed, impl, monkeypatch):
    """Padding on the left holds NaN; no start is a multiple of anything."""
    split_in(monkeypatch, 3)
    q, k, v, lengths = make_call()
    blocks = DecodeBlocks.from_mask(make_mask(lengths), block_k=64) if listed else None
    expected = run(q, k, v, lengths, blocks, impl)
    starts = torch.tensor([5, 0, 37, 1, 300], dtype=torch.int32)
    moved = [torch.full((*k.shape[:2], k.shape[2] + 300, k.shape[3]), torch.nan) for _ in range(2)]
    for x, to in zip((k, v), moved):
        for b, (n, start) in enumerate(zip(lengths.tolist(), starts.tolist())):
            to[b, :, start : start + n] = x[b, :, :n]
    found = run(q, *moved, lengths, blocks, impl, starts=starts)
    if impl == "triton" or listed:
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    else:  # which sums over the whole width of a row
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(found, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_lists_all_keys_are_read_and_full_lists_change_no_bit(impl, monkeypatch):
    call = make_call()
    split_in(monkeypatch, 3)
    found = run(*call, impl=impl)
    check(found, call)
    full = DecodeBlocks.dense(call[3], kv_heads=2, block_k=64, width=4)
    assert all(torch.equal(*pair) for pair in zip(found, run(*call, full, impl)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_unlisted_blocks_and_keys_behind_the_end_are_not_read(impl):
    call = make_call([200])
    mask = torch.tensor([[[True, False, False, True], [False, True, False, True]]])
    clean = run(*call, DecodeBlocks.from_mask(mask, block_k=64), impl)
    for x in call[1:3]:
        x[0, 0, 64:192], x[0, 1, :64], x[0, 1, 128:192] = torch.nan, torch.nan, torch.nan
    assert torch.equal(run(*call, DecodeBlocks.from_mask(mask, block_k=64), impl)[0], clean[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_half_precision_stays_within_the_fp64_budget(dim, dtype, monkeypatch):
    call = q, k, v, lengths = make_call([150, 64], dim=dim, dtype=dtype)
    mask = make_mask(lengths)
    split_in(monkeypatch, 2)
    out, _ = run(*call, DecodeBlocks.from_mask(mask, block_k=64))
    assert out.dtype == dtype
    for b, n in enumerate(lengths.tolist()):
        exact, _ = exact_row(q, k, v, n, b, mask)
        seen = mask[b].repeat_interleave(64, 1)[:, None, :n]
        scores = (q[b].view(2, 2, dim) @ k[b, :, :n].mT).float() * dim**-0.5
        # What a model computes without a fused kernel, and one rounding of the output.
        eager = (scores.masked_fill(~seen, -torch.inf).softmax(-1).to(dtype) @ v[b, :, :n]).view(4, dim)
        budget = 2 * (eager - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (out[b] - exact).abs().max() <= budget


def test_strided_caches_are_read_where_they_lie():
    q, k, v, lengths = make_call()
    expected = run(q, k, v, lengths)
    room = torch.full((5, 300, 2, 64), torch.nan)  # a static cache, K and V side by side, tokens first
    room[:, :256] = torch.cat((k, v), -1).transpose(1, 2)
    sliced = [x[:, :, :256] for x in room.transpose(1, 2).split(32, -1)]
    assert torch.equal(run(q, *sliced, lengths)[0], expected[0])


def test_splits_follow_shapes_and_fill_the_device():
    def splits(batch, tokens, density, kv_heads=8):
        width = max(1, round(tokens / 64 * density))
        launch = triton_split.choose_launch(
            lists=batch * kv_heads, width=width, block_k=64, head_dim=128, element_size=2, multiprocessors=132
        )
        return launch.splits

    # One wave of two programs a multiprocessor where lists are long enough, and no empty share.
    for batch, tokens in [(1, 32768), (1, 131072), (4, 32768), (16, 32768), (16, 131072)]:
        assert 0.75 <= batch * 8 * splits(batch, tokens, 0.1) / 264 <= 1
    assert splits(1, 64, 1.0) == 1
    assert splits(64, 32768, 1.0) == 1 or 64 * 8 * splits(64, 32768, 1.0) % 264 < 132
    assert all(splits(1, n, 1.0) <= -(-n // 64) for n in (64, 128, 640, 6400))


def test_two_runs_are_bitwise_equal(monkeypatch):
    call = make_call(dtype=torch.float16)
    split_in(monkeypatch, 3)
    assert torch.equal(run(*call)[0], run(*call)[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_a_captured_call_follows_what_lists_and_lengths_hold_later():
    q, k, v, lengths = (x.to(DEVICE) for x in make_call())
    for x in (k, v):
        x.nan_to_num_()
    first, later = (DecodeBlocks.from_mask(make_mask(lengths.cpu(), seed=i), block_k=64) for i in (1, 2))
    lists = DecodeBlocks(first.indices.to(DEVICE), first.counts.to(DEVICE), 64)
    call = {"lengths": lengths, "blocks": lists, "impl": "triton"}
    decode_attention(q, k, v, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, **call)
    lists.indices.copy_(later.indices)
    lists.counts.copy_(later.counts)
    lengths -= 1
    lengths.clamp_(min=0)
    graph.replay()
    assert torch.equal(out, decode_attention(q, k, v, **call))


def test_what_does_not_fit_is_rejected_in_a_sentence():
    q, k, v, lengths = make_call()
    blocks = DecodeBlocks.from_mask(make_mask(lengths), block_k=64)
    call = {"q": q, "k": k, "v": v, "lengths": lengths, "blocks": blocks}
    lists = blocks.indices, blocks.counts
    in_pages = {"block_table": torch.zeros(5, 3, dtype=torch.int32), "k": k.transpose(1, 2), "v": v.transpose(1, 2)}
    for change, text in [
        ({"q": q[:2]}, r"q and k must share B and D, got \[2, 4, 32\]"),
        ({"q": q[:, :3]}, "q must have a multiple of the 2 heads of k, got 3"),
        ({"q": q[0]}, r"q must be \[B, H, D\] and k \[B, HKV, S, D\]"),
        ({"v": v[:, :, 1:]}, "v must have the shape of k"),
        ({"k": k.mT.contiguous().mT}, "k and v must have adjacent channels"),
        ({"lengths": lengths.long()}, r"lengths must be int32 \[5\]"),
        ({"blocks": DecodeBlocks(*lists, 48)}, "blocks.block_k must be one of"),
        ({"blocks": DecodeBlocks(lists[0][:, :1], lists[1], 64)}, r"blocks must have lists \[5, 2, K\]"),
        ({"blocks": DecodeBlocks(lists[0].long(), lists[1], 64)}, "blocks must be int32"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int32), "k": k[:, :2], "v": v[:, :2]}, "of k, got 4|rows"),
        ({"starts": lengths[:2]}, r"starts must be int32 \[5\]"),
        ({"starts": lengths} | in_pages, "starts must be None with a block_table"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\]"),
        ({"scale": -1.0}, "it takes positive scales"),
        ({"q": q.double(), "k": k.double(), "v": v.double()}, "it takes fp16, bf16 or fp32"),
        ({"impl": "gluon"}, "impl must be one of auto, triton, reference for decode_attention"),
    ]:
        with pytest.raises(ValueError, match=text):
            run(**call | change)
    with pytest.raises(ValueError, match=r"mask must be \[B, HKV, Nk\]"):
        DecodeBlocks.from_mask(torch.ones(2, 2, dtype=torch.bool), block_k=64)
