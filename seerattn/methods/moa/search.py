"""MoA's profile of a model, and the plan that follows from it (arXiv 2406.14909, section 4)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seerattn.data.retrieval import RetrievalDocument, training_document
from seerattn.eval.arms import EvalModel
from seerattn.hf.capture import AttentionCall, watch_attention
from seerattn.hf.probe import probe
from seerattn.methods.described import describe
from seerattn.methods.head_rules import Plan
from seerattn.methods.moa.profile import (
    BLOCK,
    METHOD,
    Profile,
    SpanRule,
    area_density,
    block_influence,
    influence_by_distance,
    row_density,
)
from seerattn.methods.moa.spans import bound_limits, bounded_plans, programmes, selectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int], Callable[[int], None]]

# The shortest document with facts and questions.
_LEAST_TOKENS = 256
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What defines a plan beside the model.

    Attributes:
        lengths: tokens of the profile's documents, ascending whole blocks of 64; published are 2k, 4k and 8k.
        validation: tokens of the documents that decide between plans, none of the lengths; published is 12k.
        samples: documents of each length.
        density: bound of MoA's density, see `bound_limits`.
        seed: draws the documents.
        data: digest of the text that facts are hidden in.
        dtype: of the model.
    """

    lengths: tuple[int, ...]
    validation: int
    samples: int
    density: float
    seed: int
    data: str
    dtype: str

    def __post_init__(self) -> None:
        lengths = list(self.lengths)
        if not lengths or lengths != sorted(set(lengths)) or min(lengths) < _LEAST_TOKENS:
            raise ValueError(f"lengths must ascend from {_LEAST_TOKENS} tokens at least, got {lengths}")
        if any(length % BLOCK for length in lengths):
            raise ValueError(f"lengths must be whole blocks of {BLOCK} tokens, got {lengths}")
        if self.validation < _LEAST_TOKENS or self.validation in lengths:
            raise ValueError(
                f"validation must be a new length of {_LEAST_TOKENS} tokens at least, got {self.validation} beside "
                f"{lengths}"
            )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"lengths": list(self.lengths)}


