"""Skipping by the running maximum: what is computed and what comes out, against a walk over blocks in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from seerattn.methods.blasst import BlasstSelector
from seerattn.ops.block_sparse_attention import block_sparse_attention, reference
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import AttentionContext
from tests.ops.test_block_sparse_attention import DIM, assert_exact, make_blocks, make_qkv, oracle, token_mask
from tests.ops.test_block_sparse_attention_triton import eager_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter multiplies the bit patterns of bf16
# No excess of these calls comes nearer to a threshold, so that rounding to fp32 moves no block.
CLEAR = 2e-5


def uneven_qkv(*sizes, dtype=torch.float64, seed=0):
    """Queries that look into one direction, and keys of which stretches lie that way: some blocks matter, others not.

    Values are those of ``dtype``, so that every dtype has the same scores but for its sums.
    """
    q, k, v = make_qkv(*sizes, seed=seed)
    place = torch.arange(k.shape[2], dtype=torch.float64)
    strength = 14 * torch.cos(place / 60)
    q[..., 0] += 4
    k[..., 0] += strength
    return [x.to(dtype) for x in (q, k, v)]


def walk(q, k, blocks, threshold, scale=None, softcap=None, sinks=None):
    """What an online softmax over the lists of an unpadded call computes: lists of entries, by batch, head and row.

    Raises:
        AssertionError: a block is so near to the threshold that rounding decides.
    """
    group, start = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    members, found = q.shape[1] // blocks.num_heads, {}
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[b, h].double() @ k[b, h // group].double().T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            for row in range(blocks.num_q_blocks):
                block = start // blocks.block_q + row
                places = range(max(block * blocks.block_q, start), min((block + 1) * blocks.block_q, k.shape[2]))
                met = dict.fromkeys(places, -math.inf if sinks is None else float(sinks[h]))
                kept = found[b, h, row] = []
                for n, j in enumerate(x for x in blocks.indices[b, h // members, row].tolist() if x >= 0):
                    excess = -math.inf
                    for x in places:
                        seen = scores[x - start, j * blocks.block_k : min((j + 1) * blocks.block_k, x + 1)]
                        if len(seen):
                            met[x] = max(met[x], float(seen.max()))
                            excess = max(excess, float(seen.max()) - met[x])
                    if n == 0 or any(x // blocks.block_k == j for x in places):
                        kept.append(j)
                    else:
                        assert abs(excess - math.log(threshold)) > CLEAR or excess == 0 == math.log(threshold)
                        if excess >= math.log(threshold):
                            kept.append(j)
    return found


def as_lists(found, blocks, heads):
    """What `walk` found as lists of every query head."""
    mask = torch.zeros(len(blocks.indices), heads, blocks.num_q_blocks, blocks.num_k_blocks, dtype=torch.bool)
    for (b, h, row), kept in found.items():
        mask[b, h, row, kept] = True
    sizes = {"block_q": blocks.block_q, "block_k": blocks.block_k}
    return BlockIndices.from_mask(mask, q_start=blocks.q_start, q_len=blocks.q_len, **sizes)


def run(q, k, v, blocks, threshold, impl, **options):
    """Output, log-sum-exp and counts, computed on the GPU where there is one."""
    if impl == "triton":
        pytest.importorskip("triton")
    lists = {"indices": blocks.indices.to(DEVICE), "counts": blocks.counts.to(DEVICE)}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = block_sparse_attention(
        *(x.to(DEVICE) for x in (q, k, v)),
        replace(blocks, skip_threshold=threshold, **lists),
        impl=impl,
        return_lse=True,
        return_counts=True,
        **options,
    )
    return [x.cpu() for x in found]


def assert_skips_as_walked(q, k, v, blocks, threshold, impl, **options):
    """The blocks of the walk are computed and no others; how many were skipped."""
    walked = as_lists(walk(q, k, blocks, threshold, **options), blocks, q.shape[1])
    out, lse, counts = run(q, k, v, blocks, threshold, impl, **options)
    assert counts.dtype == torch.int32
    assert torch.equal(counts, walked.counts)
    exact, exact_lse = oracle(q, k, v, token_mask(walked, q.shape[1], q.shape[2], k.shape[2]), **options)
    if q.dtype == torch.float64:
        assert_exact(out, exact)
    else:
        # Twice the error of plain torch in the same dtype and one rounding of the output. Scores are large here: scaled
        # in fp32, one moves by half of eps of itself, and the output by twice that times a value.
        eager = eager_attention(q, k, v, token_mask(walked, q.shape[1], q.shape[2], k.shape[2]), **options)
        score = (exact_lse.abs().max() + math.log(k.shape[2])) * torch.finfo(torch.float32).eps
        budget = 2 * (eager - exact).abs().max() + torch.finfo(q.dtype).eps * exact.abs().max()
        assert (out - exact).abs().max() <= budget + score * v.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    return int(blocks.counts.sum()) * q.shape[1] // blocks.num_heads - int(counts.sum())


IMPLS = [("reference", torch.float64), ("triton", torch.float32), ("triton", HALF)]
SIZES = [(64, 64), (64, 32), (128, 32), (32, 128), (128, 128)]
CALLS = [(1, 0), (63, 0), (64, 7), (27, 300), (65, 335), (1, 400)]


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize(
    "block_q, block_k, threshold", [(64, 64, 0.5), *((*sizes, 1e-2) for sizes in SIZES), (32, 64, 1.0)]
)
def test_ragged_calls_compute_what_an_online_softmax_would_not_skip(block_q, block_k, threshold, impl, dtype):
    if impl == "triton" and dtype == torch.float32 and 128 in (block_q, block_k):
        pytest.skip("Triton refuses blocks of 128 tokens in fp32")
    skipped = 0
    for q_tokens, past in CALLS:
        q, k, v = uneven_qkv(1, 2, 1, q_tokens, q_tokens + past, dtype=dtype, seed=q_tokens + past)
        blocks = make_blocks(1, 2, q_tokens, q_tokens + past, block_q, block_k, keep=0.7)
        skipped += assert_skips_as_walked(q, k, v, blocks, threshold, impl)
    assert skipped > 0


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("heads, kv_heads, mask_heads", [(3, 1, 1), (8, 2, 2), (6, 2, 6)])
def test_every_query_head_skips_for_itself(heads, kv_heads, mask_heads, impl, dtype):
    q, k, v = uneven_qkv(1, heads, kv_heads, 70, 331, dtype=dtype)
    q[:, ::2, :, 0] -= 8  # every other head looks the other way
    blocks = make_blocks(1, mask_heads, 70, 331, 64, 32, keep=0.8)
    assert assert_skips_as_walked(q, k, v, blocks, 0.02, impl) > 0
    counts = run(q, k, v, blocks, 0.02, impl)[2]
    assert not torch.equal(counts[:, 0], counts[:, 1])


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize(
    "extra",
    [
        {"scale": 0.4},
        {"softcap": 4.0},
        {"sinks": [-2.0, 3.0, 60.0, 4.0]},
        {"softcap": 5.0, "sinks": [-9.0, 2.0, 9.0, 4.0]},
    ],
    ids=lambda extra: " ".join(extra),
)
def test_scale_softcap_and_sinks_come_before_the_comparison(extra, impl, dtype):
    q, k, v = uneven_qkv(1, 4, 2, 100, 340, dtype=dtype)
    if "sinks" in extra:
        extra = extra | {"sinks": torch.tensor(extra["sinks"], dtype=dtype)}
    blocks = make_blocks(1, 2, 100, 340, 64, 32, keep=0.8)
    assert assert_skips_as_walked(q, k, v, blocks, 0.05, impl, **extra) > 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_block_that_ends_with_the_first_query_is_computed(impl):
    # The only block that holds a query of the row and needs no mask: the first query is its last key.
    q, k, v = uneven_qkv(1, 1, 1, 40, 103, dtype=torch.float32)
    k[:, :, 32:64, 0] -= 60
    blocks = BlockIndices.dense(batch=1, heads=1, q_len=40, k_len=103, block_q=64, block_k=32)
    assert_skips_as_walked(q, k, v, blocks, 0.9, impl)
    clean = run(q, k, v, blocks, 0.9, impl)
    assert clean[2][0, 0, 0] == 2


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("q_tokens", [200, 90])
def test_a_padded_row_skips_what_the_row_alone_skips(q_tokens, impl):
    lengths = [200, 131, 64, 1, 0]
    q, k, v = uneven_qkv(len(lengths), 4, 2, q_tokens, 200, dtype=torch.float32)
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 200 - n] = torch.inf
        v[b, :, : 200 - n] = torch.nan
    rows = [make_blocks(1, 2, min(q_tokens, n), n, 64, 32, keep=0.8, seed=n) for n in lengths[:-1]]
    empty, none = torch.zeros(1, 2, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows.append(BlockIndices(empty, empty[..., 0], 64, 32, none, none))
    stacked = BlockIndices.stack(rows)
    out, _, counts = run(q, k, v, stacked, 0.1, impl, lengths=torch.tensor(lengths))
    assert counts.sum() < stacked.counts.sum() * 2
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert (out[b, :, : q_tokens - t] == 0).all()
        assert (counts[b, :, rows[b].num_q_blocks :] == 0).all()
        if n:
            alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
            walked = as_lists(walk(*alone[:2], rows[b], 0.1), rows[b], 4)
            assert torch.equal(counts[b : b + 1, :, : rows[b].num_q_blocks], walked.counts)
            exact, _ = oracle(*alone, token_mask(walked, 4, t, n))
            torch.testing.assert_close(out[b, :, q_tokens - t :].double(), exact[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_packed_sequence_skips_what_it_skips_alone(impl):
    lengths, bounds = [170, 1, 64, 133], torch.tensor([0, 170, 171, 235, 368])
    q, k, v = uneven_qkv(1, 4, 2, 368, 368, dtype=torch.float32)
    rows = [make_blocks(1, 2, n, n, 64, 32, keep=0.8, seed=n) for n in lengths]
    out, _, counts = run(q, k, v, BlockIndices.stack(rows), 0.1, impl, cu_seqlens=bounds)
    for i, (n, lists) in enumerate(zip(lengths, rows)):
        own = [x[:, :, int(bounds[i]) : int(bounds[i + 1])] for x in (q, k, v)]
        walked = as_lists(walk(*own[:2], lists, 0.1), lists, 4)
        assert torch.equal(counts[i : i + 1, :, : lists.num_q_blocks], walked.counts)
        exact, _ = oracle(*own, token_mask(walked, 4, n, n))
        part = out[:, :, int(bounds[i]) : int(bounds[i + 1])]
        torch.testing.assert_close(part.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("softcap, sink", [(None, None), (4.0, None), (None, 2.0)])
@pytest.mark.parametrize("threshold", [0.3, 1e-3])
def test_full_lists_compute_the_blocks_of_the_method_blasst(threshold, softcap, sink, impl, dtype):
    q, k, v = uneven_qkv(1, 2, 1, 75, 410, dtype=dtype)
    sinks = None if sink is None else torch.full((2,), sink, dtype=dtype)
    scale = DIM**-0.5
    context = AttentionContext(0, scale, softcap, lambda x, start: x, sinks)
    chosen = BlasstSelector(threshold, 64, 32).select(q.double(), k.double(), context)
    full = BlockIndices.dense(batch=1, heads=1, q_len=75, k_len=410, block_q=64, block_k=32)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    assert as_lists(walk(q, k, full, threshold, **options), full, 2).to_mask().equal(chosen.to_mask())
    out, lse, counts = run(q, k, v, full, threshold, impl, **options)
    assert torch.equal(counts, chosen.counts)
    wanted, wanted_lse = block_sparse_attention(q, k, v, chosen, return_lse=True, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, HALF: 5e-3}[dtype]
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("sinks", [None, [-2.0, 3.0, 5.0, 4.0]])
def test_a_threshold_below_all_probabilities_changes_no_bit(sinks, impl, dtype):
    q, k, v = uneven_qkv(1, 4, 2, 150, 331, dtype=dtype)
    blocks = make_blocks(1, 4, 150, 331, 64, 64)
    sinks = None if sinks is None else torch.tensor(sinks, dtype=dtype)
    expected = run(q, k, v, blocks, None, impl, sinks=sinks)
    assert torch.equal(expected[2], blocks.counts)
    for actual, wanted in zip(run(q, k, v, blocks, 5e-324, impl, sinks=sinks), expected):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("sinks", [None, [-2.0, 3.0, 5.0, 4.0]])
@pytest.mark.parametrize("threshold", [0.1, 1e-2, 1e-4])
def test_what_is_skipped_weighs_no_more_than_the_threshold_allows(threshold, sinks):
    q, k, v = uneven_qkv(1, 4, 2, 150, 661)
    sinks = None if sinks is None else torch.tensor(sinks, dtype=torch.float64)
    blocks = make_blocks(1, 4, 150, 661, 64, 32, keep=0.8)
    out, lse, counts = run(q, k, v, blocks, threshold, "reference", sinks=sinks)
    full, full_lse, _ = run(q, k, v, blocks, None, "reference", sinks=sinks)
    start = 661 - 150
    row = torch.arange(start, 661) // 64 - start // 64
    # A row's largest score is never skipped; each key that is has less than the threshold times its probability.
    share = ((blocks.counts - counts)[:, :, row] * 32 * threshold).double()
    assert (share > 0).any()
    assert ((full - out).abs() <= 2 * share[..., None] * v.abs().max() + 1e-12).all()
    shift = full_lse.double() - lse.double()
    assert (shift >= -1e-5).all() and ((1 - torch.exp(-shift)) <= share + 1e-5).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernel_reads_no_value_of_a_skipped_block():
    q, k, v = uneven_qkv(1, 1, 1, 64, 320, dtype=torch.float32)
    k[:, :, 128:192, 0] -= 60
    blocks = BlockIndices.dense(batch=1, heads=1, q_len=64, k_len=320, block_q=64, block_k=64)
    expected = run(q, k, v, blocks, 1e-3, "triton")
    assert 2 not in walk(q, k, blocks, 1e-3)[0, 0, 0]
    v[:, :, 128:192] = torch.nan
    for actual, wanted in zip(run(q, k, v, blocks, 1e-3, "triton"), expected):
        assert torch.equal(actual, wanted)


def test_chunks_do_not_change_what_is_skipped(monkeypatch):
    q, k, v = uneven_qkv(2, 4, 2, 130, 130)
    blocks = make_blocks(2, 2, 130, 130, 16, 16, keep=0.8)
    expected = run(q, k, v, blocks, 0.1, "reference")
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", 1)
    actual = run(q, k, v, blocks, 0.1, "reference")
    assert torch.equal(actual[2], expected[2])
    assert_exact(actual[0], expected[0])


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_gradients_of_what_may_be_skipped_are_refused(name, impl):
    q, k, v = make_qkv(1, 2, 1, 40, 40, torch.float32)
    inputs = {"q": q, "k": k, "v": v, "sinks": torch.zeros(2)}
    inputs[name].requires_grad_()
    blocks = replace(make_blocks(1, 2, 40, 40, 32, 32), skip_threshold=0.1)
    with pytest.raises(ValueError, match=r"no skip_threshold where gradients are taken, got 0\.1; call it under"):
        block_sparse_attention(**inputs, blocks=blocks, impl=impl)
    with torch.no_grad():
        block_sparse_attention(**inputs, blocks=blocks, impl=impl)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, math.nan, math.inf, "0.1", True])
def test_thresholds_that_no_probability_can_have_are_rejected(threshold):
    blocks = make_blocks(1, 2, 40, 40, 32, 32)
    with pytest.raises(ValueError, match=r"skip_threshold must be a number above 0, at most 1, or None, got"):
        replace(blocks, skip_threshold=threshold)


@pytest.mark.parametrize("impl", ["gluon_fwd", "flash4"])
def test_kernels_that_skip_nothing_say_so(impl):
    module = pytest.importorskip(f"seerattn.ops.block_sparse_attention.{impl}")
    q, k, v = (torch.zeros(1, h, 64, 64, dtype=torch.bfloat16) for h in (2, 1, 1))
    blocks = make_blocks(1, 2, 64, 64, 64, 64)
    call = {"scale": 0.1, "softcap": None, "sinks": None, "cu_seqlens": None, "lengths": [64]}
    reason = "it skips no blocks, got skip_threshold 0.25"
    assert module.refusal(q, k, v, blocks, **call) != reason
    assert module.refusal(q, k, v, replace(blocks, skip_threshold=0.25), **call) == reason


@pytest.mark.parametrize("dtype, dim, size", [(torch.float32, 32, 128), (torch.float16, 256, 128)])
def test_blocks_that_a_program_has_no_room_for_are_refused_and_served_by_auto(dtype, dim, size):
    pytest.importorskip("triton")
    q, k, v = (torch.randn(1, h, 40, dim, generator=torch.Generator().manual_seed(0)).to(dtype) for h in (2, 1, 1))
    for sizes in ((size, 32), (32, size)):
        blocks = make_blocks(1, 2, 40, 40, *sizes)
        with pytest.raises(ValueError, match=rf"it skips smaller blocks of heads of {dim} channels in {dtype}, got"):
            run(q, k, v, blocks, 0.5, "triton")
        run(q, k, v, blocks, 0.5, "auto")


def test_counts_without_a_threshold_are_those_of_the_lists():
    q, k, v = make_qkv(1, 4, 2, 70, 90)
    blocks = make_blocks(1, 2, 70, 90, 32, 32)
    out, counts = block_sparse_attention(q, k, v, blocks, return_counts=True)
    assert torch.equal(out, block_sparse_attention(q, k, v, blocks))
    assert torch.equal(counts, blocks.counts[:, [0, 0, 1, 1]])


def test_an_empty_batch_skips_nothing():
    q, k, v = make_qkv(0, 4, 2, 10, 10, torch.float32)
    none = torch.zeros(0, dtype=torch.int32)
    blocks = BlockIndices(torch.zeros(0, 4, 0, 1, dtype=torch.int32), torch.zeros(0, 4, 0), 32, 32, none, none)
    assert run(q, k, v, blocks, 0.1, "triton")[2].shape == (0, 4, 0)
