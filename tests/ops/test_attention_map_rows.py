"""Laws of `attention_map` of some query blocks: rows of an fp64 map, of whatever implementation."""

import math

import pytest
import torch
import torch.nn.functional as F

from seerattn.ops.attention_map import attention_map, reference
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter's products of bf16 are wrong.
HALF = torch.bfloat16 if CUDA else torch.float16
EPS = torch.finfo(torch.float32).eps
FORMS = (PUBLISHED, MASS, MapForm("sum", 2))
# The interpreter computes with NumPy, which warns of log2(0) = -inf: a block in which a row has no probability.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def make_qk(heads, kv_heads, tokens, dtype, batch=1, dim=32):
    gen = torch.Generator().manual_seed(tokens + heads)
    shapes = ((batch, heads, tokens, dim), (batch, kv_heads, tokens, dim))
    return [(2 * torch.randn(s, generator=gen, dtype=torch.float64)).to(dtype) for s in shapes]


def oracle(q, k, rows, block_q, block_k, scale=None, softcap=None, sinks=None, segment_ids=None):
    """Maps of `FORMS` in fp64, reduced by padding them to whole blocks; and the largest score."""
    tokens = q.shape[2]
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ keys.mT * (scale or q.shape[3] ** -0.5)
    largest = float(scores.abs().max())
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if segment_ids is not None:
        hidden = hidden | (segment_ids[:, None, :, None] != segment_ids[:, None, None])
    sink = -torch.inf if sinks is None else sinks.double().view(1, -1, 1, 1)
    with_sink = torch.cat((scores.masked_fill(hidden, -torch.inf), scores[..., :1] * 0 + sink), -1)
    p = F.pad(with_sink.softmax(-1)[..., :-1], (0, -tokens % block_k, 0, -tokens % block_q))
    tiles = p.unflatten(2, (-1, block_q)).unflatten(4, (-1, block_k))
    maps = (tiles.amax((3, 5)), tiles.sum((3, 5)), tiles.sum(5).square().sum(3).sqrt())
    return [(x / x.sum(-1, keepdim=True))[:, :, rows] for x in maps], largest


def run(impl, q, k, rows, block_q, block_k, **options):
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    call = {"block_q": block_q, "block_k": block_k, "impl": impl, "query_blocks": torch.tensor(rows)} | options
    return [attention_map(q.to(DEVICE), k.to(DEVICE), form=form, **call).map.cpu() for form in FORMS]


def assert_matches(impl, q, k, rows, block_q=64, block_k=64, **options):
    """Both work in fp32 on inputs as given: 32 roundings of a score, in its probability and in its row's sum."""
    expected, largest = oracle(q, k, rows, block_q, block_k, **options)
    actual = run(impl, q, k, rows, block_q, block_k, **options)
    for got, exact in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert ((got - exact).abs() <= 2 * 32 * EPS * max(1.0, largest) * exact + 1e-12).all()


IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