def default_lengths(context: int) -> tuple[int, ...]:
    """A quarter, a half and all of a context, in whole blocks."""
    return tuple(context // part // BLOCK * BLOCK for part in (4, 2, 1))


def default_validation(context: int, longest: int) -> int:
    """One and a half of a context, or three quarters where a model of ``longest`` tokens does not reach so far."""
    tokens = context * 3 // 2
    return (tokens if tokens <= longest else context * 3 // 4) // BLOCK * BLOCK


def make_plan(
    subject: EvalModel,
    haystacks: Sequence[Sequence[int]],
    settings: ProfileSettings,
    *,
    progress: Progress | None = None,
) -> Plan:
    """Profiles a model, solves MoA's programme and keeps the best plan of its Pareto front.

    Args:
        subject: the model.
        haystacks: token ids of texts to hide facts in.
        settings: what to do; all of it is kept in the plan.
        progress: called with a description and a number of steps, returns what is told of finished steps.

    Returns:
        The plan: alpha, beta and influence by length and distance of each head. ``made["found"]`` has the number of
        plans on the front, the loss of the one that was kept and of the dense model at the validation length, and its
        densities at the longest length, as MoA counts them and by area.

    Raises:
        ValueError: no plan can meet the density, or the texts are too short.
    """
    model, config = subject.model, subject.model.config
    layers = [layer.layer for layer in probe(model)]
    sizes = describe(config)
    bound_limits(settings.lengths, np.repeat(np.arange(len(layers)), sizes["kv_heads"]), settings.density)
    documents = {
        length: _documents(subject, haystacks, length, settings) for length in (*settings.lengths, settings.validation)
    }

    found = []
    for length in settings.lengths:
        advance = progress(f"profile at {length}", settings.samples) if progress else None
        samples = []
        for document in documents[length]:
            samples.append(sample_influence(model, answer_greedily(model, document)))
            if advance is not None:
                advance(1)
        found.append({layer: torch.stack([sample[layer] for sample in samples]).mean(0) for layer in layers})
    rules: list[list[dict[str, Any]]] = [
        [{"influence": [_rounded(by_layer[layer][head]) for by_layer in found]} for head in range(sizes["heads"])]
        if layer in layers
        else []
        for layer in range(sizes["layers"])
    ]
    profile = Profile.of(Plan(METHOD, sizes, rules, settings.to_dict()))

    advance = progress("optimise", programmes(len(settings.lengths))) if progress else None
    plans = bounded_plans(profile, settings.density, advance)
    advance = progress(f"validate at {settings.validation}", settings.samples * (len(plans) + 1)) if progress else None
    answered = [answer_greedily(model, document) for document in documents[settings.validation]]
    dense = _mean_loss(model, answered, advance)
    losses = []
    for spans in plans:
        with subject.observed(selectors(spans)):
            losses.append(_mean_loss(model, answered, advance))
    best = losses.index(min(losses))
    summary = {"plans": len(plans), "loss": losses[best], "dense_loss": dense}
    summary |= _densities(plans[best], settings.lengths[-1])
    group = sizes["heads"] // sizes["kv_heads"]
    for layer, spans in plans[best].items():
        rules[layer] = [asdict(spans[head // group]) | rule for head, rule in enumerate(rules[layer])]
    return Plan(METHOD, sizes, rules, settings.to_dict() | {"found": summary})


@torch.no_grad()
def answer_greedily(model: PreTrainedModel, document: RetrievalDocument) -> RetrievalDocument:
    """The document with the model's own answers in place of the true ones, token by token in order.

    The paper's profile uses them so that the loss is that of what the model knows, not of what it does not.
    """
    from transformers import DynamicCache

    ids = torch.tensor([document.input_ids], device=model.device)
    cache, done = DynamicCache(config=model.config), 0
    for begin, end in document.answers:
        for place in range(begin, end):
            logits = model(input_ids=ids[:, done:place], past_key_values=cache, logits_to_keep=1).logits
            ids[0, place] = logits[0, -1].argmax()
            done = place
    return replace(document, input_ids=ids[0].tolist())


def answer_loss(model: PreTrainedModel, document: RetrievalDocument) -> Tensor:
    """Mean cross-entropy of the tokens of all answers, fp32 (fp64 for such models)."""
    ids = torch.tensor([document.input_ids], device=model.device)
    places = torch.tensor([place for begin, end in document.answers for place in range(begin, end)], device=ids.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=places - 1).logits[0]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[0, places])


def sample_influence(model: PreTrainedModel, document: RetrievalDocument) -> dict[int, Tensor]:
    """Influence of each layer on the loss of the answers, float64 ``[H, N]`` by distance on the host.

    Layers run again in the backward pass, one at a time, so memory holds the input of every layer and the attention
    of one.
    """
    hooked: set[int] = set()
    again: dict[int, AttentionCall] = {}
    found: dict[int, Tensor] = {}

    def see(call: AttentionCall) -> None:
        if call.layer in hooked:
            again[call.layer] = call
            return
        hooked.add(call.layer)
        call.output.register_hook(partial(take, call.layer))

    def take(layer: int, grad: Tensor) -> None:
        call = again.pop(layer)
        logits = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        influence = block_influence(call.query, call.key, call.value, grad.transpose(1, 2), **logits)
        found[layer] = influence_by_distance(influence[0]).double().cpu()

    layers = [model.get_submodule(attention.name.rpartition(".")[0]) for attention in probe(model)]
    with watch_attention(model, see), _recomputing(model, layers) as embedded:
        torch.autograd.grad(answer_loss(model, document), embedded)
    return found


@contextmanager
def _recomputing(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Freezes the weights and runs the layers again in the backward pass; yields the embeddings of inputs."""
    embedded: list[Tensor] = []

    def embed(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    trainable = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.callback(lambda: [p.requires_grad_() for p in trainable])
        for parameter in trainable:
            parameter.requires_grad_(False)
        for layer in layers:
            stack.callback(partial(_restore, layer, vars(layer).get("forward")))
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        stack.callback(model.get_input_embeddings().register_forward_hook(embed).remove)
        yield embedded


def _restore(layer: nn.Module, forward: Callable | None) -> None:
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _documents(
    subject: EvalModel, haystacks: Sequence[Sequence[int]], length: int, settings: ProfileSettings
) -> list[RetrievalDocument]:
    long_enough = [text for text in haystacks if len(text) >= length]
    if not long_enough:
        longest = max(map(len, haystacks), default=0)
        raise ValueError(f"data must hold a text of {length} tokens, got at most {longest}; use a longer one")
    made = []
    for number in range(settings.samples):
        rng = random.Random(f"{settings.seed} moa {length} {number}")
        text = rng.choice(long_enough)
        made.append(training_document(subject.tokenizer, text, length, rng, bos_token_id=subject.bos_token_id))
    return made


@torch.no_grad()
def _mean_loss(
    model: PreTrainedModel, documents: Sequence[RetrievalDocument], advance: Callable[[int], None] | None
) -> float:
    total = 0.0
    for document in documents:
        total += float(answer_loss(model, document))
        if advance is not None:
            advance(1)
    return total / len(documents)


def _densities(spans: dict[int, tuple[SpanRule, ...]], length: int) -> dict[str, float]:
    bands = [rule.band(length) for rules in spans.values() for rule in rules]
    densities = {"row_density": row_density, "area_density": area_density}
    return {name: sum(f(band, length) for band in bands) / len(bands) for name, f in densities.items()}


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
