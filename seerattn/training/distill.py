"""`distill`: learns the gates of a model from the model's own attention maps (arXiv 2410.13276, section 4)."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.saving import staged, write_whole
from seerattn.selection.policies import TopK
from seerattn.training.data import Samples, collate, read_documents, tokenize
from seerattn.training.layer_loss import LayerLoss
from seerattn.training.losses import LossKind, RowWeight
from seerattn.training.memory import estimate_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG_NAME = "training.jsonl"
RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
WEIGHTS_NAME = "adapter_model.safetensors"
# What may differ between a run and its continuation: nothing that changes a gate or a record.
_FREE_TO_CHANGE = ("save_steps", "keep_checkpoints", "micro_batch_size", "report_to")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How gates are trained. The defaults are the published recipe, whose context is 65536 and steps are 500.

    Attributes:
        context: tokens of a sample.
        steps: optimizer steps.
        lr: peak learning rate of AdamW; it warms up, then falls along a cosine to zero.
        batch_size: samples of a step, over all processes and micro-batches.
        micro_batch_size: samples that one process runs at once.
        warmup_steps: None is 20, or 5 % of a short run.
        loss: "kl", "mse" or "smooth_l1", see `gate_loss`.
        row_weight: "uniform" or "mass", see `gate_loss`.
        drop_rows: share of the first query-block rows of every document that the loss leaves out; officially 0.25.
        recall_share: share of samples that are synthetic recall documents (`seerattn.eval.documents`). They teach
            the rows that look far back, which plain text rarely has.
        density: of the `TopK` policy that is saved with the gates and applied when they are loaded. Training does not
            depend on it, and `set_policy` changes it at any time.
        logging_steps: steps from one record to the next.
        save_steps: steps from one checkpoint to the next, a multiple of ``logging_steps``.
        keep_checkpoints: older ones are deleted.
        report_to: trackers of the Trainer, such as "wandb" or "tensorboard".
        seed: draws the gates' initial weights and the order of the data.
    """

    context: int
    steps: int
    lr: float = 1e-3
    batch_size: int = 16
    micro_batch_size: int = 1
    warmup_steps: int | None = None
    loss: LossKind = "kl"
    row_weight: RowWeight = "uniform"
    drop_rows: float = 0.0
    recall_share: float = 0.0
    density: float = 0.2
    logging_steps: int = 10
    save_steps: int = 100
    keep_checkpoints: int = 2
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "steps", "batch_size", "micro_batch_size", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must be 0 to {self.steps}, the number of steps, got {self.warmup_steps}")
        for name, kinds in (("loss", get_args(LossKind)), ("row_weight", get_args(RowWeight))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {list(kinds)}, got {getattr(self, name)!r}")
        if not 0 <= self.drop_rows < 1:
            raise ValueError(f"drop_rows must be in [0, 1), got {self.drop_rows}")
        if not 0 <= self.recall_share <= 1:
            raise ValueError(f"recall_share must be in [0, 1], got {self.recall_share}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.save_steps % self.logging_steps:
            # A record averages over the steps since the last one; a run that resumes between two would lose some.
            raise ValueError(
                f"save_steps must be a multiple of logging_steps = {self.logging_steps}, got {self.save_steps}"
            )

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return min(20, math.ceil(0.05 * self.steps)) if self.warmup_steps is None else self.warmup_steps

    def accumulation(self, processes: int) -> int:
        """Micro-batches of a step on each of so many processes."""
        at_once = self.micro_batch_size * processes
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size x processes = {at_once}, got {self.batch_size}"
            )
        return self.batch_size // at_once


@dataclass(frozen=True)
class Plan:
    """A run that was checked and is ready; nothing has been written.

    Attributes:
        model: the base model with fresh gates.
        samples: the data.
        config: how the gates are trained.
        data: the sources.
    """

    model: PeftModel
    samples: Samples
    config: DistillConfig
    data: tuple[str, ...]

    @property
    def gates(self) -> list[AttnGate]:
        """The gates, in the order of the layers."""
        return [module for module in self.model.modules() if isinstance(module, AttnGate)]

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def facts(self) -> dict[str, Any]:
        """What decides the run, in plain JSON types."""
        adapter = self.model.active_peft_config
        return {
            "model": adapter.base_model_name_or_path,
            "base_model": adapter.base_model,
            "gate": adapter.gate,
            "layers": adapter.layers,
            "config": asdict(self.config),
            "data": list(self.data),
            "data_hash": self.samples.corpus.fingerprint(),
        }

    def describe(self) -> dict[str, str]:
        """What will be done, for people."""
        config, corpus, processes = self.config, self.samples.corpus, _processes()
        recall = sum(segments is None for segments in self.samples.plan)
        packed = sum(segments is not None and len(segments) > 1 for segments in self.samples.plan)
        memory = estimate_memory(
            self.model, self.gates, micro_batch_size=config.micro_batch_size, context=config.context
        )
        tokens = config.steps * config.batch_size * config.context
        return {
            "model": self.facts()["model"] or type(self.model.get_base_model()).__name__,
            "gates": f"{self.parameters:,} parameters in {len(self.gates)} layers",
            "form": ", ".join(f"{name} {value}" for name, value in self.gates[0].config.to_dict().items()),
            "documents": f"{len(corpus.lengths)} with {len(corpus.tokens):,} tokens, {corpus.dropped} too short",
            "samples": f"{len(self.samples)} of {config.context} tokens: {packed} packed, {recall} recall documents",
            "steps": f"{config.steps} of {config.batch_size} samples, {config.accumulation(processes)} micro-batches "
            f"of {config.micro_batch_size} on {processes} process(es); {tokens:,} tokens",
            "loss": f"{config.loss}, rows {config.row_weight}, first {config.drop_rows:.0%} left out",
            "learning rate": f"{config.lr}, cosine, {config.warmup} steps of warm-up",
            "memory (estimate)": f"{_bytes(sum(memory.values()))} on each process: "
            + ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items()),
        }


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path],
    config: DistillConfig,
    *,
    gate: AttnGateConfig | None = None,
    layers: Sequence[int] | None = None,
) -> Plan:
    """Checks everything, reads the data, and attaches fresh gates. See `distill` for the arguments.

    Raises:
        ValueError: the model, the data, the gate and the config do not fit each other.
    """
    from seerattn.hf.attach import attach

    gate = gate or AttnGateConfig()
    block = max(gate.block_q, gate.block_k)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise ValueError(f"context must be at most {longest}, the model's own, got {config.context}")
    if config.context < 2 * block or config.context % block:
        raise ValueError(
            f"context must be a multiple of the block size {block}, two blocks at least, got {config.context}"
        )
    config.accumulation(_processes())
    head = 0 if tokenizer.bos_token_id is None else 1
    count = config.steps * config.batch_size
    corpus = tokenize(
        read_documents(data),
        tokenizer,
        min_tokens=2 * block - head,
        enough_tokens=count * config.context,
        seed=config.seed,
        progress=is_main(),
    )
    samples = Samples(
        corpus,
        tokenizer,
        count=count,
        context=config.context,
        block=block,
        recall_share=config.recall_share,
        seed=config.seed,
    )
    torch.manual_seed(config.seed)
    gated = attach(model, gate, policy=TopK(density=config.density), layers=None if layers is None else list(layers))
    return Plan(gated, samples, config, tuple(map(str, data)))


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path],
    config: DistillConfig,
    *,
    output: str | Path,
    gate: AttnGateConfig | None = None,
    layers: Sequence[int] | None = None,
    resume: bool = False,
) -> PeftModel:
    """Learns the gates of a model. The model's own weights stay as they are, and run without a graph.

    Under torchrun the samples of a step are spread over the processes. ``output`` gets the gates as a PEFT adapter,
    ``training.jsonl`` with a record every few steps, and ``run.json`` with what decided the run; while it lasts, also
    ``checkpoints``. A run that was killed and is resumed ends with the same gates and records as one that was not.

    Args:
        model: a causal language model from transformers, on the device to train on.
        tokenizer: its tokenizer.
        data: files, folders or names of datasets, see `seerattn.training.data.read_documents`.
        config: how to train.
        output: folder of the result, to be made; with ``resume`` that of an unfinished run.
        gate: form of the gates, by default the one that measures best.
        layers: indices of the decoder layers that get a gate, by default every full-attention layer.
        resume: continue from the last checkpoint, or start if there is none.

    Returns:
        The model with its gates.

    Raises:
        ValueError: arguments that do not fit each other; nothing was written.
        OSError: a file could not be written; the last checkpoint is whole.
    """
    output = Path(output)
    check_output(output, resume=resume)
    return run(plan(model, tokenizer, data, config, gate=gate, layers=layers), output, resume=resume)


