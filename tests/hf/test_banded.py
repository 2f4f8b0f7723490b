"""Windows in bands are windows of SDPA; whatever is no window of a whole long prompt is left to it."""

import logging

import pytest
import torch
from tiny_models import ROTARY, SUPPORTED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import seerattn
from seerattn import AttnGateConfig, TopK
from seerattn.hf import attention
from seerattn.hf.banded import BANDED, Bands, banded_attention, banded_mask
from seerattn.hf.loading import read_model
from seerattn.selection.policies import KeepAll

WINDOW = 32
MODELS = ROTARY | SUPPORTED


class Heads(nn.Module):
    num_key_value_groups = 2
    is_causal = True


def windowed_model(implementation: str, name: str = "gemma3") -> PreTrainedModel:
    """The same random model, whose first layer has a window."""
    cls, sizes = MODELS[name]
    torch.manual_seed(0)
    config = cls(**sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()


def padding(rows: int, tokens: int) -> Tensor:
    real = torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        real[row, : 37 * row] = 0
    return real


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the bands that are made."""
    found = []
    begin = Bands.__init__

    def watched(self: Bands, seen: Tensor) -> None:
        found.append(tuple(seen.shape))
        begin(self, seen)

    monkeypatch.setattr(Bands, "__init__", watched)
    return found


@pytest.mark.parametrize("make", [sliding_window_causal_mask_function, chunked_causal_mask_function])
@pytest.mark.parametrize("tokens", [128, 133, 200, 257])
@pytest.mark.parametrize("padded", [False, True])
def test_bands_are_attention_through_the_mask_of_all_keys(make, tokens: int, padded: bool) -> None:
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(3, heads, tokens, 16, dtype=torch.float64) for heads in (4, 2, 2))
    real = padding(3, tokens).bool() if padded else None
    starts = torch.zeros(3, dtype=torch.int64) if real is None else real.int().argmax(1)
    function = make(WINDOW) if make is sliding_window_causal_mask_function else make(WINDOW, starts)
    arguments = {"batch_size": 3, "q_length": tokens, "kv_length": tokens, "mask_function": function}
    arguments |= {"attention_mask": real, "local_size": WINDOW}
    mask = banded_mask(**arguments)
    assert isinstance(mask, Bands)
    seen = sdpa_mask(**arguments, allow_is_causal_skip=False).expand(3, -1, -1, -1)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = (q @ keys.mT * 0.3).masked_fill(~seen, -torch.inf).softmax(-1) @ values
    found, _ = banded_attention(Heads(), q, k, v, mask, scaling=0.3, sliding_window=WINDOW)
    rows = seen.any(-1)[:, 0]
    torch.testing.assert_close(found[rows], expected.transpose(1, 2)[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changed",
    [
        {"local_size": None, "mask_function": causal_mask_function},
        {"q_length": 127, "kv_length": 127},
        {"kv_length": 300},
        {"q_offset": 1},
        {"q_offset": torch.tensor(0)},
        {"kv_offset": 4},
        {"allow_is_causal_skip": False},
        {"use_vmap": True},
    ],
)
def test_masks_that_may_show_more_than_a_window_of_a_whole_prompt_are_those_of_sdpa(changed: dict) -> None:
    arguments = {"batch_size": 2, "q_length": 200, "kv_length": 200, "local_size": WINDOW}
    arguments |= {"mask_function": sliding_window_causal_mask_function(WINDOW), "attention_mask": None} | changed
    found, expected = banded_mask(**arguments), sdpa_mask(**arguments)
    assert type(found) is type(expected)
    assert found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_a_model_says_the_same_in_bands(name: str, padded: bool, made) -> None:
    ids, real = torch.randint(3, 97, (3, 150)), padding(3, 150)
    given = {"attention_mask": real} if padded else {}
    with torch.inference_mode():
        expected, found = (windowed_model(one, name)(ids, **given).logits for one in ("sdpa", BANDED))
    # The window of the second one is longer than the prompt.
    assert made == ([(3 if padded else 1, 5, 1, WINDOW, 2 * WINDOW)] if name == "gemma3" else [])
    shown = real.bool() if padded else torch.ones_like(ids).bool()
    torch.testing.assert_close(found[shown], expected[shown], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_answers_are_those_of_sdpa(cache: str, made) -> None:
    ids, real = torch.randint(3, 97, (2, 140)), padding(2, 140)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected, found = (windowed_model(one).generate(ids, attention_mask=real, **options) for one in ("sdpa", BANDED))
    assert torch.equal(found, expected)
    assert len(made) == 1


def test_gradients_are_those_of_sdpa() -> None:
    ids = torch.randint(3, 97, (2, 150))
    losses = []
    for one in ("sdpa", BANDED):
        model = windowed_model(one).train()
        model(ids, labels=ids).loss.backward()
        losses.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in losses[0].items():
        torch.testing.assert_close(losses[1][name], grad, rtol=0, atol=1e-12)


def test_gates_go_on_from_bands_and_give_them_back(made) -> None:
    ids, real = torch.randint(3, 97, (2, 200)), padding(2, 200)
    model = windowed_model(BANDED)
    with torch.inference_mode():
        expected = model(ids, attention_mask=real).logits
        gated = seerattn.attach(model, AttnGateConfig(), impl="sparse")
        assert torch.equal(gated(ids, attention_mask=real).logits, expected)
        seerattn.set_policy(gated, KeepAll())
        shown = real.bool()
        found = gated(ids, attention_mask=real).logits
        torch.testing.assert_close(found[shown], expected[shown], rtol=0, atol=1e-5)
        seerattn.set_policy(gated, TopK(density=0.3))
        sparse = gated(ids, attention_mask=real).logits
        assert (sparse[shown] - expected[shown]).abs().max() > 1e-3
        assert seerattn.detach(gated) is model and model.config._attn_implementation == BANDED
        assert torch.equal(model(ids, attention_mask=real).logits, expected)
    assert len(made) == 5


def test_continuous_batching_answers_as_without_bands() -> None:
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (150, 70)]
    answers = []
    for one in ("sdpa", BANDED):
        gated = seerattn.attach(windowed_model(one).float(), AttnGateConfig(), policy=TopK(density=0.5), impl="sparse")
        config = gated.generation_config
        config.max_new_tokens, config.do_sample = 4, False
        outputs = gated.generate_batch(prompts, generation_config=config)
        answers.append([outputs[key].generated_tokens for key in sorted(outputs)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("name", "expected"), [("gemma3", BANDED), ("llama", "sdpa"), ("gemma2", "eager")])
def test_a_model_that_is_read_runs_its_windows_in_bands(name: str, expected: str, tmp_path) -> None:
    cls, sizes = MODELS[name]
    AutoModelForCausalLM.from_config(cls(**sizes)).save_pretrained(tmp_path)
    if name == "gemma2":
        # As with a model whose class has no SDPA.
        config = cls.from_pretrained(tmp_path, attn_implementation="eager")
        model = read_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"), config=config)
    else:
        model = read_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert model.config._attn_implementation == expected


def test_long_windows_of_sdpa_are_told_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(attention, "_LONG", 128)
    attention._warn_of_windows.cache_clear()
    ids = torch.randint(3, 97, (1, 130))
    for one, told in ((BANDED, 0), ("sdpa", 1)):
        gated = seerattn.attach(windowed_model(one).float(), AttnGateConfig(), policy=TopK(density=0.5))
        with caplog.at_level(logging.WARNING), torch.inference_mode():
            gated(ids[:, :127])
            assert "compute what it hides" not in caplog.text
            gated(ids)
            gated(ids)
        assert caplog.text.count("compute what it hides") == told
    attention._warn_of_windows.cache_clear()


def test_what_transformers_asks_of_an_implementation_finds_the_one_in_bands() -> None:
    assert ALL_ATTENTION_FUNCTIONS[BANDED] is banded_attention
