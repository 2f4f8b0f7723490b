"""What the tests of recipes share: a tiny model, and text for it."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seerattn import AttnGateConfig, attach

WORDS = [f"w{i}" for i in range(300)]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of two layers with gates of its own, and documents of 3000 tokens, one of them shorter."""
    folder = tmp_path_factory.mktemp("inputs")
    # Characters, so that the sentences of retrieval documents have tokens as well.
    characters = ["<bos>", "<unk>", *map(chr, range(10, 127))]
    vocabulary = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<bos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    attach(model, AttnGateConfig()).save_pretrained(folder / "gates")
    rng = random.Random(0)
    paths = {"model": folder / "model", "gates": folder / "gates"}
    for name, count in (("train", 4), ("books", 3), ("proofs", 2)):
        paths[name] = folder / f"{name}.jsonl"
        texts = [" ".join(rng.choices(WORDS, k=600 if number else 20)) for number in range(count + 1)]
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths
