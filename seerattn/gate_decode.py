"""The learned gate while an answer is written: blocks of one token by the gate keys of finished blocks.

The gate is that of prompts. A token is a query block of which one token is there: the sub-block that holds it pools it
alone, whatever the pooling, and rotates at its own first position, as the last rows of a chunk that ends there do. Gate
keys are those that prompts leave in `GateMemory`; a block that decoded tokens finish is pooled once, from the keys of
the model's cache, by the code of every other block and at its first position.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.pooling import Pooled
from seerattn.gate_memory import GateMemory, known_keys
from seerattn.gate_selector import call_frequencies, pool, pooled_keys
from seerattn.ops.decode_select import KeyTable, TokenRule, select_blocks
from seerattn.ops.gate_query import gate_queries
from seerattn.ops.resolve import check_impl, implementation, refusal
from seerattn.selection import decode_policy as modules
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks, group_scores, most_blocks
from seerattn.selection.decode_selector import PolicyDecoder
from seerattn.selection.policies import Policy, TokenBudget, TopK
from seerattn.selection.selector import AttentionContext, RotaryTables


def single_queries(gate: AttnGate, q: Tensor, context: AttentionContext, start: int, impl: str = "reference") -> Pooled:
    """Queries after RoPE ``[B, H, n, D]`` from position ``start`` on, un-rotated, as windows of one token."""
    tokens = pool(q, context, start=start, size=1, kinds=("avg",), impl=impl)
    return replace(tokens, inv_freq=call_frequencies(gate, context))


def token_scores(gate: AttnGate, gate_q: Tensor, gate_k: Tensor, positions: Tensor, *, unscored: int) -> Tensor:
    """What decoding chooses the blocks of single tokens by, and what a gate learns that is trained for it.

    Args:
        gate: its weights are whole.
        gate_q: ``[B, Hm, R, DG]``, see `AttnGate.token_queries`.
        gate_k: gate keys ``[B, h, W, DG]`` from the first one on.
        positions: int64 ``[R]``, where the tokens stand, on the device of the queries.
        unscored: first blocks that take part in no softmax.

    Returns:
        fp32 ``[B, HKV, R, N]``, see `group_scores`; -inf for blocks that are not finished before a token.
    """
    return group_scores(gate.token_scores(gate_q, gate_k, positions), gate.num_kv_heads, unscored=unscored)


def token_rule(gate: AttnGate, policy: Policy) -> TokenRule | None:
    """A gate and a policy as the op takes them; None for policies that it has not."""
    match policy:
        case TopK():
            kind, setting = "share", policy.density
        case TokenBudget():
            kind, setting = "count", -(-policy.tokens // gate.config.block_k)
        case _:
            return None
    return TokenRule(
        block_k=gate.config.block_k,
        pieces=gate.config.key_subblocks,
        over_pieces=gate.config.target_keys,
        kind=kind,
        setting=setting,
        sink_blocks=policy.sink_blocks,
        unscored=_unscored(gate, policy),
        biased=gate.distance_bias is not None,
    )


def _unscored(gate: AttnGate, policy: Policy) -> int:
    """First blocks that take part in no softmax: what a gate never learned means nothing there."""
    return policy.sink_blocks if gate.config.exclude_forced else 0


@dataclass(frozen=True)
class GateDecoder(PolicyDecoder):
    """The learned gate as a `DecodeSelector` (SeerAttention-R, arXiv 2506.08889, section 2, with a gate of prompts).

    Scores are those of `AttnGate` over finished blocks, the softmax of each query head over what is not forced, and of
    a KV group the largest probability that one of its heads gives.

    Attributes:
        gate: scores the blocks.
        policy: chooses among them.
        impl: "triton" scores and chooses in one launch, "reference" by the torch modules; "auto" takes the kernel on a
            GPU where it can run. `TopP`, `Threshold` and `KeepAll` are left to the modules.
    """

    gate: AttnGate
    policy: Policy
    impl: Literal["auto", "triton", "reference"] = "auto"

    def __post_init__(self) -> None:
        check_impl("decode_select", self.impl)

    @property
    def block_size(self) -> int:
        """See `PolicyDecoder.block_size`."""
        return self.gate.config.block_k

    @torch.no_grad()
    def select_token(self, q: Tensor, k: Tensor, context: AttentionContext) -> DecodeBlocks:
        """See `DecodeSelector.select_token`."""
        config, tokens = self.gate.config, k.shape[2]
        blocks = (tokens - 1) // config.block_k
        # Before the first block is finished there is nothing to choose.
        if blocks and self._runs_fused(q.device, blocks * config.key_subblocks):
            gate_k = self._gate_keys(k, context, blocks)
            width = most_blocks(self.policy, blocks + 1, config.block_k)
            sizes = {"kv_heads": self.gate.num_kv_heads, "width": width, "tokens": tokens}
            return select_blocks(self._one_query(q, context, tokens), gate_k, self._rule, **sizes)
        return choose_blocks(
            self.scores(q, k, context),
            self.policy,
            tokens=tokens,
            block_k=config.block_k,
            layer=context.layer,
            forced_scored=not config.exclude_forced,
        )

    def serves_many(self, device: torch.device, tokens: int) -> bool:
        """Whether `select_many` serves sequences of up to so many tokens: where the kernel chooses for one as well."""
        return self._runs_fused(device, self.finished_windows(tokens), tells=False)

    def finished_windows(self, tokens: int) -> int:
        """Gate keys of the blocks before that of the last of so many tokens."""
        return (tokens - 1) // self.block_size * self.gate.config.key_subblocks

    @torch.no_grad()
    def select_many(
        self, q: Tensor, rotary: RotaryTables, gate_k: Tensor | KeyTable, lengths: Tensor, *, tokens: int
    ) -> DecodeBlocks:
        """Chooses blocks for the last tokens of sequences of many lengths in one launch, each as `select_token` does.

        Args:
            q: queries ``[R, H, D]``, one token of every sequence.
            rotary: how they were rotated, by tables ``[1 or R, 1, columns]``.
            gate_k: gate keys of their finished blocks, of ``R`` sequences.
            lengths: int32 ``[R]``, keys of every sequence, that of the token included.
            tokens: the largest of them.

        Returns:
            Lists ``[R, HKV, K]``.
        """
        gate_q = gate_queries(q, rotary, self.gate, lengths=lengths)
        width = most_blocks(self.policy, (tokens - 1) // self.block_size + 1, self.block_size)
        sizes = {"kv_heads": self.gate.num_kv_heads, "width": width, "lengths": lengths}
        return select_blocks(gate_q, gate_k, self._rule, **sizes)

    @torch.no_grad()
    def keep_keys(self, k: Tensor, context: AttentionContext) -> None:
        """Leaves the gate keys of all finished blocks in the memory of the context; see `select_token`."""
        self._gate_keys(k, context, (k.shape[2] - 1) // self.block_size)

    @functools.cached_property
    def _rule(self) -> TokenRule | None:
        return token_rule(self.gate, self.policy)

    def _runs_fused(self, device: torch.device, windows: int, *, tells: bool = True) -> bool:
        """Whether the kernel serves a call; where "auto" leaves a GPU to the modules, it warns with the reason."""
        if implementation("decode_select", self.impl, device, windows, self._rule, reference=modules) is not modules:
            return True
        if tells and self.impl == "auto" and device.type == "cuda":
            _warn_of_modules(refusal("decode_select", "triton", device, windows, self._rule))
        return False

    def scores(self, q: Tensor, k: Tensor, context: AttentionContext) -> Tensor:
        """Scores ``[B, HKV, N]`` of the blocks before that of the token; see `select_token`."""
        config, tokens = self.gate.config, k.shape[2]
        blocks = (tokens - 1) // config.block_k
        if not blocks:
            return q.new_zeros(q.shape[0], k.shape[1], 0, dtype=torch.float32)
        vectors = self._vectors(q, k, context, blocks)
        return token_scores(self.gate, *vectors, unscored=_unscored(self.gate, self.policy))[:, :, 0]

    def _one_query(self, q: Tensor, context: AttentionContext, tokens: int) -> Tensor:
        """The gate query ``[B, Hm, DG]`` of the token, in one launch where a kernel can undo the rotation."""
        rotary = context.token_rotary
        known = rotary is not None and context.frequencies is None
        if known and refusal("gate_query", "triton", q.device, q[:, :, 0], rotary) is None:
            return gate_queries(q[:, :, 0], rotary, self.gate, tokens=tokens)
        return self._query(q, context, tokens - 1)[0][:, :, 0]

    def _vectors(self, q: Tensor, k: Tensor, context: AttentionContext, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gate query ``[B, Hm, 1, DG]`` of the token, gate keys of finished blocks, and the position ``[1]``."""
        gate_k = self._gate_keys(k, context, blocks)
        gate_q, position = self._query(q, context, k.shape[2] - 1)
        return gate_q, gate_k, position

    def _query(self, q: Tensor, context: AttentionContext, start: int) -> tuple[Tensor, Tensor]:
        """The gate query ``[B, Hm, 1, DG]`` of the token by the torch modules, and the position ``[1]``."""
        position, factors = self._position(context, start, q.device)
        query = single_queries(self.gate, q, context, start)
        return self.gate.token_queries(query, position, factors), position

    def _position(
        self, context: AttentionContext, start: int, device: torch.device
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The position ``[1]`` of the token, and its `AttnGate.token_angles`; layers that rotate alike share them."""
        form = (self.gate.config.q_size, self.gate.gate_dim, self.gate.config.rope)
        shared, name = {} if context.shared is None else context.shared, (GateDecoder, start, device, *form)
        if context.frequencies is not None or name not in shared:
            # Made on the device: a copy from the host would wait for it.
            position = torch.arange(start, start + 1, device=device)
            shared[name] = position, self.gate.token_angles(position, call_frequencies(self.gate, context))
        return shared[name]

    def _gate_keys(self, k: Tensor, context: AttentionContext, blocks: int) -> Tensor:
        """Gate keys ``[B, h, W, DG]`` of the first ``blocks`` blocks; those that nobody kept are made, and kept."""
        config, kept, known, needed = self.gate.config, None, None, blocks * self.gate.config.key_subblocks
        # Keys of other frequencies would be other ones, so a call that has its own keeps nothing.
        memory = context.memory if context.frequencies is None else None
        if memory is not None:
            # Most tokens finish no block.
            (known,) = known_keys((memory.kept,), self.gate)
            if known is not None and min(known.shape[2], memory.known // config.k_size) >= needed:
                return known[:, :, :needed]
            kept = GateMemory.of(memory, self.gate)
            known = kept.keys
        count = 0 if known is None else known.shape[2]
        first = count * config.k_size
        new = k[:, :, first : blocks * config.block_k]
        gate_k = self.gate.gate_keys(pooled_keys(self.gate, new, context, first, "reference"))
        if count:
            gate_k = torch.cat((known, gate_k), dim=2)
        if kept is not None:
            # Nobody keeps queries of decoded tokens: the block that they begin is pooled from the next prompt on.
            memory.kept = kept.after(q=k[:, :, :0], k_len=k.shape[2], keys=gate_k)
        return gate_k


@functools.cache
def _warn_of_modules(reason: str) -> None:
    warnings.warn(f"blocks of decoded tokens are chosen by torch modules: {reason}", stacklevel=2)
