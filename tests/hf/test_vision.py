"""The text layers of vision-language models: text in any number of calls, images in one."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from tiny_models import SIZES, tokens
from torch import Tensor, nn

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
IMAGE, START, END = 90, 92, 93
TEXT = SIZES | {"hidden_size": 128}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
QWEN = {
    "depth": 1,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": START, "vision_end_token_id": END}
GEMMA_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA_TEXT = SIZES | {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}


class Kind(NamedTuple):
    model: type
    config: type
    values: dict[str, Any]


KINDS = {
    "qwen2-vl": Kind(
        tf.Qwen2VLForConditionalGeneration,
        tf.Qwen2VLConfig,
        IDS
        | {"text_config": TEXT | MROPE}
        | {"vision_config": QWEN | {"embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2}},
    ),
    "qwen2.5-vl": Kind(
        tf.Qwen2_5_VLForConditionalGeneration,
        tf.Qwen2_5_VLConfig,
        IDS
        | {"text_config": TEXT | MROPE}
        | {"vision_config": QWEN | {"hidden_size": 32, "out_hidden_size": 128, "intermediate_size": 32}},
    ),
    "qwen3-vl": Kind(
        tf.Qwen3VLForConditionalGeneration,
        tf.Qwen3VLConfig,
        IDS
        | {"text_config": TEXT | MROPE}
        | {
            "vision_config": QWEN
            | {"hidden_size": 32, "out_hidden_size": 128, "intermediate_size": 32, "num_position_embeddings": 16}
            | {"deepstack_visual_indexes": [0]}
        },
    ),
    "gemma3": Kind(
        tf.Gemma3ForConditionalGeneration,
        tf.Gemma3Config,
        {"text_config": GEMMA_TEXT, "vision_config": GEMMA_VISION | {"image_size": 28, "patch_size": 14}}
        | {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END},
    ),
}


def models(name: str, policy: Any = None) -> tuple[nn.Module, nn.Module]:
    """The model as it is, and with gates."""
    kind = KINDS[name]
    torch.manual_seed(0)
    plain = kind.model(kind.config(**copy.deepcopy(kind.values))).double().eval()
    return plain, seerattn.attach(copy.deepcopy(plain), GATE, policy or KeepAll(), impl="reference")


def prompt(name: str) -> dict[str, Tensor]:
    """A prompt with one image."""
    ids, count = tokens(1, 130) % 88, 4 if name == "gemma3" else 16
    ids[0, 10], ids[0, 11 : 11 + count], ids[0, 11 + count] = START, IMAGE, END
    kinds = (ids == IMAGE).long()
    torch.manual_seed(0)
    if name == "gemma3":
        pixels = torch.randn(1, 3, 28, 28, dtype=torch.float64)
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": kinds}
    pixels = torch.randn(64, 3 * 2 * 4 * 4, dtype=torch.float64)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": kinds,
    }


@torch.no_grad()
def turns(model: nn.Module, *calls: dict[str, Tensor]) -> Tensor:
    cache, found = None, []
    for call in calls:
        out = model(**call, past_key_values=cache, use_cache=True)
        cache, found = out.past_key_values, [*found, out.logits]
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", KINDS)
def test_text_in_one_call_or_two_matches_the_unpatched_model(name: str) -> None:
    plain, gated = models(name)
    ids = tokens(2, 130) % 88
    kinds = {"token_type_ids": torch.zeros_like(ids)} if name == "gemma3" else {}
    for calls in ([{"input_ids": ids} | kinds], [{"input_ids": ids[:, :70]}, {"input_ids": ids[:, 70:]}]):
        with seerattn.record_density(gated) as meter:
            assert (turns(gated, *calls) - turns(plain, *calls)).abs().max() < 1e-9
        assert meter.mean() == 1.0
    seerattn.set_policy(gated, SPARSE)
    one, two = (turns(gated, *({"input_ids": part} for part in ids.tensor_split(cuts, dim=1))) for cuts in ([], [64]))
    assert (one - two).abs().max() < 1e-9 and (one - turns(plain, {"input_ids": ids})).abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_prompt_with_an_image_is_that_of_the_unpatched_model_and_a_later_turn_is_dense_or_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seerattn.hf.attention.prefer_dense", lambda **_: False)
    plain, gated = models(name)
    first, second = prompt(name), {"input_ids": tokens(1, 40) % 88}
    seerattn.set_policy(gated, KeepAll(), impl="auto")
    with seerattn.record_density(gated) as meter:
        assert (turns(gated, first, second) - turns(plain, first, second)).abs().max() < 1e-9
    assert meter.mean() == 1.0
    if name != "gemma3":  # whose images attend both ways: that call is dense, later ones are as any
        seerattn.set_policy(gated, SPARSE, impl="sparse")
        with pytest.raises(ValueError, match="position_ids must count up by one"):
            turns(gated, first, second)
