"""Gates as a PEFT adapter: files, refusals, training."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gate_forms import plain
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import seerattn
from seerattn import AttnGate, AttnGateConfig, KeepAll, SeerConfig, TopK, attention_map
from seerattn.hf.config import save_settings
from seerattn.hf.distillation import GateLosses
from seerattn.hf.gates import SeerGates
from seerattn.hf.state import layer_states
from seerattn.selection import HeadBudgets
from seerattn.selection.map_form import PUBLISHED, MapForm

GATE = plain(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
LEARNED = replace(GATE, q_pooling=("salient", "max"), k_pooling=("avg", "salient"))
SPARSE = TopK(density=0.3, rule="row_share")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model and its gates, saved."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    seerattn.attach(model, GATE, SPARSE).save_pretrained(tmp_path / "gates")
    return tmp_path


def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def test_files_hold_the_gates_and_nothing_else(folder: Path) -> None:
    tensors = load_file(folder / "gates" / "adapter_model.safetensors")
    assert sorted(tensors) == [
        f"base_model.model.model.layers.{i}.self_attn.seer_gate.{name}"
        for i in (0, 1)
        for name in ("k_weight", "q_weight")
    ]
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = PeftConfig.from_pretrained(folder / "gates")
    assert isinstance(config, SeerConfig)
    assert AttnGateConfig.from_dict(config.gate) == GATE
    assert seerattn.policy_from_dict(config.policy) == SPARSE
    assert config.base_model["hidden_size"] == 64 and config.base_model["head_dim"] == 32
    assert config.base_model["rope"]["rope_theta"] == 10000


def test_learned_pooling_is_saved_and_loaded(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")  # PEFT warns of a base that it cannot find
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = seerattn.attach(base, LEARNED, SPARSE)
    saved = [state.gate for state in layer_states(model)]
    with torch.no_grad():
        for gate in saved:
            gate.q_salience.normal_()
            gate.k_salience.normal_()
    model.save_pretrained(tmp_path / "gates")
    again = seerattn.attach(tiny_model("llama"), tmp_path / "gates")
    for gate, loaded in zip(saved, [state.gate for state in layer_states(again)], strict=True):
        assert loaded.config == LEARNED
        assert [name for name, _ in loaded.named_parameters()] == ["q_weight", "k_weight", "q_salience", "k_salience"]
        for a, b in zip(gate.parameters(), loaded.parameters()):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "overrides",
    [{"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"hidden_size": 96}],
    ids=["layers", "kv-heads", "width"],
)
def test_gates_reject_a_model_of_other_sizes(folder: Path, overrides: dict) -> None:
    with pytest.raises(ValueError, match="gates must belong to the model"):
        seerattn.attach(tiny_model("llama", **overrides), folder / "gates")


def test_gates_reject_a_model_of_another_rope(folder: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    model = tiny_model("llama", rope_parameters=rope)
    for load in (seerattn.attach, PeftModel.from_pretrained):
        with pytest.raises(ValueError, match=r"gates must belong to the model, got gates for rope = .*10000.*500000"):
            load(model, folder / "gates")
        assert model.config._attn_implementation == "sdpa" and not layer_states(model)


def damage(name: str, gates: Path) -> None:
    weights, config = gates / "adapter_model.safetensors", gates / "adapter_config.json"
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "pickled":
        torch.save(load_file(weights), gates / "adapter_model.bin")
        weights.unlink()
    elif name == "no-weights":
        weights.unlink()
    elif name == "nothing-there":
        shutil.rmtree(gates)
    elif name == "no-config":
        config.unlink()
    elif name == "broken-config":
        config.write_text("{")
    elif name == "other-kind":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    elif name == "no-gates":
        save_file({"x": torch.zeros(1)}, weights)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated", "whole safetensors file"),
        ("pickled", "pickled gates are not read"),
        ("no-weights", "no weights"),
        ("nothing-there", "must be a folder or the name of gates on the Hub"),
        ("no-config", "must be a folder with adapter_config.json"),
        ("broken-config", "must be JSON"),
        ("other-kind", "peft_type"),
        ("no-gates", "must hold gates"),
    ],
)
def test_attach_rejects_damaged_folders(folder: Path, name: str, reason: str) -> None:
    damage(name, folder / "gates")
    model = base(folder)
    with pytest.raises(ValueError, match=reason):
        seerattn.attach(model, folder / "gates")
    assert not layer_states(model)
    if name in ("truncated", "pickled", "no-weights"):
        with pytest.raises(ValueError, match=reason):
            PeftModel.from_pretrained(model, folder / "gates")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # PEFT's own words for the same fault
@pytest.mark.parametrize("named", [True, False], ids=["layers are named", "layers of earlier versions"])
def test_every_path_rejects_gates_that_miss_a_layer(folder: Path, named: bool) -> None:
    weights, config = (folder / "gates" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    save_file({k: v for k, v in load_file(weights).items() if "layers.1" not in k}, weights)
    if not named:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"layers": None}))
    paths = (
        lambda: seerattn.attach(base(folder), folder / "gates"),
        lambda: PeftModel.from_pretrained(base(folder), folder / "gates"),
        lambda: AutoModelForCausalLM.from_pretrained(folder / "gates"),
    )
    reason = "must hold gates of layers|must be finite in every layer"
    for load in paths:
        with pytest.raises(ValueError, match=reason):
            load()(input_ids=tokens(1, 70))
    model = base(folder)
    with pytest.raises(ValueError, match=reason):
        seerattn.attach(model, folder / "gates")
    assert not layer_states(model) and model.config._attn_implementation == "sdpa"


def test_config_rejects_unknown_gate_fields() -> None:
    with pytest.raises(ValueError, match="got 'block'"):
        SeerConfig(gate={"block": 64})
    with pytest.raises(ValueError, match="policy must be one of"):
        SeerConfig(policy={"policy": "Magic"})


@pytest.mark.parametrize("layers", [[], [2], [0, 7]])
def test_attach_rejects_layers_that_do_not_exist(layers: list[int]) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="layers must be among"):
        seerattn.attach(model, GATE, layers=layers)
    assert model.config._attn_implementation == "sdpa"


def test_gates_and_frequencies_stay_fp32_when_the_model_is_cast(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "gates", dtype=torch.bfloat16)
    moved = seerattn.attach(base(folder), folder / "gates").to(torch.bfloat16)
    saved = load_file(folder / "gates" / "adapter_model.safetensors")
    for loaded in (model, moved):
        assert loaded.lm_head.weight.dtype == torch.bfloat16
        for layer, state in enumerate(layer_states(loaded)):
            name = f"base_model.model.model.layers.{layer}.self_attn.seer_gate.k_weight"
            assert torch.equal(state.gate.k_weight, saved[name])
            assert state.gate.inv_freq.dtype == torch.float32
        assert loaded(input_ids=tokens(1, 100)).logits.isfinite().all()


def test_second_attach_is_refused_and_detach_restores(folder: Path) -> None:
    plain = base(folder)
    ids = tokens(1, 130)
    expected = plain(input_ids=ids).logits
    model = seerattn.attach(plain, folder / "gates", impl="reference")
    with pytest.raises(ValueError, match="no gates or selectors yet"):
        seerattn.attach(model, GATE)
    assert not torch.equal(model(input_ids=ids).logits, expected)
    detached = seerattn.detach(model)
    assert torch.equal(detached(input_ids=ids).logits, expected)
    assert not any(isinstance(m, SeerGates) for m in detached.modules())
    with pytest.raises(ValueError, match="must have gates"):
        seerattn.set_policy(detached, SPARSE)
    with pytest.raises(ValueError, match="cannot be merged"):
        seerattn.attach(detached, folder / "gates").merge_and_unload()


def loaded_by_transformers(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "gates")


def loaded_into_a_model(folder: Path) -> torch.nn.Module:
    model = base(folder)
    model.load_adapter(str(folder / "gates"))
    return model


@pytest.mark.parametrize(
    "load",
    [
        loaded_by_transformers,
        loaded_into_a_model,
        lambda folder: PeftModel.from_pretrained(base(folder), folder / "gates"),
        lambda folder: seerattn.attach(base(folder), folder / "gates"),
    ],
    ids=["from_pretrained", "load_adapter", "PeftModel", "attach"],
)
@pytest.mark.parametrize("replaced", [False, True], ids=["gates", "selector over gates"])
def test_detach_restores_the_model_however_the_gates_were_loaded(folder: Path, load, replaced: bool) -> None:
    plain, ids = base(folder), tokens(1, 130)
    model = load(folder)
    if replaced:
        seerattn.attach(model, lambda layer: None)
    else:
        seerattn.set_policy(model, SPARSE, impl="reference")
        assert not torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    detached = seerattn.detach(model)
    assert detached.state_dict().keys() == plain.state_dict().keys() and not layer_states(detached)
    assert [*dict(detached.named_modules())] == [*dict(plain.named_modules())]
    assert detached.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    assert torch.equal(detached(input_ids=ids).logits, plain(input_ids=ids).logits)
    # Gates that are attached again are those of a model that never had any.
    first, again = (seerattn.attach(m, folder / "gates", impl="reference") for m in (plain, detached))
    assert torch.equal(again(input_ids=ids).logits, first(input_ids=ids).logits)


def test_detach_restores_a_model_whose_loaded_gates_were_deleted_before(folder: Path) -> None:
    plain, model, ids = base(folder), loaded_into_a_model(folder), tokens(1, 130)
    model.delete_adapter("default")
    detached = seerattn.detach(model)
    assert not hasattr(detached, "peft_config") and not layer_states(detached)
    assert detached.config._attn_implementation == "sdpa"
    assert torch.equal(detached(input_ids=ids).logits, plain(input_ids=ids).logits)
    detached.load_adapter(str(folder / "gates"))
    assert detached.__dict__["_hf_peft_config_loaded"] and len(layer_states(detached)) == 2


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # PEFT's, of two adapters
def test_detach_leaves_other_adapters_of_transformers(folder: Path) -> None:
    ids, lora = tokens(1, 100), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = base(folder)
    model.add_adapter(lora, "lora")
    expected = model(input_ids=ids).logits
    model.load_adapter(str(folder / "gates"), "gates")
    seerattn.detach(model)
    model.set_adapter("lora")
    assert list(model.peft_config) == ["lora"] and torch.equal(model(input_ids=ids).logits, expected)


def test_what_is_no_policy_is_refused_and_leaves_the_model_as_it_was(folder: Path) -> None:
    model = base(folder)
    for wrong in (0.1, "topk", TopK):
        with pytest.raises(ValueError, match=r"policy must be a policy such as TopK\(density=0.1\)"):
            seerattn.attach(model, folder / "gates", wrong)
        assert not layer_states(model) and model.config._attn_implementation == "sdpa"
    gated = seerattn.attach(model, folder / "gates")
    with pytest.raises(ValueError, match="policy must be a policy"):
        seerattn.set_policy(gated, 0.1)
    assert gated.active_peft_config.policy == SPARSE.to_dict()


def test_two_sets_of_gates_switch(folder: Path) -> None:
    other = seerattn.attach(base(folder), GATE, KeepAll())
    other.save_pretrained(folder / "other")
    model = seerattn.attach(base(folder), folder / "gates", impl="reference")
    ids = tokens(1, 130)
    sparse = model(input_ids=ids).logits
    model.load_adapter(str(folder / "other"), "other")
    model.set_adapter("other")
    assert (model(input_ids=ids).logits - base(folder)(input_ids=ids).logits).abs().max() < 2e-5
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, sparse)


def cross_entropy(gate: AttnGate, q: Tensor, k: Tensor, target: Tensor, segment_ids: Tensor | None):
    rows = -(target * gate(q, k).softmax(-1).clamp(min=1e-9).log()).sum(-1)
    return rows.mean(), {"rows": torch.tensor(float(rows.numel()))}


MEAN_SQUARE = replace(GATE, target_keys="sum", target_power=2)


@pytest.mark.parametrize("config", [GATE, LEARNED, MEAN_SQUARE], ids=["pooled", "learned-pooling", "mean-square"])
def test_losses_and_gradients_match_plain_autograd(config: AttnGateConfig) -> None:
    """The oracle recomputes queries and keys from the projections and keeps one graph over all layers."""
    model = seerattn.attach(tiny_model("llama"), config).train()
    seen: dict[tuple[int, str], Tensor] = {}
    inner = model.get_base_model().model
    for i, layer in enumerate(inner.layers):
        for side in "qkv":
            projection = getattr(layer.self_attn, f"{side}_proj")
            projection.register_forward_hook(lambda m, a, out, key=(i, side): seen.update({key: out}))
    ids = tokens(2, 100)
    losses = GateLosses(cross_entropy)
    out = model(input_ids=ids, labels=ids, gate_losses=losses, use_cache=False, logits_to_keep=1)
    assert out.logits.shape[1] == 1 and not out.logits.requires_grad
    out["loss"].backward()
    gates = [state.gate for state in layer_states(model)]
    got = [[p.grad.clone() for p in gate.parameters()] for gate in gates]
    model.zero_grad()

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = inner.rotary_emb(torch.zeros(1), torch.arange(100)[None])
    total = 0.0
    for i, gate in enumerate(gates):
        q, k = (seen[i, side].detach().unflatten(-1, (-1, 32)).transpose(1, 2) for side in "qk")
        form = MapForm("sum", 2) if config == MEAN_SQUARE else PUBLISHED
        target = attention_map(*apply_rotary_pos_emb(q, k, cos, sin), form=form, block_q=32, block_k=32).map
        total = total + cross_entropy(gate, q, k, target, None)[0] / 2
    total.backward()
    assert torch.allclose(out["loss"], total, rtol=1e-5)
    for gate, grads in zip(gates, got):
        for parameter, grad in zip(gate.parameters(), grads):
            assert (parameter.grad - grad).abs().max() < 1e-4 * parameter.grad.abs().max()
    assert not [n for n, p in model.named_parameters() if p.grad is not None and "seer_gate" not in n]
    assert losses.metrics()[0].keys() == {"loss", "rows"}


def recorded(model: torch.nn.Module, **inputs) -> list[tuple[Tensor, Tensor]]:
    """Pooled un-rotated keys, target and segments of every loss call."""
    calls = []

    def remember(gate, q, k, target, segment_ids):
        calls.append((k.features, target, segment_ids))
        return cross_entropy(gate, q, k, target, segment_ids)

    model(**inputs, gate_losses=GateLosses(remember), use_cache=False)
    return calls


def test_training_on_a_padded_batch_sees_the_rows_as_if_alone() -> None:
    model = seerattn.attach(tiny_model("llama", torch.float64), GATE).train()
    ids = tokens(2, 100)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :37] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = recorded(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = [recorded(model, input_ids=ids[:1]), recorded(model, input_ids=ids[1:, 37:])]
    for layer in (0, 1):
        for row in (0, 1):
            for a, b in zip(together[2 * layer + row][:2], alone[row][layer][:2]):
                assert a.shape == b.shape and (a - b).abs().max() < 1e-6


def test_loss_of_a_padded_batch_is_the_mean_of_its_rows_alone_by_their_tokens() -> None:
    model = seerattn.attach(tiny_model("llama", torch.float64), GATE).train()
    ids, starts = tokens(3, 130), (0, 37, 98)
    mask = torch.stack([torch.arange(130) >= start for start in starts]).long()

    def learn(**inputs: Tensor) -> tuple[list[Tensor], list[float]]:
        model.zero_grad()
        losses = GateLosses(cross_entropy)
        model(**inputs, gate_losses=losses, use_cache=False)
        losses.total().backward()
        parameters = [p for state in layer_states(model) for p in state.gate.parameters()]
        logged = [metrics[name] for metrics in losses.metrics().values() for name in ("loss", "rows")]
        return [losses.total().detach(), *(p.grad.clone() for p in parameters)], list(map(float, logged))

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, logged = learn(input_ids=ids, attention_mask=mask, position_ids=positions)
    alone, logged_alone = zip(*(learn(input_ids=row[None, start:]) for row, start in zip(ids, starts)))
    weights = [(130 - start) / (3 * 130 - sum(starts)) for start in starts]
    for x, *parts in zip(found, *alone):
        expected = sum(weight * part for weight, part in zip(weights, parts))
        assert (x - expected).norm() <= 1e-5 * expected.norm()
    for x, *parts in zip(logged, *logged_alone):
        assert x == pytest.approx(sum(weight * part for weight, part in zip(weights, parts)), rel=1e-6)


def test_training_on_packed_documents_sees_no_attention_across_them() -> None:
    model = seerattn.attach(tiny_model("llama", torch.float64), GATE).train()
    ids = tokens(1, 192)
    positions = torch.cat((torch.arange(64), torch.arange(128)))[None]
    packed = recorded(model, input_ids=ids, position_ids=positions)
    alone = [recorded(model, input_ids=ids[:, :64]), recorded(model, input_ids=ids[:, 64:])]
    for layer in (0, 1):
        keys, target, segments = packed[layer]
        assert segments.diff().nonzero()[:, 1].tolist() == [63]
        assert (keys[:, :, 64 // GATE.k_size :] - alone[1][layer][0]).abs().max() < 1e-5
        assert (target[:, :, :2, :2] - alone[0][layer][1]).abs().max() < 1e-6
        assert (target[:, :, 2:, 2:] - alone[1][layer][1]).abs().max() < 1e-6
        assert (target[:, :, 2:, :2] == 0).all()


def test_training_rejects_a_cache_and_a_model_without_gates() -> None:
    model = seerattn.attach(tiny_model("llama"), GATE).train()
    cache = model(input_ids=tokens(1, 64), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="whole causal sequences"):
        model(input_ids=tokens(1, 64), past_key_values=cache, gate_losses=GateLosses(cross_entropy))
    with model.disable_adapter(), pytest.raises(ValueError, match="at least one layer"):
        model(input_ids=tokens(1, 64), gate_losses=GateLosses(cross_entropy))


def test_importing_seerattn_is_enough_for_transformers_to_load_gates(folder: Path) -> None:
    code = f"""
