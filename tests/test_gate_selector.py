"""What the learned gate says when it cannot have the fused op."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from seerattn import AttentionContext, AttnGate, AttnGateConfig, GateSelector, Policy, TopK
from seerattn.gate_selector import _runs_fused, _warn_of_modules
from seerattn.ops import gate_scores
from seerattn.selection.selector import RotaryTables

pytest.importorskip("triton")
RULE = gate_scores.Rule("count", 2.0)


@pytest.fixture(autouse=True)
def _untold() -> None:
    _warn_of_modules.cache_clear()


def gate_of(**form: object) -> AttnGate:
    return AttnGate(AttnGateConfig(rope=False, **form), num_heads=2, num_kv_heads=2, head_dim=32)


def asks(gate: AttnGate, rule: gate_scores.Rule | None, device: str, *, times: int = 1) -> list[bool]:
    """Whether the fused op serves a call; its tensors are on the CPU whatever the device is said to be."""
    q, k = torch.randn(2, 1, 2, 128, 32)
    return [_runs_fused("auto", torch.device(device), q, k, gate, rule, RotaryTables()) for _ in range(times)]


def test_losing_the_fused_op_on_a_gpu_is_told_once_for_each_reason() -> None:
    gate = gate_of()
    with pytest.warns(UserWarning) as told:
        assert asks(gate, None, "cuda", times=3) == [False] * 3  # a policy that is no rule of the op
        assert len(told) == 1
        biased = gate_of(distance_bias=4)
        assert asks(biased, RULE, "cuda", times=2) == [False] * 2
    assert len(told) == 2


def test_nothing_is_told_on_a_cpu_or_where_the_fused_op_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asks(gate_of(), None, "cpu") == [False]
        assert asks(gate_of(), RULE, "cuda") == [True]


def test_a_named_implementation_refuses_or_runs_and_tells_nothing() -> None:
    q, k = torch.randn(2, 1, 2, 128, 32)
    call = (torch.device("cuda"), q, k, gate_of(), None, RotaryTables())
    with pytest.raises(ValueError):
        _runs_fused("triton", *call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _runs_fused("reference", *call)


@dataclass(frozen=True, kw_only=True)
class EveryOther(Policy):
    """A policy of a user."""

    def _keep(self, scores: Tensor, rows) -> Tensor:
        return (torch.arange(scores.shape[-1]) % 2 == 0).expand(scores.shape)


def test_a_policy_of_a_user_chooses_by_the_torch_modules() -> None:
    q, k = torch.randn(2, 1, 2, 512, 32)
    context = AttentionContext(layer=0, scale=1.0, softcap=None, unrotate=lambda x, start: x.float())
    selector = GateSelector(gate_of(), EveryOther())
    kept = selector.select(q, k, context).to_mask()
    assert kept[0, 0, -1].tolist() == [True, False] * 3 + [True, True]
    assert selector.expected_density() is None and not selector.needs_length
    told = replace(selector, policy=TopK(density=0.25))
    assert told.expected_density() == 0.25 and told.needs_length


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter multiplies what it does not use
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_threshold_of_skipping_goes_on_with_the_lists_and_changes_none(impl: str) -> None:
    q, k = torch.randn(2, 1, 2, 512, 32, generator=torch.Generator().manual_seed(0))
    context = AttentionContext(layer=0, scale=1.0, softcap=None, unrotate=lambda x, start: x.float())
    gate = gate_of()
    plain, skipping = (
        GateSelector(gate, TopK(density=0.4, skip_threshold=threshold), impl).select(q, k, context)
        for threshold in (None, 0.1)
    )
    assert plain.skip_threshold is None and skipping.skip_threshold == 0.1
    assert torch.equal(plain.indices, skipping.indices)
