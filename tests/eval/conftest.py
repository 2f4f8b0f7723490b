"""A tiny model with two sets of gates, and documents for it."""

from __future__ import annotations

import pytest
from gate_forms import plain
from tiny_corpus import tiny_tokenizer, topical_text
from tiny_models import tiny_model

from seerattn.eval.arms import EvalModel, Gates
from seerattn.gate import AttnGateConfig
from seerattn.hf.attach import attach, detach

FORMS = {"paper": AttnGateConfig.paper(init="identity"), "best": plain(share="kv_group")}


@pytest.fixture(scope="session")
def gate_folders(tmp_path_factory) -> list[Gates]:
    model, folders = tiny_model("llama"), []
    for name, form in FORMS.items():
        folder = tmp_path_factory.mktemp("gates") / name
        gated = attach(model, form)
        gated.save_pretrained(folder)
        model = detach(gated)
        folders.append(Gates(name, folder))
    return folders


@pytest.fixture(scope="session")
def subject(gate_folders) -> EvalModel:
    return EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny", gates=gate_folders)


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    """Four documents of 500 to 740 tokens."""
    tokenizer = tiny_tokenizer()
    texts = [topical_text(500 + 80 * seed, seed) for seed in range(4)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
