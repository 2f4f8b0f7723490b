"""Densities of tokens that are decoded, counted by hand."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seerattn
from seerattn.selection.density_meter import WAITING


def counted(seed: int, number: int) -> list[tuple[int, Tensor, int]]:
    """Layers, lengths of lists ``[B, 2]`` and keys of so many steps."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for step in range(number):
        tokens = int(torch.randint(1, 500, (), generator=draw))
        counts = torch.randint(1, -(-tokens // 32) + 1, (step % 3 + 1, 2), generator=draw, dtype=torch.int32)
        found.append((step % 2, counts, tokens))
    return found


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_densities_are_those_of_all_tokens_however_often_they_are_asked_for(every: int) -> None:
    meter, steps = seerattn.DensityMeter(), counted(0, 3 * WAITING + 5)
    for number, (layer, counts, tokens) in enumerate(steps):
        meter.decode.add(layer, 4, counts, tokens, 32)
        if number % every == every - 1:
            assert 0 < meter.decode.mean() <= 1
    assert meter.decode.layers == [0, 1]
    for layer, density in meter.decode.by_head().items():
        own = [(counts.tolist(), -(-tokens // 32)) for at, counts, tokens in steps if at == layer]
        causal = sum(len(rows) * blocks for rows, blocks in own)
        read = [sum(row[group] for rows, _ in own for row in rows) for group in range(2)]
        # Query heads of a group share a list.
        assert density.tolist() == [read[0] / causal, read[0] / causal, read[1] / causal, read[1] / causal]


def test_counting_a_token_computes_nothing_but_now_and_then() -> None:
    class Seen(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += 1
            return function(*args, **(kwargs or {}))

    meter, steps = seerattn.DensityMeter(), counted(1, 2 * WAITING)
    with Seen() as seen:
        for _, counts, tokens in steps[: WAITING - 1]:
            meter.decode.add(0, 4, counts, tokens, 32)
        assert not seen.number
        for _, counts, tokens in steps[WAITING - 1 :]:
            meter.decode.add(0, 4, counts, tokens, 32)
    assert 0 < seen.number < 20
