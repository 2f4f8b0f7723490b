"""Families of models in vLLM with gates: each request gets what sparse `generate` gives it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import alone, answers, engine, make, prompts

import seerattn
from seerattn.vllm import density

# vLLM has warnings of its own.
pytestmark = pytest.mark.filterwarnings("ignore")

UNTIED = {"tie_word_embeddings": False}
# Rotations of several kinds, norms of queries and keys, soft caps, sinks, and layers with a window beside full ones.
FAMILIES = {"llama-yarn": {}, "llama-llama3": {}, "qwen3": {}, "gemma3": UNTIED}
FAMILIES |= {"gemma2": {}, "gpt-oss": {}, "cohere": {}}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families_give_the_tokens_and_the_density_of_sparse_generate(tmp_path: Path, name: str) -> None:
    made, asked = make(tmp_path, name, **FAMILIES[name]), prompts()
    expected, densities = [], []
    for prompt in asked:
        with seerattn.record_density(made.gated) as meter:
            expected.append(alone(made.gated, prompt))
        densities.append(meter.mean() if meter.layers else None)
    with seerattn.policy(made.gated, None):
        assert [alone(made.gated, prompt) for prompt in asked] != expected
    with engine(made.model, made.options()) as llm:
        assert answers(llm, asked) == expected
    # A prompt of one token is decoded.
    assert [one.density for one in density.prompts()[-5:]] == densities[:-1] and densities[-1] is None
    assert max(densities[1:-1]) < 0.7
