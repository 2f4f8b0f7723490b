"""The learned gate while an answer is written: blocks of one token by the gate keys of finished blocks.

The gate is that of prompts. A token is a query block of which one token is there: the sub-block that holds it pools it
alone, whatever the pooling, and rotates at its own first position, as the last rows of a chunk that ends there do. Gate
keys are those that prompts leave in `GateMemory`; a block that decoded tokens finish is pooled once, from the keys of
the model's cache, by the code of every other block and at its first position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.pooling import Pooled
from seerattn.gate_memory import GateMemory
from seerattn.gate_selector import call_frequencies, pool, pooled_keys
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks, group_scores
from seerattn.selection.decode_selector import PolicyDecoder
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext


def single_queries(gate: AttnGate, q: Tensor, context: AttentionContext, start: int, impl: str = "reference") -> Pooled:
    """Queries after RoPE ``[B, H, n, D]`` from position ``start`` on, un-rotated, as windows of one token."""
    tokens = pool(q, context, start=start, size=1, kinds=("avg",), impl=impl)
    return replace(tokens, inv_freq=call_frequencies(gate, context))


def token_scores(gate: AttnGate, queries: Pooled, gate_k: Tensor, positions: Tensor, *, unscored: int) -> Tensor:
    """What decoding chooses the blocks of single tokens by, and what a gate learns that is trained for it.

    Args:
        gate: its weights are whole.
        queries: of the tokens, ``[B, H, R, D]``, see `single_queries`.
        gate_k: gate keys ``[B, h, W, DG]`` from the first one on.
        positions: int64 ``[R]``, where the tokens stand, on the device of the queries.
        unscored: first blocks that take part in no softmax.

    Returns:
        fp32 ``[B, HKV, R, N]``, see `group_scores`; -inf for blocks that are not finished before a token.
    """
    scores = gate.token_scores(gate.token_queries(queries, positions), gate_k, positions)
    return group_scores(scores, gate.num_kv_heads, unscored=unscored)


@dataclass(frozen=True)
class GateDecoder(PolicyDecoder):
    """The learned gate as a `DecodeSelector` (SeerAttention-R, arXiv 2506.08889, section 2, with a gate of prompts).

    Scores are those of `AttnGate` over finished blocks, the softmax of each query head over what is not forced, and of
    a KV group the largest probability that one of its heads gives.

    Attributes:
        gate: scores the blocks.
        policy: chooses among them.
    """

    gate: AttnGate
    policy: Policy

    @property
    def block_size(self) -> int:
        """See `PolicyDecoder.block_size`."""
        return self.gate.config.block_k

    @torch.no_grad()
    def select_token(self, q: Tensor, k: Tensor, context: AttentionContext) -> DecodeBlocks:
        """See `DecodeSelector.select_token`."""
        config, tokens = self.gate.config, k.shape[2]
        return choose_blocks(
            self.scores(q, k, context),
            self.policy,
            tokens=tokens,
            block_k=config.block_k,
            layer=context.layer,
            forced_scored=not config.exclude_forced,
        )

    def scores(self, q: Tensor, k: Tensor, context: AttentionContext) -> Tensor:
        """Scores ``[B, HKV, N]`` of the blocks before that of the token; see `select_token`."""
        config, tokens = self.gate.config, k.shape[2]
        blocks = (tokens - 1) // config.block_k
        if not blocks:
            return q.new_zeros(q.shape[0], k.shape[1], 0, dtype=torch.float32)
        gate_k = self._gate_keys(k, context, blocks)
        # Made on the device: a copy from the host would wait for it.
        position = torch.arange(tokens - 1, tokens, device=q.device)
        query = single_queries(self.gate, q, context, tokens - 1)
        # What a gate never learned must not take part in a softmax.
        unscored = self.policy.sink_blocks if config.exclude_forced else 0
        return token_scores(self.gate, query, gate_k, position, unscored=unscored)[:, :, 0]

    def _gate_keys(self, k: Tensor, context: AttentionContext, blocks: int) -> Tensor:
        """Gate keys ``[B, h, W, DG]`` of the first ``blocks`` blocks; those that nobody kept are made, and kept."""
        config, kept, known = self.gate.config, None, None
        # Keys of other frequencies would be other ones, so a call that has its own keeps nothing.
        if context.memory is not None and context.frequencies is None:
            kept = GateMemory.of(context.memory, self.gate)
            known = kept.keys
        count = 0 if known is None else known.shape[2]
        needed, first = blocks * config.key_subblocks, count * config.k_size
        if count >= needed:
            return known[:, :, :needed]
        new = k[:, :, first : blocks * config.block_k]
        gate_k = self.gate.gate_keys(pooled_keys(self.gate, new, context, first, "reference"))
        if count:
            gate_k = torch.cat((known, gate_k), dim=2)
        if kept is not None:
            # Nobody keeps queries of decoded tokens: the block that they begin is pooled from the next prompt on.
            context.memory.kept = kept.after(q=k[:, :, :0], k_len=k.shape[2], keys=gate_k)
        return gate_k
