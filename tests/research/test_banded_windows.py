"""Windows in bands are SDPA with a window; where there is none, or no whole prompt, SDPA is called as it is."""

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import ROTARY, SUPPORTED
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BANDS = runpy.run_path(str(Path(__file__).parents[2] / "research" / "banded_windows.py"))["attend_in_bands"]


class Heads(nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("tokens", [65, 96, 200, 256])
@pytest.mark.parametrize("rows", [1, 3])
def test_bands_are_attention_through_a_window(tokens: int, rows: int) -> None:
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(3, heads, tokens, 16, dtype=torch.float64) for heads in (4, 2, 2))
    place = torch.arange(tokens)
    distance = place[:, None] - place
    mask = ((distance >= 0) & (distance < 32)).expand(rows, 1, -1, -1).clone()
    # The first row is padded on the left; what padded queries see is not asked.
    mask[0, :, :, :40] = False
    seen = mask.expand(3, -1, -1, -1).any(-1)[:, 0]
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    keys, values = repeated
    logits = (q @ keys.mT * 0.3).masked_fill(~mask, -torch.inf)
    expected = (logits.softmax(-1) @ values).transpose(1, 2)
    found, _ = BANDS(sdpa_attention_forward, Heads(), q, k, v, mask, scaling=0.3, sliding_window=32)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [150, 70])
def test_a_model_with_windows_says_the_same_in_bands(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, sizes = (ROTARY | SUPPORTED)["gemma3"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**sizes), attn_implementation="sdpa").double().eval()
    ids = torch.randint(3, 97, (2, tokens))
    with torch.inference_mode():
        expected = model(ids).logits
        lengths = []

        def watched(module: nn.Module, query: torch.Tensor, *args, **kwargs):
            lengths.append(query.shape[2])
            return sdpa_attention_forward(module, query, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", partial(BANDS, watched))
        found = model(ids).logits
    assert lengths == [32, tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "call", [{"sliding_window": None}, {"sliding_window": 32, "keys": 90}, {"sliding_window": 64}, {"masked": False}]
)
def test_what_is_no_long_prompt_through_a_window_is_handed_on(call: dict) -> None:
    keys, masked = call.pop("keys", 80), call.pop("masked", True)
    q, k = torch.randn(1, 4, 80, 16), torch.randn(1, 2, keys, 16)
    mask = torch.ones(1, 1, 80, keys, dtype=torch.bool) if masked else None
    seen = []

    def attend(*args, **kwargs):
        seen.append((args, kwargs))
        return None, None

    module = Heads()
    BANDS(attend, module, q, k, k, mask, **call)
    args, kwargs = seen[0]
    assert args == (module, q, k, k, mask) and kwargs == call and len(seen) == 1
