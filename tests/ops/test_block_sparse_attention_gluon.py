"""`impl="gluon"`: against the fp64 oracle of the op on a Hopper GPU; plans, refusals and index arithmetic anywhere."""

from types import SimpleNamespace

import pytest
import torch

from seerattn.ops import resolve
from seerattn.selection.block_indices import BlockIndices
from tests.ops.test_block_sparse_attention import make_blocks, oracle, token_mask
from tests.ops.test_block_sparse_attention_triton import assert_within_budget, run

gluon_fwd = pytest.importorskip("seerattn.ops.block_sparse_attention.gluon_fwd")
Plan = gluon_fwd.Plan

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
# Heads, KV heads, heads with lists, block sizes: one of every plan, and groups of 2, 3 and 6 that share lists.
FORMS = [
    (4, 1, 1, 64, 64),
    (8, 2, 2, 64, 128),
    (4, 1, 1, 32, 64),
    (4, 1, 1, 128, 64),
    (4, 2, 2, 64, 64),
    (6, 1, 1, 128, 128),
    (3, 1, 1, 64, 64),
    (2, 1, 2, 128, 128),
    (3, 1, 1, 128, 64),
    (4, 2, 4, 64, 64),
    (2, 2, 2, 64, 128),
]


def make_qkv(batch, heads, kv_heads, q_tokens, k_tokens, dim=128, dtype=torch.bfloat16):
    gen = torch.Generator().manual_seed(0)
    sizes = ((heads, q_tokens), (kv_heads, k_tokens), (kv_heads, k_tokens))
    return [torch.randn(batch, *size, dim, generator=gen).to(dtype) for size in sizes]


@on_hopper
@pytest.mark.parametrize("heads, kv_heads, mask_heads, block_q, block_k", FORMS)
@pytest.mark.parametrize("dim, dtype", [(128, torch.bfloat16), (64, torch.float16)])
@pytest.mark.parametrize("q_tokens, past", [(1, 0), (63, 0), (64, 7), (65, 0), (127, 100), (1, 200), (1000, 0)])
def test_ragged_calls_stay_within_the_fp64_budget(
    heads, kv_heads, mask_heads, block_q, block_k, q_tokens, past, dim, dtype
):
    q, k, v = make_qkv(2, heads, kv_heads, q_tokens, q_tokens + past, dim, dtype)
    blocks = make_blocks(2, mask_heads, q_tokens, q_tokens + past, block_q, block_k)
    assert_within_budget(q, k, v, blocks, impl="gluon", scale=0.1)


@on_hopper
@pytest.mark.parametrize("mask_heads, block_q, block_k", [(1, 64, 64), (1, 64, 128), (2, 128, 128), (2, 64, 64)])
def test_long_lists_stay_within_the_fp64_budget(mask_heads, block_q, block_k):
    heads = 4 if mask_heads == 1 else 2
    q, k, v = make_qkv(1, heads, 1, 4097, 4097)
    assert_within_budget(q, k, v, make_blocks(1, mask_heads, 4097, 4097, block_q, block_k, keep=0.3), impl="gluon")


PLANS = [
    Plan(4, 32, q_in_registers=False),
    Plan(4, 32, block_n=64, stages=5),
    Plan(2, 64),
    Plan(2, 32, block_n=64, stages=2),
    Plan(1, 128, q_in_registers=False),
    Plan(1, 128, block_n=64, stages=5, q_in_registers=False),
    Plan(1, 64),
]


@on_hopper
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("block_k", [64, 128])
def test_the_plan_does_not_change_the_result(plan, block_k, monkeypatch):
    monkeypatch.setattr(gluon_fwd, "choose_plan", lambda **_: plan)
    q, k, v = make_qkv(1, 4, 1, 300, 330)
    assert_within_budget(q, k, v, make_blocks(1, 1, 300, 330, 128, block_k), impl="gluon")


