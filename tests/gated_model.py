"""Fixtures: a tiny model, two sets of gates for it, and documents; a `conftest.py` imports those that its tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
from gate_forms import plain
from tiny_corpus import tiny_tokenizer, topical_text
from tiny_models import tiny_model

from seerattn.gate import AttnGateConfig
from seerattn.hf.attach import attach, detach
from seerattn.hf.eval_model import EvalModel

FORMS = {"paper": AttnGateConfig.paper(init="identity"), "best": plain(share="kv_group")}


@pytest.fixture(scope="session")
def gate_folders(tmp_path_factory) -> list[Path]:
    model, folders = tiny_model("llama"), []
    for name, form in FORMS.items():
        folder = tmp_path_factory.mktemp("gates") / name
        gated = attach(model, form)
        gated.save_pretrained(folder)
        model = detach(gated)
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def model() -> EvalModel:
    return EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    """Four documents of 500 to 740 tokens."""
    tokenizer = tiny_tokenizer()
    texts = [topical_text(500 + 80 * seed, seed) for seed in range(4)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
