"""Engines of vLLM that cannot have gates say so, in a sentence, before they answer anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import PAGE, Made, alone, answers, engine, make, outputs, prompts
from tiny_models import tiny_model

from seerattn.gate_files import WEIGHTS

# vLLM has warnings of its own.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
REFERENCE, PUBLISHED = ROOT / "assets/reference-model", ROOT / "assets/reference-gates/paper"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"))


def refused(model, options: dict, **more) -> str:
    with pytest.raises(ValueError) as error, engine(model, options, **more):
        pass
    return str(error.value)


def test_engine_is_refused_in_a_sentence_before_it_answers(llama: Made, tmp_path) -> None:
    assert "gates must be a folder with adapter_config.json" in refused(llama.model, {"gates": str(tmp_path)})
    fp8 = refused(llama.model, llama.options(), kv_cache_dtype="fp8")
    assert fp8 == (
        "kv_cache_dtype must be that of the model where gates are asked for, got fp8; leave --kv-cache-dtype out"
    )
    assert "last_rows_dense must be 0" in refused(
        llama.model, llama.options() | {"policy": {"policy": "KeepAll", "last_rows_dense": 1}}
    )
    pages = refused(REFERENCE, {"gates": str(PUBLISHED), "density": 0.2}, block_size=32)
    assert pages == "pages must hold whole gate keys, of 64 tokens each, got pages of 32 tokens; use --block-size 64"


def test_gates_that_are_not_of_the_model_are_refused_by_the_engine(llama: Made, tmp_path) -> None:
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "longer")
    assert "got gates for num_hidden_layers = 2" in refused(tmp_path / "longer", llama.options())
    weights = llama.gates / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    try:
        assert "must be a whole safetensors file" in refused(llama.model, llama.options())
    finally:
        weights.write_bytes(whole)


def test_layer_with_a_window_and_a_gate_is_refused_and_served_where_the_window_is_switched_off(tmp_path) -> None:
    made = make(tmp_path, "phi3")
    assert "got layer 0 with a sliding window" in refused(made.model, made.options())
    with engine(made.model, made.options(), disable_sliding_window=True) as llm:
        assert answers(llm, prompts()) == [alone(made.gated, prompt) for prompt in prompts()]


def test_encoder_is_refused_by_the_engine(llama: Made, tmp_path) -> None:
    tiny_model("llama", is_causal=False).save_pretrained(tmp_path / "encoder")
    found = refused(tmp_path / "encoder", llama.options(), runner="pooling")
    assert "must be those of a decoder where gates are asked for, got one of kind encoder_only" in found


def test_forward_that_fails_is_told_by_the_engine(llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no forward today")

    monkeypatch.setattr("seerattn.vllm.backend.GatedImpl._select", fail)
    with engine(llama.model, llama.options()) as llm, pytest.raises(ValueError, match="no forward today"):
        outputs(llm, prompts((PAGE,)), 1)
