"""`RunConfig`: the options that all training runs have."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from seerattn.options import check_options, option
from seerattn.training.losses import LossKind, RowWeight
from seerattn.training.processes import processes

C = TypeVar("C", bound="RunConfig")
TRAINING = "Training"  # the panel of --help


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run needs to know.

    Attributes:
        context: tokens of a sample.
        steps: optimizer steps.
        lr: peak learning rate of AdamW; None where a run finds one that fits.
        batch_size: samples of a step, over all processes and micro-batches.
        micro_batch_size: samples that one process runs at once.
        warmup_steps: None is 20, or 5 % of a short run.
        loss: of the gates, see `gate_loss`.
        row_weight: "uniform" or "mass", see `gate_loss`.
        retrieval_share: share of samples that are synthetic retrieval documents (`seerattn.data.retrieval`). They teach
            the rows that look far back, which plain text rarely has.
        window_lengths: lengths, in tokens, one of which is drawn for each sample of text to be cut into; they divide
            the context. None is the context. Weights that are to serve short prompts sparsely as well must meet some.
        logging_steps: steps from one record to the next.
        save_steps: steps from one checkpoint to the next, a multiple of ``logging_steps``.
        keep_checkpoints: older ones are deleted.
        report_to: trackers of the Trainer, such as "wandb" or "tensorboard".
        target_share: share of the query blocks whose attention map is computed for the gates to learn from; others
            every step.
        seed: draws the gates' initial weights and the order of the data.
    """

    context: int = option(help="Tokens of a sample.", low=1, panel=TRAINING)
    steps: int = option(help="Optimizer steps.", low=1, panel=TRAINING)
    lr: float | None = option(None, help="Peak learning rate.", above=0, panel=TRAINING)
    batch_size: int = option(8, help="Samples of a step, over all processes.", low=1, panel=TRAINING)
    micro_batch_size: int = option(1, help="Samples that one process runs at once.", low=1, flag=False)
    warmup_steps: int | None = option(
        None, help="Steps of warm-up; default 20, or 5 % of a short run.", low=0, flag=False
    )
    loss: LossKind = option("kl", help="What gates minimise.", flag=False)
    row_weight: RowWeight = option("uniform", help="Whether rows count by what they leave to choose.", flag=False)
    retrieval_share: float = option(
        0.0, help="Share of samples that are synthetic retrieval documents.", low=0, high=1, panel=TRAINING
    )
    window_lengths: tuple[int, ...] = option(
        (), help="Lengths that samples of text are cut into; default: the context.", low=1, flag=False
    )
    logging_steps: int = option(10, help="Steps between records.", low=1, flag=False)
    save_steps: int = option(100, help="Steps between checkpoints.", low=1, flag=False)
    keep_checkpoints: int = option(2, help="Checkpoints to keep.", low=1, flag=False)
    report_to: str = option("none", help="Tracker, such as wandb or tensorboard.", flag=False)
    target_share: float = option(
        1.0, help="Share of the query blocks that gates learn from, others every step.", above=0, high=1, flag=False
    )
    # The most that numpy takes, which the Trainer seeds as well.
    seed: int = option(0, help="Of gates and data.", low=0, high=2**32 - 1, flag=False)

    # Which option is the learning rate of the gates, and what it is by default for narrow heads.
    gate_rate: ClassVar[str] = "lr"
    narrow_rate: ClassVar[float]

    def __post_init__(self) -> None:
        check_options(self)
        if self.steps * self.batch_size * self.context > sys.maxsize:
            raise ValueError(
                f"steps x batch_size x context must be at most {sys.maxsize} tokens, got "
                f"{self.steps} x {self.batch_size} x {self.context}"
            )
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must be at most the {self.steps} steps, got {self.warmup_steps}")
        if self.save_steps % self.logging_steps:
            # A record averages over the steps since the last one; a run that resumes between two would lose some.
            raise ValueError(
                f"save_steps must be a multiple of logging_steps = {self.logging_steps}, got {self.save_steps}"
            )
        _check_tracker(self.report_to)

    @property
    def has_gates(self) -> bool:
        """Whether there are gates to be trained."""
        return True

    @property
    def keeps_budgets(self) -> bool:
        """Whether the budgets of gates to start from stay with those that they become."""
        return False

    def with_fitting_rate(self: C, head_dim: int) -> C:
        """The same with a learning rate of the gates that fits heads so wide, unless there is one."""
        if getattr(self, self.gate_rate) is not None:
            return self
        return replace(self, **{self.gate_rate: fitting_lr(head_dim, self.narrow_rate)})

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return min(20, math.ceil(0.05 * self.steps)) if self.warmup_steps is None else self.warmup_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all processes."""
        return self.batch_size * self.context

    def accumulation(self, processes: int) -> int:
        """Micro-batches of a step on each of so many processes."""
        at_once = self.micro_batch_size * processes
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size x processes = {at_once}, got {self.batch_size}"
            )
        return self.batch_size // at_once

    def describe_steps(self) -> str:
        """Steps, samples and tokens, for people."""
        return (
            f"{self.steps} of {self.batch_size} samples, {self.accumulation(processes())} micro-batches of "
            f"{self.micro_batch_size} on {processes()} process(es); {self.steps * self.tokens_per_step:,} tokens"
        )


def fitting_lr(head_dim: int, narrow: float) -> float:
    """Peak learning rate for gates of heads so wide, where ``narrow`` is that of 64 channels and less.

    A step of AdamW moves every weight by the rate. A score sums ``head_dim`` moves of the one linear times ``head_dim``
    features of the other side, over the root of the width, so that the rate falls with ``head_dim ** 1.5``. At 5e-3
    gates of SmolLM2, whose heads have 64 channels, learned fastest. Those of Gemma 3, with 256, fell apart
    (docs/LOG.md).
    """
    return narrow * min(1.0, (64 / head_dim) ** 1.5)


def _check_tracker(name: str) -> None:
    """Refuses a tracker that transformers does not know or that is not installed."""
    if name == "none":
        return
    from transformers.integrations import get_available_reporting_integrations

    found = get_available_reporting_integrations()
    if name not in ("all", *found):
        raise ValueError(
            "report_to must be none, all or a tracker that is installed here, got "
            f"{name!r} where {', '.join(found) or 'none'} can be imported; install it"
        )
