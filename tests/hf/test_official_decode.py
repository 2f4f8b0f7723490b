"""Published decode gates of the official implementation, against the published formula written out."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor

import seerattn
from seerattn import Threshold, TokenBudget, load_official_gates
from seerattn.gate_decode import GateDecoder
from seerattn.hf.state import layer_states
from seerattn.selection.selector import AttentionContext

HEADS, KV_HEADS, DIM, LAYERS, BLOCK = 4, 2, 32, 2, 64
GROUP = HEADS // KV_HEADS
LAYOUTS = {
    "published": {"seerattn_use_qk_norm": True},
    "untold-norm": {"seerattn_q_head_pooling_type": "Qproj"},
    "no-norm": {"seerattn_use_qk_norm": False, "seerattn_k_seq_pooling_type": "Kmaxmin"},
    "mean-and-linear": {"seerattn_q_head_pooling_type": "Qavgproj", "seerattn_gate_hidden_size": 64},
    "mean": {"seerattn_q_head_pooling_type": "Qavg", "seerattn_use_qk_norm": True},
    "no-rope": {"seerattn_use_qk_norm": True, "seerattn_use_rope": False, "seerattn_gate_block_size": 32},
}


def fields_of(layout: str, **fields) -> dict:
    return {"seerattn_gate_hidden_size": DIM, "seerattn_gate_block_size": BLOCK} | LAYOUTS[layout] | fields


def has_norm(layout: str) -> bool:
    return LAYOUTS[layout].get("seerattn_use_qk_norm", layout == "untold-norm")


def write(folder: Path, layout: str = "published", **fields) -> dict[str, Tensor]:
    """A folder as published, with random weights."""
    values = fields_of(layout, **fields)
    model = {"hidden_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    config = model | {"num_hidden_layers": LAYERS, "base_model": "tiny", "model_type": "qwen3"} | values
    (folder / "config.json").write_text(json.dumps(config))
    width, kinds = values["seerattn_gate_hidden_size"], values.get("seerattn_k_seq_pooling_type", "Kmaxminavg")
    how = values.get("seerattn_q_head_pooling_type", "Qproj")
    shapes = {"linear_k": (KV_HEADS, len(kinds) // 3 * DIM, width)}
    if how != "Qavg":
        shapes["linear_q"] = (KV_HEADS, GROUP, DIM, width) if how == "Qproj" else (KV_HEADS, DIM, width)
    if has_norm(layout):
        shapes |= {"qnorm": (width,), "knorm": (width,)}
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"model.layers.{layer}.self_attn.attn_gate.attngate_{name}.weight": torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    torch.save(weights, folder / "attn_gate_weights.pth")
    return weights


def published_probabilities(layout: str, weights: dict[str, Tensor], layer: int, q: Tensor, k: Tensor) -> Tensor:
    """Softmax ``[HKV, N]`` over finished blocks for the last of ``k [S, HKV, D]`` and its ``q [H, D]``, before RoPE."""
    values, t = fields_of(layout), len(k) - 1
    block, width = values["seerattn_gate_block_size"], values["seerattn_gate_hidden_size"]
    kinds = values.get("seerattn_k_seq_pooling_type", "Kmaxminavg")[1:]
    how = values.get("seerattn_q_head_pooling_type", "Qproj")

    def weight(name: str) -> Tensor:
        return weights[f"model.layers.{layer}.self_attn.attn_gate.attngate_{name}.weight"].double()

    def placed(x: Tensor, name: str, position: int) -> Tensor:
        if has_norm(layout):
            x = x / ((x * x).mean() + 1e-6).sqrt() * weight(name)
        if not values.get("seerattn_use_rope", True):
            return x
        out = torch.empty_like(x)
        for i in range(width // 2):
            angle = position * 10000.0 ** (-2 * i / width)
            a, b = x[i], x[i + width // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    rows = []
    for head in range(KV_HEADS):
        members = q[head * GROUP : (head + 1) * GROUP].double()
        if how == "Qproj":
            query = sum(member @ weight("linear_q")[head, j] for j, member in enumerate(members))
        else:
            query = members.mean(0) @ (weight("linear_q")[head] if how == "Qavgproj" else torch.eye(DIM).double())
        query = placed(query, "qnorm", t)
        scores = []
        for b in range(t // block):
            own = k[b * block : (b + 1) * block, head].double()
            pooled = {"max": own.amax(0), "min": own.amin(0), "avg": own.mean(0)}
            features = torch.cat([pooled[kinds[i : i + 3]] for i in range(0, len(kinds), 3)])
            scores.append(query @ placed(features @ weight("linear_k")[head], "knorm", b * block) / math.sqrt(width))
        rows.append(torch.stack(scores).softmax(0))
    return torch.stack(rows)


def context() -> AttentionContext:
    return AttentionContext(layer=0, scale=1.0, softcap=None, unrotate=lambda x, start: x.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probabilities_of_a_token_match_the_published_formula(tmp_path: Path, layout: str) -> None:
    weights = write(tmp_path, layout)
    model = load_official_gates(tmp_path, tiny_model("qwen3"))
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(300, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    states = layer_states(model)
    assert len(states) == LAYERS
    for state in states:
        for t in (64, 127, 128, 200, 299):
            decoder = GateDecoder(state.gate, TokenBudget(tokens=128))
            found = decoder.scores(q[t, :, None][None], k[: t + 1].transpose(0, 1)[None], context())
            expected = published_probabilities(layout, weights, state.layer, q[t], k[: t + 1])
            torch.testing.assert_close(found[0].double().exp(), expected, rtol=1e-4, atol=1e-6)


def test_decoded_tokens_are_scored_by_what_the_model_projects(tmp_path: Path) -> None:
    """Of Qwen3 that is behind its norms of queries and keys, and before RoPE."""
    weights = write(tmp_path, seerattn_sparsity_method="token_budget", seerattn_token_budget=64)
    model = load_official_gates(tmp_path, tiny_model("qwen3"), impl="reference")
    projected: dict[str, list[Tensor]] = {"q": [], "k": []}
    attention = model.get_base_model().model.layers[0].self_attn
    for side, seen in projected.items():
        getattr(attention, f"{side}_norm").register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
    scores, of = [], GateDecoder.scores

    def watch(decoder: GateDecoder, q: Tensor, k: Tensor, context: AttentionContext) -> Tensor:
        found = of(decoder, q, k, context)
        scores.extend([found] if context.layer == 0 else [])
        return found

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(GateDecoder, "scores", watch)
        # The third block is finished by decoded tokens.
        model.generate(tokens(1, 180), max_new_tokens=20, do_sample=False, eos_token_id=None)
    q, k = (torch.cat(seen) for seen in projected.values())
    assert len(scores) == 19 and len(k) == 199
    for step, found in enumerate(scores):
        end = 181 + step
        expected = published_probabilities("published", weights, 0, q[end - 1], k[:end])
        torch.testing.assert_close(found[0].double().exp(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("budget", [64, 100, 192])
def test_a_token_reads_all_that_the_published_choice_reads_and_one_block_more_at_most(
    tmp_path: Path, budget: int
) -> None:
    weights = write(tmp_path, seerattn_sparsity_method="token_budget", seerattn_token_budget=budget)
    model = load_official_gates(tmp_path, tiny_model("qwen3"))
    policy, gate = load_official_gates(tmp_path).decode_policy, layer_states(model)[0].gate
    q, k = (torch.randn(700, n, DIM, generator=torch.Generator().manual_seed(n)) for n in (HEADS, KV_HEADS))
    more = set()
    for t in range(70, 700, 45):
        chosen = GateDecoder(gate, policy).select_token(
            q[t, :, None][None], k[: t + 1].transpose(0, 1)[None], context()
        )
        p = published_probabilities("published", weights, 0, q[t], k[: t + 1])
        for head in range(KV_HEADS):
            best = p[head].topk(min(budget // BLOCK, t // BLOCK)).indices.tolist()
            read = {0, t // BLOCK, *best}
            ours = set(chosen.indices[0, head, : int(chosen.counts[0, head])].tolist())
            assert read <= ours and len(ours) <= len(read) + 1
            more.add(len(ours) - len(read))
    assert more == {0, 1}


def test_configuration_is_read_and_replaced(tmp_path: Path) -> None:
    write(tmp_path, seerattn_threshold=4e-3, seerattn_start_layer=1)
    gates = load_official_gates(tmp_path)
    assert gates.policy is None and gates.decode_policy == Threshold(threshold=4e-3)
    assert gates.config.share == "kv_group" and gates.config.query_subblocks == gates.config.block_q == BLOCK
    model = load_official_gates(tmp_path, tiny_model("qwen3"), decode_policy=TokenBudget(tokens=128), impl="sparse")
    assert [state.layer for state in layer_states(model) if state.gate is not None] == [1]
    with seerattn.record_density(model) as meter, torch.no_grad():
        model.generate(tokens(1, 300), max_new_tokens=4, do_sample=False, eos_token_id=None)
    # Of 300 tokens and more, two blocks of five.
    assert meter.decode.mean() == pytest.approx(2 / 5)
    write(tmp_path)
    assert load_official_gates(tmp_path).decode_policy is None


def test_read_gates_save_and_load_as_our_own(tmp_path: Path) -> None:
    write(tmp_path, seerattn_sparsity_method="token_budget", seerattn_token_budget=64)
    model = load_official_gates(tmp_path, tiny_model("qwen3"), impl="reference")
    model.save_pretrained(tmp_path / "own")
    again = seerattn.attach(tiny_model("qwen3"), tmp_path / "own", impl="reference")
    assert again.active_peft_config.decode_policy == TokenBudget(tokens=192).to_dict()
    for ours, read in zip(layer_states(again), layer_states(model), strict=True):
        state, expected = ours.gate.state_dict(), read.gate.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_gates_with_norms_are_whole_when_they_are_saved(tmp_path: Path) -> None:
    """PEFT takes the name of an adapter off the names of weights where it comes last but one, and nowhere else."""
    model = seerattn.attach(tiny_model("qwen3"), seerattn.AttnGateConfig(qk_norm=True))
    generator = torch.Generator().manual_seed(3)
    for state in layer_states(model):
        for parameter in state.gate.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second", state_dict=model.state_dict())
    for folder in ("first", "second"):
        again = seerattn.attach(tiny_model("qwen3"), tmp_path / folder)
        for ours, saved in zip(layer_states(again), layer_states(model), strict=True):
            state, expected = ours.gate.state_dict(), saved.gate.state_dict()
            assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_the_factor_of_yarn_goes_into_what_is_behind_the_norm(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    for layout, name in (("published", "knorm"), ("no-norm", "linear_k")):
        weights = write(tmp_path, layout)
        model = load_official_gates(tmp_path, tiny_model("qwen3", rope_parameters=scaling))
        gate = layer_states(model)[1].gate
        factor = 0.1 * math.log(4.0) + 1.0
        held = gate.k_norm.weight if name == "knorm" else gate.k_weight
        expected = weights[f"model.layers.1.self_attn.attn_gate.attngate_{name}.weight"] * factor**2
        torch.testing.assert_close(held.detach(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"seerattn_q_head_pooling_type": "Qorig"}, "seerattn_q_head_pooling_type must be one of .*, got 'Qorig'"),
        ({"seerattn_k_seq_pooling_type": "Ksum"}, "must look like 'Kmaxminavg', got 'Ksum'"),
        ({"seerattn_gate_block_size": 16}, r"seerattn_gate_block_size must be one of \(32, 64, 128\), got 16"),
        ({"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.1}, "must be threshold or token_budget"),
        ({"seerattn_q_head_pooling_type": "Qavgproj"}, "linear_q.weight must be|tensors that"),
        ({"seerattn_use_qk_norm": False}, "4 unknown"),
    ],
)
def test_what_gates_here_cannot_be_is_refused(tmp_path: Path, fields: dict, reason: str) -> None:
    write(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | fields))
    with pytest.raises(ValueError, match=reason):
        load_official_gates(tmp_path)
