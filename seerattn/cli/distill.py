"""`seerattn distill`: learn the gates of a model."""

from __future__ import annotations

from seerattn.cli.options import from_options
from seerattn.cli.training import Setup, train
from seerattn.training.distill import DistillConfig, DistillRun


@from_options
def distill(setup: Setup, config: DistillConfig) -> None:
    """Learn the gates of a model from its own attention maps.

    The published recipe: --gate paper --context 65536 --steps 500 --batch-size 16 --lr 1e-3 --set target_share=1
    --set drop_rows=0.25.

    Several GPUs: torchrun --nproc-per-node 8 -m seerattn distill ...
    """
    train(DistillRun, config, setup)
