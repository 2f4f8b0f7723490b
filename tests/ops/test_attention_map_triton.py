"""`impl="triton"` against the fp64 oracle of the op, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from seerattn.ops.attention_map import attention_map
from seerattn.selection.map_form import MASS, PUBLISHED
from tests.ops.test_attention_map import FORMS, make_qkv, oracle

triton_fwd = pytest.importorskip("seerattn.ops.attention_map.triton_fwd")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's products of bf16 are wrong.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
EPS = torch.finfo(torch.float32).eps
# The interpreter computes with NumPy, which warns of log2(0) = -inf: a block in which a row has no probability.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def on_device(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def run(q, k, v, block_q, block_k, **kwargs):
    """Output and all maps on the CPU."""
    q, k, v = map(on_device, (q, k, v))
    call = {"block_q": block_q, "block_k": block_k, "impl": "triton"} | {n: on_device(x) for n, x in kwargs.items()}
    out, maps = attention_map(q, k, v, form=FORMS, **call)
    assert out.dtype == q.dtype and len(maps) == len(FORMS) and all(x.dtype == torch.float32 for x in maps)
    return out.cpu(), *(x.cpu() for x in maps)


def eager_error(q, k, v, exact, scale=None, softcap=None, sinks=None, segment_ids=None):
    """Largest error of what a model computes without a fused kernel: softmax in fp32, products in the inputs' dtype."""
    group, (q_tokens, k_tokens) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(q_tokens, k_tokens, dtype=torch.bool).triu(k_tokens - q_tokens + 1)
    if segment_ids is not None:
        hidden = hidden | (segment_ids[:, None, None] != segment_ids[:, None, k_tokens - q_tokens :, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return float(((scores.softmax(-1)[..., :k_tokens].to(q.dtype) @ v).double() - exact).abs().max())


def assert_within_budget(actual, expected, q, k, v, **kwargs):
    """The output has twice the error of eager attention and one rounding, maps that of fp32 scores.

    Maps are made of fp32 scores of inputs as given: a score with an error of 32 roundings has as large a relative
    error in its probability, and its row's sum as much again.
    """
    (out, *maps), (exact_out, *exact_maps) = actual, expected
    rounding = torch.finfo(q.dtype).eps * float(exact_out.abs().max())
    assert (out - exact_out).abs().max() <= 2 * eager_error(q, k, v, exact_out, **kwargs) + rounding
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT * kwargs.get("scale", q.shape[-1] ** -0.5)
    band = 2 * 32 * EPS * max(1.0, float(scores.abs().max()))
    for actual_map, exact in zip(maps, exact_maps):
        assert actual_map.shape == exact.shape
        assert ((actual_map - exact).abs() <= band * exact + 1e-12).all()


def check(q, k, v, block_q=64, block_k=64, **kwargs):
    expected = oracle(q, k, v, block_q, block_k, **kwargs)
    assert_within_budget(run(q, k, v, block_q, block_k, **kwargs), expected, q, k, v, **kwargs)


@pytest.mark.parametrize(
    "block_q, block_k, dtype",
    [
        (64, 64, torch.float32),
        (32, 128, torch.float32),
        (128, 32, torch.float32),
        (64, 64, HALF),
        (128, 128, HALF),
        (32, 32, HALF),
        (128, 64, HALF),
    ],
)
@pytest.mark.parametrize("q_tokens, past", [(1, 0), (63, 0), (64, 1), (127, 100), (200, 0), (1, 128)])
def test_ragged_calls_stay_within_the_fp64_budget(q_tokens, past, block_q, block_k, dtype):
    check(*make_qkv(1, 2, 1, q_tokens, q_tokens + past, dtype), block_q, block_k)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (8, 2)])
def test_grouped_heads_stay_within_the_fp64_budget(heads, kv_heads):
    check(*make_qkv(2, heads, kv_heads, 90, 110, torch.float16))


@pytest.mark.parametrize("dim", [32, 40, 64, 80, 96, 128, 192, 256])
def test_head_dims_stay_within_the_fp64_budget(dim):
    gen = torch.Generator().manual_seed(dim)
    check(*(torch.randn(1, h, 140, dim, generator=gen, dtype=HALF) for h in (2, 1, 1)))


@pytest.mark.parametrize(
    "extra",
    [{"scale": 0.4}, {"softcap": 1.5}, {"sinks": (-1, 30)}, {"softcap": 20.0, "sinks": (0, 2), "scale": -2.0}],
)
def test_scale_softcap_and_sinks_stay_within_the_fp64_budget(extra):
    if "sinks" in extra:
        extra = extra | {"sinks": torch.linspace(*extra["sinks"], 4)}
    check(*make_qkv(1, 4, 2, 90, 150, torch.float32), 32, 64, **extra)


@pytest.mark.parametrize("block_q, block_k, dtype", [(64, 64, HALF), (32, 128, torch.float32), (32, 128, HALF)])
@pytest.mark.parametrize("q_tokens", [330, 150])
def test_packed_documents_stay_within_the_fp64_budget(q_tokens, block_q, block_k, dtype):
    segment_ids = torch.zeros(2, 330, dtype=torch.int32)
    for document, begin in enumerate((70, 131, 132, 260), 1):
        segment_ids[0, begin:] = document
    segment_ids[1, 5:] = 7
    check(*make_qkv(2, 2, 1, q_tokens, 330, dtype), block_q, block_k, segment_ids=segment_ids)


