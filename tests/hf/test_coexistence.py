"""Gates beside other adapters: only our own layers are ever touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.state import layer_states

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.3, rule="row_share", sink_blocks=0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
IDS = tokens(2, 130)
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def lora(targets: list[str] | str = TARGETS) -> LoraConfig:
    return LoraConfig(target_modules=targets, init_lora_weights=False, r=4)


def by_peft(model: nn.Module, targets: list[str] | str = TARGETS) -> nn.Module:
    torch.manual_seed(7)
    return get_peft_model(model, lora(targets))


def by_transformers(model: PreTrainedModel, targets: list[str] | str = TARGETS) -> PreTrainedModel:
    torch.manual_seed(7)
    model.add_adapter(lora(targets), "lora")
    return model


def plain() -> PreTrainedModel:
    return tiny_model("llama", torch.float64)


def attached(model: nn.Module, policy: Any = None) -> nn.Module:
    return seerattn.attach(model, GATE, policy or KeepAll(), impl="reference")


def frozen(model: nn.Module) -> nn.Module:
    for state in layer_states(model):
        state.gate.requires_grad_(False)
    return model


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def facts(model: nn.Module) -> dict[str, Any]:
    """All that a careful neighbour leaves alone, under names that our own parts are left out of."""
    own = ("seer_gate", "seer_status", "gate_switch")
    state = {name: x.clone() for name, x in model.state_dict().items() if not any(o in name for o in own)}
    modules = {name: m for name, m in model.named_modules() if not any(o in name for o in own)}
    return {
        "weights": state,
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters() if "seer_gate" not in n},
        "training": {name: m.training for name, m in modules.items()},
        "classes": {name: type(m).__name__ for name, m in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._backward_hooks)) for name, m in modules.items()},
        "dtypes": {name: x.dtype for name, x in state.items()},
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in a:
        if key == "weights":
            assert a[key].keys() == b[key].keys()
            assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
        else:
            assert a[key] == b[key], key


BEFORE = {
    "no adapter": lambda: plain(),
    "LoRA of PEFT": lambda: by_peft(plain()),
    "LoRA of transformers": lambda: by_transformers(plain()),
    "LoRA of PEFT, not on attention": lambda: by_peft(plain(), ["up_proj"]),
}


@pytest.mark.parametrize("before", BEFORE)
def test_attach_and_detach_leave_everything_else_bit_for_bit(before: str, tmp_path: Path) -> None:
    model = BEFORE[before]()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.model.layers[1].mlp.eval()
    configs = dict(getattr(base, "peft_config", {}))
    found, expected = facts(model), logits(model)
    gated = attached(model, SPARSE)
    assert_same(facts(model), found)
    assert difference(logits(gated), expected) > 1e-2
    seerattn.set_policy(gated, None)
    assert torch.equal(logits(gated), expected)
    seerattn.set_policy(gated, SPARSE)
    with gated.disable_adapter():
        assert torch.equal(logits(gated), expected)
        assert_same(facts(model), found)
    gated.save_pretrained(tmp_path / "gates")
    assert all("seer_gate" in name for name in load_file(tmp_path / "gates" / "adapter_model.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["gates"] and not [
        p for p in (tmp_path / "gates").iterdir() if p.is_dir()
    ]
    assert seerattn.detach(gated) is model
    assert_same(facts(model), found)
    assert torch.equal(logits(model), expected) and not layer_states(model)
    assert getattr(base, "peft_config", {}) == configs


@pytest.mark.parametrize("before", BEFORE)
def test_refused_attach_leaves_everything_bit_for_bit(before: str, tmp_path: Path) -> None:
    attached(tiny_model("llama", num_hidden_layers=3)).save_pretrained(tmp_path / "others")
    model = BEFORE[before]()
    found, expected = facts(model), logits(model)
    for gates, options in ((tmp_path / "others", {}), (GATE, {"layers": [7]}), (GATE, {"policy": "topk"})):
        with pytest.raises(ValueError, match="must"):
            seerattn.attach(model, gates, **options)
        assert_same(facts(model), found)
        assert torch.equal(logits(model), expected) and not layer_states(model)


ORDERS: dict[str, Callable[[Any], nn.Module]] = {
    "PEFT, gates first": lambda targets: by_peft(frozen(attached(plain())), targets),
    "PEFT, gates last": lambda targets: frozen(attached(by_peft(plain(), targets))),
    "transformers, gates last": lambda targets: frozen(attached(by_transformers(plain(), targets))),
    "transformers, gates first": lambda targets: (
        lambda gated: (by_transformers(gated.get_base_model(), targets), gated)[1]
    )(frozen(attached(plain()))),
}


def trained(model: nn.Module) -> list[float]:
    """Losses of some steps of LoRA alone."""
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(parameters) > 0 and all(p.requires_grad for p in parameters)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "seer_gate" in name]
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("targets", [TARGETS, "all-linear", ["v_proj"]], ids=["named", "all-linear", "one"])
@pytest.mark.parametrize("order", ORDERS)
def test_lora_trains_and_merges_beside_gates_that_keep_all_as_it_does_without(order: str, targets: Any) -> None:
    alone = (by_transformers if order.startswith("transformers") else by_peft)(plain(), targets).train()
    model = ORDERS[order](targets).train()
    names = [
        {n.split("base_model.model.")[-1] for n, _ in m.named_parameters() if "lora_" in n} for m in (alone, model)
    ]
    assert names[0] == names[1]
    assert difference(logits(model), logits(alone)) < 1e-10
    losses = trained(model), trained(alone)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][0] != losses[0][-1]
    assert difference(logits(model), logits(alone)) < 1e-8
    if order == "PEFT, gates first":
        merged, expected = model.merge_and_unload(), alone.merge_and_unload()
        assert difference(logits(merged), logits(expected)) < 1e-8
        assert layer_states(merged) and not [n for n, _ in merged.named_parameters() if "lora_" in n]
    elif order == "PEFT, gates last":
        merged, expected = model.get_base_model().merge_and_unload(), alone.merge_and_unload()
        assert difference(logits(merged), logits(expected)) < 1e-8 and layer_states(merged)


def test_adapter_around_gates_keeps_its_configs_and_files_apart_from_theirs(tmp_path: Path) -> None:
    gated = attached(plain(), SPARSE)
    around = by_peft(gated)
    assert [type(c).__name__ for c in around.peft_config.values()] == ["LoraConfig"]
    assert gated.active_peft_config.policy == SPARSE.to_dict()
    around.save_pretrained(tmp_path / "lora")
    gated.save_pretrained(tmp_path / "gates")
    names = [load_file(tmp_path / kind / "adapter_model.safetensors").keys() for kind in ("lora", "gates")]
    assert all("lora_" in name for name in names[0]) and all("seer_gate" in name for name in names[1])
    sparse = logits(around)
    again = PeftModel.from_pretrained(seerattn.attach(plain(), tmp_path / "gates", impl="reference"), tmp_path / "lora")
    assert difference(logits(again), sparse) < 1e-12
    with around.disable_adapter():
        only_gates = logits(around)
    with gated.disable_adapter():
        only_lora = logits(around)
    assert torch.equal(only_gates, logits(attached(plain(), SPARSE)))
    assert torch.equal(only_lora, logits(by_peft(plain()))) and torch.equal(logits(around), sparse)
    seerattn.set_policy(around, KeepAll())
    assert gated.active_peft_config.policy == KeepAll().to_dict()
    assert difference(logits(around), only_lora) < 1e-10
    assert seerattn.detach(around) is around
    assert torch.equal(logits(around), only_lora)


def test_switches_of_transformers_reach_the_gates_that_it_loaded_and_no_others(tmp_path: Path) -> None:
    attached(plain(), SPARSE).save_pretrained(tmp_path / "gates")
    model = by_transformers(plain())
    dense = logits(model)
    model.load_adapter(str(tmp_path / "gates"), "gates")
    seerattn.set_policy(model, SPARSE, impl="reference")
    sparse = logits(model)
    assert difference(sparse, dense) > 1e-2
    model.set_adapter("lora")
    assert torch.equal(logits(model), sparse), "an adapter that is switched on leaves the gates as they are"
    model.disable_adapters()
    assert torch.equal(logits(model), logits(plain()))
    model.enable_adapters()
    assert torch.equal(logits(model), sparse)
    model.set_adapter("lora")
    model.delete_adapter("gates")
    assert torch.equal(logits(model), dense)