import seerattn, sys
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
import importlib.util; importlib.util.find_spec("peft")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder / "gates")!r})
print(type(model.model.layers[0].self_attn.seer_gate["default"]).__name__)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "AttnGate"


DOWN = "base_model.model.model.layers.0.mlp.down_proj.weight"
GATE_KEY = "base_model.model.model.layers.1.self_attn.seer_gate.k_weight"
HOSTILE = {
    "a weight of the model": lambda t: t | {DOWN: torch.zeros(64, 64)},
    "a weight under a name of transformers": lambda t: t | {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 64)},
    "another kind of adapter": lambda t: (
        t | {GATE_KEY.replace("seer_gate.k_weight", "q_proj.lora_A.weight"): torch.ones(2)}
    ),
    "a buffer of a gate": lambda t: t | {GATE_KEY.replace("k_weight", "inv_freq"): torch.zeros(16)},
    "a gate elsewhere": lambda t: t | {GATE_KEY.replace("self_attn", "mlp"): t[GATE_KEY].clone()},
    "a layer that does not exist": lambda t: t | {GATE_KEY.replace("layers.1", "layers.7"): t[GATE_KEY].clone()},
    "another shape": lambda t: t | {GATE_KEY: torch.zeros(2, 3)},
    "more heads": lambda t: t | {GATE_KEY: torch.cat((t[GATE_KEY], t[GATE_KEY]))},
    "NaN": lambda t: t | {GATE_KEY: t[GATE_KEY].index_fill(0, torch.tensor([1]), float("nan"))},
    "infinity": lambda t: t | {GATE_KEY: t[GATE_KEY] * float("inf")},
    "integers": lambda t: t | {GATE_KEY: t[GATE_KEY].to(torch.int32)},
    "less": lambda t: {key: x for key, x in t.items() if key != GATE_KEY},
}


