"""`distill`: learns the gates of a model from the model's own attention maps (arXiv 2410.13276, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from seerattn.data.corpus import Corpus
from seerattn.data.samples import Samples, collate
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.hf.config import check_gate_folder
from seerattn.saving import staged
from seerattn.training.checkpoints import delete_checkpoints
from seerattn.training.layer_loss import LayerLoss
from seerattn.training.memory import estimate_memory
from seerattn.training.output import (
    CHECKPOINTS_NAME,
    LOG_NAME,
    check_output,
    check_replaced,
    records,
)
from seerattn.training.runs import (
    RunConfig,
    as_bytes,
    attach_gates,
    check_positive,
    describe_samples,
    gate_form,
    gates_start,
    make_samples,
    shared_facts,
    training_arguments,
    working,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """How gates are trained. The defaults are what taught most in a given time on a public model (docs/LOG.md).

    The learning rate warms up, then falls along a cosine to zero. The published recipe has 500 steps of 16 samples of
    65536 tokens at a learning rate of 1e-3, and leaves out a quarter of the rows.

    Attributes:
        lr: peak learning rate of AdamW; None is that of `fitting_lr`.
        batch_size: see `RunConfig`; gates learn more of many small steps than of few large ones.
        target_share: see `RunConfig`; a quarter of the query blocks teaches as much as all of them.
        drop_rows: share of the first query-block rows of every document that the loss leaves out; officially 0.25.
        density: of the `TopK` policy that is saved with the gates and applied when they are loaded. Training does not
            depend on it, and `set_policy` changes it at any time.
    """

    lr: float | None = None
    batch_size: int = 2
    target_share: float = 0.25
    drop_rows: float = 0.0
    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None:
            check_positive("lr", self.lr)
        if not 0 <= self.drop_rows < 1:
            raise ValueError(f"drop_rows must be in [0, 1), got {self.drop_rows}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")


def fitting_lr(head_dim: int) -> float:
    """Peak learning rate for gates of heads so wide.

    A step of AdamW moves every weight by the rate. A score sums ``head_dim`` moves of the one linear times ``head_dim``
    features of the other side, over the root of the width, so that the rate falls with ``head_dim ** 1.5``. At 5e-3
    gates of SmolLM2, whose heads have 64 channels, learned fastest. Those of Gemma 3, with 256, fell apart
    (docs/LOG.md).
    """
    return 5e-3 * min(1.0, (64 / head_dim) ** 1.5)


@dataclass(frozen=True)
class Plan:
    """A run that was checked and is ready; nothing has been written.

    Attributes:
        model: the base model with gates.
        samples: the data.
        config: how the gates are trained.
        start: folder of the gates to start from, with the hash of their weights; None are fresh ones.
        device: where it will train; a model without weights, or one to be sharded, is elsewhere before.
    """

    model: PeftModel
    samples: Samples
    config: DistillConfig
    start: tuple[str, str] | None
    device: torch.device

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
        facts = {
            "model": adapter.base_model_name_or_path,
            "base_model": adapter.base_model,
            "gate": adapter.gate,
            "layers": adapter.layers,
            **shared_facts(self.model, self.samples, self.config),
        }
        return facts if self.start is None else facts | {"gates": list(self.start)}

    def describe(self) -> dict[str, str]:
        """What will be done, for people."""
        config = self.config
        memory = estimate_memory(
            self.model,
            self.gates,
            micro_batch_size=config.micro_batch_size,
            context=config.context,
            target_share=config.target_share,
        )
        return {
            "model": self.facts()["model"] or type(self.model.get_base_model()).__name__,
            "gates": f"{self.parameters:,} parameters in {len(self.gates)} layers, "
            + (f"from {self.start[0]}" if self.start else "fresh"),
            "form": ", ".join(f"{name} {value}" for name, value in self.gates[0].config.to_dict().items()),
            **describe_samples(self.samples),
            "steps": config.describe_steps(),
            "loss": f"{config.loss}, rows {config.row_weight}, first {config.drop_rows:.0%} left out",
            "targets": "of all query blocks"
            if config.target_share == 1
            else f"of {config.target_share:.0%} of the query blocks, others every step",
            "learning rate": f"{config.lr:.3g}, cosine, {config.warmup} steps of warm-up",
            "memory (estimate)": f"{as_bytes(sum(memory.values()))} on each process: "
            + ", ".join(f"{name} {as_bytes(size)}" for name, size in memory.items()),
        }


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path] | Corpus,
    config: DistillConfig,
    *,
    gates: str | Path | None = None,
    gate: AttnGateConfig | None = None,
    layers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Plan:
    """Checks everything, reads the data, and attaches gates. See `distill` for the arguments.

    ``device`` is where it will train, by default where the model is. A model on the meta device can be planned for.

    Raises:
        ValueError: the model, the data, the gates and the config do not fit each other.
    """
    form = gate_form(gates, gate, layers)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise ValueError(f"context must be at most {longest}, the model's own, got {config.context}")
    samples = make_samples(model, tokenizer, data, config, block=max(form.block_q, form.block_k))
    torch.manual_seed(config.seed)
    gated = attach_gates(model, gates, form, density=config.density, layers=layers)
    if config.lr is None:
        widest = max(module.head_dim for module in gated.modules() if isinstance(module, AttnGate))
        config = replace(config, lr=fitting_lr(widest))
    return Plan(gated, samples, config, gates_start(gates), device or model.device)


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path] | Corpus,
    config: DistillConfig,
    *,
    output: str | Path,
    gates: str | Path | None = None,
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
        data: files, folders or names of datasets, see `seerattn.data.samples.read_documents`, or tokenised text,
            of which no document is shorter than two blocks.
        config: how to train.
        output: folder of the result, to be made; with ``resume`` that of an unfinished run.
        gates: folder of gates to start from; by default fresh ones.
        gate: form of fresh gates, by default that of `AttnGateConfig()`.
        layers: indices of the decoder layers that get a fresh gate, by default every full-attention layer.
        resume: continue from the last whole checkpoint, or start if there is none.

    Returns:
        The model with its gates.

    Raises:
        ValueError: arguments that do not fit each other, and nothing was written; or a loss that is not finite, and
            the last checkpoint is whole.
        OSError: a file could not be written; the last checkpoint is whole.
    """
    output = Path(output)
    check_output(output, resume=resume)
    return run(plan(model, tokenizer, data, config, gates=gates, gate=gate, layers=layers), output, resume=resume)


