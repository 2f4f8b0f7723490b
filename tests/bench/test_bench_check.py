"""The gates of the benchmarks: they let the implementations pass and nothing that is wrong."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from seerattn.bench.attention_map import attention_with_map, plain_attention_with_map
from seerattn.bench.check import (
    GATE_TOKENS,
    check_attention,
    check_attention_map,
    check_dense,
    check_selection,
    check_skipping,
    gate_scores,
)
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.model import GATE_FORMS, gate_form, layer_context, random_gate, rotary_tables
from seerattn.gate_selector import GateSelector
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm
from seerattn.selection.policies import TopK

CPU = torch.device("cpu")
SHAPES = [Shape(4, 2, 32, torch.float32), Shape(4, 2, 32, torch.bfloat16)]
SIZES = {"block_q": 64, "block_k": 64, "mask_heads": 2}


def fails(result) -> bool:
    error, bound = result
    return not error <= bound


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.dtype_name)
@pytest.mark.parametrize("block_q, block_k, mask_heads", [(64, 64, 4), (128, 32, 2)])
def test_attention_check_passes_the_op_and_fails_wrong_ones(shape, block_q, block_k, mask_heads) -> None:
    sizes = {"block_q": block_q, "block_k": block_k, "mask_heads": mask_heads, "tokens": 500}
    wrong = {
        "scale": lambda q, k, v, b: block_sparse_attention(q, k, v, b, scale=1.02 * q.shape[-1] ** -0.5),
        "heads": lambda q, k, v, b: block_sparse_attention(q.flip(1), k, v, b),
        "last token": lambda q, k, v, b: F.pad(block_sparse_attention(q, k, v, b)[:, :, :-1], (0, 0, 0, 1)),
        "nan": lambda q, k, v, b: block_sparse_attention(q, k, v, b).index_fill(2, torch.tensor([7]), torch.nan),
    }
    error, bound = check_attention(block_sparse_attention, shape, CPU, **sizes)
    assert 0 < error <= bound
    assert bound < (1e-5 if shape.dtype == torch.float32 else 0.1)
    assert all(fails(check_attention(attend, shape, CPU, **sizes)) for attend in wrong.values())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.dtype_name)
@pytest.mark.parametrize("block_q, block_k, mask_heads", [(64, 64, 4), (128, 32, 2)])
def test_skipping_check_passes_the_op_and_fails_wrong_ones(shape, block_q, block_k, mask_heads) -> None:
    sizes = {"block_q": block_q, "block_k": block_k, "mask_heads": mask_heads, "tokens": 500, "threshold": 0.05}

    def attend(q, k, v, blocks, threshold=0.05, **options):
        lists = replace(blocks, skip_threshold=threshold)
        return block_sparse_attention(q, k, v, lists, return_counts=True, **options)

    wrong = {
        "skips nothing": lambda *x: attend(*x, threshold=None),
        "skips more": lambda *x: attend(*x, threshold=0.5),
        "skips less": lambda *x: attend(*x, threshold=1e-4),
        "skips by other logits": lambda *x: attend(*x, softcap=2.0),
        "computes what it says it skips": lambda *x: (attend(*x, threshold=None)[0], attend(*x)[1]),
        "nan": lambda *x: (attend(*x)[0] * torch.nan, attend(*x)[1]),
    }
    error, bound = check_skipping(attend, shape, CPU, **sizes)
    assert 0 < error <= bound
    failing = {name for name, run in wrong.items() if fails(check_skipping(run, shape, CPU, **sizes))}
    # What weighs little in bf16 is not seen in the output, so counts have to be.
    assert failing >= set(wrong) - ({"computes what it says it skips"} if shape.dtype == torch.bfloat16 else set())


def test_skipping_check_fails_where_nothing_is_skipped() -> None:
    attend = partial(block_sparse_attention, return_counts=True)
    assert fails(check_skipping(attend, SHAPES[0], CPU, **SIZES, tokens=500, threshold=1e-30))


def test_dense_check_fails_without_causality() -> None:
    def attend(q, k, v, is_causal=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    error, bound = check_dense(attend, SHAPES[0], CPU, tokens=300)
    assert 0 < error <= bound
    assert fails(check_dense(lambda q, k, v: attend(q, k, v, is_causal=False), SHAPES[0], CPU, tokens=300))


@pytest.mark.parametrize(
    "form", [PUBLISHED, MASS, MapForm("sum", 2), MapForm("max", 4), MapForm("sum", math.inf)], ids=str
)
@pytest.mark.parametrize("version", [attention_with_map, plain_attention_with_map])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.dtype_name)
def test_map_check_passes_both_versions_and_fails_wrong_maps_and_outputs(version, shape, form) -> None:
    def attend(q, k, v):
        return version(q, k, v, form)

    def check(*args, tokens):
        return check_attention_map(*args, form=form, tokens=tokens)

    error, bound = check(attend, shape, CPU, tokens=300)
    assert 0 < error <= bound

    def other_map(q, k, v):
        out, target = attend(q, k, v)
        return out, (target**1.02) / (target**1.02).sum(-1, keepdim=True)

    def other_output(q, k, v):
        out, target = attend(q, k, v)
        return out.roll(1, 2), target

    other_form = MapForm("sum", 3)
    assert fails(check(other_map, SHAPES[0], CPU, tokens=300))
    assert fails(check(other_output, shape, CPU, tokens=300))
    assert fails(check(lambda q, k, v: version(q, k, v, other_form), SHAPES[0], CPU, tokens=300))


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (128, 32)])
@pytest.mark.parametrize("form", GATE_FORMS)
def test_oracle_of_the_gate_matches_the_module(form, block_q, block_k) -> None:
    shape = SHAPES[0]
    gate = random_gate(gate_form(form, block_q, block_k), shape, CPU)
    q, k, _ = random_qkv(shape, 512, CPU, drift=1.0)
    exact, found = gate_scores(gate, q.double(), k.double()), gate(q, k)
    assert torch.equal(exact.isfinite(), found.isfinite())
    seen = exact.isfinite()
    # fp32 sums of head_dim terms, and log-sum-exp: well within 64 roundings of the largest score.
    assert float((exact - found)[seen].abs().max()) <= 64 * 2**-24 * float(exact[seen].abs().max())


@pytest.mark.parametrize("form", GATE_FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.dtype_name)
def test_selection_check_passes_the_selector_and_fails_wrong_ones(form, shape) -> None:
    gate = random_gate(gate_form(form), shape, CPU)
    context, tables = layer_context(shape, GATE_TOKENS, CPU), rotary_tables(shape, GATE_TOKENS, CPU)

    def check(gate=gate, context=context, density=0.3):
        selector = GateSelector(gate, TopK(density=density), "reference")
        asked = (lambda q, k: selector.select(q, k, context)), selector_gate, shape, tables
        return check_selection(*asked, density=0.3)

    selector_gate = gate
    error, bound = check()
    assert error <= bound
    rotated = replace(context, unrotate=lambda x, start: x.float())
    assert fails(check(context=rotated))
    assert fails(check(density=0.5))
    torch.manual_seed(1)
    other = random_gate(gate_form(form), shape, CPU)
    with torch.no_grad():
        other.k_weight.copy_(other.k_weight.flip(0))
    assert fails(check(gate=other))