@on_hopper
@pytest.mark.parametrize("q_tokens", [200, 40])
@pytest.mark.parametrize("mask_heads", [1, 4])
def test_padding_is_not_read_and_its_output_is_zero(q_tokens, mask_heads):
    lengths = [200, 130, 64, 1, 0]
    q, k, v = make_qkv(len(lengths), 4, 1, q_tokens, 200, dtype=torch.float16)
    for b, n in enumerate(lengths):
        q[b, :, : max(0, q_tokens - n)] = torch.nan
        k[b, :, : 200 - n] = torch.nan
        v[b, :, : 200 - n] = torch.nan
    rows = [make_blocks(1, mask_heads, min(q_tokens, n), n, 64, 64, seed=n) for n in lengths[:-1]]
    out, lse = run(q, k, v, stack(rows, mask_heads), impl="gluon", lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert (out[b, :, : q_tokens - t] == 0).all()
        assert (lse[b, :, : q_tokens - t] == -torch.inf).all()
        if n:
            alone = [x[b : b + 1, :, x.shape[2] - m :] for x, m in ((q, t), (k, n), (v, n))]
            exact, exact_lse = oracle(*alone, token_mask(rows[b], 4, t, n))
            # Weights and output are rounded to fp16; the largest value of v is below 5.
            torch.testing.assert_close(out[b, :, q_tokens - t :].double(), exact[0], rtol=0, atol=5 * 2**-10)
            torch.testing.assert_close(lse[b, :, q_tokens - t :].double(), exact_lse[0], rtol=1e-5, atol=1e-5)


@on_hopper
@pytest.mark.parametrize("layout", ["tokens first", "strided channels", "sliced cache", "expanded"])
def test_inputs_of_any_memory_layout_give_the_same_result(layout):
    q, k, v = make_qkv(1, 4, 2, 65, 65)
    blocks = make_blocks(1, 4, 65, 65, 64, 64)
    change = {
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided channels": lambda x: torch.stack((x, x), -1).flatten(3)[..., ::2],
        "sliced cache": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 7), value=torch.nan)[:, :, :65],
        "expanded": lambda x: x[:, :1].expand(x.shape),
    }[layout]
    expected, _ = run(*(change(x).contiguous() for x in (q, k, v)), blocks, impl="gluon")
    # `run` copies to the GPU and keeps strides only of dense inputs: change them there.
    q, k, v = (change(x.cuda()) for x in (q, k, v))
    assert torch.equal(run(q, k, v, blocks, impl="gluon")[0], expected)


@on_hopper
@pytest.mark.parametrize("mask_heads", [2, 8])
def test_two_runs_are_bitwise_equal(mask_heads):
    q, k, v = make_qkv(1, 8, 2, 1000, 1000)
    blocks = make_blocks(1, mask_heads, 1000, 1000, 64, 64)
    assert torch.equal(run(q, k, v, blocks, impl="gluon")[0], run(q, k, v, blocks, impl="gluon")[0])


@pytest.mark.parametrize(
    "block_q, sharing, expected",
    [
        (64, 4, Plan(4, 32)),
        (32, 8, Plan(4, 32)),
        (128, 12, Plan(4, 32)),
        (64, 2, Plan(2, 64)),
        (128, 6, Plan(2, 64)),
        (128, 1, Plan(1, 128)),
        (128, 3, Plan(1, 128)),
        (64, 1, Plan(1, 64, block_n=64)),
        (64, 7, Plan(1, 64, block_n=64)),
        (32, 2, None),
        (32, 1, None),
        (16, 4, None),
    ],
)
def test_plans_fill_tiles_with_rows_of_one_list(block_q, sharing, expected):
    plan = gluon_fwd.choose_plan(block_q=block_q, sharing=sharing)
    assert plan == expected
    if plan is not None:
        assert sharing % plan.heads == 0 and block_q % plan.tokens == 0
        assert plan.heads * plan.tokens == 64 * plan.consumers


def refusal(dim=128, heads=4, mask_heads=4, block_q=64, block_k=64, dtype=torch.bfloat16, grad=False, **kwargs):
    q, k, v = (torch.zeros(1, h, 8, dim, dtype=dtype, requires_grad=grad) for h in (heads, 2, 2))
    call = {"scale": 1.0, "lengths": [8], "softcap": None, "sinks": None, "return_lse": False, "cu_seqlens": None}
    return gluon_fwd.refusal(q, k, v, make_blocks(1, mask_heads, 8, 8, block_q, block_k), **call | kwargs)


@pytest.mark.parametrize(
    "call, reason",
    [
        ({"dtype": torch.float32}, "it takes fp16 or bf16, got torch.float32"),
        ({"dim": 96}, "head dims of (64, 128), got 96"),
        ({"softcap": 30.0}, "no softcap, sinks or packed sequences"),
        ({"sinks": torch.zeros(4)}, "no softcap, sinks or packed sequences"),
        ({"cu_seqlens": [0, 8]}, "no softcap, sinks or packed sequences"),
        ({"scale": 0.0}, "positive scales, got 0.0"),
        ({"block_k": 32}, "key blocks of (64, 128) tokens, got 32"),
        ({"block_q": 32}, "got 32 tokens x 1 heads"),
        ({"block_q": 32, "mask_heads": 2}, "got 32 tokens x 2 heads"),
    ],
)
def test_refusal_names_what_the_kernel_cannot_serve(call, reason):
    assert reason in refusal(**call)


def test_a_fitting_call_is_not_refused():
    assert refusal() is None
    assert refusal(heads=8, mask_heads=2, block_q=32, block_k=128, dim=64, dtype=torch.float16) is None
    assert refusal(grad=True) is None


@pytest.mark.parametrize("capability, version, expected", [((9, 0), "3.6.0", "gluon"), ((9, 0), "3.5.1", "triton")])
def test_auto_prefers_gluon_on_hopper_with_a_new_triton(capability, version, expected, monkeypatch):
    assert preferred(monkeypatch, capability, version) == expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_auto_does_not_take_gluon_on_other_gpus(capability, monkeypatch):
    assert preferred(monkeypatch, capability, "3.6.0") == "triton"
    reason = f"compute capability 9.0 (Hopper), got {capability[0]}.{capability[1]}"
    assert reason in resolve._missing("gluon", torch.device("cuda"))


