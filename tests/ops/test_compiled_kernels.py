"""Which kernels Triton compiles: one for constants, and for which whole numbers are 1 or multiples of 16."""

import os
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from interpreted import large_steps

from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form, layer_context, random_gate
from seerattn.gate_selector import GateSelector
from seerattn.ops.gate_scores import triton_select
from seerattn.ops.gate_scores.kernels import choice
from seerattn.selection import Policy, Threshold, TopK
from seerattn.selection.selector import Memory

# What lies outside of a row of scores is whatever the memory held.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="launches of compiled kernels are not told"),
]


class Recorded:
    """A kernel whose launches are written down, as Triton tells kernels apart."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            names = self.kernel.arg_names[: len(args)]
            ours = set(self.kernel.kwargs.get("do_not_specialize") or ())
            told = tuple(_told(value) for name, value in zip(names, args) if name not in ours)
            self.compiled.add((told, tuple(sorted(constants.items(), key=str))))
            self.kernel[grid](*args, **constants)

        return launch


def _told(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


@pytest.mark.parametrize("form", ["default", "paper"])
@pytest.mark.parametrize("policy", [TopK(density=0.3), Threshold(threshold=0.01)], ids=str)
def test_parts_of_prompts_share_their_kernels_wherever_they_are_cut(
    policy: Policy, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_steps(monkeypatch)
    kernels = [Recorded(triton_select.vectors_kernel), Recorded(triton_select.score_and_choose_kernel)]
    kernels.append(Recorded(choice.expand_kernel))
    monkeypatch.setattr(triton_select, "vectors_kernel", kernels[0])
    monkeypatch.setattr(triton_select, "score_and_choose_kernel", kernels[1])
    monkeypatch.setattr(choice, "expand_kernel", kernels[2])
    shape, cpu, tokens = Shape(4, 2, 32, torch.float32), torch.device("cpu"), 600
    gate, context = random_gate(gate_form(form), shape, cpu), layer_context(shape, tokens, cpu)
    q, k = torch.randn(1, 4, tokens, 32), torch.randn(1, 2, tokens, 32)
    for cuts in ([0, 256, 512], [0, 255, 509], [0, 1, 193, 401, 586]):
        selector, kept = GateSelector(gate, policy, impl="triton"), None
        for begin, end in pairwise(cuts):
            memory = Memory(begin, kept)
            selector.select(q[:, :, begin:end], k[:, :, :end], replace(context, memory=memory))
            kept = memory.kept
    # A beginning and what follows it.
    assert len(kernels[0].compiled) == 2
    assert len(kernels[1].compiled) == 1
    assert len(kernels[2].compiled) == (0 if isinstance(policy, TopK) else 1)
