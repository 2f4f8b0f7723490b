"""Laws of every family of causal language models in transformers, against the unpatched model.

The laws of one family run one after the other on one model, so the fixture is made once a family.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers
from configs import CAUSAL, is_known, tiny_model
from sweep import PAGE, row
from torch import Tensor, nn
from transformers import PreTrainedModel
from verdicts import EXPECTED, GATE, LEFT_OUT, OWN_POSITIONS, SLOT_POSITIONS, agrees, verdict

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.state import layer_states

SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
# The second turn begins a block, whose choice would otherwise see a part of its queries.
LENGTH, SHORT, CUT = 131, 97, 64
SLICES = {"left": slice(LENGTH - SHORT, None), "right": slice(SHORT)}
PAPER = AttnGateConfig.paper(block_q=32, block_k=32)
# How far logits may move for each rounding that some modules do in fp32, whatever the model is loaded in.
ROUNDINGS = 16

pytestmark = [
    # Config classes and modeling files of transformers warn of what is theirs alone.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]


def tokens(*shape: int) -> Tensor:
    """Ids that are neither padding nor those of images."""
    return torch.randint(3, 88, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    return model(input_ids=ids, **options)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    assert bool(found.isfinite().all())
    return float((found - expected).abs().max() / expected.abs().max())


def state_of(model: PreTrainedModel) -> tuple:
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return model.config._attn_implementation, [name for name, _ in model.named_modules()], hooks


@dataclass
class Family:
    """The unpatched model of a family, and what it gives."""

    name: str
    plain: PreTrainedModel

    def attached(self, gates: Any = GATE, policy: Any = None) -> nn.Module:
        return seerattn.attach(copy.deepcopy(self.plain), gates, policy or KeepAll(), impl="reference").eval()

    @cached_property
    def gated(self) -> nn.Module:
        return self.attached()

    @cached_property
    def logits(self) -> Tensor:
        return run(self.plain, tokens(2, LENGTH)).logits

    @cached_property
    def tolerance(self) -> float:
        """What embeddings that are rounded to fp32 do to the logits, times a number of such roundings."""
        shaken = copy.deepcopy(self.plain)
        with torch.no_grad():
            weight = shaken.get_input_embeddings().weight
            weight.mul_(1 + torch.finfo(torch.float32).eps / 2 * torch.randn_like(weight).clamp(-1, 1))
        moved = error(run(shaken, tokens(2, LENGTH)).logits, self.logits)
        assert moved < 1e-3
        return ROUNDINGS * moved

    def second_turn(self, model: nn.Module) -> Tensor:
        ids = tokens(2, LENGTH)
        cache = run(model, ids[:, :CUT], use_cache=True).past_key_values
        return run(model, ids[:, CUT:], past_key_values=cache, use_cache=True).logits

    def padded(self, model: nn.Module, side: str) -> list[Tensor]:
        """Logits of the real tokens of two rows of different length."""
        ids, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
        for row_of, one, where in ((0, tokens(1, LENGTH), slice(None)), (1, tokens(1, SHORT), SLICES[side])):
            ids[row_of, where], mask[row_of, where] = one[0], 1
        options = {"attention_mask": mask}
        if "position_ids" in inspect.signature(self.plain.forward).parameters and self.name not in OWN_POSITIONS:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        found = run(model, ids, **options).logits
        return [found[:1], found[1:, SLICES[side]]]

    def alone(self, model: nn.Module) -> list[Tensor]:
        return [run(model, tokens(1, length)).logits for length in (LENGTH, SHORT)]

    def worst(self, found: list[Tensor], expected: list[Tensor]) -> float:
        return max(error(one, other) for one, other in zip(found, expected))


@pytest.fixture(scope="module")
def family(name: str) -> Family:
    if not is_known(name):
        pytest.skip("this transformers does not have it")
    return Family(name, tiny_model(name))


@pytest.fixture
def served(family: Family) -> Family:
    seerattn.set_policy(family.gated, KeepAll())
    return family


@pytest.fixture
def refused(family: Family) -> Family:
    return family


def without_numbers(text: str) -> str:
    return re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", text)


def test_verdict_is_the_one_of_the_table_and_of_the_page(name: str) -> None:
    if not is_known(name):
        pytest.skip("this transformers does not have it")
    found = verdict(name)
    assert agrees(found, EXPECTED[name]), found
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," in page and not found.startswith(LEFT_OUT):
        assert without_numbers(row(name, found)) in without_numbers(page).splitlines()


def test_model_that_is_refused_is_as_it_was(refused: Family) -> None:
    model = refused.plain
    before = state_of(model)
    with pytest.raises(ValueError):
        seerattn.attach(model, GATE)
    assert state_of(model) == before and not layer_states(model)


def test_all_blocks_give_the_logits_of_the_unpatched_model(served: Family) -> None:
    assert error(run(served.gated, tokens(2, LENGTH)).logits, served.logits) <= served.tolerance


@pytest.mark.parametrize("side", SLICES)
def test_padded_rows_are_those_of_the_unpatched_model_and_sparse_ones_those_of_the_row_alone(
    served: Family, side: str
) -> None:
    expected = served.padded(served.plain, side)
    assert served.worst(served.padded(served.gated, side), expected) <= served.tolerance
    keeps_rows = served.worst(expected, served.alone(served.plain)) <= served.tolerance
    assert keeps_rows == (side == "right" or served.name not in SLOT_POSITIONS)
    if keeps_rows:
        seerattn.set_policy(served.gated, SPARSE)
        assert served.worst(served.padded(served.gated, side), served.alone(served.gated)) <= served.tolerance


def test_second_turn_is_that_of_the_unpatched_model_and_sparse_that_of_one_call_or_it_is_refused(
    served: Family,
) -> None:
    if any(state.found.not_cached for state in layer_states(served.gated)):
        with pytest.raises(ValueError, match="a prompt must come in one call"):
            served.second_turn(served.gated)
        return
    expected = served.second_turn(served.plain)
    assert error(served.second_turn(served.gated), expected) <= served.tolerance
    assert error(expected, served.logits[:, CUT:]) <= served.tolerance
    seerattn.set_policy(served.gated, SPARSE)
    one_call = run(served.gated, tokens(2, LENGTH)).logits
    assert error(served.second_turn(served.gated), one_call[:, CUT:]) <= served.tolerance


def test_sparse_policy_changes_the_logits_and_visits_fewer_blocks(served: Family) -> None:
    seerattn.set_policy(served.gated, SPARSE)
    with seerattn.record_density(served.gated) as meter:
        found = run(served.gated, tokens(2, LENGTH)).logits
    assert error(found, served.logits) > max(1e-2, 10 * served.tolerance)
    # Five rows of blocks have 1 to 5 causal blocks; a share of .4 of each, rounded up, and no less than the diagonal.
    assert meter.mean() == pytest.approx((1 + 1 + 2 + 2 + 2) / 15)
    assert set(meter.layers) == {state.layer for state in layer_states(served.gated)}


def test_detach_gives_the_model_back_bit_for_bit(served: Family) -> None:
    before = state_of(served.plain)
    detached = seerattn.detach(served.attached(policy=SPARSE))
    assert state_of(detached) == before
    assert torch.equal(run(detached, tokens(2, LENGTH)).logits, served.logits)


@pytest.mark.parametrize("gate", [AttnGateConfig(block_q=32, block_k=32), PAPER], ids=["default", "published"])
def test_gate_of_either_form_rotates_and_chooses(served: Family, gate: AttnGateConfig) -> None:
    gated = served.attached(gate, SPARSE)
    with seerattn.record_density(gated) as meter:
        found = run(gated, tokens(2, LENGTH)).logits
    assert gate.rope and meter.mean() < 0.9
    assert error(found, served.logits) > max(1e-2, 10 * served.tolerance)


def test_every_family_of_transformers_is_in_the_table() -> None:
    assert not set(CAUSAL) - set(EXPECTED)
