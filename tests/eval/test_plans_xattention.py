"""The profile of a model against its own attention maps, computed in fp64 by the eager implementation."""

import pytest
import torch
from tiny_models import tiny_model

from seerattn.cli import main
from seerattn.data.windows import Window
from seerattn.eval.arms import EvalModel
from seerattn.hf.capture import watch_attention
from seerattn.methods.head_rules import Plan
from seerattn.methods.xattention.estimate import antidiagonal_scores
from seerattn.methods.xattention.search import ThresholdSettings, profile_plan

SETTINGS = ThresholdSettings(
    stride=8, block=32, coverage=0.8, context=333, windows=2, seed=0, data="none", dtype="float32"
)


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


def test_profile_is_the_largest_minimum_threshold_over_texts_by_layer_and_head() -> None:
    model = tiny_model("llama")
    subject = EvalModel(model, None, name="tiny")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 97, (333,), generator=generator).tolist() for _ in range(2)]
    plan = profile_plan(subject, [Window(i, ids) for i, ids in enumerate(texts)], SETTINGS)
    assert plan.method == "xattention_profile" and [len(heads) for heads in plan.rules] == [4, 4]

    expected = torch.zeros(2, 4, dtype=torch.float64)
    for ids in texts:
        calls = {}
        with torch.no_grad(), watch_attention(model, lambda call, calls=calls: calls.setdefault(call.layer, call)):
            model(input_ids=torch.tensor([ids]))
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


def test_command_writes_a_profile_that_it_reuses_and_refuses_for_other_settings(tmp_path, capsys) -> None:
    from tiny_corpus import tiny_tokenizer, write_documents

    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_documents(tmp_path / "docs.jsonl", 450, 500)
    command = ["plan", "xattention_profile", "--model", f"{tmp_path}/model", "--data", f"{tmp_path}/docs.jsonl"]
    command += ["--device", "cpu", "--context", "400", "--windows", "2", "--block", "32", "--output", f"{tmp_path}/p"]

    def run(*options: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*command, *options])
        return stop.value.code

    assert run("--stride", "8") == 0
    written = (tmp_path / "p").read_bytes()
    plan = Plan.load(tmp_path / "p", method="xattention_profile")
    every = [rule["threshold"] for heads in plan.rules for rule in heads]
    assert f"least threshold: {plan.made['found']['least threshold']:g}" in capsys.readouterr().out
    assert 0 < min(every) <= max(every) <= 1
    assert run("--stride", "8") == 0
    assert run("--stride", "16") == 2
    assert "stride 8, not 16" in capsys.readouterr().err
    assert (tmp_path / "p").read_bytes() == written