def budgets(**changes: object) -> dict:
    """Of the gates of two layers with four heads, at one length."""
    rows = [["0.1 0.1 0.3 0.5", "0.2 0.4 0.4 0.4"], ["0.2 0.4 0.8 0.8", "0.4 0.6 0.6 1"]]
    values = {"ladder": [0.3, 0.6], "lengths": [128], "densities": [rows], "block_q": 32, "block_k": 32, "windows": 1}
    return values | {"target": "max:inf", "gain": "max:inf", "text": "0a1b"} | changes


HOSTILE_CONFIGS = {
    "budgets of no kind": {"budgets": [0.1]},
    "budgets of a word": {"budgets": budgets(densities=[[["x"]]])},
    "budgets that miss their mean": {"budgets": budgets(ladder=[0.35, 0.6])},
    "budgets of other blocks": {"budgets": budgets(block_k=64)},
    "budgets of another target": {"budgets": budgets(target="sum:2")},
    "budgets of other heads": {"budgets": budgets(densities=[[["0.3 0.3", "0.3 0.3"], ["0.6 0.6", "0.6 0.6"]]])},
    "budgets of one layer": {"budgets": budgets(densities=[[["0.3 " * 4], ["0.6 " * 4]]])},
    "budgets of three layers": {"budgets": budgets(densities=[[["0.3 " * 4] * 3, ["0.6 " * 4] * 3]])},
    "budgets of other heads where layers are not told": {
        "budgets": budgets(densities=[[["0.3 0.3", "0.3 0.3"], ["0.6 0.6", "0.6 0.6"]]]),
        "layers": None,
    },
    "budgets above the policy": {"budgets": budgets(), "policy": TopK(density=0.2).to_dict()},
    "code to import": {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
    "a gate of no form": {"gate": []},
    "a gate that fills the memory": {"gate": {"gate_dim": 10**9}},
    "a policy of no kind": {"policy": {"policy": "TopK", "density": "x"}},
    "layers that are none": {"layers": ["0", 1.5]},
    "sizes that are none": {"base_model": {"hidden_size": "x"}},
    "a head that is none": {"base_model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": -4}},
    "numbers of layers": {
        "base_model": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        | {"num_hidden_layers": [2, 2]}
    },
    "no sizes": {"base_model": None},
}