def run(prepared: Plan, output: Path, *, resume: bool = False) -> PeftModel:
    """Carries a plan out; see `distill`."""
    check_output(output, resume=resume)
    model, facts = prepared.model, prepared.facts()
    arguments = training_arguments(
        prepared.config,
        output,
        lr_scheduler_type="cosine",
        ddp_find_unused_parameters=False,
        use_cpu=prepared.device.type == "cpu",
    )
    with working(output, facts, arguments, resume=resume):
        if (output / WEIGHTS_NAME).exists():
            _load(model, output)
        else:
            use_cache = model.config.use_cache
            _train(prepared, facts, output, arguments)
            # The Trainer turns it off.
            model.config.use_cache = use_cache
        if arguments.should_save:
            delete_checkpoints(output / CHECKPOINTS_NAME)
    return model.eval()


def _train(prepared: Plan, facts: dict[str, Any], output: Path, arguments: TrainingArguments) -> None:
    from seerattn.training.card import model_card
    from seerattn.training.trainer import DistillTrainer

    config, model = prepared.config, prepared.model
    check_replaced(output)
    trainer = DistillTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.samples,
        data_collator=collate,
        layer_loss=LayerLoss(loss=config.loss, row_weight=config.row_weight, drop_rows=config.drop_rows),
        target_share=config.target_share,
        log=output / LOG_NAME,
        keep_checkpoints=config.keep_checkpoints,
        tokens_per_step=config.tokens_per_step,
    )
    trainer.train_from_last()
    # Gathered where FSDP shards them, by all processes; the frozen model stays where it is.
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=whole)
    if arguments.should_save:
        with staged(output, "the gates") as staging:
            model.save_pretrained(staging, state_dict=state)
            card = model_card(facts, prepared.parameters, records(output))
            (staging / "README.md").write_text(card, encoding="utf-8")
    arguments.distributed_state.wait_for_everyone()


def _load(model: PeftModel, output: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_gate_folder(output)
    set_peft_model_state_dict(model, load_file(output / WEIGHTS_NAME))
