"""A gate rotates what the model rotates: with plain averages as its vectors it knows the true logits of blocks."""

from dataclasses import replace

import pytest
import torch
from gate_forms import plain
from interpreted import large_steps
from tiny_models import ROTARY, SUPPORTED, tiny_model, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import seerattn
from seerattn import AttnGateConfig
from seerattn.gate import AttnGate, Pairing
from seerattn.gate_selector import GateSelector, pooled_inputs
from seerattn.hf.probe import probe
from seerattn.hf.rotary import _turns_halves, gate_frequencies, gate_rotation, unproven
from seerattn.hf.state import AttentionLayer
from seerattn.selection import AttentionContext, BlockIndices, RotaryTables, TokenBudget

BLOCK = 32
FORMS = {
    "default": plain(block_q=BLOCK, block_k=BLOCK, query_subblocks=1, key_subblocks=1, normalize_subblocks=False),
    "published": AttnGateConfig.paper(block_q=BLOCK, block_k=BLOCK),
}


def averaging_gate(form: str, layer: AttentionLayer) -> AttnGate:
    """A gate whose vectors are the averages of queries and keys, rotated."""
    sizes = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}
    gate = AttnGate(FORMS[form], **sizes, **gate_rotation(layer.rotation, gate_dim=layer.head_dim)._asdict())
    eye = torch.eye(layer.head_dim)
    with torch.no_grad():
        for weight, kinds in ((gate.q_weight, FORMS[form].q_pooling), (gate.k_weight, FORMS[form].k_pooling)):
            if weight is not None:
                weight.copy_(torch.cat([eye * (kind == "avg") for kind in kinds]))
    return gate


def constant_blocks(layer: AttentionLayer, length: int) -> tuple[Tensor, Tensor]:
    """Queries and keys after RoPE that were the same all over each block before it."""
    g = torch.Generator().manual_seed(5)
    made = []
    for heads in (layer.num_heads, layer.num_kv_heads):
        x = torch.randn(1, heads, -(-length // BLOCK), layer.head_dim, generator=g)
        x = x.repeat_interleave(BLOCK, 2)[:, :, :length]
        made.append(x if layer.rotation is None else layer.rotation.rotate(x, *own_tables(layer, length)))
    return tuple(made)


def own_tables(layer: AttentionLayer, length: int) -> tuple[Tensor, Tensor]:
    return layer.rotation.tables(torch.arange(length)[None], torch.ones(1))


def layer_context(layer: AttentionLayer, length: int, **others) -> AttentionContext:
    rotation = layer.rotation
    if rotation is None:
        return AttentionContext(0, 1.0, None, lambda x, start: x.float(), rotary=RotaryTables(), **others)
    cos, sin = own_tables(layer, length)

    def unrotate(x: Tensor, start: int) -> Tensor:
        end = start + x.shape[2]
        return rotation.unrotate(x, cos[:, start:end], sin[:, start:end])

    return AttentionContext(0, 1.0, None, unrotate, rotary=rotation.as_tables(cos, sin), **others)


def true_logits(q: Tensor, k: Tensor) -> Tensor:
    """Causal products of the first tokens of blocks, one number for all heads of a pair."""
    first_k = k[:, :, ::BLOCK].repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q[:, :, ::BLOCK].double() @ first_k.double().transpose(2, 3)


def assert_scores_are_logits(scores: Tensor, logits: Tensor) -> None:
    """Equal but for one factor: that of the dimension, and YaRN's of the tables, which a gate learns."""
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    got, expected = scores.detach().double()[..., seen].flatten(), logits[..., seen].flatten()
    assert float(torch.corrcoef(torch.stack((got, expected)))[0, 1]) > 0.999
    factor = float(got @ expected / (expected @ expected))
    # Angles of up to 2^8 radians are off by half a unit of fp32, as are a rotation, its inverse and another.
    assert (got - factor * expected).abs().max() <= 1e-4 * factor * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUPPORTED | ROTARY)
def test_gate_of_averages_scores_blocks_by_the_models_own_logits(name: str, form: str) -> None:
    for layer in probe(tiny_model(name)):
        context = layer_context(layer, 8 * BLOCK)
        q, k = constant_blocks(layer, 8 * BLOCK)
        gate = averaging_gate(form, layer)
        scores = gate(*pooled_inputs(gate, q, k, context, "reference"))
        assert_scores_are_logits(scores, true_logits(q, k))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "cohere", "glm4", "phi", "stablelm", "smollm3", "nanochat"])
