"""`seerattn finetune`: train a model and its gates together while attention is sparse."""

from __future__ import annotations

from dataclasses import replace

from seerattn.cli.options import from_options
from seerattn.cli.training import Setup, train
from seerattn.training.finetune import FinetuneConfig, FinetuneRun


@from_options
def finetune(setup: Setup, config: FinetuneConfig) -> None:
    """Train a model and its gates together while attention is sparse.

    The published recipe, 8k to 32k: --context 32768 --context-factor 4 --steps 400 --gates FOLDER --sparsity 0.5.

    Several GPUs: torchrun --nproc-per-node 8 -m seerattn finetune ...
    """
    # Weights are float32 unless told otherwise, since bfloat16 rounds most updates away.
    if setup.dtype == "auto":
        setup = replace(setup, dtype="float32")
    else:
        config = replace(config, autocast=False)
    train(FinetuneRun, config, setup)