def run(prepared: Plan, output: Path, *, resume: bool = False) -> PeftModel:
    """Carries a plan out; see `distill`."""
    check_output(output, resume=resume)
    model, facts = prepared.model, prepared.facts()
    if resume and (output / RUN_NAME).exists():
        _check_same(facts, json.loads((output / RUN_NAME).read_text()))
    if (output / WEIGHTS_NAME).exists():
        _load(model, output)
    else:
        use_cache = model.config.use_cache
        _train(prepared, facts, output)
        # The Trainer turns it off.
        model.config.use_cache = use_cache
    if is_main():
        shutil.rmtree(output / CHECKPOINTS_NAME, ignore_errors=True)
    return model.eval()


def _train(prepared: Plan, facts: dict[str, Any], output: Path) -> None:
    from transformers import TrainingArguments

    from seerattn.training.card import model_card
    from seerattn.training.trainer import DistillTrainer, last_checkpoint

    config, model, checkpoints = prepared.config, prepared.model, output / CHECKPOINTS_NAME
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.accumulation(_processes()),
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_strategy="no",
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=config.report_to,
        seed=config.seed,
        use_cpu=model.device.type == "cpu",
    )
    # Without torchrun, one process trains on one device, however many there are.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    # Every process has found the output as it must be before the first one writes to it.
    arguments.distributed_state.wait_for_everyone()
    if arguments.should_save:
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_whole(output / RUN_NAME, json.dumps(facts, indent=2) + "\n")
    trainer = DistillTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.samples,
        data_collator=collate,
        layer_loss=LayerLoss(loss=config.loss, row_weight=config.row_weight, drop_rows=config.drop_rows),
        log=output / LOG_NAME,
        keep_checkpoints=config.keep_checkpoints,
        tokens_per_step=config.batch_size * config.context,
    )
    last = last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if arguments.should_save:
        with staged(output, "the gates") as staging:
            model.save_pretrained(staging)
            card = model_card(facts, prepared.parameters, records(output))
            (staging / "README.md").write_text(card, encoding="utf-8")
    arguments.distributed_state.wait_for_everyone()


def records(output: Path) -> list[dict[str, Any]]:
    """The records of a run, in order of the steps."""
    return [json.loads(line) for line in (output / LOG_NAME).read_text().splitlines()]


def check_output(output: Path, *, resume: bool) -> None:
    """Refuses to write over what is there.

    Raises:
        ValueError: the output is a file, or holds something and is not to be resumed.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    if not resume and output.exists() and any(output.iterdir()):
        raise ValueError(
            f"output must be a new or empty folder, got {output}; choose another one, or resume the run in it"
        )


def _check_same(facts: dict[str, Any], before: dict[str, Any]) -> None:
    now, then = (dict(f, **f["config"]) for f in (json.loads(json.dumps(facts)), before))
    changed = [name for name in now if name not in ("config", "data", *_FREE_TO_CHANGE) and now[name] != then.get(name)]
    if changed:
        told = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in changed)
        raise ValueError(f"a resumed run must be the one that was begun, got another: {told}")


def _load(model: PeftModel, output: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(output / WEIGHTS_NAME))


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and shows."""
    return os.environ.get("RANK", "0") == "0"
