"""A tiny model with gates, and what it says to a prompt alone and in a batch of many."""

import torch
from tiny_models import tiny_model, tokens
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

import seerattn
from seerattn import AttnGateConfig, TopK

BLOCK = 32
GATE = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
# transformers 5.17 knows only the older name.
PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
LENGTHS = (1, 37, 130, 300, 256)
NEW = 4
# Its experts have no product in fp64.
DTYPES = {"gpt-oss": torch.float32}


def model(name: str = "llama", impl: str = "reference", policy=SPARSE) -> nn.Module:
    # With tied embeddings a tiny Gemma 3 only says again what it read last.
    untied = {"tie_word_embeddings": False} if name == "gemma3" else {}
    return seerattn.attach(tiny_model(name, DTYPES.get(name, torch.float64), **untied), GATE, policy, impl=impl).eval()


def prompts(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    return [tokens(n, seed=seed + n).tolist() for n in lengths]


def alone(model: nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
    return model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()


def greedy(new: int = NEW, **options) -> GenerationConfig:
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": -1, "pad_token_id": 0} | options
    return GenerationConfig(**options)


def config(**options) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{PAGE: BLOCK, "num_blocks": 256, "max_batch_tokens": 128} | options)


def batch(model: nn.Module, prompts: list[list[int]], new: int = NEW, **options) -> list[list[int]]:
    found = model.generate_batch(prompts, greedy(new), config(**options))
    # A failing attention function shows as an error of the request.
    assert [output.error for output in found.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in found.values()]
