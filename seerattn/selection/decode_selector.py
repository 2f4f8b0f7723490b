"""The protocol of what chooses blocks for one token of every sequence, while an answer is written."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import nominal_density, reads_all
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext


@runtime_checkable
class DecodeSelector(Protocol):
    """Chooses key blocks for the last token of sequences of one length, for the heads of a KV group together.

    The list of a sequence must depend on that sequence alone, and must hold the block of the token.

    It may also have ``reads_all(tokens)`` and ``expected_density(tokens)``, see `tells_all` and `told_density`.
    """

    def select_token(self, q: Tensor, k: Tensor, context: AttentionContext) -> DecodeBlocks:
        """Chooses blocks.

        Args:
            q: post-RoPE query ``[B, H, 1, D]`` of the last token.
            k: post-RoPE keys ``[B, HKV, S, D]``, that of the token included.
            context: facts about the layer. `AttentionContext.unrotate` serves any part of the keys; what is left in
                `AttentionContext.memory` is there in the next step.
        """
        ...


def tells_all(selector: DecodeSelector, tokens: int) -> bool:
    """Whether a selector says that it keeps every block of so many tokens; False of one that says nothing."""
    tell = getattr(selector, "reads_all", None)
    return tell is not None and tell(tokens)


def told_density(selector: DecodeSelector, tokens: int) -> float | None:
    """The share of the blocks of so many tokens that a selector says it keeps; None of one that cannot say."""
    tell = getattr(selector, "expected_density", None)
    return None if tell is None else tell(tokens)


class PolicyDecoder:
    """What a selector that leaves the choice to its `policy` can tell of it; the base class of such selectors."""

    policy: Policy

    @property
    def block_size(self) -> int:
        """Key block size in tokens."""
        raise NotImplementedError

    def reads_all(self, tokens: int) -> bool:
        """Whether every block of so many tokens is kept, whatever the scores."""
        return reads_all(self.policy, tokens, self.block_size)

    def expected_density(self, tokens: int) -> float | None:
        """The share of the blocks of so many tokens that is kept; None where scores decide."""
        return nominal_density(self.policy, tokens, self.block_size)
