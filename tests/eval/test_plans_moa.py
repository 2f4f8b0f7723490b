"""MoA's profile against the attention maps and gradients that transformers itself returns, and plans end to end."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_corpus import tiny_tokenizer, topical_text, write_documents
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import seerattn
from seerattn.cli import main
from seerattn.data.retrieval import RetrievalDocument, training_document
from seerattn.eval.arms import EvalModel
from seerattn.methods.head_rules import Plan
from seerattn.methods.moa.profile import Profile, area_density
from seerattn.methods.moa.search import (
    ProfileSettings,
    answer_greedily,
    answer_loss,
    default_lengths,
    default_validation,
    make_plan,
    sample_influence,
)
from seerattn.methods.moa.spans import bounded_plans, planned, selectors

SETTINGS = ProfileSettings(
    lengths=(256, 512, 768), validation=320, samples=2, density=0.6, seed=0, data="text", dtype="float32"
)


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
    rngs = [random.Random(f"{SETTINGS.seed} moa {length} {number}") for number in range(SETTINGS.samples)]
    return [training_document(tiny_tokenizer(), rng.choice([haystack()]), length, rng, bos_token_id=1) for rng in rngs]


@pytest.fixture(scope="module")
def made() -> tuple[EvalModel, Plan]:
    subject = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    return subject, make_plan(subject, [haystack()], SETTINGS)


def test_plan_holds_the_mean_of_its_samples(made) -> None:
    subject, plan = made
    answered = [answer_greedily(subject.model, sample) for sample in drawn(512)]
    samples = [explicit_influence(tiny_model("llama"), sample) for sample in answered]
    for layer in (0, 1):
        expected = (samples[0][layer] + samples[1][layer]) / 2
        found = torch.tensor([rule["influence"][1] for rule in plan.rules[layer]], dtype=torch.float64)
        assert (found - expected).abs().max() <= 1e3 * 2.0**-24 * expected.max()


def test_plan_has_the_least_loss_of_its_front(made) -> None:
    subject, plan = made
    answered = [answer_greedily(subject.model, sample) for sample in drawn(SETTINGS.validation)]

    def loss(model: PreTrainedModel) -> float:
        with torch.no_grad():
            return sum(float(answer_loss(model, sample)) for sample in answered) / len(answered)

    front = bounded_plans(Profile.of(plan), SETTINGS.density)
    assert len(front) > 1
    losses = []
    for spans in front:
        model = seerattn.attach(tiny_model("llama"), selectors(spans), impl="reference")
        losses.append(loss(model))
    found = plan.made["found"]
    assert found["plans"] == len(front) and found["dense_loss"] == pytest.approx(loss(tiny_model("llama")), rel=1e-5)
    assert found["loss"] == pytest.approx(min(losses), rel=1e-5)
    best = front[losses.index(min(losses))]
    assert all(planned(plan)(layer).rules == best[layer] for layer in (0, 1))
    bands = [rule.band(768) for rules in best.values() for rule in rules]
    assert found["area_density"] == pytest.approx(sum(area_density(band, 768) for band in bands) / len(bands))


def test_plan_is_the_same_again_and_leaves_the_model_as_it_was(made) -> None:
    subject, plan = made
    assert make_plan(subject, [haystack()], SETTINGS) == plan
    ids = torch.tensor([haystack()[:300]])
    assert torch.equal(subject.model(ids).logits, tiny_model("llama")(ids).logits)


def test_plan_rejects_what_cannot_be_made(made) -> None:
    subject, _ = made
    with pytest.raises(ValueError, match="data must hold a text of 512 tokens"):
        make_plan(subject, [haystack(400)], SETTINGS)
    with pytest.raises(ValueError, match="density must be one that MoA's rules can meet"):
        make_plan(subject, [haystack()], replace(SETTINGS, density=0.05))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (192, 512)}, "lengths must ascend from 256"),
        ({"lengths": (512, 256)}, "lengths must ascend"),
        ({"lengths": ()}, "lengths must ascend"),
        ({"lengths": (256, 500)}, "whole blocks"),
        ({"validation": 512}, "validation must be a new length"),
        ({"validation": 255}, "validation must be a new length"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_settings_reject_bad_values(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_default_lengths_are_the_published_ones_at_8k() -> None:
    assert default_lengths(8192) == (2048, 4096, 8192)
    assert default_validation(8192, 131072) == 12288 and default_validation(8192, 8192) == 6144
    assert default_lengths(5000) == (1216, 2496, 4992)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moa")
    for name, overrides in (("model", {}), ("other", {"num_hidden_layers": 3})):
        tiny_model("llama", **overrides).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_documents(folder / "docs.jsonl", 700, 750)
    return folder


def run(folder, *args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(("plan", "moa", *(arg.replace("@", f"{folder}/") for arg in args)))
    return stop.value.code


COMMAND = ("--data", "@docs.jsonl", "--device", "cpu", "--lengths", "256,512", "--validate-at", "320", "--samples", "1")


def test_moa_command_writes_a_plan_that_it_does_not_make_again(folder, tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "new" / "plan.json"
    args = ("--model", "@model", *COMMAND, "--density", "0.6", "--output", str(output))
    assert run(folder, *args) == 0
    plan = Plan.load(output, method="moa")
    shown = capsys.readouterr().out
    assert f"loss: {plan.made['found']['loss']:g}" in shown and "area density" in shown
    assert plan.made["lengths"] == [256, 512] and plan.made["samples"] == 1 and planned(plan)(0) is not None
    before = output.read_bytes()
    monkeypatch.setattr("seerattn.methods.moa.search.make_plan", None)
    assert run(folder, *args) == 0
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "@model", *COMMAND, "--density", "0.05"), "density must be"),
        (("--model", "@model", *COMMAND, "--lengths", "100"), "lengths must ascend from 256"),
        (("--model", "@model", *COMMAND, "--lengths", "640", "--validate-at", "2048"), "contexts must be at most"),
        (("--model", "@nothing", *COMMAND), "model must be"),
        (("--model", "@model", *COMMAND, "--data", "@none.jsonl"), "data must"),
        (("--model", "@model", "--data", "@docs.jsonl", "--device", "cpu"), "contexts must be at most"),
    ],
)
def test_moa_command_refuses_bad_input_in_a_sentence(folder, tmp_path, capsys, args, message) -> None:
    output = tmp_path / "plan.json"
    assert run(folder, *args, "--output", str(output)) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("seerattn: ") and message in shown
    assert not output.exists()


def test_moa_command_refuses_a_plan_of_another_model_or_of_other_settings(folder, tmp_path, capsys) -> None:
    output = tmp_path / "plan.json"
    assert run(folder, "--model", "@model", *COMMAND, "--density", "0.6", "--output", str(output)) == 0
    assert run(folder, "--model", "@other", *COMMAND, "--density", "0.6", "--output", str(output)) == 2
    assert "layers 2, not 3" in capsys.readouterr().err
    assert run(folder, "--model", "@model", *COMMAND, "--density", "0.7", "--output", str(output)) == 2
    assert "density 0.6, not 0.7" in capsys.readouterr().err
    assert json.loads(output.read_text())["made"]["density"] == 0.6
