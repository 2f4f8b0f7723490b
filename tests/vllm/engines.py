"""Engines of vLLM with gates, beside the same models in transformers. Importing it skips where there is no vLLM."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn

import seerattn
from seerattn import AttnGateConfig, BlockIndices, TopK
from seerattn.vllm import backend

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # The folder of these tests is a package of that name too, where there is no other.
    pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm", exc_type=ImportError)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

BLOCK = 32
GATE = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
PAGE, CONTEXT, NEW = 128, 1024, 6


class Made(NamedTuple):
    """A model with gates, in transformers and on the disk."""

    gated: nn.Module
    model: Path
    gates: Path

    def options(self, policy: seerattn.Policy = SPARSE, **more: Any) -> dict[str, Any]:
        return {"gates": str(self.gates), "policy": policy.to_dict(), "impl": "sparse"} | more


def make(folder: Path, name: str = "llama", **overrides: Any) -> Made:
    model = tiny_model(name, **overrides)
    model.save_pretrained(folder / "model")
    gated = seerattn.attach(model, GATE, SPARSE, impl="reference").eval()
    gated.save_pretrained(folder / "gates")
    return Made(gated, folder / "model", folder / "gates")


@contextmanager
def engine(model: Path, options: dict[str, Any] | None, **more: Any) -> Iterator[LLM]:
    """An engine in this process; it and what it holds of the process go with the ``with``."""
    given = {"max_model_len": CONTEXT, "block_size": PAGE, "num_gpu_blocks_override": 64, "skip_tokenizer_init": True}
    given |= {"dtype": "float32", "enforce_eager": True, "disable_log_stats": True, "max_num_batched_tokens": 4096}
    additional = {} if options is None else {"additional_config": {"seerattn": options}}
    made = None
    try:
        made = LLM(str(model), **given | additional | more)
        yield made
    finally:
        if made is not None:
            made.llm_engine.engine_core.shutdown()
        del made
        cleanup_dist_env_and_memory()
        gc.collect()


def prompts(lengths: tuple[int, ...] = (37, 130, 300, 256, 700, 1), seed: int = 0) -> list[list[int]]:
    return [tokens(n, seed=seed + n).tolist() for n in lengths]


def outputs(llm: LLM, asked: list[list[int]], new: int = NEW, **options: Any) -> list[Any]:
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **options)
    return [out.outputs[0] for out in llm.generate([{"prompt_token_ids": p} for p in asked], sampling, use_tqdm=False)]


def answers(llm: LLM, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    return [list(out.token_ids) for out in outputs(llm, asked, new)]


def logprobs(llm: LLM, asked: list[list[int]], new: int = NEW) -> Tensor:
    """Of the five likeliest tokens at every step."""
    found = [out.logprobs for out in outputs(llm, asked, new, logprobs=5)]
    return torch.tensor([[sorted(x.logprob for x in step.values())[-5:] for step in one] for one in found])


def alone(model: nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    """What transformers writes behind a prompt."""
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()


class Chosen(NamedTuple):
    """Blocks of a part of a prompt in one layer."""

    layer: int
    prompt: int
    start: int
    end: int
    blocks: BlockIndices

    def rows(self) -> dict[int, Tensor]:
        """Which key blocks every query block keeps, bool ``[H, Nk]``, by its number."""
        first = self.start // self.blocks.block_q
        return {first + row: mask for row, mask in enumerate(self.blocks.to_mask()[0].unbind(1))}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Chosen]:
    """All that gates choose from now on."""
    found: list[Chosen] = []
    unwatched = backend.GatedImpl._select

    def watched(self, q, layer, kv_cache, part, *rest):
        blocks = unwatched(self, q, layer, kv_cache, part, *rest)
        found.append(Chosen(self.gate.layer, part.prompt, part.start, part.end, blocks))
        return blocks

    monkeypatch.setattr(backend.GatedImpl, "_select", watched)
    return found


@contextmanager
def told_lines() -> Iterator[list[str]]:
    """What the plug-in logs for people inside the ``with``; the first engine of a process sets vLLM's loggers up."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("vllm.seerattn")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        yield told
    finally:
        logger.removeHandler(handler)