def test_budgets_are_used_as_densities_of_heads_and_stay_through_saving_and_loading(folder: Path) -> None:
    """On every path; ``heads="equal"`` and gates without them choose as before."""
    table = HeadBudgets.from_dict(budgets())
    ids = tokens(2, 320)
    plain = seerattn.attach(base(folder), folder / "gates", impl="reference").eval()
    policies = (TopK(density=0.45), TopK(density=0.3, rule="row_share"), TopK(density=0.7))

    @torch.no_grad()
    def logits(model: torch.nn.Module, policy: TopK) -> Tensor:
        seerattn.set_policy(model, policy, impl="reference")
        return model(input_ids=ids).logits

    expected = [logits(plain, replace(policy, density=table.at(policy.density, 320))) for policy in policies]
    equal = [logits(plain, policy) for policy in policies]
    save_settings(folder / "gates", budgets=budgets(), policy=None)
    first = seerattn.attach(base(folder), folder / "gates").eval()
    first.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "adapter_config.json").read_text())["budgets"] == budgets()
    loaded = (
        first,
        seerattn.attach(base(folder), folder / "again").eval(),
        PeftModel.from_pretrained(base(folder), folder / "again").eval(),
        AutoModelForCausalLM.from_pretrained(folder / "again").eval(),
        copy.deepcopy(first),
    )
    for model in loaded:
        for policy, found, same in zip(policies, expected, equal):
            assert torch.equal(logits(model, policy), found)
            assert not torch.equal(found, same)
            assert torch.equal(logits(model, replace(policy, heads="equal")), same)
            with seerattn.policy(model, policy), torch.no_grad():
                assert torch.equal(model(input_ids=ids).logits, found)
        for change in (seerattn.set_policy, lambda *given: seerattn.policy(*given).__enter__()):
            with pytest.raises(ValueError, match=r"density must be 0\.3 to 1.*; use TopK\(heads='equal'\)"):
                change(model, TopK(density=0.2))


