"""Text of 90 words with topics that come back, a tokenizer for it, and a model that attends to equal words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from seerattn.gate import AttnGateConfig
from seerattn.hf.attach import attach, detach

WORDS = [f"w{number}" for number in range(90)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; 97 entries, as the tiny models have, <s> their beginning-of-sequence token."""
    special = ["<pad>", "<s>", "<unk>", "<4>", "<5>", "<6>", "<7>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


def topical_text(length: int, seed: int) -> str:
    """Passages of 16 to 48 words of one of four topics of five words each, so that attention has far blocks to find."""
    rng = random.Random(seed)
    topics = [rng.sample(WORDS, 5) for _ in range(4)]
    words: list[str] = []
    while len(words) < length:
        words += rng.choices(rng.choice(topics), k=rng.randint(16, 48))
    return " ".join(words[:length])


def write_documents(path: Path, *lengths: int) -> Path:
    """JSON lines with documents of so many words."""
    texts = [topical_text(length, seed) for seed, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def topical_model() -> LlamaForCausalLM:
    """A tiny Llama whose queries are three times its keys, so that blocks of one topic find each other."""
    model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with torch.no_grad():
        for layer in model.model.layers:
            keys = layer.self_attn.k_proj.weight.unflatten(0, (2, 32))
            layer.self_attn.q_proj.weight.copy_(3 * keys.repeat_interleave(2, 0).flatten(0, 1))
    return model


def write_model(folder: Path) -> Path:
    """Saves the model and its tokenizer."""
    topical_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_card(gates: Path) -> nn.Module:
    """The model that the code on the card of saved gates makes, with their folder where it says to put it."""
    code = (gates / "README.md").read_text().split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(code.replace("path/to/these/gates", str(gates)), made)
    return made["model"]


def write_models_and_gates(folder: Path) -> None:
    """A "model" and an "other" of other sizes with tokenizers, gates for both, and documents ("docs.jsonl")."""
    for name, overrides in (("model", {}), ("other", {"num_attention_heads": 2, "num_key_value_heads": 1})):
        model = tiny_model("llama", **overrides)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        gated = attach(model, AttnGateConfig(rope=False))
        gated.save_pretrained(folder / f"gates-of-{name}")
        detach(gated)
    write_documents(folder / "docs.jsonl", 450, 500, 550)