def preferred(monkeypatch, capability, version):
    monkeypatch.setattr(resolve, "_lacking", resolve._lacking.__wrapped__)
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return resolve.preferred("block_sparse_attention", "auto", torch.device("cuda"))


def stack(rows, mask_heads):
    """Rows of the batch, and behind them one without a token."""
    empty, none = torch.zeros(1, mask_heads, 0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return BlockIndices.stack([*rows, BlockIndices(empty, empty[..., 0], rows[0].block_q, rows[0].block_k, none, none)])


class Pointer:
    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, step):
        return Pointer(self.values, self.at + int(step))


class Scores(torch.Tensor):
    type = SimpleNamespace(layout=None)


def on_tensors(function):
    return lambda *args: function(*map(torch.as_tensor, args))


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's own index arithmetic, run as Python on tensors; ``program`` is the program that it is in."""
    names = ("_box_key", "_tile_boxes", "_visible_tiles", "_work", "_tile", "_hide_future")
    language = SimpleNamespace(
        int32=torch.int32,
        int64=torch.int64,
        program_id=lambda axis: torch.tensor(parts.program),
        load=lambda pointer: torch.tensor(int(pointer.values[pointer.at])),
        minimum=on_tensors(torch.minimum),
        maximum=on_tensors(torch.maximum),
        where=torch.where,
        expand_dims=torch.unsqueeze,
        static_range=range,
        arange=lambda begin, end, layout: torch.arange(begin, end),
        SliceLayout=lambda dim, layout: None,
    )
    parts = SimpleNamespace(program=0, **{name: getattr(gluon_fwd, name).fn for name in names})
    for name in names:
        monkeypatch.setattr(gluon_fwd, name, getattr(parts, name))
    monkeypatch.setattr(gluon_fwd, "gl", language)
    return parts


@pytest.mark.parametrize("heads, kv_heads, mask_heads, block_q, block_k", FORMS)
@pytest.mark.parametrize("q_tokens, lengths", [(150, [150, 65]), (70, [260, 131, 40]), (1, [130])])
@pytest.mark.parametrize("block_n", [64, 128])
def test_programs_together_compute_each_listed_pair_once(
    heads, kv_heads, mask_heads, block_q, block_k, q_tokens, lengths, block_n, kernel
):
    sharing = heads // mask_heads
    plan = gluon_fwd.choose_plan(block_q=block_q, sharing=sharing)
    plan = Plan(plan.heads, plan.tokens, block_n)
    form = gluon_fwd.Form(plan, block_q, block_k, min(block_k, block_n), sharing)
    rows = [make_blocks(1, mask_heads, min(q_tokens, n), n, block_q, block_k, seed=n) for n in lengths]
    blocks = stack(rows, mask_heads)
    batch, num_q_blocks, width = len(blocks.counts), blocks.num_q_blocks, blocks.indices.shape[3]
    pointers = (
        Pointer(x.flatten()) for x in (blocks.indices, blocks.counts, torch.cat((blocks.q_start, blocks.q_len)))
    )
    problem = (*pointers, batch, heads, kv_heads, num_q_blocks, width)
    tile_tokens = min(plan.tokens, 64)
    q_smem = SimpleNamespace(shape=[plan.consumers, 1, 64 // tile_tokens, tile_tokens, 64])
    computed = torch.zeros(batch, heads, q_tokens, max(lengths), dtype=torch.int32)
    for kernel.program in range(batch * heads // plan.heads * (block_q // plan.tokens) * num_q_blocks):
        b, kv_head, head, position, q_start, q_len, entries, boxes = kernel._work(problem, form)
        total = int(-(-boxes // (block_n // form.box)))
        for t in range(plan.consumers):
            first_head, first = kernel._tile(t, head, position, q_smem, form)
            r = torch.arange(64)
            token, row_head = first + r % tile_tokens - q_start, first_head + r // tile_tokens
            real = (token >= 0) & (token < q_len)
            assert (row_head // (heads // kv_heads) == kv_head).all()
            visible = kernel._visible_tiles(entries, total, boxes, first, form)
            for e in range(total):
                seen = torch.zeros(64, block_n)
                if e >= visible:
                    positions = first + r % tile_tokens
                    seen = kernel._hide_future(seen.as_subclass(Scores), entries, e, boxes, positions, form)
                pair = kernel._tile_boxes(entries, e, boxes, form)[: block_n // form.box]
                keys = torch.cat([key + torch.arange(form.box) for key in pair])
                at = ((seen == 0) & real[:, None]).nonzero()
                slot = token[at[:, 0]] + q_tokens - q_len
                index = (b.expand(len(at)), row_head[at[:, 0]], slot, keys[at[:, 1]])
                computed.index_put_(index, torch.ones(len(at), dtype=torch.int32), accumulate=True)
    for b, n in enumerate(lengths):
        t = min(q_tokens, n)
        assert not computed[b, :, : q_tokens - t].any() and not computed[b, ..., n:].any()
        assert torch.equal(computed[b, :, q_tokens - t :, :n], token_mask(rows[b], heads, t, n).squeeze(0).int())
    assert not computed[len(lengths) :].any()
