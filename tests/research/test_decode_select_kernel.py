"""Times of choosing: nothing is timed whose lists are not those of the best blocks."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form, random_gate
from seerattn.bench.session import CheckFailed

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "research" / "kernels" / "decode_select.py"))


@pytest.mark.parametrize("form", SCRIPT["FORMS"])
def test_the_check_passes_the_modules_and_stops_lists_of_other_blocks(form: str) -> None:
    gate = random_gate(gate_form(form), Shape(4, 2, 32, torch.float16), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    windows = 60 * gate.config.key_subblocks
    gate_q = torch.randn(2, gate.mask_heads, gate.gate_dim, generator=generator)
    gate_k = torch.randn(2, gate.k_weight.shape[0], windows, gate.gate_dim, generator=generator)
    call = (gate, gate_q, gate_k, 60 * 64 + 3)
    _, blocks = SCRIPT["by_modules"](*call)
    assert blocks.indices.shape == (2, 2, 7)
    SCRIPT["check_lists"](*call, blocks)
    # Another block in the place of one in the middle.
    other = blocks.indices.clone()
    free = next(j for j in range(1, 60) if j not in other[1, 0].tolist())
    other[1, 0, 3] = free
    other[1, 0] = other[1, 0].sort().values
    with pytest.raises(CheckFailed, match="must be the best ones"):
        SCRIPT["check_lists"](*call, replace(blocks, indices=other))
    with pytest.raises(CheckFailed, match="must be as long as"):
        SCRIPT["check_lists"](*call, replace(blocks, counts=blocks.counts - 1))
    with pytest.raises(CheckFailed, match="must ascend"):
        SCRIPT["check_lists"](*call, replace(blocks, indices=blocks.indices.flip(-1)))
