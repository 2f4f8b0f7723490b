"""What a model's rotary function does with its tables, found by trying."""

import copy

import pytest
import torch
from interpreted import large_steps
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.nanochat import modeling_nanochat

import seerattn
from seerattn import AttnGateConfig, TopK
from seerattn.gate_selector import GateSelector
from seerattn.hf.rotary import Rotation
from seerattn.hf.state import layer_states

WIDTH = 16
ANGLES = torch.arange(1, 9)[:, None] * 100.0 ** -(torch.arange(WIDTH // 2) / 8)


def reversed_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A rotation that pairs channels from both ends: none of the known forms."""
    turned = torch.cat((q[..., : WIDTH // 2], q[..., WIDTH // 2 :].flip(-1)), -1)
    return modeling_llama.apply_rotary_pos_emb(turned, k, cos, sin)


@pytest.mark.parametrize(
    ("function", "spread", "head_dim", "form"),
    [
        (modeling_llama.apply_rotary_pos_emb, "concatenated", WIDTH, (WIDTH, False, 1)),
        (modeling_gpt_oss.apply_rotary_pos_emb, "half", WIDTH, (WIDTH, False, 1)),
        (modeling_cohere.apply_rotary_pos_emb, "interleaved", WIDTH, (WIDTH, True, 2)),
        (modeling_glm.apply_rotary_pos_emb, "concatenated", 2 * WIDTH, (WIDTH, True, 1)),
        (reversed_halves, "concatenated", WIDTH, None),
    ],
)
def test_form_of_a_rotation_matches_the_models_function(function, spread: str, head_dim: int, form) -> None:
    spread_out = {"half": ANGLES, "concatenated": torch.cat((ANGLES, ANGLES), -1)}
    angle = spread_out.get(spread, ANGLES.repeat_interleave(2, -1))
    cos, sin = 1.25 * angle.cos()[None], 1.25 * angle.sin()[None]
    tables = Rotation(function, head_dim, nn.Identity()).as_tables(cos, sin)
    if form is None:
        assert tables is None
    else:
        assert (tables.width, tables.interleaved, tables.column_step) == form
        assert tables.cos is cos and tables.sin is sin


def test_rotation_by_negative_angles_is_told_as_one_by_negative_sines() -> None:
    angle = torch.cat((ANGLES, ANGLES), -1)[None]
    tables = Rotation(modeling_nanochat.apply_rotary_pos_emb, WIDTH, nn.Identity()).as_tables(angle.cos(), angle.sin())
    assert (tables.width, tables.interleaved, tables.column_step) == (WIDTH, False, 1)
    assert torch.equal(tables.sin, -angle.sin()) and torch.equal(tables.cos, angle.cos())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt-oss", "smollm3"])
def test_fused_gate_in_a_model_matches_the_torch_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached keys, a left-padded row, half tables, a layer without RoPE."""
    pytest.importorskip("triton")
    large_steps(monkeypatch)
    config = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=1)
    model = seerattn.attach(tiny_model(name), config, TopK(density=0.5), impl="reference").eval()
    chosen: dict[str, list[Tensor]] = {}

    states = {state.layer: state for state in layer_states(model)}

    def watched(impl: str, state):
        selector = GateSelector(state.gate, TopK(density=0.5), impl)

        class Watch:
            def select(self, q, k, context):
                blocks = selector.select(q, k, context)
                chosen.setdefault(impl, []).append(blocks.to_mask())
                return blocks

        return Watch()

    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, :37] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for impl in ("reference", "triton"):
        seerattn.attach(model, lambda layer, impl=impl: watched(impl, states[layer]), impl="reference")
        model(input_ids=tokens(2, 80), attention_mask=mask, position_ids=positions)
        cache = model(input_ids=tokens(1, 64), use_cache=True).past_key_values
        model(input_ids=tokens(1, 40), past_key_values=copy.deepcopy(cache))
    assert len(chosen["triton"]) == len(chosen["reference"]) >= 4
    assert all(torch.equal(a, b) for a, b in zip(chosen["triton"], chosen["reference"]))
