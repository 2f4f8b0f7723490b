"""Times of decoding: nothing is timed that differs from fp64, and lists are of the density that they say."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seerattn.bench.inputs import Shape

pytest.importorskip("triton")

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "research" / "kernels" / "decode.py"))
SHAPE = Shape(4, 2, 32, torch.float16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("page", [None, 48])
def test_the_check_passes_the_kernel_and_stops_one_that_leaves_a_block_out(page: int | None) -> None:
    check = SCRIPT["check_decode"]
    error, bound = check(SHAPE, CPU, page, True, True)
    assert error <= bound
    attend = SCRIPT["decode_attention"]

    def without_last(*args: torch.Tensor, blocks, **kwargs) -> torch.Tensor:
        return attend(*args, blocks=replace(blocks, counts=(blocks.counts - 1).clamp(min=0)), **kwargs)

    check.__globals__["decode_attention"] = without_last
    try:
        error, bound = check(SHAPE, CPU, page, True, True)
    finally:
        check.__globals__["decode_attention"] = attend
    assert error > bound


def test_pages_hold_what_the_table_says() -> None:
    x = torch.randn(1, 2, 100, 8)
    table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32)
    pages = SCRIPT["in_pages"](x, 32, table)
    assert torch.equal(pages[table[0].long()].flatten(0, 1)[:100].transpose(0, 1), x[0])