def test_each_set_of_gates_has_its_own_budgets(folder: Path) -> None:
    shutil.copytree(folder / "gates", folder / "plain")
    save_settings(folder / "gates", budgets=budgets())
    model = PeftModel.from_pretrained(base(folder), folder / "gates").eval()
    model.load_adapter(folder / "plain", "plain")
    attachment = layer_states(model)[0].attachment

    def used() -> list[HeadBudgets | None]:
        return [attachment.running.budgets, *(s.budgets for s in attachment.running.selectors.values())]

    table = HeadBudgets.from_dict(budgets())
    assert used() == [table] * 3
    model.set_adapter("plain")
    assert used() == [None] * 3
    seerattn.set_policy(model, TopK(density=0.1))
    model.set_adapter("default")
    assert used() == [table] * 3
    model.set_adapter("plain")
    model.delete_adapter("default")
    assert used() == [None] * 3 and attachment.budgets == {"plain": None}


def test_budgets_of_another_model_are_refused_for_fresh_gates_and_leave_the_model_as_it_was(folder: Path) -> None:
    other = budgets(densities=[[["0.3 0.3", "0.3 0.3"], ["0.6 0.6", "0.6 0.6"]]])
    model = base(folder)
    with pytest.raises(ValueError, match=r"layer \{0: 4, 1: 4\}, got budgets for heads by layer \{0: 2, 1: 2\}"):
        get_peft_model(model, SeerConfig(gate=GATE.to_dict(), budgets=other))
    assert not layer_states(model) and model.config._attn_implementation == "sdpa"
    get_peft_model(model, SeerConfig(gate=GATE.to_dict(), budgets=budgets()))
    assert layer_states(model)[0].budgets == HeadBudgets.from_dict(budgets())


