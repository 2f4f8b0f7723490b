"""What is seen of watched attention, and that a watched model computes what it always does."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import EAGER, SUPPORTED, tiny_model, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import seerattn
from seerattn import AttnGateConfig, BlockIndices, TopK
from seerattn.hf.capture import AttentionCall, watch_attention
from seerattn.hf.probe import probe
from seerattn.hf.state import layer_states


def attention(call: AttentionCall) -> Tensor:
    """The output ``[B, T, H, D]`` of a call, written out in fp64."""
    groups = call.query.shape[1] // call.key.shape[1]
    q, k, v = call.query.double(), *(x.double().repeat_interleave(groups, 1) for x in (call.key, call.value))
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    q_len, k_len = scores.shape[-2:]
    future = torch.arange(k_len) > torch.arange(k_len - q_len, k_len)[:, None]
    scores = scores.masked_fill(future, -torch.inf)
    if call.sinks is not None:
        scores = torch.cat((scores, call.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:2], q_len, 1)), -1)
    return (scores.softmax(-1)[..., :k_len] @ v).transpose(1, 2)


@pytest.mark.parametrize("name", SUPPORTED)
def test_watched_calls_are_the_attention_of_the_layers_that_attach_serves(name: str) -> None:
    model = tiny_model(name, torch.float32 if name in EAGER else torch.float64)
    ids, calls = tokens(2, 133), []
    before, implementation = model(ids).logits, model.config._attn_implementation
    with watch_attention(model, calls.append):
        watched = model(ids).logits
    assert torch.equal(watched, before) and torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == implementation
    assert [call.layer for call in calls] == [layer.layer for layer in probe(model)]
    for call in calls:
        assert call.query.shape == (2, 4, 133, 32) and call.key.shape == call.value.shape
        error = (call.output.double() - attention(call)).abs().max()
        assert error <= (1e-5 if name in EAGER else 1e-12), f"layer {call.layer} of {name}"


def test_watched_chunks_have_their_keys_and_decode_steps_are_not_seen() -> None:
    model, calls = tiny_model("llama", torch.float64), []
    ids, cache = tokens(1, 101), DynamicCache(config=model.config)
    expected = model(ids).logits[:, -1]
    with watch_attention(model, calls.append):
        model(ids[:, :60], past_key_values=cache)
        model(ids[:, 60:100], past_key_values=cache)
        last = model(ids[:, 100:], past_key_values=cache).logits[:, -1]
    assert [(c.query.shape[2], c.key.shape[2]) for c in calls] == [(60, 60)] * 2 + [(40, 100)] * 2
    assert all((call.output - attention(call)).abs().max() <= 1e-12 for call in calls)
    assert (last - expected).abs().max() <= 1e-10


def test_watched_outputs_are_what_the_loss_depends_on() -> None:
    """The gradient of the loss at a layer's output, against a finite difference of the output itself."""
    model, calls, ids = tiny_model("llama", torch.float64), [], tokens(1, 70)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def loss() -> Tensor:
        return F.cross_entropy(model(inputs_embeds=embeddings).logits[0, :-1], ids[0, 1:])

    with watch_attention(model, calls.append):
        watched = loss()
    [gradient] = torch.autograd.grad(watched, [calls[1].output])
    step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = probe(model)[1].module

    def moved(size: float) -> float:
        shift = size * step.flatten(2)
        hook = module.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + shift,))
        try:
            with torch.no_grad():
                return float(loss())
        finally:
            hook.remove()

    # The norms round to fp32: a smaller step is lost in that.
    difference = (moved(3e-3) - moved(-3e-3)) / 6e-3
    assert difference == pytest.approx(float((gradient * step).sum()), rel=1e-3)


def test_watching_restores_a_model_that_failed() -> None:
    model, ids = tiny_model("llama"), tokens(1, 70)

    def fail(call: AttentionCall) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watch_attention(model, fail):
        model(ids)
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer.module._forward_pre_hooks for layer in probe(model))


def test_watching_rejects_padding_and_packed_documents() -> None:
    model, mask = tiny_model("llama"), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    with watch_attention(model, lambda call: None):
        with pytest.raises(ValueError, match="attention_mask must be None"):
            model(tokens(2, 40), attention_mask=mask)
        with pytest.raises(ValueError, match="packed documents"):
            model(tokens(1, 40), position_ids=torch.arange(40)[None] % 25, use_cache=False)


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_context_of_a_watched_call_is_that_of_a_selector(name: str) -> None:
    """Chunks on one cache, whose earlier keys only tables made again can un-rotate."""
    model, ids = tiny_model(name, torch.float32 if name in EAGER else torch.float64), tokens(1, 140)
    selected, watched = [], []

    class Looking:
        def select(self, q: Tensor, k: Tensor, context) -> BlockIndices:
            selected.append((q, k, context))
            sizes = {"q_len": q.shape[2], "k_len": k.shape[2], "block_q": 32, "block_k": 32}
            return BlockIndices.dense(batch=1, heads=q.shape[1], **sizes)

    def run() -> None:
        cache = DynamicCache(config=model.config)
        for part in ids.split(70, dim=1):
            model(part, past_key_values=cache)

    with watch_attention(model, watched.append):
        run()
    seerattn.attach(model, Looking(), impl="reference")
    run()
    assert len(watched) == len(selected) == 2 * len(layer_states(model))
    # The selector's later layers see outputs of our own attention.
    bound = 1e-4 if name in EAGER else 1e-9
    for call, (q, k, context) in zip(watched, selected):
        start = k.shape[2] - q.shape[2]
        assert call.layer == context.layer and call.context.logits.keys() == context.logits.keys()
        assert call.scale == context.scale and call.softcap == context.softcap
        assert (call.context.unrotate(call.query, start) - context.unrotate(q, start)).abs().max() < bound
        assert (call.context.unrotate(call.key, 0) - context.unrotate(k, 0)).abs().max() < bound


def test_a_watched_model_with_gates_runs_dense_and_keeps_them() -> None:
    ids, calls = tokens(1, 133), []
    dense = tiny_model("llama")(ids).logits
    gate = AttnGateConfig(block_q=32, block_k=32)
    model = seerattn.attach(tiny_model("llama"), gate, TopK(density=0.2), impl="sparse").eval()
    sparse = model(input_ids=ids).logits
    with watch_attention(model, calls.append):
        assert torch.equal(model(input_ids=ids).logits, dense)
        other = tiny_model("llama")
        seerattn.attach(other, lambda layer: None)
        other(ids)
    assert [call.layer for call in calls] == [0, 1]
    assert torch.equal(model(input_ids=ids).logits, sparse) and not torch.equal(sparse, dense)


def test_layers_that_run_again_in_the_backward_pass_are_seen_again() -> None:
    model, calls, ids = tiny_model("llama"), [], tokens(1, 70)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with watch_attention(model, calls.append):
        loss = model(ids, labels=ids, use_cache=False).loss
        assert [call.layer for call in calls] == [0, 1]
        loss.backward()
    assert [call.layer for call in calls] == [0, 1, 1, 0]
