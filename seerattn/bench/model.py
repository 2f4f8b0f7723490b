"""Models and gates with random weights: whole ones of Llama-3.1-8B's shape, and what one of their layers knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama import modeling_llama

from seerattn.bench.inputs import Shape
from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.config import AttnGateConfig
from seerattn.hf.attach import attach, detach
from seerattn.hf.call import LayerCall
from seerattn.hf.rotary import Rotation, gate_frequencies
from seerattn.hf.state import Attachment, AttentionLayer, LayerState
from seerattn.selection.selector import AttentionContext

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MAX_TOKENS = 131072

SALIENT = ("salient", "max", "min")
# 8 x 8 sub-blocks of plain poolings, taught by the published target: what others differ from.
PLAIN_FORM = AttnGateConfig(
    q_pooling=("avg", "max", "min"),
    k_pooling=("avg", "max", "min"),
    target_keys="max",
    target_power=None,
    query_subblocks=8,
    key_subblocks=8,
)
_SALIENT_4X4 = replace(PLAIN_FORM, q_pooling=SALIENT, k_pooling=SALIENT, query_subblocks=4, key_subblocks=4)
# By the names that commands and results give them.
GATE_FORMS = {
    "paper": AttnGateConfig.paper(),
    "paper-group": AttnGateConfig.paper(q_linear=True, share="kv_group"),
    "default": AttnGateConfig(),
    "default-group": AttnGateConfig(share="kv_group"),
    "8x8": PLAIN_FORM,
    "8x8-group": replace(PLAIN_FORM, share="kv_group"),
    "sum-2": replace(PLAIN_FORM, target_keys="sum", target_power=2),
    "salient": replace(PLAIN_FORM, q_pooling=SALIENT, k_pooling=SALIENT),
    "salient-4x4": _SALIENT_4X4,
    "salient-4x4-group": replace(_SALIENT_4X4, share="kv_group"),
}


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder; the defaults are those of Llama-3.1-8B.

    Attributes:
        name: what results call it, whatever its number of layers.
        layers: decoder layers that are measured.
        whole: decoder layers of the whole model.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        vocab: size of the vocabulary.
        tied: whether the head shares the weights of the embeddings.
        shape: the heads and the dtype.
    """

    name: str = "Llama-3.1-8B shape"
    layers: int = 32
    whole: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    vocab: int = 128256
    tied: bool = False
    shape: Shape = field(default_factory=Shape)


TINY = Size("Llama of width 64", 2, 2, hidden=64, intermediate=64, vocab=97, shape=Shape(4, 2, 32, torch.float32))
# By the names that commands give them. A GPU of 80 GB trains all weights of the two of Llama 3.2 by itself.
SIZES = {
    "llama-3.1-8b": Size(),
    "llama-3.1-70b": Size("Llama-3.1-70B shape", 80, 80, 8192, 28672, shape=Shape(64, 8, 128)),
    "llama-3.2-3b": Size("Llama-3.2-3B shape", 28, 28, 3072, 8192, tied=True, shape=Shape(24, 8, 128)),
    "llama-3.2-1b": Size("Llama-3.2-1B shape", 16, 16, 2048, 8192, tied=True, shape=Shape(32, 8, 64)),
    "tiny": TINY,
}


def gate_form(name: str, block_q: int | None = None, block_k: int | None = None) -> AttnGateConfig:
    """The form of that name, in other block sizes if given.

    Raises:
        ValueError: there is no such form, or not in these blocks.
    """
    if name not in GATE_FORMS:
        raise ValueError(f"gates must be among {', '.join(GATE_FORMS)}, got {name!r}")
    form = GATE_FORMS[name]
    return replace(form, block_q=block_q or form.block_q, block_k=block_k or form.block_k)


def random_model(size: Size, device: torch.device) -> PreTrainedModel:
    """A model of this size, drawn on the device in its own dtype."""
    shape = size.shape
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=size.vocab,
        tie_word_embeddings=size.tied,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters=LLAMA3_ROPE,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class BenchModel:
    """A model with random weights, drawn when it is first needed, with gates on it or without.

    Args:
        size: of the model.
        device: where to draw it.
        impl: of the sparse attention.
    """

    def __init__(self, size: Size, device: torch.device, impl: str = "auto") -> None:
        self._size, self._device, self._impl = size, device, impl
        self._form: str | None = None
        self._gated: PeftModel | None = None

    @cached_property
    def base(self) -> PreTrainedModel:
        """The model itself, whatever is attached to it."""
        return random_model(self._size, self._device)

    def plain(self) -> PreTrainedModel:
        """The unpatched model."""
        if self._gated is not None:
            detach(self._gated)
            self._form = self._gated = None
        return self.base

    def gated(self, form: str) -> PeftModel:
        """The model with fresh gates of a form, which stay for later calls."""
        if self._form != form:
            self._gated = attach(self.plain(), gate_form(form), impl=self._impl)
            self._form = form
        return self._gated


@contextmanager
def first_layer_only(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model run its first decoder layer alone: all kernels of a forward in a fraction of its time."""
    config = model.config
    layers = config.num_hidden_layers
    config.num_hidden_layers = 1
    try:
        yield
    finally:
        config.num_hidden_layers = layers


@cache
def _rotation(head_dim: int, device: torch.device) -> Rotation:
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters=LLAMA3_ROPE,
    )
    with torch.device(device):
        embedding = modeling_llama.LlamaRotaryEmbedding(config)
    return Rotation(modeling_llama.apply_rotary_pos_emb, head_dim, embedding)


def rotary_tables(shape: Shape, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The (cos, sin) ``[1, T, D]`` that a layer of the model gets for a prompt."""
    positions = torch.arange(tokens, device=device)[None]
    like = torch.empty(0, dtype=shape.dtype, device=device)
    return _rotation(shape.head_dim, device).tables(positions, like)


def layer_context(shape: Shape, tokens: int, device: torch.device) -> AttentionContext:
    """What a layer of the model tells its selector of a prompt, made by the integration itself."""
    rotation = _rotation(shape.head_dim, device)
    layer = AttentionLayer("", nn.Identity(), 0, shape.heads, shape.kv_heads, shape.head_dim, rotation)
    state = LayerState(layer, Attachment("sdpa", {0: layer}))
    call = LayerCall(state, rotary_tables(shape, tokens, device), torch.arange(tokens, device=device)[None])
    scale = shape.head_dim**-0.5
    return call.context(row=None, q_len=tokens, k_len=tokens, scale=scale, softcap=None, sinks=None)


def random_gate(config: AttnGateConfig, shape: Shape, device: torch.device) -> AttnGate:
    """A gate for one layer whose weights are all at work, as those of a trained one are."""
    torch.manual_seed(0)
    frequencies = gate_frequencies(_rotation(shape.head_dim, device), gate_dim=config.gate_dim or shape.head_dim)
    sizes = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    gate = AttnGate(config, inv_freq=frequencies, **sizes)
    with torch.no_grad():
        for weight in (gate.q_weight, gate.k_weight):
            if weight is not None:
                weight += 0.02 * torch.randn_like(weight)
    for salience in (gate.q_salience, gate.k_salience):
        if salience is not None:
            nn.init.normal_(salience, std=shape.head_dim**-0.5)
    return gate.to(device).requires_grad_(False)
