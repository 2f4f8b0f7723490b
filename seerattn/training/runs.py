"""What all training runs share: their schedule, their data, their output folder and how they are resumed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from seerattn.data.corpus import Corpus, tokenize
from seerattn.data.samples import Samples
from seerattn.data.text import read_documents
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.selection.policies import TopK
from seerattn.training.losses import LossKind, RowWeight
from seerattn.training.output import CHECKPOINTS_NAME, begun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


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
        loss: of the gates: "kl", "mse" or "smooth_l1", see `gate_loss`.
        row_weight: "uniform" or "mass", see `gate_loss`.
        retrieval_share: share of samples that are synthetic retrieval documents (`seerattn.data.retrieval`). They teach
            the rows that look far back, which plain text rarely has.
        logging_steps: steps from one record to the next.
        save_steps: steps from one checkpoint to the next, a multiple of ``logging_steps``.
        keep_checkpoints: older ones are deleted.
        report_to: trackers of the Trainer, such as "wandb" or "tensorboard".
        target_share: share of the query blocks whose attention map is computed for the gates to learn from; others
            every step.
        seed: draws the gates' initial weights and the order of the data.
    """

    context: int
    steps: int
    lr: float | None = None
    batch_size: int = 8
    micro_batch_size: int = 1
    warmup_steps: int | None = None
    loss: LossKind = "kl"
    row_weight: RowWeight = "uniform"
    retrieval_share: float = 0.0
    logging_steps: int = 10
    save_steps: int = 100
    keep_checkpoints: int = 2
    report_to: str = "none"
    target_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("context", "steps", "batch_size", "micro_batch_size", "logging_steps", "save_steps")
        for name in (*counts, "keep_checkpoints"):
            check_whole_number(name, getattr(self, name), 1, sys.maxsize)
        if self.steps * self.batch_size * self.context > sys.maxsize:
            raise ValueError(
                f"steps x batch_size x context must be at most {sys.maxsize} tokens, got "
                f"{self.steps} x {self.batch_size} x {self.context}"
            )
        # What numpy takes, which the Trainer seeds as well.
        check_whole_number("seed", self.seed, 0, 2**32 - 1)
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must be 0 to {self.steps}, the number of steps, got {self.warmup_steps}")
        for name, kinds in (("loss", get_args(LossKind)), ("row_weight", get_args(RowWeight))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {list(kinds)}, got {getattr(self, name)!r}")
        if not 0 <= self.retrieval_share <= 1:
            raise ValueError(f"retrieval_share must be in [0, 1], got {self.retrieval_share}")
        if not 0 < self.target_share <= 1:
            raise ValueError(f"target_share must be in (0, 1], got {self.target_share}")
        if self.save_steps % self.logging_steps:
            # A record averages over the steps since the last one; a run that resumes between two would lose some.
            raise ValueError(
                f"save_steps must be a multiple of logging_steps = {self.logging_steps}, got {self.save_steps}"
            )
        _check_tracker(self.report_to)

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


def check_whole_number(name: str, value: int, least: int, most: int) -> None:
    """Refuses what is no whole number in a range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


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


def check_positive(name: str, value: float) -> None:
    """Refuses what is no positive number."""
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{name} must be a positive number, got {value}")


def gate_form(gates: str | Path | None, gate: AttnGateConfig | None, layers: Sequence[int] | None) -> AttnGateConfig:
    """Form of the gates that a run starts from: that of saved ones, or of fresh ones.

    Raises:
        ValueError: saved gates that are not whole, or saved gates and a form.
    """
    from seerattn.hf.config import SeerConfig

    if gates is None:
        return gate or AttnGateConfig()
    if gate is not None or layers is not None:
        raise ValueError(
            f"gates must be a folder, which holds their form, or fresh ones of a form, got {gates} and a form; "
            "leave one of them out"
        )
    return AttnGateConfig.from_dict(SeerConfig.from_pretrained(str(gates)).gate)


def attach_gates(
    model: PreTrainedModel,
    gates: str | Path | None,
    form: AttnGateConfig,
    *,
    density: float,
    layers: Sequence[int] | None,
) -> PeftModel:
    """The model with gates to be trained, saved ones or fresh ones of a form, that run at a density when loaded.

    Budgets that were read off saved gates are not those of the gates that these become, and are left behind.
    """
    from seerattn.hf.attach import attach, set_policy

    policy, indices = TopK(density=density), None if layers is None else list(layers)
    model.requires_grad_(False)
    gated = attach(model, form, policy=policy, layers=indices) if gates is None else attach(model, str(gates))
    if gates is not None:
        # They come frozen and marked as such, with the name of the model that they were made for.
        gated.active_peft_config.inference_mode = False
        gated.active_peft_config.base_model_name_or_path = model.config.name_or_path
        gated.active_peft_config.budgets = None
        attachment = gated.base_model.attachment
        attachment.budgets[attachment.active] = None
        for module in gated.modules():
            if isinstance(module, AttnGate):
                module.requires_grad_(True)
        set_policy(gated, policy)
    return gated


def make_samples(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path] | Corpus,
    config: RunConfig,
    *,
    block: int,
) -> Samples:
    """The samples of a whole run, their documents cut to blocks of ``block`` tokens where they are packed.

    Raises:
        ValueError: the context is no whole number of blocks, the data cannot be read or is too short, or the model
            knows fewer tokens than the tokenizer gives.
    """
    if config.context < 2 * block or config.context % block:
        raise ValueError(
            f"context must be a multiple of the block size {block}, two blocks at least, got {config.context}"
        )
    config.accumulation(processes())
    head = 0 if tokenizer.bos_token_id is None else 1
    count = config.steps * config.batch_size
    min_tokens = 2 * block - head
    if isinstance(data, Corpus):
        corpus, shortest = data, min(data.lengths, default=0)
        if shortest < min_tokens:
            raise ValueError(
                f"tokenised data must hold documents of at least two blocks, {min_tokens} tokens, got one of "
                f"{shortest}; leave shorter ones out"
            )
    else:
        corpus = tokenize(
            read_documents(data),
            tokenizer,
            min_tokens=min_tokens,
            enough_tokens=count * config.context,
            seed=config.seed,
            progress=is_main(),
        )
        corpus = replace(corpus, sources=tuple(map(str, data)))
    known = model.get_input_embeddings().weight.shape[0]
    least, most = int(corpus.tokens.min()), max(int(corpus.tokens.max()), tokenizer.bos_token_id or 0)
    if least < 0 or most >= known:
        raise ValueError(
            f"tokens must be among the {known} that the model knows, got {least if least < 0 else most}; use the "
            "tokenizer of the model"
        )
    return Samples(
        corpus,
        tokenizer,
        count=count,
        context=config.context,
        block=block,
        retrieval_share=config.retrieval_share,
        seed=config.seed,
    )


def describe_samples(samples: Samples) -> dict[str, str]:
    """Documents and samples, for people."""
    corpus, plan = samples.corpus, samples.plan
    # Not counted one by one: a run may be of millions.
    passes = len(samples) * (1 - plan.retrieval_share) * samples.context / len(corpus.tokens)
    return {
        "documents": f"{len(corpus.lengths)} with {len(corpus.tokens):,} tokens, {corpus.dropped} too short",
        "samples": f"{len(samples)} of {samples.context} tokens, {plan.retrieval_share:.0%} retrieval documents; "
        f"{plan.short} documents are packed; the text {passes:,.1f} times over",
    }


def training_arguments(config: RunConfig, output: Path, **options: Any) -> TrainingArguments:
    """Arguments of the Trainer for a run that writes to ``output``."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS_NAME),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.accumulation(processes()),
        learning_rate=config.lr,
        warmup_steps=config.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_strategy="no",
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=config.report_to,
        seed=config.seed,
        **options,
    )
    # Without torchrun, one process trains on one device, however many there are.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextmanager
