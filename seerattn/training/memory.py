"""What a training run will need of memory, estimated before it starts."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from seerattn.hf.chunked_loss import LOGITS_ELEMENTS
from seerattn.hf.identity import transformers_model

if TYPE_CHECKING:
    from seerattn.gate import AttnGate

_FP32, _BF16 = 4, 2
# Copies of a block map that live at once: scores, target, their masked and normalised forms, softmax, gradient.
_MAPS = 8
# Words in transformers' names of what it does with a module that no process has a part of.
_KEPT = ("replicat", "sequence", "router")
# How many processes one process plans for as well.
MANY = 8


class Way(NamedTuple):
    """How a model lies in the processes of a run.

    Attributes:
        processes: all of them.
        sharded: whether FSDP2 spreads weights, gradients and optimizer over them; otherwise DDP keeps all whole.
        tensor: processes that have some heads each of the same layers (tensor parallelism); the others have other
            samples.
    """

    processes: int = 1
    sharded: bool = False
    tensor: int = 1

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process"
        # Gates learn on layers in one piece: these are told to be compared with.
        if self.sharded and self.tensor > 1:
            return f"FSDP2 x TP on {self.processes // self.tensor} x {self.tensor} processes (planned, not trained so)"
        if self.tensor > 1:
            return f"TP on {self.processes} processes (planned, not trained so)"
        return f"{'FSDP2' if self.sharded else 'DDP'} on {self.processes} processes"

    @property
    def shards(self) -> int:
        """Processes among which one weight is spread by FSDP2."""
        return self.processes // self.tensor if self.sharded else 1


ALONE = Way()


def ways(processes: int, kv_heads: int) -> list[Way]:
    """The ways that a run of so many processes plans for; one process plans for `MANY` as well.

    Tensor parallelism deals out the KV heads, as many to each process.
    """
    many = MANY if processes == 1 else processes
    found = [Way()] if processes == 1 else []
    found += [Way(many), Way(many, sharded=True)]
    found += [Way(many, tensor=many)] if kv_heads % many == 0 else []
    return found + ([Way(many, sharded=True, tensor=2)] if many % 2 == 0 and many > 2 and kv_heads % 2 == 0 else [])


def own_bytes(model: nn.Module, tensor: int, *, trained: bool | None = None) -> int:
    """Bytes of the weights that a process has of a model whose heads are dealt out, by transformers' plan.

    Args:
        model: the model, with gates or without.
        tensor: processes among which heads are dealt out; 1 is the whole model.
        trained: count those that are trained alone, or those that are not; by default all.
    """
    base = transformers_model(model)
    config = base.config.get_text_config()
    plan = getattr(base, "tp_plan", None) or getattr(config, "base_model_tp_plan", None) or {}
    # What the plan does not name, or names to be kept, every process has whole.
    patterns = [f"*{name}.*" for name, kind in plan.items() if not any(word in kind for word in _KEPT)]

    def share(name: str) -> int:
        # A gate has the heads of its layer; its norms are those of all heads.
        cut = "norm" not in name if "seer_gate" in name else any(fnmatchcase(name, pattern) for pattern in patterns)
        return tensor if cut else 1

    counted = ((n, p) for n, p in model.named_parameters() if trained is None or p.requires_grad == trained)
    return sum(p.numel() * p.element_size() // share(name) for name, p in counted)


def estimate_memory(
    model: nn.Module,
    gates: list[AttnGate],
    *,
    micro_batch_size: int,
    context: int,
    target_share: float = 1.0,
    decode_rows: int = 0,
    way: Way = ALONE,
) -> dict[str, int]:
    """Bytes that one process needs on its device, by what they are for.

    The base runs without a graph and each gate's graph is freed before the next layer runs, so activations and graph
    count for one layer, whatever the depth of the model.

    Args:
        model: the model with its gates.
        gates: its gates.
        micro_batch_size: samples that run at once.
        context: tokens of a sample.
        target_share: share of the query blocks that gates learn from.
        decode_rows: single tokens of a sample that gates learn from.
        way: how the model lies in the processes.
    """
    base = next(p for p in model.parameters() if not p.requires_grad)
    held, trained = (own_bytes(model, way.tensor, trained=which) for which in (False, True))
    config = model.config.get_text_config()
    tokens = micro_batch_size * context
    gate = max(gates, key=lambda g: g.num_heads)
    heads, kv_heads, width = gate.num_heads, gate.num_kv_heads, gate.head_dim

    attention = 2 * (heads + kv_heads) * width
    mlp = 3 * _intermediate(config)
    activations = tokens * (2 * config.hidden_size + max(attention, mlp) // way.tensor) * base.element_size()
    maps = _map_bytes(gate, micro_batch_size, context, share=target_share)
    maps += _token_bytes(gate, micro_batch_size, context, rows=min(decode_rows, context))
    shown = {
        "base model": held // way.shards,
        # Weights, gradients and two moments, in fp32 as gates are.
        "gates, gradients, AdamW": 4 * trained // way.shards,
        "activations of a layer": activations,
        "gate inputs and graph of a layer": _gate_bytes(gate, tokens, share=target_share) // way.tensor,
        "target and score maps of a layer": maps // way.tensor,
    }
    if way.shards > 1:
        # FSDP2 holds two layers whole.
        shown["working copies of weights"] = 2 * held // config.num_hidden_layers
    return shown


def estimate_finetuning(
    model: nn.Module,
    gates: list[AttnGate],
    *,
    micro_batch_size: int,
    context: int,
    checkpointing: bool,
    autocast: bool,
    target_share: float,
    masked: bool,
    way: Way = ALONE,
) -> dict[str, int]:
    """Bytes that one process needs on its device to train everything, by what they are for.

    Args:
        model: the model with its gates.
        gates: its gates; none for a dense run.
        micro_batch_size: samples that run at once.
        context: tokens of a sample.
        checkpointing: whether layers run again in the backward pass.
        autocast: whether fp32 weights compute in bfloat16.
        target_share: share of the query blocks that gates learn from.
        masked: whether packed documents run through dense attention, under a mask over all pairs of tokens.
        way: how the model lies in the processes.
    """
    config = model.config.get_text_config()
    layers, hidden, tokens = config.num_hidden_layers, config.hidden_size, micro_batch_size * context
    held, stream = own_bytes(model, way.tensor), next(model.parameters()).element_size()
    compute = _BF16 if autocast else stream
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    shards, tensor = way.shards, way.tensor

    # Saved for the backward pass: norms and residuals, q and k before and after RoPE, v and output, the MLP.
    layer = tokens * (4 * hidden * stream + 3 * (heads + kv_heads) * width * stream // tensor)
    layer += tokens * 4 * _intermediate(config) * compute // tensor
    shown = {
        "weights": held // shards,
        # FSDP has to reduce those of every micro-batch for that: until then they are whole.
        "gradients": held // shards,
        "AdamW": 2 * held // shards,
        "inputs of all layers" if checkpointing else "activations of all layers": layers
        * (tokens * hidden * stream if checkpointing else layer),
        "logits": min(LOGITS_ELEMENTS, tokens * config.vocab_size) * (2 * _FP32 + compute),
    }
    if checkpointing:
        shown["activations of a layer"] = layer
    if way.processes > tensor and not way.sharded:
        # The buffers that DDP reduces; the gradients lie beside them (gradient_as_bucket_view is off).
        shown["buckets of gradients"] = held
    if masked:
        # A byte each, and what scaled_dot_product_attention makes of it to add to the logits, saved by every layer.
        kept = 1 if checkpointing else layers
        shown["mask of packed documents"] = tokens * context * (1 + kept * compute)
    # Autocast keeps its copies of all weights for the length of a forward.
    copies = held // stream * compute if autocast else 0
    if shards > 1:
        # FSDP2 holds two layers whole, and copies made of them are freed with them unless the graph needs them.
        copies = 2 * held // layers + (copies // layers if checkpointing else copies)
    if copies:
        shown["working copies of weights"] = copies
    if gates:
        gate = max(gates, key=lambda g: g.num_heads)
        shown["gate inputs and graph of a layer"] = _gate_bytes(gate, tokens, share=target_share) // tensor
        maps = _map_bytes(gate, micro_batch_size, context, share=target_share)
        shown["target and score maps of a layer"] = maps // tensor
    return shown


def _intermediate(config: object) -> int:
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def _gate_bytes(gate: AttnGate, tokens: int, *, share: float) -> int:
    """Inputs of a gate and its graph over a share of the query blocks."""
    form, heads, kv_heads, width = gate.config, gate.num_heads, gate.num_kv_heads, gate.head_dim
    q_windows = tokens * form.query_subblocks // form.block_q
    k_windows = tokens * form.key_subblocks // form.block_k
    pooled = q_windows * (len(form.q_pooling) * heads * width + share * gate.mask_heads * gate.gate_dim)
    pooled += k_windows * (len(form.k_pooling) + 1) * gate.k_weight.shape[0] * width
    # Vectors before RoPE and the two halves that un-rotation makes of them.
    unrotated = 2 * tokens * (heads + kv_heads) * width
    return int((unrotated + 2 * pooled) * _FP32)


def _map_bytes(gate: AttnGate, micro_batch_size: int, context: int, *, share: float) -> int:
    blocks = math.ceil(share * math.ceil(context / gate.config.block_q)) * math.ceil(context / gate.config.block_k)
    return _MAPS * micro_batch_size * gate.num_heads * blocks * _FP32


def _token_bytes(gate: AttnGate, micro_batch_size: int, context: int, *, rows: int) -> int:
    """Targets of single tokens, and their scores of sub-blocks, which a gate keeps a few copies of."""
    pieces = _MAPS + 3 * gate.config.key_subblocks
    return pieces * micro_batch_size * gate.num_heads * rows * math.ceil(context / gate.config.block_k) * _FP32