@pytest.mark.parametrize("q_tokens, packed, dtype", [(200, False, HALF), (200, True, HALF), (90, True, torch.float32)])
def test_padded_row_stays_within_the_budget_of_the_row_alone(q_tokens, packed, dtype):
    lengths = [131, 200, 64, 1, 0]
    q, k, v = make_qkv(len(lengths), 2, 1, q_tokens, 200, dtype)
    segment_ids = (torch.arange(200) // 60).repeat(len(lengths), 1) if packed else None
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 200 - n] = torch.inf
        v[b, :, : 200 - n] = torch.nan
    actual = run(q, k, v, 64, 32, lengths=torch.tensor(lengths), segment_ids=segment_ids)
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        out, *maps = (x[b : b + 1] for x in actual)
        assert (out[:, :, : q_tokens - t] == 0).all()
        if not n:
            assert all((x == 0).all() for x in maps)
            continue
        alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
        extra = {"segment_ids": segment_ids[b : b + 1, 200 - n :]} if packed else {}
        expected = oracle(*alone, 64, 32, **extra)
        rows, columns = expected[1].shape[2:]
        for x in maps:
            assert (x[:, :, rows:] == 0).all() and (x[..., columns:] == 0).all()
        cut = [out[:, :, q_tokens - t :], *(x[:, :, :rows, :columns] for x in maps)]
        assert_within_budget(cut, expected, *alone, **extra)


@pytest.mark.parametrize("rows, keys", [(64, 32), (64, 64), (128, 64), (128, 128)])
def test_the_launch_does_not_change_the_result(rows, keys, monkeypatch):
    launch = triton_fwd.Launch(rows=rows, keys=keys, num_warps=4, num_stages=2, programs_per_sm=2)
    monkeypatch.setattr(triton_fwd, "choose_launch", lambda **_: launch)
    check(*make_qkv(1, 2, 1, 200, 270, HALF), 32, 64)


@pytest.mark.parametrize("scratch, section", [(1, 1), (1 << 20, 1), (1, 1 << 30)])
def test_bounds_on_memory_do_not_change_a_bit(scratch, section, monkeypatch):
    q, k, v = make_qkv(2, 6, 3, 200, 200, HALF)
    expected = run(q, k, v, 64, 64)
    monkeypatch.setattr(triton_fwd, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(triton_fwd, "SECTION_BYTES", section)
    assert all(torch.equal(a, e) for a, e in zip(run(q, k, v, 64, 64), expected))


def test_scratch_is_bounded_at_every_length(monkeypatch):
    allocated = []
    real_empty = torch.empty

    def empty(size, **kwargs):
        allocated.append(size * 4)
        return real_empty(1, **kwargs)

    class Launched(Exception):
        pass

    class Kernel:
        def __getitem__(self, grid):
            def launch(*_args, **_kwargs):
                raise Launched

            return launch

    monkeypatch.setattr(triton_fwd.torch, "empty", empty)
    monkeypatch.setattr(triton_fwd, "_resident", lambda *_: 132)
    monkeypatch.setattr(triton_fwd, "attention_map_fwd", Kernel())
    k = on_device(torch.ones(1, 1, 1, 128, dtype=HALF))
    for tokens in (1 << 10, 1 << 15, 1 << 17, 1 << 20):
        for block_k in triton_fwd.BLOCK_SIZES:
            inputs = k[:, :, :1].expand(1, 32, 64, 128), k.expand(1, 1, tokens, 128)
            # As many forms as you like need no more than a number for their sums and one for their maxima.
            for forms, kinds in ((FORMS, 2), ((PUBLISHED, MASS), 2), (MASS, 1), (PUBLISHED, 1)):
                allocated.clear()
                with pytest.raises(Launched):
                    attention_map(*inputs, form=forms, block_k=block_k, impl="triton")
                assert len(allocated) == kinds and sum(allocated) <= 128 << 20


def test_two_runs_are_bitwise_equal():
    q, k, v = make_qkv(1, 4, 2, 200, 230, HALF)
    once = run(q, k, v, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(run(q, k, v, 64, 64), once))


def test_a_map_alone_has_the_bits_of_one_among_others():
    q, k, v = make_qkv(1, 4, 2, 200, 230, HALF)
    _, *expected = run(q, k, v, 64, 64)
    for form, among in zip(FORMS, expected):
        alone = attention_map(*map(on_device, (q, k, v)), form=form, impl="triton").map
        assert torch.equal(alone.cpu(), among)


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    q, k, v = make_qkv(2, 4, 2, 100, 100, HALF)
    expected = run(q, k, v, 64, 64)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_first = [x.mT.contiguous().mT for x in (q, k, v)]
    for inputs in (token_major, channels_first):
        assert all(torch.equal(a, e) for a, e in zip(run(*inputs, 64, 64), expected))


def test_unsupported_calls_are_refused():
    q, k, v = make_qkv(1, 2, 1, 64, 64, torch.float32)
    wrong = {
        "it takes fp16, bf16 or fp32": ((q.double(), k.double(), v.double()), {}),
        "multiples of 8, got 36": ([torch.ones(1, 1, 8, 36)] * 3, {}),
        "blocks of": ((q, k, v), {"block_k": 48}),
        "positive scale": ((q, k, v), {"scale": -1.0}),
    }
    for message, (inputs, kwargs) in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention_map(*map(on_device, inputs), impl="triton", **kwargs)