@IMPLS
@pytest.mark.parametrize("block_q, block_k, dtype", [(64, 64, HALF), (32, 128, torch.float32), (128, 32, HALF)])
@pytest.mark.parametrize("tokens", [1, 63, 200, 391])
def test_rows_match_the_fp64_map(impl, tokens, block_q, block_k, dtype):
    blocks = list(range(-(-tokens // block_q)))
    # Neighbours, gaps, an odd number of rows, the first and the ragged last block, all of them.
    for rows in {(0,), (blocks[-1],), tuple(blocks[::2]), tuple(blocks[-3:]), tuple(blocks)}:
        assert_matches(impl, *make_qk(2, 1, tokens, dtype), list(rows), block_q, block_k)


@IMPLS
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (6, 2)])
def test_grouped_heads_match_the_fp64_map(impl, heads, kv_heads):
    assert_matches(impl, *make_qk(heads, kv_heads, 150, HALF, batch=2), [0, 2, 4], 32, 64)


@IMPLS
@pytest.mark.parametrize(
    "extra", [{"scale": 0.4}, {"softcap": 1.5}, {"sinks": (-1, 30)}, {"softcap": 9.0, "sinks": (0, 4)}]
)
def test_scale_softcap_and_sinks_match_the_fp64_map(impl, extra):
    if "sinks" in extra:
        extra = extra | {"sinks": torch.linspace(*extra["sinks"], 4)}
    assert_matches(impl, *make_qk(4, 2, 110, torch.float32), [1, 3], 32, 32, **extra)


@IMPLS
@pytest.mark.parametrize("block_q, block_k, rows", [(32, 64, [0, 1, 4, 9, 10]), (64, 32, [1, 5]), (128, 128, [0, 2])])
def test_packed_documents_match_the_fp64_map(impl, block_q, block_k, rows):
    # Rows that share a tile lie in documents apart; borders inside of blocks; a document of one token.
    segment_ids = torch.zeros(2, 330, dtype=torch.int32)
    for document, begin in enumerate((70, 131, 132, 260), 1):
        segment_ids[0, begin:] = document
    segment_ids[1, 5:] = 7
    assert_matches(impl, *make_qk(2, 1, 330, HALF, batch=2), rows, block_q, block_k, segment_ids=segment_ids)


@IMPLS
def test_tokens_that_no_row_sees_change_nothing(impl):
    q, k = make_qk(2, 1, 300, HALF)
    expected = run(impl, q, k, [1, 3], 64, 64)
    q[:, :, :64] = q[:, :, 128:192] = q[:, :, 256:] = torch.nan
    k[:, :, 256:] = torch.nan
    assert all(torch.equal(a, e) for a, e in zip(run(impl, q, k, [1, 3], 64, 64), expected))


@IMPLS
def test_all_rows_are_the_whole_map(impl):
    q, k = (x.to(DEVICE) for x in make_qk(4, 2, 200, torch.float32))
    whole = attention_map(q, k, k, block_q=32, form=FORMS, impl=impl).maps
    rows = attention_map(q, k, block_q=32, form=FORMS, query_blocks=torch.arange(7), impl=impl).maps
    assert all(torch.equal(a, b) for a, b in zip(rows, whole))


@IMPLS
def test_a_power_of_small_shares_is_not_lost(impl):
    """What all rows give to the second block, e^-30, has a fourth power that fp32 does not hold."""
    q, k = torch.zeros(1, 1, 192, 32, device=DEVICE), torch.zeros(1, 1, 192, 32, device=DEVICE)
    q[..., 0], k[:, :, 64:128, 0] = 1, -30
    call = {"query_blocks": torch.tensor([2]), "scale": 1.0, "impl": impl}
    found = attention_map(q, k, form=MapForm("sum", 4), **call).map[0, 0, 0]
    assert float(found[1] / found[0]) == pytest.approx(math.exp(-30), rel=1e-4, abs=0)


@pytest.mark.parametrize("budget", [1, 2 * 64 * 192])
def test_the_bound_on_scratch_does_not_change_the_rows(budget, monkeypatch):
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, DEVICE, budget)
    assert_matches("reference", *make_qk(4, 2, 330, torch.float32, batch=2), [0, 1, 3, 5])


def test_scores_held_at_once_are_those_of_the_rows(monkeypatch):
    q, k = make_qk(1, 1, 1000, torch.float32)
    held = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: held.append(x.numel()) or softmax(x, dim))
    attention_map(q, k, query_blocks=torch.tensor([2, 9]), impl="reference")
    assert sum(held) <= 2 * 64 * 640


def test_results_carry_no_graph():
    q, k = (x.requires_grad_() for x in make_qk(2, 1, 70, torch.float32))
    assert not attention_map(q, k, query_blocks=torch.tensor([0, 1])).map.requires_grad


def test_bad_rows_are_rejected():
    q, k = make_qk(2, 1, 200, torch.float32)
    wrong = {
        "query_blocks must be 0 to 3, those of 200 tokens, got 4": torch.tensor([1, 4]),
        "query_blocks must be 0 to 3, those of 200 tokens, got -1": torch.tensor([-1, 2]),
        "query_blocks must ascend and not repeat, got 1 after 2": torch.tensor([0, 2, 1]),
        "query_blocks must ascend and not repeat, got 2 after 2": torch.tensor([2, 2]),
        "with R > 0, got torch.int64 \\[0\\]": torch.tensor([], dtype=torch.int64),
        "got torch.float32 \\[1\\]": torch.tensor([1.0]),
        "got torch.bool \\[4\\]": torch.ones(4, dtype=torch.bool),
        "got torch.int64 \\[1, 2\\]": torch.tensor([[0, 1]]),
    }
    for message, rows in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention_map(q, k, query_blocks=rows)
    with pytest.raises(ValueError, match="q must have all S = 200 tokens of k"):
        attention_map(q[:, :, :100], k, query_blocks=torch.tensor([0]))
    with pytest.raises(ValueError, match="block_q and block_k must be at least 1"):
        attention_map(q, k, query_blocks=torch.tensor([0]), block_q=0)
    with pytest.raises(ValueError, match="query_blocks must come without v and lengths, got v"):
        attention_map(q, k, k, query_blocks=torch.tensor([0]))
    with pytest.raises(ValueError, match="query_blocks must come without v and lengths, got lengths"):
        attention_map(q, k, query_blocks=torch.tensor([0]), lengths=torch.tensor([200]))
