"""Random blocks, which any way of choosing has to beat at equal density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattn.methods.method import TopKMethod
from seerattn.options import option
from seerattn.selection.block_indices import BlockIndices, num_query_blocks
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext, PolicySelector


@dataclass(frozen=True)
class RandomSelector(PolicySelector):
    """Uniformly random blocks, as many as a policy keeps, beside the forced ones.

    The score of a block is a hash of seed, layer, query head, absolute query block and key block: it does not depend
    on the call, so a prompt in chunks gets the blocks that one shot gets, and every row of a batch gets the same.

    Attributes:
        policy: how many blocks to keep.
        seed: another seed, another draw.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    policy: Policy
    seed: int = 0
    block_q: int = 64
    block_k: int = 64

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        batch, heads, q_len = q.shape[:3]
        start = k.shape[2] - q_len
        scores = hashed(
            (self.seed, context.layer),
            torch.arange(heads, device=q.device)[:, None, None],
            start // self.block_q
            + torch.arange(num_query_blocks(start, q_len, self.block_q), device=q.device)[:, None],
            torch.arange(-(-k.shape[2] // self.block_k), device=q.device),
        )
        return self.policy.select(
            scores.expand(batch, -1, -1, -1),
            q_start=start,
            q_len=q_len,
            block_q=self.block_q,
            block_k=self.block_k,
            layer=context.layer,
        )


def hashed(key: tuple[int, ...], *places: Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1), fp32, a pure function of a key and of broadcast integer places.

    Equal on every device: integers of 32 bits whose products stay within int64.
    """
    state = torch.zeros((), dtype=torch.int64, device=places[0].device)
    for part in key + places:
        state = _mix((state ^ part) + 0x9E3779B9 & 0xFFFFFFFF)
    # 24 bits, which fp32 holds exactly.
    return (state >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit flips every output bit about half of the time."""
    x = x ^ (x >> 15)
    x = x * 0x2C1B3C6D & 0xFFFFFFFF
    x = x ^ (x >> 12)
    x = x * 0x297A2D39 & 0xFFFFFFFF
    return x ^ (x >> 15)


@dataclass(frozen=True, kw_only=True)
class Random(TopKMethod):
    """Random blocks."""

    id = "random"
    title = "random"
    kind = "static"

    seed: int = option(0, help="Another seed, another draw.")

    def selector(self, policy: Policy) -> RandomSelector:
        return RandomSelector(policy, self.seed, self.block_q, self.block_k)
