"""Gates for the layers and the heads of one process. Nothing here needs vLLM."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seerattn import AttnGate, AttnGateConfig, KeepAll, Threshold, TokenBudget, TopK
from seerattn.gate_files import GateFolder
from seerattn.vllm import decoding, options
from seerattn.vllm.gates import LayerGate, check_model, has_gate, layer_number
from seerattn.vllm.options import Options, chosen_policy, decode_policy, read
from seerattn.vllm.refusals import check_decoding, check_engine, check_layer

H, HKV, D = 8, 4, 32
FORMS = {
    "default": AttnGateConfig(distance_bias=4, qk_norm=True, init="normal"),
    "published": AttnGateConfig.paper(),
    "kv group": AttnGateConfig(share="kv_group", init="normal"),
}


def gate_of(form: AttnGateConfig, heads: int = H, kv_heads: int = HKV) -> AttnGate:
    frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)
    return AttnGate(form, num_heads=heads, num_kv_heads=kv_heads, head_dim=D, inv_freq=frequencies).eval()


def filled(form: AttnGateConfig) -> AttnGate:
    torch.manual_seed(1)
    gate = gate_of(form)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gate


def test_policy_is_told_the_length_of_the_whole_prompt_where_it_needs_it() -> None:
    gate = LayerGate(0, filled(FORMS["default"]), TopK(density=0.1), None)
    assert gate.policy_of(5000, 512) == TopK(density=0.1, length=5000)
    shared = replace(gate, policy=TopK(density=0.1, rule="row_share"))
    assert shared.policy_of(5000, 512) == shared.policy


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.3.self_attn.attn", 3), ("transformer.h.0.attn.attn", 0), ("language_model.model.layers.5.attn", 5)],
)
def test_layer_is_told_by_the_number_in_its_name(name: str, number: int) -> None:
    assert layer_number(name, 6) == number


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.6.self_attn.attn",
        "model.attn",
        "model.layers.1.blocks.2.attn",
        "vision_model.layers.1.attn",
        "encoder.layers.1.attn",
        "model.mtp.layers.1.attn",
    ],
)
def test_unknown_layer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"attention layers must be those of the decoder, layers.0 to layers.5"):
        layer_number(name, 6)


def folder(layers: dict[int, str], listed: tuple[int, ...] | None = None, **more) -> GateFolder:
    fields = {
        "form": FORMS["default"],
        "policy": None,
        "decode_policy": None,
        "budgets": None,
        "base": {},
        "listed": listed,
    }
    return GateFolder(**fields | more, modules=layers)


def test_full_layer_without_a_gate_is_refused_unless_the_folder_lists_its_layers() -> None:
    some = {0: "model.layers.0.self_attn"}
    assert has_gate(folder(some), 0, is_windowed=False) and not has_gate(folder(some), 1, is_windowed=True)
    assert not has_gate(folder(some, (0,)), 1, is_windowed=False)
    with pytest.raises(ValueError, match="every full-attention layer must have a gate, got none for layer 1"):
        has_gate(folder(some), 1, is_windowed=False)
    with pytest.raises(ValueError, match="must attend to all tokens, got layer 0 with a sliding window"):
        has_gate(folder(some), 0, is_windowed=True)


def model_config(**changed) -> SimpleNamespace:
    text = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": H,
        "rope_parameters": {"rope_theta": 1e4},
    }
    heads = {"get_total_num_kv_heads": lambda: HKV, "get_head_size": lambda: D}
    return SimpleNamespace(hf_text_config=SimpleNamespace(**text | changed), **heads)


def test_gates_of_another_model_are_refused() -> None:
    base = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": H, "num_key_value_heads": HKV}
    base |= {"head_dim": D, "rope": {"rope_theta": 10000.0, "rope_type": "default"}}
    check_model(folder({}, base=base), model_config())
    for name, value in (("hidden_size", 128), ("num_attention_heads", 16), ("rope_parameters", {"rope_theta": 5e5})):
        with pytest.raises(ValueError, match="gates must belong to the model"):
            check_model(folder({}, base=base), model_config(**{name: value}))


def test_options_are_read_and_refused_in_a_sentence() -> None:
    assert read({}) is None and read(None) is None and read({"other": 1}) is None
    found = read({"seerattn": {"gates": "g", "density": 0.2, "policy": TopK(density=0.1).to_dict()}})
    assert found == Options(gates="g", density=0.2, policy=TopK(density=0.1))
    for wrong, sentence in (
        ("g", "must be options by name"),
        ({}, "must have gates, got none"),
        ({"gates": "g", "gate": 1}, "must be among gates, density, impl, decode_tokens, log, got 'gate'"),
        ({"gates": "g", "decode_policy": {"policy": "Best"}}, "policy must be one of"),
        ({"gates": "g", "decode_tokens": 64, "decode_policy": None}, "decode_tokens must not come with a decode_pol"),
        ({"gates": "g", "density": 1.5}, "density must be"),
        ({"gates": "g", "impl": "triton"}, "impl must be"),
        ({"gates": "g", "policy": {"policy": "Best"}}, "policy must be one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read({"seerattn": wrong})


SAME_K, ROW_SHARE = TopK(density=0.3), TopK(density=0.3, rule="row_share")


def test_policy_is_that_of_the_user_or_else_of_the_folder() -> None:
    def chosen(of_folder, shares_pages: bool = True, **asked):
        return chosen_policy(Options(gates="g", **asked), folder({}, policy=of_folder), shares_pages=shares_pages)

    assert chosen(ROW_SHARE) == ROW_SHARE
    assert chosen(ROW_SHARE, density=0.1) == TopK(density=0.1, rule="row_share")
    assert chosen(None, density=0.1) == TopK(density=0.1, rule="row_share")
    assert chosen(ROW_SHARE, policy=KeepAll()) == KeepAll()
    assert chosen(SAME_K, shares_pages=False) == SAME_K
    for asked, of_folder, sentence in (
        ({}, None, "a density or a policy must be given"),
        ({"density": 0.1}, Threshold(threshold=0.1), "density must come with the policy TopK, got Threshold"),
        ({}, replace(ROW_SHARE, last_rows_dense=2), "last_rows_dense must be 0"),
        ({"policy": SAME_K}, ROW_SHARE, "must choose for a beginning whatever follows it"),
    ):
        with pytest.raises(ValueError, match=sentence):
            chosen(of_folder, **asked)


def test_rule_of_the_folder_that_knows_the_length_gives_way_to_shared_pages_and_it_is_told(monkeypatch) -> None:
    told = []
    monkeypatch.setattr(options.logger, "warning", told.append)
    options._tell_of_the_rule.cache_clear()
    for _ in range(2):  # layers
        found = chosen_policy(Options(gates="g"), folder({}, policy=SAME_K), shares_pages=True)
        assert found == ROW_SHARE and len(told) == 1 and "'same_k'" in told[0]


def test_decode_policy_is_that_of_the_user_or_else_of_the_folder_and_prompts_may_be_whole() -> None:
    budget, given = TokenBudget(tokens=64), folder({}, policy=ROW_SHARE, decode_policy=SAME_K)
    for asked, expected in (({}, SAME_K), ({"decode_policy": None}, None), ({"decode_tokens": 64}, budget)):
        assert decode_policy(Options(gates="g", **asked), given) == expected
    found = read({"seerattn": {"gates": "g", "decode_policy": budget.to_dict()}})
    assert decode_policy(found, given) == budget and read({"seerattn": {"gates": "g"}}).decode_policy == "saved"
    assert decode_policy(read({"seerattn": {"gates": "g", "decode_policy": None}}), given) is None
    asked = Options(gates="g", decode_tokens=64)
    assert chosen_policy(asked, folder({}), shares_pages=True) == KeepAll()
    with pytest.raises(ValueError, match="last_rows_dense of a decode_policy must be 0"):
        decode_policy(Options(gates="g", decode_policy=replace(budget, last_rows_dense=1)), given)


def test_decode_policy_that_auto_would_never_use_leaves_a_gpu_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    told, asked = [], []
    model = SimpleNamespace(
        max_model_len=5000,
        get_num_attention_heads=lambda parallel: H // parallel.ranks,
        get_num_kv_heads=lambda parallel: HKV // parallel.ranks,
        get_head_size=lambda: D,
    )
    config = SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(ranks=2))
    given, (cpu, cuda) = folder({}), map(torch.device, ("cpu", "cuda"))

    def prefer(*, keys: int, density: float, device: torch.device, shape) -> bool:
        asked.append((keys, density, tuple(shape)))
        return keys < crossover[0]

    monkeypatch.setattr(decoding, "prefer_dense_decode", prefer)
    monkeypatch.setattr(decoding.logger, "warning", lambda *said: told.append(said))
    decoding._tell_of_dense.cache_clear()
    # 5000 tokens are 79 blocks, and 250 tokens 4 of them.
    auto, sparse = (Options(gates="g", decode_tokens=250, impl=impl) for impl in ("auto", "sparse"))
    crossover = [0]
    for crossover[0], expected in ((5001, None), (5000, TokenBudget(tokens=250))):
        assert decoding.used_decode_policy(auto, given, config, cuda) == expected
    assert asked == [(5000, 4 / 79, (1, H // 2, HKV // 2, D))] * 2
    assert len(told) == 1 and told[0][1] == 5000
    crossover[0] = 9000
    for options_, device in ((sparse, cuda), (auto, cpu)):
        assert decoding.used_decode_policy(options_, given, config, device) == TokenBudget(tokens=250)
    assert decoding.used_decode_policy(Options(gates="g"), given, config, cuda) is None
    # What a text reads in whole is not worth asking.
    assert decoding.decodes_dense(TokenBudget(tokens=250), 64, 250, decoding.LayerShape(), cuda) and len(asked) == 2


def test_ranks_that_have_no_kv_group_in_whole_are_refused_for_decoding() -> None:
    def config(ranks: int) -> SimpleNamespace:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HKV),
        )

    check_decoding(config(HKV))
    with pytest.raises(ValueError, match=f"must be at most the {HKV} KV heads with a decode_policy, got {2 * HKV}"):
        check_decoding(config(2 * HKV))


def engine_config(**changed) -> SimpleNamespace:
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_dbo": False}
    own = {name: value for name, value in changed.items() if name not in parallel}
    parallel |= {name: value for name, value in changed.items() if name in parallel}
    plain = {"speculative_config": None, "kv_transfer_config": None}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **plain | own)


def test_engine_that_gates_cannot_follow_is_refused() -> None:
    check_engine(engine_config())
    for name, value in (
        ("speculative_config", object()),
        ("kv_transfer_config", object()),
        ("decode_context_parallel_size", 2),
        ("prefill_context_parallel_size", 2),
        ("enable_dbo", True),
    ):
        with pytest.raises(ValueError, match=f"{name} must not be set"):
            check_engine(engine_config(**{name: value}))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"attn_type": "encoder_only"},
            "must be those of a decoder where gates are asked for, got one of kind enc",
        ),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be that of the model where gates are asked for, got fp8"),
        ({"alibi_slopes": [1.0]}, "must have no ALiBi slopes"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "must have keys of their own"),
    ],
)
def test_layer_that_gates_cannot_choose_for_is_refused(changed: dict, sentence: str) -> None:
    plain = {"attn_type": "decoder", "kv_cache_dtype": "auto", "alibi_slopes": None}
    plain |= {"kv_sharing_target_layer_name": None}
    check_layer(SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=sentence):
        check_layer(SimpleNamespace(**plain | changed))
