"""What holds for every method: how it is found and told, the ends of its setting, rows of a padded batch."""

import json
from dataclasses import MISSING, replace

import pytest
import torch
from baseline_calls import CONTEXT, calls, profile
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model, tokens

from seerattn import attach, detach
from seerattn.data.windows import cut_windows
from seerattn.eval.tune import Curve, realised_density
from seerattn.gate import AttnGateConfig
from seerattn.hf.eval_model import EvalModel
from seerattn.methods import describe_methods, make_method, methods
from seerattn.methods.a_shape import AShape
from seerattn.methods.flexprefill import FlexPrefill
from seerattn.methods.gate import Gate, GatePolicy
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.mean_pooled import MeanPooled
from seerattn.methods.oracle import Oracle
from seerattn.methods.random import Random
from seerattn.methods.streaming import Streaming
from seerattn.methods.tri_shape import TriShape
from seerattn.methods.xattention import XAttention
from seerattn.options import options_of
from seerattn.results.record import KINDS
from seerattn.selection import HeadBudgets
from seerattn.selection.map_form import PUBLISHED, MapForm

PROFILE = [[0.3, 0.9, 0.6, 1.0]] * 2
BLOCKS = {"block_q": 32, "block_k": 32}
METHODS = {
    "streaming": lambda plan: Streaming(**BLOCKS),
    "oracle": lambda plan: Oracle(**BLOCKS),
    "oracle-sum": lambda plan: Oracle(**BLOCKS, target="sum:2"),
    "random": lambda plan: Random(**BLOCKS),
    "mean_pooled": lambda plan: MeanPooled(**BLOCKS),
    "a_shape": lambda plan: AShape(**BLOCKS, n_init=32),
    "tri_shape": lambda plan: TriShape(**BLOCKS, n_init=32, n_last=1),
    "xattention": lambda plan: XAttention(stride=8, block=32),
    "xattention-plan": lambda plan: XAttention(plan=plan),
    "flexprefill": lambda plan: FlexPrefill(block=32),
}
# Blocks small enough for a density to be near any goal on short text.
SMALL = {"block_q": 16, "block_k": 16}
OPTIONS = {
    "oracle": SMALL,
    "streaming": SMALL,
    "a_shape": SMALL | {"n_init": 16},
    "tri_shape": SMALL | {"n_init": 16, "n_last": 16},
    "random": SMALL,
    "mean_pooled": SMALL,
    "vertical_slash": SMALL,
    "xattention": {"block": 32, "stride": 8},
    "flexprefill": {"block": 32},
    "blasst": SMALL,
    "prism": {"block": 32},
}
POLICIES = [policy for policy in GatePolicy.__args__ if policy != "saved"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    profile(PROFILE, stride=8, block=32).save(path)
    return path


@pytest.fixture(params=METHODS)
def method(request, plan):
    return METHODS[request.param](plan)


def test_methods_are_found_by_their_own_ids_in_the_order_of_their_kinds() -> None:
    found = methods()
    assert [of.id for of in found.values()] == list(found)
    places = [(KINDS.index(of.kind), id) for id, of in found.items()]
    assert places == sorted(places) and places[0] == (0, "dense")
    # What needs a file was learned or searched; all others are tried below.
    needs = {id for id, of in found.items() if any(f.default is MISSING for f, *_ in options_of(of).values())}
    assert {"gate", "minference", "moa"} <= needs <= {"gate"} | {id for id, of in found.items() if of.searches}
    # Those of decoded tokens alone are tried in test_decoders.py.
    assert set(found) - needs == {"dense", "quest", *OPTIONS}


def test_methods_are_described_by_id_title_kind_and_options() -> None:
    described = {id: (title, kind, options.split(", ")) for id, title, kind, options in describe_methods()}
    assert list(described) == list(methods())
    assert described["streaming"][1:] == ("static", ["name", "block_q", "block_k", "sink_blocks"])
    assert all(title and kind in KINDS for title, kind, _ in described.values())


def test_method_is_called_by_its_name_or_else_by_what_tells_it_apart(method) -> None:
    assert type(method) is methods()[method.id] and str(method) == method.default_name
    named = make_method(method.id, {name: getattr(method, name) for name in options_of(type(method))} | {"name": "x"})
    assert str(named) == "x" and named.settings() == method.settings() and named.block_sizes == method.block_sizes


def density(method, selectors, setting: float, q, k) -> torch.Tensor:
    """Realised by head, ``[B, H]``."""
    blocks = selectors.at(setting)(CONTEXT.layer).select(q, k, CONTEXT)
    assert (blocks.block_q, blocks.block_k) == method.block_sizes
    return blocks.density().expand(-1, q.shape[1]) if blocks.num_heads == q.shape[1] else blocks.density()


def test_density_goes_from_the_forced_blocks_to_everything_and_never_falls(method) -> None:
    q, k = calls(1000, 1000, batch=2)
    selectors = method.selectors()
    if selectors.scale == "log":
        steps = torch.logspace(0, 11, 24, base=2).tolist()
    else:
        steps = torch.linspace(selectors.sparsest, selectors.densest, 24).tolist()
    realised = torch.stack([density(method, selectors, setting, q, k) for setting in (*steps, selectors.densest)])
    assert (realised.diff(dim=0) >= 0).all()
    assert (realised[-1] == 1).all()
    rows = 32
    # The first block and the diagonal; a window of one token and a last row are all that a shape adds.
    extra = rows - 2 if method.id == "tri_shape" else 0
    floor = (2 * rows - 1 + extra) / (rows * (rows + 1) / 2)
    assert realised[0].flatten().tolist() == pytest.approx([floor] * realised[0].numel())
    assert len(set(realised.mean((1, 2)).tolist())) > 5


def test_settings_are_json_and_a_selector_is_the_same_for_every_layer(method) -> None:
    selectors = method.selectors()
    assert json.loads(json.dumps(dict(selectors.settings))) == dict(selectors.settings) == method.settings()
    choose = selectors.at((selectors.sparsest + selectors.densest) / 2)
    assert choose(0) is choose(1)


@pytest.mark.parametrize("name", METHODS)
def test_row_of_a_padded_batch_matches_the_row_alone(name: str, plan) -> None:
    selectors = METHODS[name](plan).selectors()
    setting = {"a_shape": 40, "tri_shape": 40}.get(name, selectors.densest * 0.4)
    model = tiny_model("llama")
    attach(model, selectors.at(setting), impl="reference")
    try:
        ids = tokens(2, 333)
        mask = torch.ones_like(ids)
        mask[1, :110] = 0
        with torch.no_grad():
            together = model(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
            alone = model(input_ids=ids[1:, 110:]).logits
            first = model(input_ids=ids[:1]).logits
            dense = detach(model)(input_ids=ids[1:, 110:]).logits
    finally:
        detach(model)
    assert torch.allclose(together[1:, 110:], alone, atol=1e-4)
    assert torch.allclose(together[:1], first, atol=1e-4)
    assert not torch.allclose(alone, dense, atol=1e-2)


@pytest.fixture(scope="module")
def groups(documents) -> list[list[list[int]]]:
    windows = cut_windows(documents, context=490, count=1, bos_token_id=1)
    return [[window.input_ids for window in windows[:2]]]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> tuple[str, ...]:
    """A text of 522 words: one window of 490."""
    words = tiny_tokenizer().convert_ids_to_tokens(list(range(3, 90)) * 6)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return (str(path),)


@pytest.mark.parametrize("name", OPTIONS)
def test_methods_go_from_few_blocks_to_all_and_are_tuned_to_one_density(model, groups, name: str) -> None:
    method = make_method(name, OPTIONS[name] | {"name": "mine"})
    selectors = method.selectors(model, context=490)
    curve = Curve(selectors, lambda setting: realised_density(model, selectors.at(setting), groups))
    # BLASST keeps every block in which one of its queries meets a new maximum, and these attend to everything alike.
    least, goal = (0.7, 0.8) if name == "blasst" else (0.3, 0.5)
    assert str(method) == "mine"
    assert curve.at(0.0) < least and curve.at(1.0) > 0.99
    # At 490 tokens one more block of 16 a row changes the density by 2 x (31 - k) / (31 x 32), .044 at most.
    assert curve.tune(goal, 0.003).reached == pytest.approx(goal, abs=0.022)
    values = [value for _, value in curve.measured]
    assert values == sorted(values)


@pytest.mark.parametrize("number", [0, 1], ids=["paper", "best"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gate_policies_go_from_few_blocks_to_all(model, gate_folders, groups, calibration, policy, number) -> None:
    method = Gate(gates=gate_folders[number], policy=policy, calibration=calibration)
    selectors = method.selectors(model, context=490)
    curve = Curve(selectors, lambda setting: realised_density(model, selectors.at(setting), groups))
    # 490 tokens are 8 blocks of 64: the forced ones are 15 of 36. The best of the others stays with any share of the
    # mass, and some exceed the thresholds of other text.
    more = 6 if policy in ("top_p", "head_thresholds") else 0
    assert 15 / 36 <= curve.at(0.0) <= (15 + more) / 36 + 1e-9 and curve.at(1.0) > 0.99
    assert curve.tune(0.75, 0.003).reached == pytest.approx(0.75, abs=0.06)
    values = [value for _, value in curve.measured]
    assert values == sorted(values) and selectors.settings["policy"] == policy
    assert str(method) == ("paper", "best")[number] and method.block_sizes == (64, 64)


@pytest.mark.parametrize("policy", POLICIES)
def test_gates_that_skip_choose_as_they_do_without_and_say_so(model, gate_folders, calibration, policy) -> None:
    lists = {}
    for threshold in (None, 0.01):
        method = Gate(gates=gate_folders[0], policy=policy, calibration=calibration, skip_threshold=threshold)
        selectors = method.selectors(model, context=490)
        assert selectors.settings.get("skip_threshold") == threshold
        lists[threshold] = selectors.at(0.7)(0).policy
    assert lists[0.01] == replace(lists[None], skip_threshold=0.01) and lists[None].skip_threshold is None
    with pytest.raises(ValueError, match="skip_threshold must be a number above 0 and at most 1"):
        Gate(gates=gate_folders[0], skip_threshold=1.5)


def test_top_k_and_row_share_follow_the_budgets_of_gates_and_say_so_and_equal_top_k_does_not(
    gate_folders, groups
) -> None:
    folder = gate_folders[0]
    model = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    config = next(iter(model.gates(folder).gates.values())).config
    low, high = (0.5, 0.5, 0.7, 0.7), (0.7, 0.7, 0.9, 0.9)
    about = {"block_q": 64, "block_k": 64, "target": str(config.target), "gain": "sum:1", "text": "", "windows": 1}
    budgets = HeadBudgets((0.6, 0.8), (490,), (((low, low), (high, high)),), **about)
    for policy in ("top_k", "row_share", "equal_top_k"):
        method = Gate(gates=folder, policy=policy)
        model.set_budgets(folder, None)
        plain = method.selectors(model)
        assert "budgets" not in plain.settings and plain.sparsest == 1e-3
        model.set_budgets(folder, budgets)
        selectors = method.selectors(model)
        with model.attached(selectors.at(0.8)) as run:
            run.model.base_model(input_ids=torch.tensor(groups[0]), use_cache=False)
        first, second, third, fourth = run.head_density()[0]
        shared = policy != "equal_top_k"
        assert (first == second < third == fourth) == shared and (first == third) == (not shared)
        assert selectors.settings.get("budgets") == (budgets.digest if shared else None)
        assert selectors.sparsest == (0.6 if shared else 1e-3)


def test_thresholds_by_head_give_every_head_the_same_density_on_the_calibration_text(
    model, gate_folders, calibration
) -> None:
    method = Gate(gates=gate_folders[0], policy="head_thresholds", calibration=calibration)
    ids = [([1] + list(range(3, 90)) * 6)[:490]]
    with model.attached(method.selectors(model, context=490).at(0.7)) as run:
        run.model.base_model(input_ids=torch.tensor(ids), use_cache=False)
    # The first layer sees what the dense model saw; one block is 1/36.
    assert run.head_density()[0] == pytest.approx([0.7] * 4, abs=0.5 / 36 + 1e-6)


def test_an_oracle_is_told_by_its_map_and_the_published_one_by_none() -> None:
    """Results of the published one are found again by what told them before there were others."""
    of_map = {}
    for target in ("max:inf", "sum:2"):
        method = make_method("oracle", {"target": target})
        of_map[str(method)] = method.settings().get("target"), method.selectors().at(0.5)(0).target
    assert of_map == {"oracle": (None, PUBLISHED), "oracle sum:2": ("sum:2", MapForm("sum", 2))}
    assert "target" not in make_method("oracle", {}).settings()


def test_gates_that_tell_no_form_have_the_blocks_that_they_are_loaded_with(model, tmp_path) -> None:
    gated = attach(tiny_model("llama"), AttnGateConfig(rope=False))
    gated.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    del values["gate"]
    config.write_text(json.dumps(values))
    loaded = next(iter(model.gates(tmp_path).gates.values())).config
    assert Gate(gates=tmp_path).block_sizes == (loaded.block_q, loaded.block_k)


@pytest.mark.parametrize(
    ("id", "options", "named"),
    [
        ("magic", {}, "magic"),
        ("streaming", {"magic": 1}, "magic"),
        ("streaming", {"block_q": 0}, "block_q"),
        ("streaming", {"block_q": True}, "block_q"),
        ("streaming", {"plan": "p.json"}, "plan"),
        ("oracle", {"target": "sum"}, "map"),
        ("oracle", {"budgets_per_head": None}, "budgets_per_head"),
        ("xattention", {"stride": "wide"}, "stride"),
        ("xattention", {"stride": 8, "plan": "p.json"}, "stride"),
        ("minference", {}, "plan"),
        ("moa", {}, "plan"),
        ("gate", {}, "gates"),
        ("gate", {"gates": "g", "policy": "magic"}, "policy"),
    ],
)
def test_methods_reject_options_that_they_do_not_have_or_cannot_take(id, options, named) -> None:
    with pytest.raises(ValueError, match=named):
        make_method(id, options)


def test_methods_reject_plans_and_gates_that_are_none_or_of_others(tmp_path, gate_folders) -> None:
    config, path = tiny_model("llama").config, tmp_path / "p.json"
    for id in ("minference", "moa", "xattention"):
        with pytest.raises(OSError, match=r"p\.json"):
            make_method(id, {"plan": path}).check_model(config)
    sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
    rule = {"pattern": "vertical_slash", "columns": 100, "offsets": 800}
    HeadRules("minference", sizes, [[rule] * 4] * 2, {}).save(path)
    for id in ("moa", "xattention"):
        with pytest.raises(ValueError, match="plan must be one of"):
            make_method(id, {"plan": path}).check_model(config)
    method = make_method("minference", {"plan": path})
    method.check_model(config)
    with pytest.raises(ValueError, match="heads"):
        method.check_model(tiny_model("llama", num_attention_heads=2, num_key_value_heads=1).config)
    gates = make_method("gate", {"gates": gate_folders[0]})
    gates.check_model(config)
    with pytest.raises(ValueError, match="num_attention_heads"):
        gates.check_model(tiny_model("llama", num_attention_heads=2, num_key_value_heads=1).config)
    with pytest.raises(ValueError, match="gates"):
        make_method("gate", {"gates": tmp_path}).check_model(config)