def test_fused_gate_of_averages_chooses_blocks_by_the_models_own_logits(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    large_steps(monkeypatch)
    layer = probe(tiny_model(name))[-1]
    context = layer_context(layer, 9 * BLOCK - 5)
    q, k = constant_blocks(layer, 9 * BLOCK - 5)
    selector = GateSelector(averaging_gate(form, layer), TokenBudget(tokens=4 * BLOCK), "triton")
    chosen = selector.select(q, k, context).to_mask()
    logits = true_logits(q, k)
    blocks = torch.arange(logits.shape[-1])
    free = (blocks > 0) & (blocks < blocks[:, None])  # the first block and the diagonal are kept anyway
    best = logits.masked_fill(~free, -torch.inf).topk(2, dim=-1)
    expected = torch.zeros_like(chosen).scatter(-1, best.indices, best.values.isfinite())
    assert torch.equal(chosen & free, expected)


def test_gate_narrower_than_a_head_rotates_the_same_share_of_channels_as_the_model_does() -> None:
    expected = {
        "llama": Pairing(16),
        "cohere": Pairing(16, interleaved=True),
        "phi": Pairing(8),
        "glm4": Pairing(8, interleaved=True),
        "stablelm": Pairing(4),
    }
    for name, pairing in expected.items():
        inv_freq, got = gate_rotation(probe(tiny_model(name))[0].rotation, gate_dim=16)
        assert got == pairing
        turning = pairing.width // 2
        share = torch.arange(turning) / turning
        theta = tiny_model(name).config.rope_parameters["rope_theta"]
        torch.testing.assert_close(inv_freq[:turning], theta**-share)
        assert inv_freq.shape == (8,) and (inv_freq[turning:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "phi", "qwen3-next", "gemma3"])
def test_frequencies_at_the_width_of_a_head_are_those_that_the_model_holds(name: str, dtype: torch.dtype) -> None:
    layer = probe(tiny_model(name, dtype))[-1]
    held = getattr(layer.rotation.embedding, "full_attention_inv_freq" if name == "gemma3" else "inv_freq")
    assert held.dtype == dtype  # a cast rounds them
    got = gate_frequencies(layer.rotation, gate_dim=layer.head_dim)
    assert torch.equal(got[: len(held)], held.float()) and (got[len(held) :] == 0).all()


def test_unknown_pairs_of_channels_are_refused() -> None:
    found = probe(tiny_model("llama"))[0].rotation
    own = found.function
    rotation = replace(found, function=lambda q, k, cos, sin: _mirrored(own, q, k, cos, sin))
    with pytest.raises(ValueError, match=r"must rotate the channel pairs of the model.*rope=False"):
        gate_rotation(rotation, gate_dim=32)


def _mirrored(own, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs channels from both ends."""
    mirror = torch.cat((torch.arange(16), torch.arange(31, 15, -1)))
    return tuple(x[..., mirror] for x in own(q[..., mirror], k[..., mirror], cos, sin))


def test_layer_of_which_only_shapes_are_known_plans_a_gate_of_the_same_size() -> None:
    rotation = probe(tiny_model("cohere"))[0].rotation
    planned = gate_rotation(replace(rotation, function=unproven), gate_dim=32)
    proven = gate_rotation(rotation, gate_dim=32)
    assert planned.pairing is None and planned.inv_freq.shape == proven.inv_freq.shape


SHORT, LONG = 64, 200
FACTORS = {"short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
DEPENDENT = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": SHORT,
            "rope_parameters": FACTORS
            | {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SHORT},
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": SHORT,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
}


def dependent_model(kind: str) -> PreTrainedModel:
    name, values = DEPENDENT[kind]
    return tiny_model(name, **values)


def tables_of_call(embedding: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """What the model makes for a call of so many tokens; its module remembers it."""
    return embedding(torch.empty(0), torch.arange(length)[None])


def seen_frequencies(embedding: nn.Module, length: int) -> Tensor:
    cos, sin = tables_of_call(embedding, length)
    return torch.atan2(sin[0, 1], cos[0, 1])[:16]


@pytest.mark.parametrize("kind", DEPENDENT)
def test_frequencies_of_a_call_match_the_models_tables_of_it(kind: str) -> None:
    """Lengths in the order of calls: with dynamic NTK, those of a long call hold on until a short one."""
    rotation = probe(dependent_model(kind))[0].rotation
    assert rotation.depends_on_length and rotation.original_length == SHORT
    distinct = set()
    for length in (40, SHORT, SHORT + 1, LONG, 100, SHORT, 40, 100):
        expected = seen_frequencies(rotation.embedding, length)
        got = gate_frequencies(rotation, gate_dim=32, tokens=length)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        distinct.add(tuple(expected.tolist()))
    assert len(distinct) == {"longrope": 2, "dynamic": 4}[kind]


@pytest.mark.parametrize("kind", DEPENDENT)
def test_gate_of_averages_scores_long_calls_by_the_models_own_logits(kind: str) -> None:
    layer = probe(dependent_model(kind))[0]
    gate = averaging_gate("default", layer)  # before the model has seen a long call
    tables_of_call(layer.rotation.embedding, 8 * BLOCK)
    own = layer_context(layer, 8 * BLOCK)
    context = replace(own, frequencies=lambda width: gate_frequencies(layer.rotation, gate_dim=width, tokens=8 * BLOCK))
    q, k = constant_blocks(layer, 8 * BLOCK)
    assert_scores_are_logits(gate(*pooled_inputs(gate, q, k, context)), true_logits(q, k))
    with pytest.raises(AssertionError):
        assert_scores_are_logits(gate(*pooled_inputs(gate, q, k, own)), true_logits(q, k))


@pytest.mark.parametrize("kind", DEPENDENT)
def test_attached_gates_see_the_frequencies_that_the_model_rotates_with(kind: str) -> None:
    model = seerattn.attach(dependent_model(kind), FORMS["default"], TokenBudget(tokens=4 * BLOCK), impl="reference")
    embedding = model.get_base_model().model.rotary_emb
    seen = []

    class Watch:
        def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
            seen.append(torch.equal(context.frequencies(32), embedding.inv_freq.float()))
            return BlockIndices.dense(
                batch=1, heads=4, q_len=q.shape[2], k_len=k.shape[2], block_q=BLOCK, block_k=BLOCK
            )

    seerattn.attach(model, Watch(), impl="reference")
    for length in (LONG, 40, 100):
        model(input_ids=tokens(1, length))
    assert seen == [True] * 6


@pytest.mark.parametrize("kind", DEPENDENT)
def test_asking_for_tables_and_frequencies_leaves_the_model_as_it_was(kind: str) -> None:
    asked, other = dependent_model(kind), dependent_model(kind)
    rotation = probe(asked)[0].rotation
    for length in (40, LONG, 100):
        for model in (asked, other):
            model(input_ids=tokens(1, length))
        before = {key: x.clone() for key, x in rotation.embedding.named_buffers()}
        longest = int(rotation.embedding.max_seq_len_cached)
        for wanted in (10, SHORT + 1, 3 * LONG):
            rotation.tables(torch.arange(wanted)[None], torch.ones(1))
            gate_frequencies(rotation, gate_dim=32, tokens=wanted)
        assert int(rotation.embedding.max_seq_len_cached) == longest
        assert all(torch.equal(x, before[key]) for key, x in rotation.embedding.named_buffers())
        assert torch.equal(asked(input_ids=tokens(1, 80)).logits, other(input_ids=tokens(1, 80)).logits)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_tables_of_a_part_of_a_call_are_those_of_the_call(kind: str) -> None:
    """A row of a padded batch may be short in a call that is long."""
    rotation = probe(dependent_model(kind))[0].rotation
    whole = tables_of_call(rotation.embedding, LONG)
    part = rotation.tables(torch.arange(30)[None], torch.ones(1), tokens=LONG)
    assert all(torch.equal(x[:, :30], y) for x, y in zip(whole, part))


def test_long_factors_exist_at_the_width_of_a_head_alone() -> None:
    longrope, dynamic = (probe(dependent_model(kind))[0].rotation for kind in DEPENDENT)
    with pytest.raises(ValueError, match="gate_dim must be the head dim of the model, got 16, at which Phi3"):
        gate_rotation(longrope, gate_dim=16)
    base = 10000.0 * (4 * LONG / SHORT - 3) ** (16 / 14)
    torch.testing.assert_close(
        gate_frequencies(dynamic, gate_dim=16, tokens=LONG), base ** -(torch.arange(0, 16, 2) / 16), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", SUPPORTED | ROTARY)
def test_rotations_are_undone_as_the_models_own_function_does_it_bit_for_bit(name: str) -> None:
    for layer in probe(tiny_model(name)):
        if layer.rotation is None:
            continue
        x = torch.randn(2, 3, 5, layer.head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
        cos, sin = own_tables(layer, 5)
        norm = cos.float() ** 2 + sin.float() ** 2
        expected = layer.rotation.rotate(x.float(), cos.float() / norm, -sin.float() / norm)
        assert torch.equal(layer.rotation.undone(cos, sin)(x), expected)


def test_llama_rotates_halves_and_layouts_of_other_kinds_do_not() -> None:
    def is_known(name: str) -> bool:
        rotation = probe(tiny_model(name))[-1].rotation
        return _turns_halves(rotation.function, rotation.width)

    assert is_known("llama") and not is_known("cohere") and not is_known("nanochat")
