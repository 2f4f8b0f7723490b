import json
from pathlib import Path

import pytest
from tiny_models import tiny_model
from transformers import AutoConfig

from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.results.environment import fingerprint

MODEL = {"layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 32, "weights": "abc"}
RULES = [[{"size": 1}, {"size": 2}], [], [{"size": 0.1}, {"name": "long"}]]


def plan(**values) -> HeadRules:
    return HeadRules(
        **{"method": "some", "model": MODEL, "rules": RULES, "made": {"seed": 0, "found": {"x": 0.5}}} | values
    )


def test_saved_plan_loads_as_it_was_with_one_head_a_line(tmp_path) -> None:
    path = tmp_path / "new" / "plan.json"
    plan().save(path)
    assert HeadRules.load(path, method="some", model=MODEL) == plan()
    lines = path.read_text().splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if line.startswith("      {")] == RULES[0] + RULES[2]
    assert list(path.parent.iterdir()) == [path]


def test_plan_digest_tells_rules_and_methods_apart_and_nothing_else() -> None:
    assert plan().digest == plan(made={}).digest == plan(model=MODEL | {"weights": "x"}).digest
    assert len({p.digest for p in (plan(), plan(method="other"), plan(rules=[RULES[0], [], RULES[0]]))}) == 3


@pytest.mark.parametrize("name", MODEL)
def test_plan_rejects_another_model_and_says_what_differs(tmp_path, name) -> None:
    plan().save(tmp_path / "plan.json")
    other = MODEL | {name: "xyz" if name == "weights" else 64}
    with pytest.raises(ValueError, match=name):
        HeadRules.load(tmp_path / "plan.json", model=other)


def test_plan_takes_weights_that_one_side_does_not_know(tmp_path) -> None:
    plan().save(tmp_path / "plan.json")
    sizes = {name: value for name, value in MODEL.items() if name != "weights"}
    assert HeadRules.load(tmp_path / "plan.json", model=sizes) == plan()
    plan(model=sizes).check(MODEL)


def test_plan_rejects_another_method(tmp_path) -> None:
    plan().save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="other"):
        HeadRules.load(tmp_path / "plan.json", method="other")


def damage(text: str) -> dict[str, str]:
    values = json.loads(text)
    return {
        "cut": text[: len(text) // 2],
        "empty": "",
        "no object": "[1, 2]",
        "no rules": json.dumps({key: value for key, value in values.items() if key != "rules"}),
        "a layer less": json.dumps(values | {"rules": RULES[:2]}),
        "a head less": json.dumps(values | {"rules": [RULES[0], [], RULES[2][:1]]}),
        "a rule that is none": json.dumps(values | {"rules": [RULES[0], [], [1, 2]]}),
        "rules that are none": json.dumps(values | {"rules": 3}),
        "a layer that is none": json.dumps(values | {"rules": [RULES[0], 7, RULES[2]]}),
        "sizes missing": json.dumps(values | {"model": {"layers": 3}}),
        "model that is none": json.dumps(values | {"model": []}),
        "a later format": json.dumps(values | {"plan": 2}),
        "no text": "\xff\xfe",
        "nested": "[" * 100_000,
        "a number that is none": text.replace("0.1", "NaN"),
    }


@pytest.mark.parametrize("kind", damage(json.dumps({"rules": []})))
def test_plan_rejects_a_damaged_file(tmp_path, kind) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    path.write_bytes(damage(path.read_text())[kind].encode("latin-1"))
    with pytest.raises(ValueError, match="plan"):
        HeadRules.load(path)


def test_plan_is_written_over_plans_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("")
    for made in (plan(), plan(rules=RULES[::-1])):
        made.save(path)
        assert HeadRules.load(path) == made
    for text in ("my notes", '{"lr": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="output"):
            plan().save(path)
        assert path.read_text() == text


@pytest.mark.parametrize(
    "values",
    [{"method": 1}, {"made": []}, {"model": MODEL | {"layers": True}}, {"model": MODEL | {"weights": 1}},
     {"model": MODEL | {"heads": -1}}, {"rules": "abc"}, {"rules": [{"a": 1}, [], [{}, {}]]}],
    ids=str,
)  # fmt: skip
def test_plan_rejects_values_of_another_kind(values: dict) -> None:
    with pytest.raises(ValueError, match=r"(method|made|model|weights|rules) of a (plan|layer)"):
        plan(**values)


def test_plan_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    before = path.read_bytes()

    def full(self: Path, text: str, **_) -> None:
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        plan(method="other").save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_plan_refuses_values_that_json_does_not_have(tmp_path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        plan(rules=[[{"size": float("nan")}] * 2, [], []]).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kv_heads", "head_dim"), [("llama", 2, 32), ("phi3", 2, 32), ("gpt2", 2, 32)])
def test_describe_model_matches_the_model(name, kv_heads, head_dim) -> None:
    config = tiny_model(name).config
    sizes = {"layers": 2, "heads": 2 if name == "gpt2" else 4, "kv_heads": kv_heads, "head_dim": head_dim}
    assert describe_model(config) == sizes


def test_weights_of_a_model_are_described_where_they_lie_in_a_folder(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    described = describe_model(AutoConfig.from_pretrained(tmp_path))
    assert described["weights"] == fingerprint(tmp_path)
    named = AutoConfig.from_pretrained(tmp_path)
    named._name_or_path = "org/name"
    assert "weights" not in describe_model(named)
