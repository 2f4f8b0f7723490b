"""Where gates go, and to which models: their layer's device, and any class around the same sizes and RoPE."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel
from tiny_models import SIZES, tiny_model, tokens
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import seerattn
from seerattn import AttnGateConfig, TopK
from seerattn.hf.state import layer_states

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
IDS = tokens(2, 130)
PATHS = {
    "attach": lambda model, gates: seerattn.attach(model, gates, impl="reference"),
    "PEFT": lambda model, gates: by_peft(model, gates),
    "PEFT, low memory": lambda model, gates: by_peft(model, gates, low_cpu_mem_usage=True),
}


def by_peft(model: nn.Module, gates: Path, **options: bool) -> PeftModel:
    # It dispatches a model anew that is offloaded in part.
    return PeftModel.from_pretrained(model, gates, offload_dir=str(gates.parent / "offloaded"), **options)


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    seerattn.attach(base, GATE, SPARSE).save_pretrained(tmp_path / "gates")
    return tmp_path / "gates"


@torch.no_grad()
def hidden(model: nn.Module, **options) -> Tensor:
    return model(input_ids=IDS, output_hidden_states=True, **options).hidden_states[-1]


def expected(gates: Path) -> Tensor:
    return hidden(seerattn.attach(tiny_model("llama"), gates, impl="reference"))


def loaded(model: nn.Module, path: str, gates: Path) -> nn.Module:
    gated = PATHS[path](model, gates)
    seerattn.set_policy(gated, SPARSE, impl="reference")
    return gated


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    disk_offload(model, folder, execution_device="cpu")
    return model


OFFLOADED: dict[str, Callable[[PreTrainedModel, Path], nn.Module]] = {
    "whole": lambda model, folder: model,
    "in memory": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "on disk": on_disk,
    "in part": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        | {"model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu",
        offload_dir=folder,
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", OFFLOADED)
def test_gates_go_where_their_layer_runs(place: str, path: str, gates: Path, tmp_path: Path) -> None:
    model = OFFLOADED[place](tiny_model("llama"), tmp_path / "weights")
    gated = loaded(model, path, gates)
    assert all(not p.is_meta for state in layer_states(gated) for p in state.gate.parameters())
    assert torch.equal(hidden(gated), expected(gates))
    assert torch.equal(hidden(seerattn.detach(gated)), hidden(tiny_model("llama")))


def test_gates_on_a_model_without_weights_are_a_plan_and_do_not_run(gates: Path) -> None:
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    gated = seerattn.attach(model, gates)
    assert [state.gate.num_heads for state in layer_states(gated)] == [4, 4]
    with pytest.raises(ValueError, match="must be attached to a model with weights"):
        gated(input_ids=IDS)


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    return model.model


def classifier(model: PreTrainedModel) -> PreTrainedModel:
    found = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval()
    found.model.load_state_dict(model.model.state_dict())
    return found


def vision_language(model: PreTrainedModel) -> PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        text_config=LlamaConfig(**SIZES),
        vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        image_token_index=96,
        pad_token_id=0,
    )
    found = tf.LlavaForConditionalGeneration(config).eval()
    found.model.language_model.load_state_dict(model.model.state_dict())
    return found


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("around", [backbone, classifier, vision_language])
def test_gates_fit_every_class_around_the_same_text_model(around, path: str, gates: Path) -> None:
    if path != "attach" and not hasattr(PeftModel, "get_layer_status"):
        pytest.skip("names of layers are mapped by newer versions of PEFT")
    model = around(tiny_model("llama"))
    before = hidden(model)
    gated = loaded(model, path, gates)
    assert torch.equal(hidden(gated), expected(gates)) and not torch.equal(before, expected(gates))
    detached = seerattn.detach(gated)
    assert torch.equal(hidden(detached), before)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers = 2 and .* num_hidden_layers = 3"),
        ({"num_attention_heads": 8}, "num_attention_heads = 4 and .* num_attention_heads = 8"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 2 and .* num_key_value_heads = 4"),
        ({"head_dim": 64}, "head_dim = 32 and .* head_dim = 64"),
        ({"hidden_size": 96}, "hidden_size = 64 and .* hidden_size = 96"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope = .*10000.* rope = .*500000"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope = .* rope = .*linear"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_error_names_the_field_in_which_another_model_differs(
    path: str, overrides: dict, field: str, gates: Path
) -> None:
    model = tiny_model("llama", **overrides)
    with pytest.raises(ValueError, match=f"gates must belong to the model, got gates for {field}"):
        PATHS[path](model, gates)
    assert not layer_states(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rope", [None, [], "default", 1e4, True], ids=repr)
def test_gates_whose_rope_is_no_object_are_those_of_no_model(rope: object, path: str, gates: Path) -> None:
    config = json.loads((gates / "adapter_config.json").read_text())
    config["base_model"]["rope"] = rope
    (gates / "adapter_config.json").write_text(json.dumps(config))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="gates must belong to the model, got gates for rope = "):
        PATHS[path](model, gates)
    assert not layer_states(model) and model.config._attn_implementation == "sdpa"


def test_gates_of_a_model_are_where_training_of_it_with_a_longer_context_begins(gates: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    model = seerattn.attach(tiny_model("llama", rope_parameters=rope), gates, impl="reference")
    assert hidden(model).isfinite().all() and not torch.equal(hidden(model), expected(gates))
    other = tiny_model("llama", rope_parameters=rope | {"rope_theta": 2e4})
    with pytest.raises(ValueError, match="rope = "):
        seerattn.attach(other, gates)


def test_vision_tower_keeps_its_own_attention() -> None:
    model = vision_language(tiny_model("llama"))
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    names = {key: m.config._attn_implementation for key, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    gated = seerattn.attach(model, GATE, SPARSE)
    kept = {key: m.config._attn_implementation for key, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    text = {key for key, name in kept.items() if name == "seer_attention"}
    assert text and all(kept[key] == names[key] for key in names if key not in text)
    assert all("vision" not in key for key in text)
    seerattn.detach(gated)
    again = {key: m.config._attn_implementation for key, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    assert again == names


@torch.no_grad()
def test_layers_on_several_devices_write_as_in_one_and_share_no_batch(gates: Path, tmp_path: Path) -> None:
    decode = seerattn.TokenBudget(tokens=64)
    found = []
    for place in ("whole", "in part"):
        model = seerattn.attach(OFFLOADED[place](tiny_model("llama"), tmp_path), gates, impl="reference")
        seerattn.set_policy(model, SPARSE, decode_policy=decode, impl="reference")
        with seerattn.record_density(model) as meter:
            written = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
        found.append((written, meter.mean(), meter.decode.mean()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    model = tiny_model("llama")
    gated = seerattn.attach(model, gates, SPARSE)
    add_hook_to_module(model.model.layers[1].self_attn, AlignDevicesHook(execution_device="meta"))
    with pytest.raises(ValueError, match="all layers on one device, where its pages are, got cpu, meta; use generate"):
        gated.generate_batch([IDS[0].tolist()])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a sharded model needs two GPUs")
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_sharded_model_gives_what_it_gives_on_one_device(path: str, gates: Path) -> None:
    places = {"embed_tokens": 0, "layers.0": 0, "layers.1": 1, "norm": 1, "rotary_emb": 0}
    sharded = dispatch_model(tiny_model("llama"), {f"model.{k}": v for k, v in places.items()} | {"lm_head": 1})
    one, two = (loaded(model, path, gates) for model in (tiny_model("llama").cuda(), sharded))
    ids = tokens(2, 700).cuda()
    mask = torch.ones_like(ids)
    mask[1, 600:] = 0
    for impl in ("sparse", "auto"):
        found = []
        for model in (one, two):
            seerattn.set_policy(model, SPARSE, impl=impl)
            with seerattn.record_density(model) as meter:
                logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
                cache = model(input_ids=ids[:, :400], use_cache=True).past_key_values
                later = model(input_ids=ids[:, 400:], past_key_values=cache).logits
            found.append([logits.cpu(), later.cpu(), meter.mean()])
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*found))
    assert [state.gate.k_weight.device.index for state in layer_states(two)] == [0, 1]
