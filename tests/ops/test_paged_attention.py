"""Laws of `paged_attention`: rows in pages are the same rows in one piece, against the fp64 oracle of the op."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.paged_attention import paged_attention
from seerattn.selection.block_indices import BlockIndices
from tests.ops.paged import Cache, make_cache
from tests.ops.test_block_sparse_attention import make_blocks, make_qkv, oracle, token_mask

triton_fwd = pytest.importorskip("seerattn.ops.paged_attention.triton_fwd")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("triton", "reference")
# Queries and keys of rows: a whole prompt, a chunk, none in the middle, one token, none at the end as graphs pad.
ROWS = [(70, 70), (33, 150), (0, 64), (1, 130), (0, 0)]


class Batch:
    """Packed queries of rows, and each row alone."""

    def __init__(self, rows=ROWS, heads=4, kv_heads=2, mask_heads=2, block_q=64, block_k=64, dtype=torch.float32):
        self.lens = rows
        self.alone = [
            make_qkv(1, heads, kv_heads, max(t, 1), max(n, 1), dtype, seed=i) for i, (t, n) in enumerate(rows)
        ]
        for _, k, v in self.alone[1:]:  # a beginning that rows share
            size = min(64, k.shape[2])
            k[:, :, :size], v[:, :, :size] = self.alone[0][1][:, :, :size], self.alone[0][2][:, :, :size]
        self.lists = [make_blocks(1, mask_heads, max(t, 1), max(n, 1), block_q, block_k, seed=n) for t, n in rows]
        self.q = torch.cat([q[0].transpose(0, 1)[:t] for (q, _, _), (t, _) in zip(self.alone, rows)])
        blocks = BlockIndices.stack(self.lists)
        none = torch.zeros(len(rows), dtype=torch.int32)
        # Geometry is that of the call; what lists say of it is not looked at.
        self.blocks = replace(blocks, q_start=none, q_len=none)
        self.bounds = torch.tensor([0, *accumulate(t for t, _ in rows)], dtype=torch.int32)
        self.k_lens = torch.tensor([n for _, n in rows], dtype=torch.int32)

    def cache(self, size, **form) -> Cache:
        rows = [(k[0, :, :n], v[0, :, :n]) for (_, k, v), (_, n) in zip(self.alone, self.lens)]
        return make_cache(rows[:-1] if rows[-1][0].shape[1] == 0 else rows, size, **form)

    def run(self, cache, impl, q=None, blocks=None, **kwargs):
        """Output ``[T, H, D]`` and log-sum-exp ``[H, T]``, computed on the GPU where there is one."""
        blocks = self.blocks if blocks is None else blocks
        blocks = replace(blocks, indices=blocks.indices.to(DEVICE), counts=blocks.counts.to(DEVICE))
        table = cache.table
        if len(table) < len(self.lens):
            table = torch.cat((table, torch.full_like(table[:1], 1 << 30)))
        k, v = (x.to(DEVICE) for x in (cache.k, cache.v))
        call = {"block_table": table, "cu_seqlens_q": self.bounds, "k_lens": self.k_lens} | kwargs
        call = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
        q = self.q if q is None else q
        out, lse = paged_attention(q.to(DEVICE), k, v, blocks, impl=impl, return_lse=True, **call)
        return out.cpu(), lse.cpu()

    def check(self, out, lse, **kwargs):
        """Every row against fp64; scores are fp32 sums of products of q and k as given."""
        for i, (begin, end) in enumerate(pairwise(self.bounds.tolist())):
            if begin < end:
                q, k, v = self.alone[i]
                mask = token_mask(self.lists[i], q.shape[1], q.shape[2], k.shape[2])
                exact, exact_lse = oracle(q, k, v, mask, **kwargs)
                torch.testing.assert_close(out[begin:end].transpose(0, 1).double(), exact[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(lse[:, begin:end].double(), exact_lse[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [16, 32, 48, 64, 128, 256])
def test_rows_in_shuffled_and_shared_pages_match_the_fp64_oracle(size, packed, impl, poisoned_memory):
    batch = Batch()
    out, lse = batch.run(batch.cache(size, shared=64, packed=packed), impl)
    batch.check(out, lse)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block_q, block_k, mask_heads", [(32, 128, 4), (128, 32, 2), (64, 64, 4)])
def test_block_sizes_and_heads_match_the_fp64_oracle(block_q, block_k, mask_heads, impl):
    batch = Batch(block_q=block_q, block_k=block_k, mask_heads=mask_heads)
    batch.check(*batch.run(batch.cache(32), impl))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_scale_softcap_and_sinks_match_the_fp64_oracle(impl):
    batch = Batch()
    extra = {"scale": 0.3, "softcap": 2.0, "sinks": torch.linspace(-2, 3, 4)}
    batch.check(*batch.run(batch.cache(16), impl, **extra), **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [16, 64, 96])
def test_pages_change_no_bit_of_the_kernel_in_one_piece(size, dtype):
    batch = Batch([(200, 200), (70, 150)], heads=8, dtype=dtype)
    out, lse = batch.run(batch.cache(size), "triton")
    for i, (begin, end) in enumerate(pairwise(batch.bounds.tolist())):
        q, k, v = (x.to(DEVICE) for x in batch.alone[i])
        lists = batch.lists[i]
        lists = replace(lists, indices=lists.indices.to(DEVICE), counts=lists.counts.to(DEVICE))
        alone, alone_lse = block_sparse_attention(q, k, v, lists, impl="triton", return_lse=True)
        assert torch.equal(out[begin:end].transpose(0, 1), alone[0].cpu())
        assert torch.equal(lse[:, begin:end], alone_lse[0].cpu())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [16, 64])
def test_pages_of_unlisted_blocks_are_not_read(size, impl):
    batch = Batch([(100, 256)])
    mask = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    mask[..., 0, [0, 2]] = mask[..., 1, [2, 3]] = True
    blocks = BlockIndices.from_mask(mask, block_q=64, block_k=64, q_start=156, q_len=100)
    batch.lists = [blocks]
    cache = batch.cache(size)
    for x in (cache.k, cache.v):
        x[cache.table[0, 64 // size : 128 // size].long()] = torch.nan
    batch.check(*batch.run(cache, impl, blocks=blocks))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_skipped_blocks_are_those_of_a_row_in_one_piece():
    batch = Batch([(150, 256)], mask_heads=4)
    q, k, v = batch.alone[0]
    k[:, :, :64] *= 4
    k[:, :, 64:] *= 0.01
    batch.lists = [BlockIndices.dense(batch=1, heads=4, q_len=150, k_len=256, block_q=64, block_k=64)]
    blocks = replace(batch.lists[0], skip_threshold=0.5)
    cache = batch.cache(16)
    cache.v[cache.table[0, 4:6].long()] += 1e4  # of a block that all queries but those of its own position skip
    out, _ = batch.run(cache, "triton", blocks=blocks)
    v[:, :, 64:96] += 1e4
    exact, counts = block_sparse_attention(q, k, v, blocks, impl="reference", return_counts=True)
    assert (counts[..., 1:] < blocks.counts[..., 1:]).all()
    torch.testing.assert_close(out[22:], exact[0].transpose(0, 1)[22:], rtol=1e-5, atol=1e-5)


def test_a_batch_without_tokens_gives_an_empty_result():
    batch = Batch([(0, 0)])
    cache = Cache(torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 2, 32), torch.zeros(1, 3, dtype=torch.int32))
    for impl in IMPLS:
        assert batch.run(cache, impl)[0].shape == (0, 4, 32)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("size", [16, 64])
def test_a_captured_call_follows_what_tables_and_lengths_hold_later(size):
    first, later = Batch([(70, 70), (33, 150), (0, 0)]), Batch([(20, 150), (0, 0), (83, 90)])
    inputs = []
    for batch in (first, later):
        rows = [(k[0, :, :n], v[0, :, :n]) for (_, k, v), (_, n) in zip(batch.alone, batch.lens) if n]
        cache = make_cache(rows, size)
        room = torch.zeros(3, 12, dtype=torch.int32)
        room[[i for i, (_, n) in enumerate(batch.lens) if n], : cache.table.shape[1]] = cache.table
        lists = BlockIndices.stack([*batch.lists, make_blocks(1, 2, 192, 192, 64, 64)])
        indices = torch.nn.functional.pad(lists.indices, (0, 4 - lists.indices.shape[-1]), value=-1)[:3]
        pages = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, 40 - len(x))) for x in (cache.k, cache.v)]
        inputs.append([*pages, room, indices, lists.counts[:3], batch.bounds, batch.k_lens, batch.q])
    k, v, table, indices, counts, bounds, k_lens, q = held = [x.to(DEVICE) for x in inputs[0]]
    blocks = replace(first.blocks, indices=indices, counts=counts)
    call = {"block_table": table, "cu_seqlens_q": bounds, "k_lens": k_lens, "impl": "triton"}
    paged_attention(q, k, v, blocks, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, k, v, blocks, **call)
    for x, new in zip(held, inputs[1]):
        x.copy_(new)
    graph.replay()
    assert torch.equal(out, paged_attention(q, k, v, blocks, **call))
    assert not out.isnan().any()


def test_what_does_not_fit_is_rejected_in_a_sentence():
    batch = Batch()
    cache = batch.cache(16)
    for change, text in [
        ({"q": batch.q[:, :3]}, r"q must have a multiple of the 2 heads of k, got 3"),
        ({"q": batch.q.double()}, "q, k and v must share a float dtype"),
        ({"q": batch.q[None]}, r"q must be \[T, H, D\] and k_cache"),
        ({"block_table": cache.table.long()}, r"block_table must be int32 \[B, P\]"),
        ({"k_lens": batch.k_lens[:2]}, r"k_lens must be int32 \[5\]"),
        ({"cu_seqlens_q": batch.bounds[1:]}, r"cu_seqlens_q must be int32 \[6\]"),
        ({"blocks": batch.lists[0]}, "blocks must have 5 batch rows, got 1"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\]"),
        ({"softcap": -1.0}, "softcap must be a finite number above 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            batch.run(cache, "triton", **change)
    with pytest.raises(ValueError, match="k_cache and v_cache must have adjacent channels"):
        batch.run(cache._replace(k=cache.k.transpose(1, 3).contiguous().transpose(1, 3)), "triton")
    with pytest.raises(ValueError, match="it takes positive scales"):
        batch.run(cache, "triton", scale=-1.0)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference for paged_attention"):
        batch.run(cache, "gluon")
