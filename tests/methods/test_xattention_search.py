"""The search of thresholds against a model's own attention maps, computed in fp64 by the eager implementation."""

import pytest
import torch
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model

from seerattn.hf.capture import watch_attention
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.xattention import XAttention
from seerattn.methods.xattention.estimate import antidiagonal_scores
from seerattn.methods.xattention.search import XAttentionSearch

SEARCH = XAttentionSearch(stride=8, block=32, coverage=0.8, context=333, windows=2)


def slow_threshold(scores: torch.Tensor, mass: torch.Tensor) -> float:
    """Of one head on one text: what blocks at or above the row's lowest needed score hold of the estimate."""
    kept = 0.0
    for row, true in zip(scores.double(), mass.double()):
        needed, held = [], 0.0
        for block in true.argsort(descending=True).tolist():
            if held >= 0.8 * float(true.sum()):
                break
            needed.append(block)
            held += float(true[block])
        kept += float(row[row >= min(row[block] for block in needed)].sum())
    return kept / float(scores.double().sum())


def test_search_finds_the_largest_minimum_threshold_over_texts_by_layer_and_head(tmp_path) -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    # Each of them one window, with the beginning-of-sequence token.
    texts = [torch.randint(3, 97, (332,), generator=generator).tolist() for _ in range(2)]
    plan = SEARCH.run(EvalModel(model, tiny_tokenizer(), name="tiny"), texts)
    assert plan.method == "xattention_profile" and [len(heads) for heads in plan.rules] == [4, 4]

    expected = torch.zeros(2, 4, dtype=torch.float64)
    for ids in texts:
        calls = {}
        with torch.no_grad(), watch_attention(model, lambda call, calls=calls: calls.setdefault(call.layer, call)):
            model(input_ids=torch.tensor([[1, *ids]]))
        for layer, call in calls.items():
            q, k = call.query.double(), call.key.double().repeat_interleave(2, dim=1)
            causal = torch.ones(333, 333, dtype=torch.bool).tril()
            p = (q @ k.transpose(-1, -2) * call.scale).masked_fill(~causal, -torch.inf).softmax(-1)
            mass = torch.nn.functional.pad(p, (0, 19, 0, 19)).unflatten(2, (11, 32)).unflatten(-1, (11, 32)).sum((3, 5))
            scores = antidiagonal_scores(call.query, call.key, stride=8, block=32, scale=call.scale)
            for head in range(4):
                found = slow_threshold(scores[0, head], mass[0, head])
                expected[layer, head] = max(float(expected[layer, head]), found)
    got = torch.tensor([[rule["threshold"] for rule in heads] for heads in plan.rules], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    found = plan.made["found"]
    assert (found["least threshold"], found["largest threshold"]) == pytest.approx(
        (float(expected.min()), float(expected.max())), abs=2e-5
    )

    # What was found is what the method runs with.
    plan.save(tmp_path / "plan.json")
    method = XAttention(plan=tmp_path / "plan.json")
    method.check_model(model.config)
    assert method.sizes == (8, 32)
    assert method.selectors().at(1.0)(1).threshold == [pytest.approx(row) for row in got.tolist()]


@pytest.mark.parametrize("values", [{"coverage": 0.0}, {"coverage": 1.5}, {"stride": 0}, {"windows": 0}])
def test_search_rejects_values_out_of_range(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        XAttentionSearch(**values)
