"""What methods choose for one decoded token, against choices that are written out in fp64."""

import math
from dataclasses import replace

import pytest
import torch
from baseline_calls import CONTEXT
from torch import Tensor

from seerattn import TokenBudget
from seerattn.methods import make_method, methods
from seerattn.methods.oracle import Oracle, OracleDecoder
from seerattn.methods.quest import Quest, QuestDecoder, quest_bounds
from seerattn.methods.streaming import Streaming
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.map_form import MapForm

BLOCK = 32
LENGTHS = [1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 300]


def token(tokens: int, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, 1, 32, generator=gen), torch.randn(2, kv_heads, tokens, 32, generator=gen)


def listed(blocks: DecodeBlocks, b: int, h: int) -> list[int]:
    return blocks.indices[b, h, : blocks.counts[b, h]].tolist()


def best(scores: list[float], tokens: int, budget: int, sinks: int = 1) -> list[int]:
    """The best blocks, beside the forced ones, as many as fit."""
    own = (tokens - 1) // BLOCK
    forced = {own, *range(min(sinks, own))}
    rivals = sorted((j for j in range(own) if j not in forced), key=lambda j: -scores[j])
    return sorted(forced | set(rivals[: max(0, budget // BLOCK - len(forced))]))


def softmax_of(row: list[float], skip: int) -> list[float]:
    kept = [math.exp(x) for x in row[skip:]]
    return [0.0] * min(skip, len(row)) + [x / math.fsum(kept) for x in kept]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_quest_takes_the_pages_of_the_largest_bounds(tokens: int) -> None:
    q, k = token(tokens)
    # Heads that heed the first page much, and differently so, must not count less among the others.
    k[:, :, :BLOCK] *= 4
    found = QuestDecoder(TokenBudget(tokens=3 * BLOCK), BLOCK).select_token(q, k, CONTEXT)
    pages = (tokens - 1) // BLOCK
    for b in range(2):
        for group in range(2):
            heads = []
            for h in (2 * group, 2 * group + 1):
                row = []
                for page in range(pages):
                    keys = k[b, group, page * BLOCK : (page + 1) * BLOCK].double()
                    ends = zip(q[b, h, 0].double(), keys.amin(0), keys.amax(0))
                    row.append(CONTEXT.scale * math.fsum(max(x * low, x * high) for x, low, high in ends))
                heads.append(softmax_of(row, 1))
            scores = [max(of) for of in zip(*heads)]
            assert listed(found, b, group) == best(scores, tokens, 3 * BLOCK)


def test_no_product_of_a_page_is_above_its_bound() -> None:
    q, k = token(10 * BLOCK)
    products = (q @ k.repeat_interleave(2, 1).mT).squeeze(2).unflatten(-1, (10, BLOCK)).amax(-1)
    assert (quest_bounds(q, k, BLOCK) >= products - 1e-5).all()


@pytest.mark.parametrize("target", ["max:inf", "sum:1"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_oracle_takes_the_blocks_of_the_largest_true_probabilities(tokens: int, target: str) -> None:
    q, k = token(tokens)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    context = replace(CONTEXT, scale=0.4, softcap=3.0, sinks=sinks)
    decoder = OracleDecoder(TokenBudget(tokens=4 * BLOCK, sink_blocks=2), BLOCK, MapForm.parse(target))
    found = decoder.select_token(q, k, context)
    reduce = max if target == "max:inf" else math.fsum
    for b in range(2):
        for group in range(2):
            heads = []
            for h in (2 * group, 2 * group + 1):
                logits = [3.0 * math.tanh(0.4 * float(q[b, h, 0].double() @ x) / 3.0) for x in k[b, group].double()]
                total = math.fsum(map(math.exp, [*logits, float(sinks[h])]))
                shares = [math.exp(x) / total for x in logits]
                heads.append([reduce(shares[j * BLOCK : (j + 1) * BLOCK]) for j in range((tokens - 1) // BLOCK)])
            scores = [max(of) for of in zip(*heads)]
            assert listed(found, b, group) == best(scores, tokens, 4 * BLOCK, sinks=2)


def test_streaming_takes_the_first_and_the_last_blocks() -> None:
    for tokens in LENGTHS:
        q, k = token(tokens)
        decoder = Streaming(block_k=BLOCK).decoders().at(4 * BLOCK)(0)
        own = (tokens - 1) // BLOCK
        expected = list(range(own + 1)) if own < 4 else [0, own - 2, own - 1, own]
        assert listed(decoder.select_token(q, k, CONTEXT), 1, 1) == expected


@pytest.mark.parametrize("method", [Oracle(block_k=BLOCK), Streaming(block_k=BLOCK), Quest(block_k=BLOCK)], ids=str)
def test_lists_grow_with_the_tokens_up_to_all_of_them(method) -> None:
    q, k = token(300)
    assert "tokens" in method.budgets
    before: set[int] = set()
    for tokens in range(2 * BLOCK, 12 * BLOCK, BLOCK):
        found = method.decoders().at(tokens)(3).select_token(q, k, CONTEXT)
        now = set(listed(found, 0, 0))
        assert before <= now and len(now) == min(tokens // BLOCK, 10)
        before = now
    assert before == set(range(10))


def test_quest_leaves_first_layers_dense_and_has_nothing_for_prompts() -> None:
    at = make_method("quest", {"dense_layers": 2, "block_k": 16, "sink_blocks": 0}).decoders().at(64)
    assert at(0) is None and at(1) is None and at(2).policy == TokenBudget(tokens=64, sink_blocks=0)
    with pytest.raises(ValueError, match="decode_tokens"):
        Quest().selectors()
    with pytest.raises(ValueError, match="must choose for decoded tokens, got a_shape"):
        methods()["a_shape"]().decoders()
