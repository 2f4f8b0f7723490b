"""Steps that a CUDA graph can repeat give what steps by the host give. On a CPU each of them runs, none is recorded.

A written-out choice stands for the kernel's; what it is compared with comes from the torch modules.
"""

import logging
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers import StaticCache
from written_choice import written_out, written_queries

import seerattn
from seerattn import AttnGateConfig, TokenBudget, TopK, TopP, gate_decode
from seerattn.gate_decode import GateDecoder
from seerattn.hf import compiled_parts, decode_graph, fixed_step, state
from seerattn.hf.capturing import Capture, capturing
from seerattn.hf.decode_graph import DecodeGraph
from seerattn.hf.identity import transformers_model
from seerattn.hf.state import attachment_of

triton_one = pytest.importorskip("seerattn.ops.decode_select.triton_one")

BLOCK, NEW = 32, 40
GATE = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=2, key_subblocks=2, init="normal")
FEW = TokenBudget(tokens=3 * BLOCK)


@pytest.fixture(autouse=True)
def chosen_as_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_graph._tell.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU alone")
    monkeypatch.setattr(state, "GateDecoder", partial(GateDecoder, impl="triton"))
    monkeypatch.setattr(triton_one, "select_blocks", written_out)
    monkeypatch.setattr(gate_decode, "gate_queries", written_queries)
    monkeypatch.setattr(fixed_step, "KEY_DTYPE", torch.float32)


def model(name: str = "llama", decode_policy=FEW, gate: AttnGateConfig = GATE, impl: str = "sparse") -> nn.Module:
    gated = seerattn.attach(tiny_model(name, torch.float32), gate, None, impl=impl).eval()
    seerattn.set_policy(gated, None, decode_policy=decode_policy)
    return gated


def prompts(*lengths: int) -> dict[str, Tensor]:
    rows = [tokens(n, seed=n) for n in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long()}


def answer(gated: nn.Module, asked: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, n]`` and their logits ``[n, B, V]``."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    options |= {"cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True}
    found = gated.generate(**asked, **options)
    return found.sequences[:, asked["input_ids"].shape[1] :], torch.stack(found.logits)


def by_hand(gated: nn.Module, asked: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """Without a graph, by the torch modules."""
    with mock.patch.object(GateDecoder, "_runs_fused", lambda *_, **__: False):
        return answer(gated, asked, **options)


def by_graph(
    gated: nn.Module, asked: dict[str, Tensor], *, records: bool = False, compile: bool = False, **options
) -> tuple[Tensor, Tensor]:
    """By steps as a graph repeats them."""
    inner = transformers_model(gated)
    steps = lambda _=None: DecodeGraph(inner, attachment_of(gated), records=records, compile=compile)  # noqa: E731
    with (
        mock.patch.object(inner, "get_compiled_call", steps),
        mock.patch.object(inner, "_valid_auto_compile_criteria", lambda *_: True),
    ):
        return answer(gated, asked, **options)


def equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-4)


@pytest.fixture
def no_refusal(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert "without a CUDA graph" not in caplog.text


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", [FEW, TopK(density=0.3)], ids=["budget", "share"])
@pytest.mark.parametrize("length", [7, 250])
def test_answers_are_those_of_steps_by_the_host(name: str, policy, length: int, no_refusal) -> None:
    gated = model(name, policy)
    equal(by_graph(gated, prompts(length)), by_hand(gated, prompts(length)))


@pytest.mark.parametrize(("name", "norms"), [("llama", 0), ("qwen3", 1)])
def test_norms_and_mlps_of_steps_alone_are_compiled_and_once_for_all_layers(
    name: str, norms: int, monkeypatch: pytest.MonkeyPatch, no_refusal
) -> None:
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    monkeypatch.setattr(compiled_parts, "BACKEND", backend)
    gated = model(name)
    equal(by_graph(gated, prompts(250), compile=True), by_hand(gated, prompts(250)))
    # Norms of the residual stream, those of heads where there are some, and MLPs; no layer has its own.
    assert sum(any("rsqrt" in call for call in graph) for graph in graphs) == 1 + norms, graphs
    assert sum(any("silu" in call for call in graph) for graph in graphs) == 1, graphs
    assert len(graphs) == 2 + norms, graphs


def test_a_module_that_was_compiled_before_stays_so_and_no_other_does() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    model[0].compile(backend="eager")
    own = model[0]._compiled_call_impl
    with pytest.raises(RuntimeError), compiled_parts.compiled(model):
        assert model[1]._compiled_call_impl is not None and model[0]._compiled_call_impl is own
        raise RuntimeError
    assert model[1]._compiled_call_impl is None and model[0]._compiled_call_impl is own


@pytest.mark.parametrize("policy", [FEW, TopK(density=0.3), None], ids=["budget", "share", "dense"])
def test_padded_batches_are_those_of_steps_by_the_host(policy, no_refusal) -> None:
    """Rows finish their blocks in steps of their own, one has no block before its 25th token, two begin together."""
    gated, asked = model(decode_policy=policy), prompts(250, 7, 201, 201)
    counted = []
    for run in (by_graph, by_hand):
        with seerattn.record_density(gated) as meter:
            counted.append((run(gated, asked), meter.decode.layers and meter.decode.mean()))
    equal(counted[0][0], counted[1][0])
    assert counted[0][1] == pytest.approx(counted[1][1], rel=1e-9)
    for row, length in enumerate((250, 7, 201, 201)):
        alone = by_graph(gated, prompts(length))
        assert torch.equal(alone[0][0], counted[0][0][0][row])


def test_layers_of_padded_batches_that_auto_decodes_dense_are_counted_by_row(
    monkeypatch: pytest.MonkeyPatch, no_refusal
) -> None:
    monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", lambda **_: True)
    gated, plain = model(impl="auto"), tiny_model("llama", torch.float32).eval()
    with seerattn.record_density(gated) as meter:
        equal(by_graph(gated, prompts(250, 130)), answer(plain, prompts(250, 130)))
    assert meter.decode.mean() == 1.0


@pytest.mark.parametrize("share", ["query_head", "kv_group"])
@pytest.mark.parametrize("pooling", [("avg",), ("max", "min")])
def test_gates_of_other_forms_do_so_too(share: str, pooling, no_refusal) -> None:
    form = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, key_subblocks=4, k_pooling=pooling, share=share, init="normal")
    gated = model(gate=form)
    equal(by_graph(gated, prompts(200, 200)), by_hand(gated, prompts(200, 200)))


