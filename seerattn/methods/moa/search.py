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
from seerattn.extras import check_extra
from seerattn.hf.capture import AttentionCall, watch_attention
from seerattn.hf.probe import probe
from seerattn.methods.head_rules import HeadRules, describe_model
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
from seerattn.methods.search import Progress, Search
from seerattn.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from seerattn.hf.eval_model import EvalModel

# The shortest document with facts and questions.
_LEAST_TOKENS = 256
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class MoaSearch(Search):
    """Profiles a model, solves MoA's programme and keeps the best plan of its Pareto front.

    What is found: alpha, beta and influence by length and distance of each head, so that comparisons solve the
    programme again for any density.

    Attributes:
        lengths: tokens of the profile's documents, ascending whole blocks of 64; published are 2k, 4k and 8k.
        validation: tokens of the documents that decide between plans, none of the lengths; published is 12k.
        density: bound of MoA's density, see `bound_limits`.
    """

    method = METHOD

    density: float = option(0.5, help="Bound of MoA's density: blocks of the last row over all.", above=0, high=1)
    samples: int = option(16, help="Documents of each length.", low=1)
    lengths: tuple[int, ...] = option((), help="Tokens of the profile's documents; default: 1/4, 1/2, 1 context.")
    validation: int | None = option(None, help="Tokens of the documents that decide; default: 1.5 contexts, or 0.75.")

    def check(self) -> None:
        super().check()
        check_extra("eval", "a search of MoA")
        if not self.lengths:
            quarters = (self.context // part // BLOCK * BLOCK for part in (4, 2, 1))
            object.__setattr__(self, "lengths", tuple(quarters))
        lengths = list(self.lengths)
        if lengths != sorted(set(lengths)) or min(lengths) < _LEAST_TOKENS:
            raise ValueError(f"lengths must ascend from {_LEAST_TOKENS} tokens at least, got {lengths}")
        if any(length % BLOCK for length in lengths):
            raise ValueError(f"lengths must be whole blocks of {BLOCK} tokens, got {lengths}")
        if self.validation is not None and (self.validation < _LEAST_TOKENS or self.validation in lengths):
            raise ValueError(
                f"validation must be a new length of {_LEAST_TOKENS} tokens at least, got {self.validation} beside "
                f"{lengths}"
            )

    @property
    def longest(self) -> int:
        return max(*self.lengths, self.validation or 0)

    def validated_at(self, model: EvalModel) -> int:
        """Tokens of the documents that decide: one and a half of the longest length, or three quarters where the model
        does not reach so far."""
        if self.validation is not None:
            return self.validation
        tokens = self.lengths[-1] * 3 // 2
        return (tokens if tokens <= model.longest else self.lengths[-1] * 3 // 4) // BLOCK * BLOCK

    def made(self, model: EvalModel, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
        found = super().made(model, documents) | {"validation": self.validated_at(model)}
        # Its lengths say it.
        del found["context"]
        return found

    def run(
        self, model: EvalModel, documents: Sequence[Sequence[int]], *, progress: Progress | None = None
    ) -> HeadRules:
        """Searches; ``made["found"]`` has the number of plans on the front, the loss of the one that was kept and of
        the dense model at the validation length, and its densities at the longest length, as MoA counts them and by
        area.

        Raises:
            ValueError: no plan can meet the density, or the texts are too short.
        """
        base, sizes, validation = model.model, describe_model(model.model.config), self.validated_at(model)
        layers = [layer.layer for layer in probe(base)]
        bound_limits(self.lengths, np.repeat(np.arange(len(layers)), sizes["kv_heads"]), self.density)
        samples = {n: self._documents(model, documents, n) for n in (*self.lengths, validation)}

        found = []
        for length in self.lengths:
            advance = progress(f"profile at {length}", self.samples) if progress else None
            seen = []
            for document in samples[length]:
                seen.append(sample_influence(base, answer_greedily(base, document)))
                if advance is not None:
                    advance(1)
            found.append({layer: torch.stack([one[layer] for one in seen]).mean(0) for layer in layers})
        rules: list[list[dict[str, Any]]] = [
            [{"influence": [_rounded(by_layer[layer][head]) for by_layer in found]} for head in range(sizes["heads"])]
            if layer in layers
            else []
            for layer in range(sizes["layers"])
        ]
        profile = Profile.of(HeadRules(METHOD, sizes, rules, self.made(model, documents)))

        advance = progress("optimise", programmes(len(self.lengths))) if progress else None
        plans = bounded_plans(profile, self.density, advance)
        advance = progress(f"validate at {validation}", self.samples * (len(plans) + 1)) if progress else None
        answered = [answer_greedily(base, document) for document in samples[validation]]
        dense = _mean_loss(base, answered, advance)
        losses = []
        for spans in plans:
            with model.attached(selectors(spans)):
                losses.append(_mean_loss(base, answered, advance))
        best = losses.index(min(losses))
        summary = {"plans": len(plans), "loss": losses[best], "dense_loss": dense}
        summary |= _densities(plans[best], self.lengths[-1])
        group = sizes["heads"] // sizes["kv_heads"]
        for layer, spans in plans[best].items():
            rules[layer] = [asdict(spans[head // group]) | rule for head, rule in enumerate(rules[layer])]
        return self.rules(model, documents, rules, summary)

    def _documents(self, model: EvalModel, haystacks: Sequence[Sequence[int]], length: int) -> list[RetrievalDocument]:
        long_enough = [text for text in haystacks if len(text) >= length]
        if not long_enough:
            longest = max(map(len, haystacks), default=0)
            raise ValueError(f"data must hold a text of {length} tokens, got at most {longest}; use a longer one")
        made = []
        for number in range(self.samples):
            rng = random.Random(f"{self.seed} moa {length} {number}")
            text = rng.choice(long_enough)
            made.append(training_document(model.tokenizer, text, length, rng, bos_token_id=model.bos_token_id))
        return made


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
