"""MoA's profile against the attention maps and gradients that transformers itself returns, and plans end to end."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_corpus import tiny_tokenizer, topical_text
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import seerattn
from seerattn.data.retrieval import RetrievalDocument, training_document
from seerattn.data.windows import digest
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.moa.profile import Profile, area_density
from seerattn.methods.moa.search import MoaSearch, answer_greedily, answer_loss, sample_influence
from seerattn.methods.moa.spans import bounded_plans, planned, selectors

SEARCH = MoaSearch(lengths=(256, 512, 768), validation=320, samples=2, density=0.6)


def haystack(length: int = 900, seed: int = 0) -> list[int]:
    return tiny_tokenizer()(topical_text(length, seed), add_special_tokens=False)["input_ids"]


def document(length: int, seed: int = 0) -> RetrievalDocument:
    return training_document(tiny_tokenizer(), haystack(), length, random.Random(seed), bos_token_id=1)


def explicit_influence(model: PreTrainedModel, sample: RetrievalDocument) -> dict[int, Tensor]:
    """By distance ``[H, N]`` from maps and gradients of the eager model, one block after the other."""
    ids = torch.tensor([sample.input_ids])
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, use_cache=False)
    wanted = [place for begin, end in sample.answers for place in range(begin, end)]
    loss = F.cross_entropy(out.logits[0, [place - 1 for place in wanted]], ids[0, wanted])
    slopes = torch.autograd.grad(loss, out.attentions)
    found = {}
    for layer, (maps, slope) in enumerate(zip(out.attentions, slopes)):
        a, g = maps[0].detach().double(), slope[0].double()
        change = -a * (g - (g * a).sum(-1, keepdim=True)) / (1 - a + 1e-6)
        change[:, 0] = -a[:, 0] * g[:, 0]
        length = len(sample.input_ids)
        blocks = -(-length // 64)
        found[layer] = torch.zeros(a.shape[0], blocks, dtype=torch.float64)
        for i in range(blocks):
            for j in range(1, i + 1):
                tile = change[:, i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
                found[layer][:, i - j] += tile.abs().sum((1, 2))
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-oss", "gemma2"])
def test_sample_influence_matches_maps_and_gradients_of_the_eager_model(name: str) -> None:
    model, sample = tiny_model(name), document(333)
    trainable = [p.requires_grad for p in model.parameters()]
    found = sample_influence(model, sample)
    assert [p.requires_grad for p in model.parameters()] == trainable and all(
        p.grad is None for p in model.parameters()
    )
    assert not any("forward" in vars(module) for module in model.modules())
    expected = explicit_influence(model, sample)
    full = [1] if name in ("gpt-oss", "gemma2") else [0, 1]
    assert sorted(found) == full
    for layer in full:
        # fp32 on both sides: a thousand roundings, as values are differences of numbers that nearly cancel.
        assert (found[layer] - expected[layer]).abs().max() <= 1e3 * 2.0**-24 * expected[layer].max()
        assert expected[layer].max() > 0


def test_answers_are_the_models_own_first_choices() -> None:
    model, sample = tiny_model("llama"), document(400, seed=3)
    answered = answer_greedily(model, sample)
    assert len(sample.answers) > 1
    places = {place for begin, end in sample.answers for place in range(begin, end)}
    kept = [place for place in range(400) if place not in places]
    assert [answered.input_ids[p] for p in kept] == [sample.input_ids[p] for p in kept]
    assert answered.input_ids != sample.input_ids and answered.answers == sample.answers
    with torch.no_grad():
        logits = model(torch.tensor([answered.input_ids])).logits[0]
        loss = float(answer_loss(model, answered))
    assert all(answered.input_ids[place] == int(logits[place - 1].argmax()) for place in places)
    losses = F.cross_entropy(logits[:-1], torch.tensor(answered.input_ids[1:]), reduction="none")
    expected = float(losses[[place - 1 for place in sorted(places)]].mean())
    assert loss == pytest.approx(expected, rel=1e-5)


def drawn(length: int) -> list[RetrievalDocument]:
    """The documents of a length, without the model's answers."""
    rngs = [random.Random(f"{SEARCH.seed} moa {length} {number}") for number in range(SEARCH.samples)]
    return [training_document(tiny_tokenizer(), rng.choice([haystack()]), length, rng, bos_token_id=1) for rng in rngs]