def test_prompts_that_come_in_parts_are_no_steps(no_refusal) -> None:
    gated, options = model(), {"prefill_chunk_size": 96}
    equal(by_graph(gated, prompts(250), **options), by_hand(gated, prompts(250), **options))


def test_layers_without_a_decode_policy_attend_to_all_keys(no_refusal) -> None:
    gated, plain = model(decode_policy=None), tiny_model("llama", torch.float32).eval()
    equal(by_graph(gated, prompts(130, 130)), answer(plain, prompts(130, 130)))


@pytest.mark.parametrize("dense", [True, False])
def test_auto_asks_once_whether_dense_is_faster_where_the_host_takes_no_time(
    dense: bool, monkeypatch: pytest.MonkeyPatch, no_refusal
) -> None:
    asked = []
    monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", lambda **ask: asked.append(ask) or dense)
    gated, plain = model(impl="auto"), tiny_model("llama", torch.float32).eval()
    with seerattn.record_density(gated) as meter:
        found = by_graph(gated, prompts(130, 130))
    expected = answer(plain, prompts(130, 130)) if dense else by_hand(model(), prompts(130, 130))
    equal(found, expected)
    # A layer each, with all the room that there is.
    of_graph = [ask for ask in asked if ask["graphs"]]
    assert len(of_graph) == 2 and {ask["keys"] for ask in of_graph} == {2 * (130 + NEW - 1)}
    assert (meter.decode.mean() == 1.0) == dense


def test_gate_keys_are_kept_in_16_bits_unless_they_are_too_large(monkeypatch: pytest.MonkeyPatch, no_refusal) -> None:
    monkeypatch.setattr(fixed_step, "KEY_DTYPE", torch.float16)
    held: list[torch.dtype] = []

    def noted(gate_q: Tensor, gate_k: Tensor, rule, **sizes):
        held.append(gate_k.dtype)
        return written_out(gate_q, gate_k.float(), rule, **sizes)

    monkeypatch.setattr(triton_one, "select_blocks", noted)
    gated = model()
    found = by_graph(gated, prompts(250), max_new_tokens=4)
    assert set(held) == {torch.float16}
    # Lists of this model do not change by it.
    equal(found, by_hand(gated, prompts(250), max_new_tokens=4))

    held.clear()
    monkeypatch.setattr(fixed_step, "LARGEST", 0.0)
    by_graph(gated, prompts(250), max_new_tokens=4)
    assert set(held) == {torch.float32}


def test_gate_keys_that_prove_too_large_after_a_step_was_recorded_are_recorded_anew(
    monkeypatch: pytest.MonkeyPatch, no_refusal
) -> None:
    """A prompt shorter than a block has no gate keys yet."""
    monkeypatch.setattr(fixed_step, "KEY_DTYPE", torch.float16)
    in_fp32 = lambda gate_q, gate_k, rule, **sizes: written_out(gate_q, gate_k.float(), rule, **sizes)  # noqa: E731
    monkeypatch.setattr(triton_one, "select_blocks", in_fp32)
    recorded: list[torch.dtype] = []

    class Record:
        def __init__(self, steps: DecodeGraph) -> None:
            self.steps, self.keys = steps, [one.keys for one in steps._step.keys.values()]

        def replay(self) -> None:
            assert all(a is b.keys for a, b in zip(self.keys, self.steps._step.keys.values()))
            self.steps._logits = self.steps._forward()

    def record(steps: DecodeGraph) -> None:
        steps._graph = Record(steps)
        recorded.append(steps._graph.keys[0].dtype)

    monkeypatch.setattr(DecodeGraph, "_record", record)
    gated = model()
    by_graph(gated, prompts(20), records=True)
    assert recorded == [torch.float16]
    monkeypatch.setattr(fixed_step, "LARGEST", 0.0)
    equal(by_graph(gated, prompts(20), records=True), by_hand(gated, prompts(20)))
    assert recorded == [torch.float16, torch.float16, torch.float32]


