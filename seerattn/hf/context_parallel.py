"""Context parallelism: one prompt over several processes, each with a part of its tokens.

All of a model but attention looks at one token at a time. Before attention, queries, keys and values change hands, so
that each process has all tokens of some heads, and afterwards its own tokens of all heads again (DeepSpeed Ulysses,
arXiv 2309.14509). So attention, gates and their choice run as they do in one process, on the heads of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.heads import Heads
from seerattn.gate_selector import GateSelector
from seerattn.hf.call import LayerCall
from seerattn.hf.identity import transformers_model
from seerattn.hf.mask import CallMask
from seerattn.hf.parts import PARTS, Parts
from seerattn.hf.state import AttentionLayer, LayerState, Running, attachment_of, running_instead

# What a forward that is spread has for itself.
_OWN = ("past_key_values", "inputs_embeds", "position_ids", "labels")


@dataclass(eq=False)
class Spread:
    """A model whose prompts are spread over processes; see `context_parallel`.

    Attributes:
        group: of the processes; None is the default one.
        parts: of the last prompt.
    """

    group: dist.ProcessGroup | None
    parts: Parts | None = None
    _tokens: list[Any] = field(default_factory=list)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens ``[B, T, ..]`` of what a forward gave each process of its own, such as logits; for all to call."""
        return self.parts.gather(x)

    def last(self, x: Tensor) -> Tensor:
        """What a forward gave of the last token ``[B, ..]``, which the last process has; for all to call.

        Args:
            x: ``[B, n, ..]``, the last tokens of every process, such as logits with ``logits_to_keep=1``.
        """
        found, last = x[:, -1].contiguous(), len(self.parts.sizes) - 1
        dist.broadcast(found, last if self.group is None else dist.get_global_rank(self.group, last), group=self.group)
        return found

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the model: its prompt becomes the part of this process.

        Raises:
            ValueError: what cannot be spread.
        """
        ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
        given = [name for name in _OWN if kwargs.get(name) is not None]
        if not isinstance(ids, Tensor) or len(args) > 1:
            given.append("other arguments")
        if mask is not None and not bool(mask.all()):
            given.append("padding")
        if given or torch.is_grad_enabled():
            got = given[0] if given else "gradients; use torch.no_grad()"
            raise ValueError(f"a prompt that is spread must be input_ids alone, all of them, got {got}")
        self.parts = parts = Parts.of(ids.shape[1], self.group)
        positions = torch.arange(parts.tokens, device=ids.device)[None, parts.own]
        others = {name: x for name, x in kwargs.items() if name not in ("input_ids", "attention_mask")}
        self._tokens.append(PARTS.set(parts))
        return (), others | {"input_ids": ids[:, parts.own], "position_ids": positions, "use_cache": False}

    def end(self, *others: Any) -> None:
        """Forward hook of the model, also of a forward that failed."""
        if self._tokens:
            PARTS.reset(self._tokens.pop())


@contextmanager
def context_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[Spread]:
    """Spreads the prompts of ``model`` over the processes of a group inside the ``with``.

    Every process has the whole model and calls it with the whole ``input_ids``. A forward runs the tokens of its own
    part and gives their output; `Spread.gather` brings parts together. No cache is kept. Blocks are those of one
    process; a meter counts the heads of its own.

    Args:
        model: with gates attached.
        group: of the processes, whose number must divide the heads of every layer; None is the default group.

    Raises:
        ValueError: the model has no gates, or other selectors, or its heads cannot be dealt out.
    """
    attachment = attachment_of(model)
    if attachment is None or attachment.active is None:
        raise ValueError(f"model must have gates to spread its prompts, got {type(model).__name__} without")
    own = _own_heads(attachment.now(), attachment.layers, dist.get_rank(group), dist.get_world_size(group))
    base, spread = transformers_model(model), Spread(group)
    hooks = (
        base.register_forward_pre_hook(spread.begin, with_kwargs=True),
        base.register_forward_hook(spread.end, always_call=True),
    )
    try:
        with running_instead(attachment, own):
            yield spread
    finally:
        for hook in hooks:
            hook.remove()


def _own_heads(running: Running, layers: Mapping[int, AttentionLayer], rank: int, ranks: int) -> Running:
    """The same gates and policy for the heads of this process."""
    gates, selectors = {}, {}
    for index, gate in running.gates.items():
        layer = layers[index]
        if layer.part is not None:
            raise ValueError("model must be in one piece to spread its prompts, got the heads of one process alone")
        _check_heads(layer.num_heads, layer.num_kv_heads, ranks)
        gates[index] = _gate_of(gate, _own_layer(layer, rank, ranks).part)
    for index, selector in running.selectors.items():
        if not isinstance(selector, GateSelector):
            raise ValueError(f"gates must choose the blocks of a prompt that is spread, got {type(selector).__name__}")
        selectors[index] = replace(selector, gate=gates[index])
    return replace(running, gates=gates, selectors=selectors, decoders={})


def _own_layer(layer: AttentionLayer, rank: int, ranks: int) -> AttentionLayer:
    """A layer as this process has it."""
    heads = Heads.of_rank(layer.num_heads, layer.num_kv_heads, rank, ranks)
    return replace(layer, num_heads=len(heads.query), num_kv_heads=len(heads.kv), part=heads)


def _check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    if heads % ranks or kv_heads % ranks:
        raise ValueError(
            f"the number of processes must divide the heads of every layer, got {ranks} processes and a layer of "
            f"{heads} query and {kv_heads} KV heads"
        )


def _gate_of(gate: AttnGate, part: Heads) -> AttnGate:
    sizes = {"num_heads": len(part.query), "num_kv_heads": len(part.kv), "head_dim": gate.head_dim}
    own = AttnGate(gate.config, **sizes, inv_freq=gate.inv_freq, pairing=gate.pairing, part=part)
    own.load_state_dict(gate.state_dict())
    return own.to(gate.k_weight.device).requires_grad_(False).eval()


def spread_attention(
    parts: Parts,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    seer: LayerCall | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention ``[B, t, H, D]`` of the tokens of this process, in a layer of a prompt that is spread.

    Args:
        parts: of the prompt.
        attend: attention of one layer, of q, k, v, the mask, the call and keywords.
        query: post-RoPE ``[B, H, t, D]``, of this process's tokens; so are keys and values.
        key: ``[B, HKV, t, D]``.
        value: ``[B, HKV, t, D]``.
        mask: of the whole prompt.
        seer: set where the layer was attached to.
        kwargs: what the architecture passes on.

    Raises:
        ValueError: heads that cannot be dealt out.
    """
    ranks = len(parts.sizes)
    _check_heads(query.shape[1], key.shape[1], ranks)
    if kwargs.get("s_aux") is not None:
        raise ValueError("layers must have no attention sinks to spread a prompt, got some; use tensor parallelism")
    all_tokens = (parts.to_heads(x) for x in (query, key, value))
    out, _ = attend(*all_tokens, mask, seer and _whole(parts, seer, mask), **kwargs)
    return parts.to_tokens(out), None


def _whole(parts: Parts, seer: LayerCall, mask: Any) -> LayerCall:
    """What only the module of a layer saw, of all tokens of the prompt and the heads of this process."""
    tables, positions = seer.position_embeddings, None
    if tables is not None:
        # Layers of a forward that have the same tables share what is gathered, kept with what its key is made of.
        kept = mask.tables if isinstance(mask, CallMask) else {}
        key = ("whole", id(tables[0]))
        if key not in kept:
            kept[key] = (*(parts.gather(x) for x in tables), tables)
        tables = kept[key][:2]
        positions = torch.arange(parts.tokens, device=tables[0].device)[None]
    state = LayerState(_own_layer(seer.state.found, parts.rank, len(parts.sizes)), seer.state.attachment)
    return replace(seer, state=state, position_embeddings=tables, position_ids=positions, recall=None)
