"""Reading models: whole ones of every architecture, and what is damaged or would run code of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_corpus import write_model
from tiny_models import ROTARY, SUPPORTED, tiny_model

from seerattn.hf.eval_model import choose_device, load_eval_model
from seerattn.hf.loading import read_config, read_model, read_tokenizer

CPU = torch.device("cpu")


def read(folder: Path) -> torch.nn.Module:
    return read_model(str(folder), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("loading") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def configured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])

    return change


def with_weights(**shapes: tuple[int, ...]) -> Callable[[Path], None]:
    """Adds tensors, with two underscores for each dot of a name."""

    def change(folder: Path) -> None:
        added = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
        weights = load_file(folder / "model.safetensors") | added
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SUPPORTED | ROTARY)
def test_saved_model_is_read_with_its_own_weights(name: str, tied: bool, tmp_path: Path) -> None:
    saved = tiny_model(name, tie_word_embeddings=tied)
    saved.save_pretrained(tmp_path)
    loaded = read(tmp_path).state_dict()
    assert loaded.keys() == saved.state_dict().keys()
    assert all(torch.equal(loaded[key], weight) for key, weight in saved.state_dict().items())


BROKEN = {
    "layer that is not there": (configured(num_hidden_layers=3), "without model.layers.2"),
    "layer too many": (configured(num_hidden_layers=1), "with model.layers.1"),
    "other sizes": (configured(num_key_value_heads=1), r"k_proj.weight, \[64, 64\] in place of \[32, 64\]"),
    "weights of another architecture": (configured(model_type="qwen3"), "without model.layers.0.self_attn.k_norm"),
    "norm that the config knows nothing of": (
        with_weights(model__layers__0__self_attn__q_norm__weight=(32,)),
        "with model.layers.0.self_attn.q_norm.weight, which would be left out",
    ),
    "bias that the config knows nothing of": (
        with_weights(model__layers__1__mlp__up_proj__bias=(64,)),
        "with model.layers.1.mlp.up_proj.bias, which would be left out",
    ),
    "no causal language model": (configured(model_type="t5"), "T5Config"),
    "unknown architecture": (configured(model_type="nosuch"), "nosuch"),
    "size of a wrong type": (configured(hidden_size="wide"), "expected int, got str"),
    "no heads": (configured(num_attention_heads=0), "ZeroDivisionError"),
    "no JSON": (written("config.json", b"\xff\xfe"), "not a valid JSON file"),
    "JSON that is no object": (written("config.json", b"null"), "TypeError"),
    "deeply nested JSON": (written("config.json", b"[" * 100_000), "RecursionError"),
    "empty weights": (cut(0), "SafetensorError"),
    "cut in the header": (cut(100), "SafetensorError"),
    "cut in a tensor": (cut(50_000), "SafetensorError"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_model_that_is_not_whole_is_told_in_a_sentence(name: str, folder: Path) -> None:
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(ValueError, match=f"^model must .*{message}") as told:
        read(folder)
    assert "\n" not in str(told.value) and str(folder) in str(told.value)


def test_parts_that_layers_do_not_miss_are_left_out(folder: Path, whole: Path) -> None:
    with_weights(
        model__layers__0__self_attn__rotary_emb__inv_freq=(16,),
        model__layers__0__self_attn__masked_bias=(1,),
        vision_tower__blocks__0__norm__weight=(8,),
        multi_modal_projector__weight=(8,),
    )(folder)
    loaded, expected = read(folder).state_dict(), read(whole).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_layers_that_predict_further_tokens_may_follow_the_others(folder: Path) -> None:
    configured(num_hidden_layers=1)(folder)
    with pytest.raises(ValueError, match="would be left out"):
        read(folder)
    configured(num_nextn_predict_layers=1)(folder)
    assert len(read(folder).model.layers) == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"null"])
def test_tokenizer_that_cannot_be_read_is_told_in_a_sentence(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^model must be one with a tokenizer, got .*copy: "):
        read_tokenizer(str(folder))


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_that_comes_with_a_model_runs_only_where_it_is_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    marker = tmp_path / "it ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    configured(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})(
        folder
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for reader in (read_config, read_tokenizer):
        with pytest.raises(ValueError, match="--trust-remote-code"):
            reader(str(folder))
    assert not marker.exists()
    loaded = load_eval_model(str(folder), device=CPU, trust_remote_code=True)
    assert marker.exists() and type(loaded.model).__name__ == "OwnModel"
    assert type(loaded.tokenizer).__name__ == "OwnTokenizer"


@pytest.mark.parametrize("name", ["nosuch", "meta", "mps:7", "cuda:99", "cuda:-1", "xpu:9", "hpu", "", "\udc80"])
def test_device_that_does_not_compute_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^device must be cpu, cuda or another that computes, got "):
        choose_device(name)
    assert choose_device("cpu") == CPU
