"""Runs do not depend on how many samples go through the model at once, whatever documents the samples hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_corpus import tiny_tokenizer, write_documents, write_model
from transformers import AutoModelForCausalLM

from seerattn.gate import AttnGateConfig
from seerattn.training.config import RunConfig
from seerattn.training.distill import DistillConfig, DistillRun, distill
from seerattn.training.finetune import FinetuneConfig, FinetuneRun, finetune
from seerattn.training.run import TrainingRun

# One sub-block a side: between two that score alike, the order of a sum decides which is the maximum.
FORM = AttnGateConfig(block_q=32, block_k=32, query_subblocks=1, key_subblocks=1, init="normal")
SHARED: dict[str, Any] = {
    "context": 768,
    "steps": 3,
    "batch_size": 4,
    "logging_steps": 1,
    "save_steps": 3,
    "retrieval_share": 0.25,
    "lr": 1e-3,
}
# What a record says of the schedule, and of the clock.
NOT_MEASURED = {"step", "lr", "tokens", "tokens_per_second"}


def distillation(micro_batch_size: int) -> tuple[type[TrainingRun], Callable[..., Any], RunConfig]:
    config = DistillConfig(**SHARED, drop_rows=0.2, micro_batch_size=micro_batch_size)
    return DistillRun, distill, config


def distillation_of_some_rows(micro_batch_size: int) -> tuple[type[TrainingRun], Callable[..., Any], RunConfig]:
    return DistillRun, distill, replace(distillation(micro_batch_size)[2], target_share=0.4)


def finetuning(micro_batch_size: int) -> tuple[type[TrainingRun], Callable[..., Any], RunConfig]:
    own = {"sparsity": 0.5, "anneal": 0.25, "target_share": 0.5, "gate_lr": 3e-3}
    config = FinetuneConfig(**SHARED, **own, micro_batch_size=micro_batch_size)
    return FinetuneRun, finetune, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and documents of which some fill a sample and some are packed."""
    folder = tmp_path_factory.mktemp("micro-batches")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 1700, 700, 430, 300, 150, 100, 70, 64)
    return folder


def inputs(folder: Path) -> tuple[Any, ...]:
    """Model, tokenizer and text of a run."""
    return AutoModelForCausalLM.from_pretrained(folder / "model"), tiny_tokenizer(), [folder / "data.jsonl"]


def measured(output: Path) -> list[dict[str, Any]]:
    """The records of a run without what no sample has a part in."""
    found = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in NOT_MEASURED} for record in found]


@pytest.mark.parametrize("kind", [distillation, distillation_of_some_rows, finetuning])
def test_records_and_weights_are_those_of_one_sample_at_a_time(kind: Callable, folder: Path, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        run, train, config = kind(size)
        samples = run.plan(*inputs(folder), config, gate=FORM).samples.plan
        packed = [sample is not None and len(sample) > 1 for sample in samples]
        # Every step has packed samples beside whole ones.
        assert len(packed) == 12 and all(len(set(packed[i : i + 4])) == 2 for i in (0, 4, 8))
        train(*inputs(folder), config, gate=FORM, output=tmp_path / str(size))
    expected = measured(tmp_path / "1")
    for size in (2, 4):
        for found, alone in zip(measured(tmp_path / str(size)), expected, strict=True):
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                assert found[name] == pytest.approx(value, rel=2e-6), (size, name)
        for file in (tmp_path / "1").rglob("*.safetensors"):
            weights, other = load_file(file), load_file(tmp_path / str(size) / file.relative_to(tmp_path / "1"))
            assert weights.keys() == other.keys()
            for name, weight in weights.items():
                # Adam divides by the square root of tiny second moments, which magnifies the order of summation.
                torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-5)
