"""Functions of numbers that kernels share, against fp64."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from seerattn.ops.arithmetic import NATIVE, log2
from seerattn.ops.gate_scores.kernels.arithmetic import turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _turn_kernel(angles, cos, sin, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, s = turn(tl.load(angles + at, mask=at < count, other=0.0))
    tl.store(cos + at, c, mask=at < count)
    tl.store(sin + at, s, mask=at < count)


@triton.jit
def _log2_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, log2(tl.load(x + at, mask=at < count, other=1.0)), mask=at < count)


def uniform(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count).uniform_(low, high, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("largest", [10.0, 8192.0, 131072.0, 1e6])
def test_cosine_and_sine_match_fp64(largest: float) -> None:
    angles = torch.cat((uniform(20000, -largest, largest), torch.arange(largest - 500, largest), torch.zeros(1)))
    cos, sin = torch.empty_like(angles, device=DEVICE), torch.empty_like(angles, device=DEVICE)
    _turn_kernel[(-(-len(angles) // 1024),)](angles.to(DEVICE), cos, sin, len(angles), BLOCK=1024)
    bound = 2.0**-23
    if not NATIVE.value:  # the interpreter rounds products before it adds them
        if largest > 131072:
            pytest.skip("products are exact on a GPU alone")
        bound += 2.0**-24 * 4.9e-4 * largest
    exact = angles.double()
    assert float((cos.cpu() - exact.cos()).abs().max()) <= bound
    assert float((sin.cpu() - exact.sin()).abs().max()) <= bound


def test_logarithms_match_fp64() -> None:
    x = torch.cat((2.0 ** uniform(20000, -120.0, 120.0), uniform(20000, 0.5, 2.0), torch.ones(1)))
    got = torch.empty_like(x, device=DEVICE)
    _log2_kernel[(-(-len(x) // 1024),)](x.to(DEVICE), got, len(x), BLOCK=1024)
    exact = x.double().log2()
    assert ((got.cpu() - exact).abs() <= 2.0**-22 * exact.abs().clamp(min=1.0)).all()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_logarithms_of_nothing_and_of_all_are_infinite() -> None:
    x, got = torch.tensor([0.0, torch.inf]).to(DEVICE), torch.empty(2, device=DEVICE)
    _log2_kernel[(1,)](x, got, 2, BLOCK=16)
    assert got.tolist() == [-torch.inf, torch.inf]
