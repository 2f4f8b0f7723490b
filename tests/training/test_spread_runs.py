"""Distillation over processes in fp64: the gates and losses of one process, up to the order of sums."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_corpus import tiny_tokenizer, write_documents, write_model
from transformers import AutoModelForCausalLM
from two_processes import in_two_processes

from seerattn.gate import AttnGateConfig
from seerattn.training.distill import DistillConfig, distill
from seerattn.training.trainer import DistillTrainer

# One sub-block a side: between two that score alike, the order of a sum decides which is the maximum.
FORM = AttnGateConfig(block_q=32, block_k=32, query_subblocks=1, key_subblocks=1, init="normal")
# Samples of a step: a micro-batch of each of two processes, or two.
BATCHES = (2, 4)
# In fp32 runs of other orders of sums came to differ by 1e-4 in a weight and by 1e-6 in a loss. What is a matter of
# that order shrinks with the unit roundoff, by 2^-29; a sample left out, or of another weight, does not.
WEIGHT, LOSS = 1e-4 * 2**-29, 1e-6 * 2**-29


class Stopped(Exception):
    """A run that was interrupted."""


@contextmanager
def in_fp64() -> Iterator[None]:
    """Gates, what they are shown and what they learn from in fp64, where the library has fp32."""
    to_fp32 = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = to_fp32
        torch.set_default_dtype(torch.float32)


def run(folder: Path, output: Path, batch: int, *, until: int | None = None, resume: bool = False) -> None:
    """Distils in this process, or as one of several; interrupted in the step after ``until``."""
    config = DistillConfig(
        context=256,
        steps=6,
        batch_size=batch,
        lr=3e-3,
        logging_steps=1,
        save_steps=3,
        retrieval_share=0.25,
        target_share=0.5,
    )
    step = DistillTrainer.training_step

    def step_or_stop(self: DistillTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == until:
            raise Stopped
        return step(self, *args, **kwargs)

    DistillTrainer.training_step = step_or_stop
    try:
        with in_fp64(), suppress(Stopped):
            model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
            text = [folder / "data.jsonl"]
            distill(model, tiny_tokenizer(), text, config, gate=FORM, output=output, resume=resume)
    finally:
        DistillTrainer.training_step = step


def assert_alike(found: Path, expected: Path) -> None:
    """The same records and gates, up to the order of sums."""
    logs = [(path / "training.jsonl").read_text().splitlines() for path in (found, expected)]
    logs = [[json.loads(line) for line in log] for log in logs]
    for two, one in zip(*logs, strict=True):
        assert (two["step"], two["lr"], two["tokens"]) == (one["step"], one["lr"], one["tokens"])
        assert two["loss"] == pytest.approx(one["loss"], rel=0, abs=LOSS)
        assert two["layer_loss"] == pytest.approx(one["layer_loss"], rel=0, abs=LOSS)
    gates = [load_file(path / "adapter_model.safetensors") for path in (found, expected)]
    assert gates[0].keys() == gates[1].keys()
    for name, weight in gates[1].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(gates[0][name], weight, rtol=0, atol=WEIGHT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, whole ones and such as one has begun and the other ended."""
    folder = tmp_path_factory.mktemp("spread")
    write_model(folder / "model")
    write_documents(folder / "data.jsonl", 1200, 700, 300, 150, 100, 70)
    for batch in BATCHES:
        run(folder, folder / f"one-{batch}", batch)
    run(folder, folder / "one, then two", 4, until=4)
    in_two_processes(__file__, folder)
    run(folder, folder / "two, then one", 4, resume=True)
    return folder


@pytest.mark.parametrize("batch", BATCHES)
def test_two_processes_learn_the_gates_of_one_from_the_same_samples(batch: int, folder: Path) -> None:
    assert_alike(folder / f"two-{batch}", folder / f"one-{batch}")


@pytest.mark.parametrize("run_by", ["one, then two", "two, then one"])
def test_a_run_goes_on_with_another_number_of_processes(run_by: str, folder: Path) -> None:
    assert_alike(folder / run_by, folder / "one-4")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared = Path(sys.argv[1])
    for samples in BATCHES:
        run(shared, shared / f"two-{samples}", samples)
    run(shared, shared / "one, then two", 4, resume=True)
    run(shared, shared / "two, then one", 4, until=4)
