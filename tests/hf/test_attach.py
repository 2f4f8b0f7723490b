"""Attaching selectors that are not gates, with hooks alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, tokens

import seerattn
from seerattn import AttnGateConfig, BlockIndices, KeepAll, TopK
from seerattn.hf import attention
from seerattn.hf.state import layer_states


class Window:
    """First block and the diagonal."""

    def select(self, q, k, context) -> BlockIndices:
        blocks = -(-k.shape[2] // 32)
        mask = torch.eye(blocks, dtype=torch.bool)
        mask[:, 0] = True
        start = k.shape[2] - q.shape[2]
        mask = mask[start // 32 :].expand(q.shape[0], q.shape[1], -1, -1)
        return BlockIndices.from_mask(mask, block_q=32, block_k=32, q_start=start, q_len=q.shape[2])


class All(Window):
    def select(self, q, k, context) -> BlockIndices:
        sizes = {"q_len": q.shape[2], "k_len": k.shape[2], "block_q": 32, "block_k": 32}
        return BlockIndices.dense(batch=q.shape[0], heads=q.shape[1], **sizes)


def test_selector_runs_on_the_model_itself_and_detaches() -> None:
    model, ids = tiny_model("llama"), tokens(1, 200)
    names, dense = list(model.state_dict()), model(ids).logits
    assert seerattn.attach(model, All(), impl="reference") is model
    assert list(model.state_dict()) == names
    assert (model(ids).logits - dense).abs().max() < 2e-5
    seerattn.attach(model, Window(), impl="reference")
    with seerattn.record_density(model) as meter:
        sparse = model(ids).logits
    assert meter.mean() == pytest.approx(13 / 28)
    assert (sparse - dense).abs().max() > 1e-2
    seerattn.set_policy(model, None)
    assert torch.equal(model(ids).logits, dense)
    assert seerattn.detach(model) is model
    assert model.config._attn_implementation == "sdpa" and not layer_states(model)
    assert torch.equal(model(ids).logits, dense)
    assert seerattn.detach(model) is model


def test_selector_per_layer_leaves_other_layers_dense() -> None:
    model, ids = tiny_model("llama"), tokens(1, 200)
    seerattn.attach(model, lambda layer: Window() if layer == 1 else None, impl="reference")
    with seerattn.record_density(model) as meter:
        chosen = model(ids).logits
    assert meter.layers == [1]
    seerattn.attach(model, Window(), impl="reference", layers=[1])
    assert torch.equal(model(ids).logits, chosen)


def test_another_implementation_is_dense_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._warn_of_implementation.cache_clear()
    ids = tokens(1, 200)
    selected = seerattn.attach(tiny_model("llama"), Window(), impl="reference")
    gated = seerattn.attach(tiny_model("llama"), AttnGateConfig(block_q=32), TopK(density=0.2), impl="reference")
    for model in (selected, gated):
        sparse = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        plain = tiny_model("llama")
        plain.set_attn_implementation("eager")
        assert not caplog.messages
        for _ in range(2):
            assert torch.equal(model(input_ids=ids).logits, plain(ids).logits)
        (message,) = caplog.messages
        assert "'eager'" in message and "set_attn_implementation('seer_attention_eager')" in message
        model.set_attn_implementation("seer_attention")
        assert torch.equal(model(input_ids=ids).logits, sparse)
        caplog.clear()
        attention._warn_of_implementation.cache_clear()


def test_selector_replaces_gates_until_the_policy_is_set_again() -> None:
    gate = AttnGateConfig(block_q=32, block_k=32)
    model = seerattn.attach(tiny_model("llama"), gate, TopK(density=0.7), impl="reference").eval()
    ids = tokens(1, 200)
    gated = model(input_ids=ids).logits
    seerattn.attach(model, Window(), impl="reference")
    windowed = model(input_ids=ids).logits
    assert torch.equal(windowed, seerattn.attach(tiny_model("llama"), Window(), impl="reference")(ids).logits)
    assert not torch.equal(windowed, gated)
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=ids).logits, windowed)
    assert torch.equal(model(input_ids=ids).logits, windowed)
    seerattn.set_policy(model, TopK(density=0.7))
    assert torch.equal(model(input_ids=ids).logits, gated)


def test_lora_under_a_selector_is_seen_by_it() -> None:
    """Un-rotation starts from what the layer really computed, so adapters on the projections are in it."""

    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    )
    seen = {}

    class Watch(All):
        def select(self, q, k, context) -> BlockIndices:
            seen[context.layer] = context.unrotate(k, 0)
            return super().select(q, k, context)

    seerattn.attach(model, Watch(), impl="reference")
    layer = model.get_base_model().model.layers[0].self_attn
    layer.k_proj.register_forward_hook(lambda m, a, out: seen.update(projected=out))
    model(input_ids=tokens(1, 100))
    assert torch.allclose(seen[0], seen["projected"].unflatten(-1, (-1, 32)).transpose(1, 2), atol=1e-5)


def test_attach_rejects_what_does_not_fit() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="policy must be None"):
        seerattn.attach(model, Window(), KeepAll())
    with pytest.raises(
        ValueError, match="impl must be one of auto, sparse, gluon, triton, flash4, reference, got 'magic'"
    ):
        seerattn.attach(model, Window(), impl="magic")
    for wrong in (None, 3, 0.1):
        with pytest.raises(ValueError, match=f"gates must be a folder, .* got {wrong}"):
            seerattn.attach(model, wrong)
    with pytest.raises(ValueError, match="layers must be among"):
        seerattn.attach(model, Window(), layers=[5])
    seerattn.attach(model, Window())
    with pytest.raises(ValueError, match="no gates or selectors yet"):
        seerattn.attach(model, AttnGateConfig())
    with pytest.raises(ValueError, match="must have gates for a policy"):
        seerattn.set_policy(model, KeepAll())
