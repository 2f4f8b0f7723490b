"""The learned gate as a selector: torch modules on any device, or one fused op.

This is the one place that knows both the gate and the op, and it hands the op its reference: ``impl="reference"``
un-rotates, runs `AttnGate` and lets the policy choose.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from seerattn.gate import attn_gate, pooling
from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.heads import policy_of_heads
from seerattn.gate.pooling import Pooled, pool_blocks
from seerattn.gate_memory import GateMemory
from seerattn.ops import gate_scores
from seerattn.ops.resolve import check_impl, implementation, refusal
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.budgets import HeadBudgets, share_density
from seerattn.selection.policies import KeepAll, Policy, Setting, Threshold, TokenBudget, TopK, TopP, rows_k
from seerattn.selection.selector import AttentionContext, PolicySelector, RotaryTables


@dataclass(frozen=True)
class GateSelector(PolicySelector):
    """The learned gate: scores from un-rotated q and k, blocks by a policy.

    Attributes:
        gate: scores the blocks.
        policy: chooses among them.
        impl: "reference" runs the torch modules, "triton" the fused op; "auto" takes the fused op where it can run, and
            warns where a GPU cannot run it.
        budgets: share the one density of `TopK` among heads; None shares it equally.
    """

    gate: AttnGate
    policy: Policy
    impl: Literal["auto", "triton", "reference"] = "auto"
    budgets: HeadBudgets | None = None

    def __post_init__(self) -> None:
        check_impl("gate_scores", self.impl)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        start, k_len = k.shape[2] - q.shape[2], k.shape[2]
        config = self.gate.config
        policy = share_density(self.policy, self.budgets, k_len)
        if self.gate.part is not None:
            policy = policy_of_heads(policy, context.layer, self.gate.part.mask_heads(config))
        # Keys of other frequencies would be other ones, so a call that has its own keeps nothing.
        kept = None
        if context.memory is not None and context.frequencies is None:
            kept = GateMemory.of(context.memory, self.gate)
            q = kept.whole_block(q, start)
        rule = _rule(policy, context.layer, k_len, config.block_q, config.block_k, not config.exclude_forced)
        rotary = context.rotary or RotaryTables()
        if _runs_fused(self.impl, q.device, q, k, self.gate, rule, rotary):
            blocks = replace(self._fused(q, k, context, rule, kept), skip_threshold=policy.skip_threshold)
        else:
            blocks = self._modules(q, k, context, policy, kept)
        if q.shape[2] == k_len - start:
            return blocks
        own = {"q_start": start, "q_len": k_len - start}
        return replace(blocks, **{name: getattr(blocks, name).new_full((q.shape[0],), n) for name, n in own.items()})

    def _fused(
        self, q: Tensor, k: Tensor, context: AttentionContext, rule: gate_scores.Rule, kept: GateMemory | None
    ) -> BlockIndices:
        rotary, vectors = context.rotary, None if kept is None else kept.vectors
        given = (q, k)
        if rotary is None:
            given = context.unrotate(q, k.shape[2] - q.shape[2]), context.unrotate(k, 0)
        frequencies = call_frequencies(self.gate, context)
        blocks = gate_scores.select_blocks(*given, self.gate, rule, rotary or RotaryTables(), frequencies, vectors)
        if kept is not None:
            context.memory.kept = kept.after(q, k.shape[2])
        return blocks

    def _modules(
        self, q: Tensor, k: Tensor, context: AttentionContext, policy: Policy, kept: GateMemory | None
    ) -> BlockIndices:
        config, start = self.gate.config, k.shape[2] - q.shape[2]
        # Not a call: FSDP's hooks would gather the gate once a document, and processes with other documents would hang.
        if kept is None:
            scores = self.gate.forward(*pooled_inputs(self.gate, q, k, context, "reference"))
        else:
            scores = self._scores_of_new_keys(q, k, context, kept)
        return policy.select(
            scores,
            q_start=start,
            q_len=q.shape[2],
            block_q=config.block_q,
            block_k=config.block_k,
            layer=context.layer,
            forced_scored=not config.exclude_forced,
        )

    @torch.no_grad()
    def _scores_of_new_keys(self, q: Tensor, k: Tensor, context: AttentionContext, kept: GateMemory) -> Tensor:
        """Scores of a call of which some gate keys are known; all of them are kept."""
        known = 0 if kept.keys is None else kept.keys.shape[2]
        first = known * self.gate.config.k_size
        queries, keys = pooled_inputs(self.gate, q, k, context, "reference", first)
        gate_k = self.gate.gate_keys(keys)
        if known:
            gate_k = torch.cat((kept.keys, gate_k), dim=2)
        context.memory.kept = kept.after(q, k.shape[2], gate_k)
        return self.gate.scores(
            self.gate.gate_queries(queries), gate_k, q_start=k.shape[2] - q.shape[2], q_len=q.shape[2]
        )


def _runs_fused(
    impl: str,
    device: torch.device,
    q: Tensor,
    k: Tensor,
    gate: AttnGate,
    rule: gate_scores.Rule | None,
    rotary: RotaryTables,
) -> bool:
    """Whether the fused op serves a call; where "auto" leaves a GPU to the torch modules, it warns with the reason."""
    call = (q, k, gate, rule, rotary)
    if implementation("gate_scores", impl, device, *call, reference=attn_gate) is not attn_gate:
        return True
    if impl == "auto" and device.type == "cuda":
        _warn_of_modules(refusal("gate_scores", "triton", device, *call))
    return False


@functools.cache
def _warn_of_modules(reason: str) -> None:
    warnings.warn(
        "gates must be of what the fused op serves to choose blocks by it, got torch modules, which take more time and "
        f"memory: {reason}; seerattn/ops/gate_scores/README.md says what it serves, and with impl='reference' a "
        "GateSelector does not ask for it",
        stacklevel=2,
    )


def call_frequencies(gate: AttnGate, context: AttentionContext) -> Tensor | None:
    """Frequencies at which a gate rotates in a call, where they are not its own."""
    if context.frequencies is None or not gate.config.rope:
        return None
    return context.frequencies(gate.gate_dim)


def pooled_inputs(
    gate: AttnGate, q: Tensor, k: Tensor, context: AttentionContext, impl: str = "auto", first_key: int = 0
) -> tuple[Pooled, Pooled]:
    """What a gate takes of q and k after RoPE, un-rotated and pooled, without a graph, with the call's frequencies.

    Of keys those from position ``first_key`` on alone are read.

    The fused kernel reads each once and never holds it in fp32. Where pooling is learned, single un-rotated tokens in
    fp32 are handed on instead, as what is learned needs its gradient.
    """
    start = k.shape[2] - q.shape[2]
    queries = pooled_queries(gate, q, context, start, impl)
    return queries, pooled_keys(gate, k[:, :, first_key:], context, first_key, impl)


def pooled_queries(gate: AttnGate, q: Tensor, context: AttentionContext, start: int, impl: str = "auto") -> Pooled:
    """The part of `pooled_inputs` that is queries ``[B, H, n, D]`` from position ``start`` on."""
    return _pooled_side(gate, q, context, start, gate.config.q_size, gate.config.q_pooling, impl)


def pooled_keys(gate: AttnGate, k: Tensor, context: AttentionContext, start: int, impl: str = "auto") -> Pooled:
    """The part of `pooled_inputs` that is keys ``[B, HKV, n, D]`` from position ``start`` on."""
    return _pooled_side(gate, k, context, start, gate.config.k_size, gate.config.k_pooling, impl)


def _pooled_side(
    gate: AttnGate, x: Tensor, context: AttentionContext, start: int, size: int, kinds: tuple[str, ...], impl: str
) -> Pooled:
    if "salient" in kinds:
        size, kinds = 1, ("avg",)
    pooled = pool(x, context, start=start, size=size, kinds=kinds, impl=impl)
    return replace(pooled, inv_freq=call_frequencies(gate, context))


@torch.no_grad()
def pool(
    x: Tensor,
    context: AttentionContext,
    *,
    start: int,
    size: int,
    kinds: tuple[str, ...],
    salience: Tensor | None = None,
    impl: str = "auto",
) -> Pooled:
    """Un-rotates vectors after RoPE ``[B, h, n, D]`` from position ``start`` on and pools them; see `pool_blocks`."""
    rotary = context.rotary or RotaryTables()
    fused = implementation("pool_windows", impl, x.device, x, rotary, reference=pooling) is not pooling
    if context.rotary is None or not fused:
        x = context.unrotate(x, start)
    arguments = {"size": size, "start": start, "kinds": kinds, "salience": salience}
    features = gate_scores.pool_windows(x, rotary=rotary, **arguments) if fused else pool_blocks(x, **arguments)
    return Pooled(features, size, start, x.shape[2])


def _rule(
    policy: Policy, layer: int, tokens: int, block_q: int, block_k: int, forced_scored: bool
) -> gate_scores.Rule | None:
    """A policy as the op takes it; None for policies of others."""
    match policy:
        case KeepAll():
            kind, setting = "share", 1.0
        case TopK(rule="same_k"):
            tokens = policy.prompt_tokens(tokens)
            kind, setting = "count", _at_layer(policy.density, layer)
            counts = [float(rows_k(tokens, block_q, block_k, share)) for share in _values(setting)]
            setting = tuple(counts) if isinstance(setting, tuple) else counts[0]
        case TopK():
            kind, setting = "share", _at_layer(policy.density, layer)
        case TokenBudget():
            kind, setting = "count", float(-(-policy.tokens // block_k))
        case Threshold():
            kind, setting = policy.on, _at_layer(policy.threshold, layer)
        case TopP():
            kind, setting = "mass", _at_layer(policy.p, layer)
        case _:
            return None
    return gate_scores.Rule(kind, setting, policy.sink_blocks, policy.last_rows_dense, forced_scored)


def _at_layer(setting: Setting, layer: int) -> float | tuple[float, ...]:
    return float(setting) if isinstance(setting, (int, float)) else tuple(setting[layer])


def _values(setting: float | tuple[float, ...]) -> tuple[float, ...]:
    return setting if isinstance(setting, tuple) else (setting,)