def test_settings_that_do_not_fit_the_gates_are_not_written(folder: Path) -> None:
    config = folder / "gates" / "adapter_config.json"
    before = config.read_bytes()
    for name, changes in HOSTILE_CONFIGS.items():
        if name.startswith("budgets"):
            with pytest.raises(ValueError, match="must"):
                save_settings(folder / "gates", **changes)
    assert config.read_bytes() == before and not list(config.parent.glob("*.part"))


def test_attach_rejects_a_policy_below_the_budgets_and_leaves_the_model_as_it_was(folder: Path) -> None:
    save_settings(folder / "gates", budgets=budgets())
    model = base(folder)
    with pytest.raises(ValueError, match=r"density must be 0\.3 to 1"):
        seerattn.attach(model, folder / "gates", TopK(density=0.1))
    assert not layer_states(model) and model.config._attn_implementation == "sdpa"
    seerattn.attach(model, folder / "gates", TopK(density=0.1, heads="equal"))


def test_chunks_and_padded_rows_share_densities_as_one_shot_and_rows_alone(folder: Path) -> None:
    one = budgets()["densities"][0]
    two = [["0.3 0.3 0.3 0.3"] * 2, ["0.9 0.9 0.3 0.3", "0.3 0.3 0.9 0.9"]]
    save_settings(folder / "gates", budgets=budgets(lengths=[96, 512], densities=[two, one]))
    model = seerattn.attach(base(folder).double(), folder / "gates", impl="reference").eval()
    ids = tokens(1, 320)
    for policy in (TopK(density=0.5, length=320), TopK(density=0.5, rule="row_share")):
        seerattn.set_policy(model, policy)
        with torch.no_grad():
            whole, cache = model(input_ids=ids).logits, DynamicCache()
            parts = [
                model(input_ids=ids[:, begin:end], past_key_values=cache).logits
                for begin, end in ((0, 128), (128, 192), (192, 320))
            ]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
    lengths = (192, 100, 40)
    mask = (torch.arange(192, 0, -1) <= torch.tensor(lengths)[:, None]).long()
    padded, positions = tokens(3, 192) * mask, (mask.cumsum(1) - 1).clamp(min=0)
    for policy in (TopK(density=0.5), TopK(density=0.5, rule="row_share")):
        seerattn.set_policy(model, policy)
        with torch.no_grad():
            together = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
            for row, length in enumerate(lengths):
                alone = model(input_ids=padded[row : row + 1, -length:]).logits
                assert torch.allclose(together[row : row + 1, -length:], alone, atol=1e-10)


def by_name(model: torch.nn.Module, gates: Path) -> torch.nn.Module:
    model.load_adapter(str(gates))
    return model


@pytest.mark.parametrize(
    "load", [seerattn.attach, PeftModel.from_pretrained, by_name], ids=["attach", "PEFT", "transformers"]
)
@pytest.mark.parametrize("damaged", [*HOSTILE, *HOSTILE_CONFIGS])
def test_folder_that_is_more_or_less_than_gates_is_refused_before_anything_is_loaded(
    folder: Path, damaged: str, load
) -> None:
    weights, config = (folder / "gates" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    if damaged in HOSTILE:
        save_file(HOSTILE[damaged](load_file(weights)), weights)
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | HOSTILE_CONFIGS[damaged]))
    model, plain = base(folder), base(folder)
    with pytest.raises(ValueError, match="must"):
        load(model, folder / "gates")
    assert not layer_states(model) and model.config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(x, plain.state_dict()[key]) for key, x in model.state_dict().items())
    # Good gates are welcome afterwards.
    seerattn.attach(base(folder), GATE, SPARSE).save_pretrained(folder / "good")
    ids = tokens(1, 130)
    first, again = (seerattn.attach(m, folder / "good", impl="reference") for m in (plain, model))
    assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)