def test_counted_densities_are_those_of_steps_by_the_host(no_refusal) -> None:
    gated = model(decode_policy=TopK(density=0.3))
    counted = []
    for run in (by_graph, by_hand):
        with seerattn.record_density(gated) as meter:
            run(gated, prompts(250))
        counted.append(meter.decode.mean())
    assert counted[0] == counted[1] < 0.5


def test_a_turn_after_a_graph_finds_the_cache_as_it_is(no_refusal) -> None:
    gated = model()
    with torch.no_grad():
        inner = transformers_model(gated)
        cache = StaticCache(config=inner.config, max_cache_len=400)
        ids = tokens(290, seed=1)[None]
        inner(input_ids=ids[:, :250], past_key_values=cache)
        steps = DecodeGraph(inner, attachment_of(gated), records=False)
        for place in range(250, 290):
            found = steps(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits
        more = inner(input_ids=ids[:, :1], past_key_values=cache).logits
        expected = StaticCache(config=inner.config, max_cache_len=400)
        inner(input_ids=ids[:, :250], past_key_values=expected)
        for place in range(250, 290):
            last = inner(input_ids=ids[:, place : place + 1], past_key_values=expected).logits
        torch.testing.assert_close(found, last, rtol=0, atol=2e-4)
        torch.testing.assert_close(
            more, inner(input_ids=ids[:, :1], past_key_values=expected).logits, rtol=0, atol=2e-4
        )


@pytest.mark.parametrize(
    ("name", "policy", "lengths", "reason"),
    [
        ("llama", TopP(p=0.9), (250,), "the kernel of single tokens does not have"),
        ("gemma3", FEW, (250,), "without windows"),
    ],
)
def test_what_a_graph_cannot_repeat_runs_without_one_and_says_so(
    name: str, policy, lengths, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "GateDecoder", GateDecoder)
    gated = model(name, policy)
    with caplog.at_level(logging.WARNING):
        found = by_graph(gated, prompts(*lengths))
    assert reason in caplog.text
    equal(found, by_hand(gated, prompts(*lengths)))


def test_tokens_that_are_hidden_among_others_are_no_padding(caplog: pytest.LogCaptureFixture) -> None:
    gated, asked = model(), prompts(250, 201)
    asked["attention_mask"][0, 100:110] = 0
    with caplog.at_level(logging.WARNING):
        found = by_graph(gated, asked)
    assert "padding on the left alone" in caplog.text
    equal(found, by_hand(gated, asked))


def test_a_forward_that_cannot_be_recorded_goes_on_by_the_host(caplog: pytest.LogCaptureFixture) -> None:
    gated = model()
    with caplog.at_level(logging.WARNING):
        # A CPU records nothing.
        found = by_graph(gated, prompts(250), records=True)
    assert "the forward cannot be recorded" in caplog.text
    equal(found, by_hand(gated, prompts(250)))


def test_attention_that_is_watched_runs_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    gated = model()
    with capturing(Capture()), caplog.at_level(logging.WARNING):
        found, expected = by_graph(gated, prompts(250)), by_hand(gated, prompts(250))
    assert "must not be watched" in caplog.text
    equal(found, expected)


def test_dropout_of_attention_is_refused_as_it_is_by_the_host() -> None:
    gated = model()
    for layer in transformers_model(gated).model.layers:
        layer.self_attn.attention_dropout = 0.5
    gated.train()
    for run in (by_graph, by_hand):
        with pytest.raises(ValueError, match=r"attention dropout must be 0, got 0\.5"):
            run(gated, prompts(250))


def test_a_step_that_is_refused_halfway_is_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    gated = model()
    attend = fixed_step.FixedStep.attend

    def refused(step, seer, *args):
        if seer.state.layer == 1:
            raise decode_graph.Unservable("a reason")
        return attend(step, seer, *args)

    with mock.patch.object(fixed_step.FixedStep, "attend", refused), caplog.at_level(logging.WARNING):
        found = by_graph(gated, prompts(250))
    assert "a reason" in caplog.text
    equal(found, by_hand(gated, prompts(250)))


def test_models_without_gates_and_other_devices_are_refused() -> None:
    assert not decode_graph.fits_graphs(tiny_model("llama")) and not decode_graph.fits_graphs(model())
    with pytest.raises(ValueError, match="not attached to"), seerattn.decode_graphs(tiny_model("llama")):
        pass
    with pytest.raises(ValueError, match="on a CUDA device, got one on cpu"), seerattn.decode_graphs(model()):
        pass
