"""What an attached model runs, for good, in one context, or in one forward.

Every attention layer that was attached to has a `LayerState`; all of a model share one `Attachment`. What the layers
run is a `Running`, which is replaced as a whole: a forward takes it once, with its mask, and is never run half by one
policy and half by another. `policy` and `capturing` put something else in its place for one context, so requests that
are served side by side do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.heads import Heads
from seerattn.gate_decode import GateDecoder
from seerattn.gate_files import GATES
from seerattn.gate_selector import GateSelector
from seerattn.hf.gate_cache import GateCache
from seerattn.hf.rotary import Rotation
from seerattn.ops.resolve import IMPLS
from seerattn.selection.budgets import HeadBudgets, shares_density
from seerattn.selection.decode_policy import check_decode_policy
from seerattn.selection.decode_selector import DecodeSelector
from seerattn.selection.policies import Policy
from seerattn.selection.selector import Selector, expected_density

if TYPE_CHECKING:
    pass

# Rotary tables (cos, sin).
Tables = tuple[Tensor, Tensor]
# Query and key block of what has no gate to ask.
NO_GATE_BLOCK = 64


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """What the probe proved of one attention layer that can be sparse; on the meta device, what it saw of it.

    Attributes:
        name: its name in the model.
        module: the attention module.
        layer: index of the decoder layer.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        rotation: how it rotates, None without RoPE.
        not_cached: why it cannot be followed against a cache, None if it can.
        part: the heads of the layer that this process has, where tensor parallelism deals them out; then ``num_heads``
            and ``num_kv_heads`` are their numbers.
    """

    name: str
    module: nn.Module
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotation: Rotation | None
    not_cached: str | None = None
    part: Heads | None = None

    @property
    def whole_heads(self) -> tuple[int, int]:
        """Query and key/value heads of the layer in all processes together."""
        return (self.num_heads, self.num_kv_heads) if self.part is None else self.part[:2]


class Kind(NamedTuple):
    """What decides of a layer whether it runs dense; layers of one kind do alike.

    Attributes:
        selects: whether something chooses blocks.
        expected: density that it tells, see `expected_density`.
        block_q: query block of the gate.
        sizes: query heads, key/value heads, width of a head.
    """

    selects: bool
    expected: float | None
    block_q: int
    sizes: tuple[int, int, int]

    def chooses(self, q_len: int, k_len: int) -> bool:
        """Whether blocks are chosen in a call. Not where it goes on with an answer.

        It does so, as decoding does, with fewer queries than a block against a cache.
        """
        return self.selects and q_len >= min(k_len, self.block_q)


@dataclass(frozen=True, eq=False)
class Running:
    """What the layers of a model run; a layer that is not named runs dense.

    Attributes:
        selectors: what chooses the blocks, by layer.
        decoders: what chooses those of a token that is decoded, by layer; one that is not named decodes dense.
        gates: those that are used and trained, by layer.
        impl: implementation of `block_sparse_attention`; "auto" may also choose dense attention, "sparse" is "auto"
            without that.
        budgets: of the gates, or None where they have none.
    """

    selectors: Mapping[int, Selector | None] = field(default_factory=dict)
    decoders: Mapping[int, DecodeSelector | None] = field(default_factory=dict)
    gates: Mapping[int, AttnGate] = field(default_factory=dict)
    impl: str = "auto"
    budgets: HeadBudgets | None = None
    _kinds: dict[Kind, set[AttentionLayer]] = field(default_factory=dict, init=False, repr=False)

    @property
    def op_impl(self) -> str:
        """What `block_sparse_attention` is told: "sparse" is its "auto", of a call that is never dense."""
        return "auto" if self.impl == "sparse" else self.impl

    def kind(self, layer: AttentionLayer) -> Kind:
        """The kind of a layer."""
        selector, gate = self.selectors.get(layer.layer), self.gates.get(layer.layer)
        expected = None if selector is None else expected_density(selector)
        block_q = NO_GATE_BLOCK if gate is None else gate.config.block_q
        return Kind(selector is not None, expected, block_q, (layer.num_heads, layer.num_kv_heads, layer.head_dim))

    def kinds(self, layers: Mapping[int, AttentionLayer]) -> Mapping[Kind, set[AttentionLayer]]:
        """All layers of the model by their kinds, found once: that of 30 layers takes longer than one layer may.

        Raises:
            ValueError: a gate that a checkpoint should have filled.
        """
        if not self._kinds:
            for index, gate in self.gates.items():
                check_filled(gate, index)
            found: dict[Kind, set[AttentionLayer]] = {}
            for layer in layers.values():
                found.setdefault(self.kind(layer), set()).add(layer)
            self._kinds.update(found)
        return self._kinds

    def with_policy(self, policy: Policy | None, decode_policy: Policy | None = None) -> Running:
        """The same gates under other policies, of prompts and of tokens that are decoded; None runs dense."""
        selectors, decoders = {}, {}
        for index, gate in self.gates.items():
            if policy is not None:
                selectors[index] = GateSelector(gate, policy, budgets=self.budgets)
            if decode_policy is not None:
                decoders[index] = GateDecoder(gate, decode_policy)
        return replace(self, selectors=selectors, decoders=decoders)


@dataclass(eq=False)
class Attachment:
    """What was attached to one model.

    Attributes:
        dense: the attention implementation that ours replaced.
        layers: what is known of the attention layers that were attached to, by index.
        policies: policy of every set of gates, by the name of its adapter.
        decode_policies: the same for tokens that are decoded.
        budgets: the same for what shares a density among its heads.
        active: name of the set of gates that is used, None without gates.
        enabled: whether gates and selectors are used at all.
        chosen: selectors that were attached over the gates, or None.
        chosen_decoders: what was attached with them.
        decodes: whether anything ever chose blocks of decoded tokens here; else no decode step asks.
        running: what the layers run outside of a `policy` context.
        gate_cache: what their selectors keep from call to call.
    """

    dense: str
    layers: dict[int, AttentionLayer] = field(default_factory=dict)
    policies: dict[str, Policy | None] = field(default_factory=dict)
    decode_policies: dict[str, Policy | None] = field(default_factory=dict)
    budgets: dict[str, HeadBudgets | None] = field(default_factory=dict)
    active: str | None = None
    enabled: bool = True
    chosen: Mapping[int, Selector | None] | None = None
    chosen_decoders: Mapping[int, DecodeSelector | None] = field(default_factory=dict)
    decodes: bool = False
    running: Running = field(default_factory=Running)
    gate_cache: GateCache = field(default_factory=GateCache)

    def now(self) -> Running:
        """What the layers run in the context of the caller."""
        for attachment, running in reversed(_POLICIES.get()):
            if attachment is self:
                return running
        return self.running

    def gates(self) -> dict[int, AttnGate]:
        """The gates of the active set, by layer."""
        holders = ((index, getattr(layer.module, GATES, {})) for index, layer in self.layers.items())
        return {index: holder[self.active] for index, holder in holders if self.active in holder}

    def refresh(self, impl: str | None = None) -> None:
        """Makes `running` anew from the other fields and the gates in the layers; one assignment, seen at once."""
        impl = impl or self.running.impl
        if not self.enabled:
            self.running = Running(impl=impl)
            return
        running = Running(gates=self.gates(), impl=impl, budgets=self.budgets.get(self.active))
        if self.chosen is None:
            running = running.with_policy(self.policies.get(self.active), self.decode_policies.get(self.active))
        else:
            running = replace(running, selectors=self.chosen, decoders=self.chosen_decoders)
        self.decodes |= bool(running.decoders)
        self.running = running

    def set_policy(self, policy: Policy | None, decode_policy: Policy | None = None, impl: str | None = None) -> None:
        """Changes how the gates choose; None runs dense. Selectors that were attached over them go."""
        if self.active is not None:
            self.policies[self.active], self.decode_policies[self.active] = policy, decode_policy
        self.chosen, self.chosen_decoders = None, {}
        self.refresh(impl)


@dataclass(frozen=True, eq=False)
class LayerState:
    """One attention layer that was attached to.

    Attributes:
        found: what is known of the layer.
        attachment: shared by all layers of the model.
    """

    found: AttentionLayer
    attachment: Attachment

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return self.found.layer

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.found.num_heads

    @property
    def rotation(self) -> Rotation | None:
        """How the layer rotates, None without RoPE."""
        return self.found.rotation

    @property
    def selector(self) -> Selector | None:
        """What chooses the blocks in the context of the caller; None runs dense."""
        return self.attachment.now().selectors.get(self.layer)

    @property
    def decodes(self) -> bool:
        """Whether something chooses the blocks of tokens that are decoded, in the context of the caller."""
        return self.attachment.now().decoders.get(self.layer) is not None

    @property
    def gate(self) -> AttnGate | None:
        """The gate that is used and trained, if the layer has one."""
        return self.attachment.now().gates.get(self.layer)

    @property
    def budgets(self) -> HeadBudgets | None:
        """What shares a density among the heads of the gates, if they have it."""
        return self.attachment.now().budgets

    @property
    def impl(self) -> str:
        """What `block_sparse_attention` is told, see `Running.op_impl`."""
        return self.attachment.now().op_impl


def layer_states(model: nn.Module) -> list[LayerState]:
    """The states of all attention layers of ``model`` that were attached to, in order of the layers."""
    states = (module.__dict__.get("_seer") for module in model.modules())
    return sorted((s for s in states if s is not None), key=lambda s: s.layer)


def attachment_of(model: nn.Module) -> Attachment | None:
    """What was attached to ``model``, or to the model that it wraps."""
    return next((state.attachment for state in layer_states(model)), None)


def check_attached_impl(impl: str) -> None:
    """Refuses what `Running.impl` cannot be."""
    names = ("auto", "sparse", *IMPLS["block_sparse_attention"])
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(names)}, got {impl!r}")


def check_policy(policy: Any) -> None:
    """Refuses what is no policy."""
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"policy must be a policy such as TopK(density=0.1), or None for dense, got {policy!r}")


def check_fits(policy: Policy | None, attachment: Attachment) -> None:
    """Refuses a policy whose settings by layer and head are not those of the attached layers.

    Raises:
        ValueError: a layer or a head has no setting, or there is one too many; or the budgets of the gates do not
            reach down to its density.
    """
    budgets = attachment.budgets.get(attachment.active)
    if budgets is not None and shares_density(policy):
        budgets.check(policy.density)
    if policy is None or policy.setting is None:
        return
    name, setting = policy.setting
    if isinstance(setting, (int, float)):
        return
    for layer, gate in attachment.gates().items():
        heads = len(setting[layer]) if layer < len(setting) else 0
        whole = attachment.layers[layer].whole_heads[gate.config.share == "kv_group"]
        if heads != whole:
            raise ValueError(
                f"{name} must be one number, or one a head of every layer, got {heads} for layer {layer} with "
                f"{whole}; calibrate the policy on this model"
            )


_POLICIES: ContextVar[tuple[tuple[Attachment, Running], ...]] = ContextVar("seerattn_policies", default=())


@contextmanager
def policy(
    model: nn.Module, policy: Policy | None, *, decode_policy: Policy | None = None, impl: str | None = None
) -> Iterator[None]:
    """Runs ``model`` by other policies inside the ``with``, in this thread or asyncio task alone.

    A server gives each request its own this way; `set_policy` changes the model for all. A thread that is started
    inside begins without it, unless it is given `contextvars.copy_context`.

    Args:
        model: with gates; without a policy any model that was attached to.
        policy: chooses the blocks of prompts; None runs them dense.
        decode_policy: chooses those of every token that is decoded; None decodes dense.
        impl: implementation of the attention, see `seerattn.attach`; None keeps it.

    Raises:
        ValueError: the model has no gates, or what is no policy or no ``impl``.
    """
    check_policy(policy)
    check_decode_policy(decode_policy)
    if impl is not None:
        check_attached_impl(impl)
    attachment = check_gated(model, policy or decode_policy)
    check_fits(policy, attachment)
    running = attachment.now().with_policy(policy, decode_policy)
    attachment.decodes |= bool(running.decoders)
    with running_instead(attachment, replace(running, impl=impl or running.impl)):
        yield


@contextmanager
def running_instead(attachment: Attachment, running: Running) -> Iterator[None]:
    """Puts something else in the place of what the layers run inside the ``with``, in this context alone."""
    token = _POLICIES.set((*_POLICIES.get(), (attachment, running)))
    try:
        yield
    finally:
        _POLICIES.reset(token)


def check_gated(model: nn.Module, policy: Policy | None) -> Attachment:
    """What was attached to ``model``, which must have gates unless ``policy`` is None."""
    attachment = attachment_of(model)
    if attachment is None or (policy is not None and attachment.active is None):
        raise ValueError(f"model must have gates for a policy, got {type(model).__name__} without; use seerattn.attach")
    return attachment


def check_filled(gate: AttnGate, layer: int) -> None:
    """Refuses a gate that a checkpoint should have filled and did not.

    Raises:
        ValueError: the gate has numbers that are not finite, or none.
    """
    if not gate.__dict__.get("_awaits"):
        return
    if any(p.is_meta for p in gate.parameters()):
        raise ValueError(
            f"gates must stay where their layer runs, got those of layer {layer} offloaded; attach them with "
            "seerattn.attach(model, gates), which leaves them in memory"
        )
    if not all(bool(p.detach().isfinite().all()) for p in gate.parameters()):
        raise ValueError(
            f"gates must be finite in every layer, got none for layer {layer}; the checkpoint does not hold them, "
            "load whole gates of this model"
        )
    gate.__dict__["_awaits"] = False