def working(output: Path, facts: dict[str, Any], arguments: TrainingArguments, *, resume: bool) -> Iterator[None]:
    """The run in its folder, see `begun`, for all of its processes."""
    everyone = arguments.distributed_state
    # Every process has found the output as it must be before the first one writes to it.
    everyone.wait_for_everyone()
    with begun(output, facts, resume=resume, main=arguments.should_save):
        everyone.wait_for_everyone()
        yield


def gates_start(gates: str | Path | None) -> tuple[str, str] | None:
    """Folder of the gates that a run starts from, with the hash of their weights; None for fresh ones."""
    from seerattn.results.environment import fingerprint

    return None if gates is None else (str(gates), fingerprint(gates))


def shared_facts(model: PreTrainedModel | PeftModel, samples: Samples, config: RunConfig) -> dict[str, Any]:
    """What decides any run, in plain JSON types."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": asdict(config),
        "data": list(samples.corpus.sources),
        "data_hash": samples.corpus.fingerprint(),
        "weights": _base_weights(model),
    }


def _base_weights(model: PreTrainedModel | PeftModel) -> str | None:
    """Fingerprint of the weights that a model was loaded from; None for one that was made in memory."""
    from huggingface_hub import try_to_load_from_cache

    from seerattn.results.environment import fingerprint

    name = model.config.name_or_path
    if not name or Path(name).is_dir():
        return fingerprint(name) if name else None
    try:
        # Weights on the Hub can be replaced under the same name, but not those in a folder of a revision.
        cached = try_to_load_from_cache(name, "config.json")
    # It is no name on the Hub.
    except ValueError:
        return None
    return fingerprint(Path(cached).parent) if isinstance(cached, str) else None


def as_bytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def processes() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Whether accelerate was told to shard the model of the run by FSDP."""
    return "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_main() -> bool:
    """Whether this process is the one that writes and shows."""
    return os.environ.get("RANK", "0") == "0"