@pytest.fixture(scope="module")
def made() -> tuple[EvalModel, HeadRules]:
    model = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    return model, SEARCH.run(model, [haystack()])


def test_plan_holds_the_mean_of_its_samples(made) -> None:
    model, plan = made
    answered = [answer_greedily(model.model, sample) for sample in drawn(512)]
    samples = [explicit_influence(tiny_model("llama"), sample) for sample in answered]
    for layer in (0, 1):
        expected = (samples[0][layer] + samples[1][layer]) / 2
        found = torch.tensor([rule["influence"][1] for rule in plan.rules[layer]], dtype=torch.float64)
        assert (found - expected).abs().max() <= 1e3 * 2.0**-24 * expected.max()


def test_plan_has_the_least_loss_of_its_front(made) -> None:
    model, plan = made
    answered = [answer_greedily(model.model, sample) for sample in drawn(SEARCH.validation)]

    def loss(model: PreTrainedModel) -> float:
        with torch.no_grad():
            return sum(float(answer_loss(model, sample)) for sample in answered) / len(answered)

    front = bounded_plans(Profile.of(plan), SEARCH.density)
    assert len(front) > 1
    losses = []
    for spans in front:
        sparse = seerattn.attach(tiny_model("llama"), selectors(spans), impl="reference")
        losses.append(loss(sparse))
    found = plan.made["found"]
    assert found["plans"] == len(front) and found["dense_loss"] == pytest.approx(loss(tiny_model("llama")), rel=1e-5)
    assert found["loss"] == pytest.approx(min(losses), rel=1e-5)
    best = front[losses.index(min(losses))]
    assert all(planned(plan)(layer).rules == best[layer] for layer in (0, 1))
    bands = [rule.band(768) for rules in best.values() for rule in rules]
    assert found["area_density"] == pytest.approx(sum(area_density(band, 768) for band in bands) / len(bands))


def test_plan_is_the_same_again_and_leaves_the_model_as_it_was(made) -> None:
    model, plan = made
    assert SEARCH.run(model, [haystack()]) == plan
    ids = torch.tensor([haystack()[:300]])
    assert torch.equal(model.model(ids).logits, tiny_model("llama")(ids).logits)


def test_plan_rejects_what_cannot_be_made(made) -> None:
    model, _ = made
    with pytest.raises(ValueError, match="data"):
        SEARCH.run(model, [haystack(400)])
    with pytest.raises(ValueError, match="density"):
        replace(SEARCH, density=0.05).run(model, [haystack()])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lengths": (192, 512)}, "lengths"),
        ({"lengths": (512, 256)}, "lengths"),
        ({"lengths": (), "context": 512}, "lengths"),
        ({"lengths": (256, 500)}, "lengths"),
        ({"validation": 512}, "validation"),
        ({"validation": 255}, "validation"),
        ({"samples": 0}, "samples"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
    ],
)
def test_search_rejects_bad_values(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SEARCH, **change)


def test_default_lengths_are_the_published_ones_at_8k() -> None:
    def validated(search: MoaSearch, longest: int) -> int:
        return search.validated_at(SimpleNamespace(longest=longest))

    assert MoaSearch().lengths == MoaSearch(context=8192).lengths == (2048, 4096, 8192)
    assert validated(MoaSearch(), 131072) == 12288 and validated(MoaSearch(), 8192) == 6144
    assert MoaSearch(context=5000).lengths == (1216, 2496, 4992)
    assert validated(SEARCH, 131072) == 320 and SEARCH.longest == 768
    assert replace(SEARCH, validation=1024).longest == 1024


def test_plan_says_how_it_was_made(made) -> None:
    model, plan = made
    options = {"lengths": [256, 512, 768], "validation": 320, "samples": 2, "density": 0.6, "seed": 0}
    options |= {"data": digest([haystack()]), "dtype": "float32"}
    assert {name: value for name, value in plan.made.items() if name != "found"} == options
    assert SEARCH.made(model, [haystack()]) == options
