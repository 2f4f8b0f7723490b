"""The oracle of gradients that a benchmark asks before it times a backward pass."""

import pytest
import torch
import torch.nn.functional as F

from seerattn.bench.backward import check_dense_gradients, check_sparse_gradients
from seerattn.bench.inputs import Shape
from seerattn.ops.block_sparse_attention import block_sparse_attention

CPU = torch.device("cpu")
SHAPES = [Shape(4, 2, 32, torch.float32), Shape(4, 2, 32, torch.bfloat16)]


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is 3 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.03 * gradient


def fails(result) -> bool:
    error, bound = result
    return not error <= bound


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.dtype_name)
def test_gradient_check_passes_the_op_and_fails_wrong_ones(shape) -> None:
    sizes = {"block_q": 64, "block_k": 32, "mask_heads": 2, "tokens": 300}
    attend = block_sparse_attention
    wrong = {
        "dq": lambda q, k, v, b: attend(Scaled.apply(q), k, v, b),
        "dk": lambda q, k, v, b: attend(q, Scaled.apply(k), v, b),
        "dv": lambda q, k, v, b: attend(q, k, Scaled.apply(v), b),
        "nan": lambda q, k, v, b: attend(q, k, v, b).index_fill(2, torch.tensor([7]), torch.nan) * k.mean(),
    }
    error, bound = check_sparse_gradients(attend, shape, CPU, **sizes)
    assert 0 < error <= bound
    assert all(fails(check_sparse_gradients(run, shape, CPU, **sizes)) for run in wrong.values())


def test_dense_gradient_check_fails_without_causality() -> None:
    def attend(q, k, v, is_causal=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    error, bound = check_dense_gradients(attend, SHAPES[0], CPU, tokens=200)
    assert 0 < error <= bound
    assert fails(check_dense_gradients(lambda q, k, v: attend(q, k, v, is_causal=False), SHAPES[0], CPU, tokens=200))
