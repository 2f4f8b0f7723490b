"""What a selector may tell before it has seen a call."""

from dataclasses import dataclass

import pytest

from seerattn import BlockIndices, KeepAll, Policy, Selector, Threshold, TopK, TopP
from seerattn.selection.selector import LastRowsDense, PolicySelector, expected_density, needs_length


class Plain:
    """All that a user must write."""

    def select(self, q, k, context) -> BlockIndices:
        raise NotImplementedError


class Telling(Plain):
    needs_length = True

    def expected_density(self) -> float:
        return 0.25


@dataclass
class ByPolicy(PolicySelector, Plain):
    policy: Policy


def test_a_plain_selector_tells_nothing() -> None:
    assert isinstance(Plain(), Selector)
    assert expected_density(Plain()) is None and needs_length(Plain()) is False


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: LastRowsDense(x, 2)])
def test_what_a_selector_tells_is_asked_through_last_dense_rows_too(wrap) -> None:
    assert expected_density(wrap(Telling())) == 0.25 and needs_length(wrap(Telling())) is True
    assert expected_density(wrap(Plain())) is None and needs_length(wrap(Plain())) is False


@pytest.mark.parametrize(
    ("policy", "density", "length"),
    [
        (TopK(density=0.1), 0.1, True),
        (TopK(density=[[0.1, 0.3], [], [0.5]]), 0.3, True),
        (TopK(density=0.1, length=512), 0.1, False),
        (TopK(density=0.1, rule="row_share"), 0.1, False),
        (KeepAll(), 1.0, False),
        (TopP(p=0.9), None, False),
        (Threshold(threshold=1e-3), None, False),
    ],
)
def test_a_selector_with_a_policy_tells_what_the_policy_names(policy, density, length) -> None:
    told = expected_density(ByPolicy(policy))
    assert told == (None if density is None else pytest.approx(density))
    assert needs_length(ByPolicy(policy)) is length
