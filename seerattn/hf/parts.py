"""`Parts`: the tokens of one prompt over several processes, and how tokens and heads change hands."""

from __future__ import annotations

from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Parts(NamedTuple):
    """How the tokens of a prompt are spread over the processes of a group; the last parts may be shorter.

    Attributes:
        group: of the processes; None is the default one.
        rank: of this process in it.
        bounds: first token of each process, and the end.
    """

    group: dist.ProcessGroup | None
    rank: int
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, group: dist.ProcessGroup | None) -> Parts:
        """Parts of one size, as far as they go.

        Raises:
            ValueError: there are processes without a token.
        """
        ranks = dist.get_world_size(group)
        size = -(-tokens // ranks)
        bounds = tuple(min(rank * size, tokens) for rank in range(ranks + 1))
        if bounds[-2] == tokens:
            raise ValueError(f"a prompt must have a token for each of {ranks} processes and more, got {tokens}")
        return cls(group, dist.get_rank(group), bounds)

    @property
    def own(self) -> slice:
        """Tokens of this process."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def tokens(self) -> int:
        """Of the whole prompt."""
        return self.bounds[-1]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each process."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    def gather(self, x: Tensor) -> Tensor:
        """All tokens ``[B, T, ..]`` of what every process has of its own ``[B, t, ..]``."""
        # Not every library gathers parts of different sizes.
        longest = self.sizes[0]
        padded = x.new_zeros(x.shape[0], longest, *x.shape[2:])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, self.sizes, strict=True)], dim=1)

    def to_heads(self, x: Tensor) -> Tensor:
        """All tokens of this process's heads ``[B, h / n, T, D]``, of its own tokens of all heads ``[B, h, t, D]``."""
        batch, heads, own, width = x.shape
        each = heads // len(self.sizes)
        sent = x.unflatten(1, (-1, each)).transpose(0, 1).flatten()
        one = batch * each * width
        got = self._exchange(sent, [one * own] * len(self.sizes), [one * size for size in self.sizes])
        return torch.cat([x.view(batch, each, -1, width) for x in got], dim=2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """This process's tokens of all heads ``[B, t, h, D]``, of all tokens of its own heads ``[B, T, h / n, D]``."""
        batch, _, each, width = x.shape
        sent = torch.cat([part.flatten() for part in x.split(self.sizes, dim=1)])
        own = self.sizes[self.rank]
        one = batch * each * width
        got = self._exchange(sent, [one * size for size in self.sizes], [one * own] * len(self.sizes))
        return torch.cat([x.view(batch, own, each, width) for x in got], dim=2)

    def _exchange(self, sent: Tensor, sizes: list[int], wanted: list[int]) -> tuple[Tensor, ...]:
        """What every process has for this one, of elements that are laid out by the process that is to have them."""
        got = sent.new_empty(sum(wanted))
        dist.all_to_all_single(got, sent, wanted, sizes, group=self.group)
        return got.split(wanted)

    def whole_mask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The description of the mask of a part as that of the whole prompt, which has no padding."""
        whole = {"q_length": self.tokens, "kv_length": self.tokens, "attention_mask": None}
        return arguments | {name: x for name, x in whole.items() if name in arguments}


# Of the forward at hand, where its prompt is spread.
PARTS: ContextVar[Parts | None] = ContextVar("seerattn_parts", default=None)
