"""`finetune`: trains a model and its gates together while attention is sparse (arXiv 2410.13276, section 4.2).

The weights adapt to what the gates leave out, and the gates follow the moving attention maps. With a context factor
the model's context is extended on the way (YaRN).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seerattn.data.corpus import Corpus
from seerattn.data.samples import Samples, collate
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.hf.config import check_gate_folder
from seerattn.hf.loading import read_model
from seerattn.saving import staged
from seerattn.training.card import MODEL_NAME
from seerattn.training.checkpoints import delete_checkpoints
from seerattn.training.memory import estimate_finetuning
from seerattn.training.output import (
    CHECKPOINTS_NAME,
    GATES_NAME,
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
    check_whole_number,
    describe_samples,
    gate_form,
    gates_start,
    is_sharded,
    make_samples,
    processes,
    shared_facts,
    training_arguments,
    working,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """How a model and its gates are trained together.

    The published recipe (8k to 32k) is ``context=32768, context_factor=4, steps=400, batch_size=8``, 1000 steps of
    distillation before. The learning rates warm up, then fall linearly to zero.

    Attributes:
        dense: train with dense attention and without gates, to compare with.
        sparsity: share of the causal block area that attention leaves out, in [0, 1).
        anneal: share of the steps over which the sparsity rises from 0; 0 is fixed.
        context_factor: extends the model's context so many times with YaRN.
        target_every: steps from one on which the gates learn to the next.
        gate_lr: peak learning rate of the gates. The two losses need no other balance, see `FinetuneTrainer`.
        gradient_checkpointing: run layers again in the backward pass in place of keeping what they computed.
        autocast: compute in bfloat16 on an accelerator where the weights are fp32.
    """

    lr: float = 1e-5
    dense: bool = False
    sparsity: float = 0.9
    anneal: float = 0.0
    context_factor: float = 1.0
    target_share: float = 0.1
    target_every: int = 1
    gate_lr: float = 1e-3
    gradient_checkpointing: bool = True
    autocast: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"anneal must be a share of the steps in [0, 1], got {self.anneal}")
        if not self.context_factor >= 1:
            raise ValueError(f"context_factor must be at least 1, got {self.context_factor}")
        check_whole_number("target_every", self.target_every, 1, sys.maxsize)
        for name in ("lr", "context_factor", "gate_lr"):
            check_positive(name, getattr(self, name))

    def sparsity_at(self, step: int) -> float:
        """Sparsity of a step, counted from 0."""
        rising = self.anneal * self.steps
        return self.sparsity if step >= rising else self.sparsity * step / rising


@dataclass(frozen=True)
class Plan:
    """A run that was checked and is ready; nothing has been written.

    Attributes:
        model: the model, with gates unless the run is dense.
        tokenizer: its tokenizer.
        samples: the data.
        config: how to train.
        start: folder of the gates to start from, with the hash of their weights; None are fresh ones.
        device: where it will train; a model without weights, or one to be sharded, is elsewhere before.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    samples: Samples
    config: FinetuneConfig
    start: tuple[str, str] | None
    device: torch.device

    @property
    def autocasts(self) -> bool:
        """Whether fp32 weights compute in bfloat16."""
        weight = next(p for p in self.model.parameters() if p.requires_grad)
        return self.config.autocast and self.device.type != "cpu" and weight.dtype == torch.float32

    @property
    def gates(self) -> list[AttnGate]:
        """The gates, in the order of the layers."""
        return [module for module in self.model.modules() if isinstance(module, AttnGate)]

    def facts(self) -> dict[str, Any]:
        """What decides the run, in plain JSON types."""
        facts = {
            "kind": "finetune",
            "model": self.model.config.name_or_path,
            "autocasts": self.autocasts,
            **shared_facts(self.model, self.samples, self.config),
        }
        if not self.config.dense:
            adapter = self.model.active_peft_config
            facts |= {"base_model": adapter.base_model, "gate": adapter.gate, "layers": adapter.layers}
            facts |= {"gates": None if self.start is None else list(self.start)}
        return facts

    def describe(self) -> dict[str, str]:
        """What will be done, for people."""
        config, gates = self.config, self.gates
        of_gates = sum(p.numel() for gate in gates for p in gate.parameters())
        trained = sum(p.numel() for p in self.model.parameters()) - of_gates
        shown = {"model": f"{self.facts()['model'] or type(self.model).__name__}, {trained:,} parameters"}
        if not config.dense:
            form = ", ".join(f"{name} {value}" for name, value in gates[0].config.to_dict().items())
            rising = f", rising from 0 over the first {config.anneal:.0%} of the steps" if config.anneal else ""
            shown |= {
                "gates": f"{of_gates:,} parameters in {len(gates)} layers, "
                + (f"from {self.start[0]}" if self.start else "fresh"),
                "form": form,
                "sparsity": f"{config.sparsity:g}{rising}",
                "targets": f"{config.target_share:.0%} of the query blocks, every {config.target_every} step(s), "
                f"{config.loss}",
            }
        rates = f"{config.lr:g}" if config.dense else f"{config.lr:g}, gates {config.gate_lr:g}"
        return shown | {
            "attention": "dense, no gates" if config.dense else "sparse",
            "context": f"{config.context} tokens, YaRN factor {config.context_factor:g}",
            **describe_samples(self.samples),
            "steps": config.describe_steps(),
            "learning rate": f"{rates}, linear, {config.warmup} steps of warm-up",
            **self._describe_memory(),
        }

    def _describe_memory(self) -> dict[str, str]:
        # One process plans for eight as well, with FSDP2 because a model that does not fit needs it.
        many = 8 if processes() == 1 else processes()
        ways = {f"memory, DDP on {many} processes": (many, False), f"memory, FSDP2 on {many} processes": (many, True)}
        if processes() == 1:
            ways = {"memory, one process": (1, False)} | ways
        shown = {}
        for name, (count, sharded) in ways.items():
            parts = estimate_finetuning(
                self.model,
                self.gates,
                micro_batch_size=self.config.micro_batch_size,
                context=self.config.context,
                checkpointing=self.config.gradient_checkpointing,
                autocast=self.autocasts,
                target_share=self.config.target_share,
                masked=self._masked,
                processes=count,
                sharded=sharded,
            )
            told = ", ".join(f"{part} {as_bytes(size)}" for part, size in parts.items())
            shown[name] = f"{as_bytes(sum(parts.values()))} on each process (estimate): {told}"
        return shown

    @property
    def _masked(self) -> bool:
        """Whether packed documents meet dense attention: everywhere, in the first steps or in layers without a gate."""
        config = self.config
        layers = self.model.config.get_text_config().num_hidden_layers
        dense = config.dense or config.sparsity_at(0) == 0 or len(self.gates) < layers
        return dense and self.samples.plan.has_packed()


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path] | Corpus,
    config: FinetuneConfig,
    *,
    gates: str | Path | None = None,
    gate: AttnGateConfig | None = None,
    layers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Plan:
    """Checks everything, reads the data, extends the context and attaches gates. See `finetune` for the arguments.

    ``device`` is where it will train, by default where the model is. A model on the meta device can be planned for.

    Raises:
        ValueError: the model, the data, the gates and the config do not fit each other.
    """
    from seerattn.hf.yarn import extend_context

    if config.dense and (gates is not None or gate is not None or layers is not None):
        raise ValueError("gates must not be given for a dense run, which has none; leave gates, gate and layers out")
    form = gate_form(gates, gate, layers)
    text = model.config.get_text_config()
    dropout = getattr(text, "attention_dropout", 0)
    if dropout:
        raise ValueError(f"attention_dropout must be 0, got {dropout}; set it in the model's config")
    extend_context(model, config.context_factor)
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise ValueError(
            f"context must be at most {longest}, the model's own with context_factor {config.context_factor:g}, "
            f"got {config.context}; raise context_factor"
        )
    torch.manual_seed(config.seed)
    if not config.dense:
        # Rounded for people who read it in the saved gates; each step sets its own.
        model = attach_gates(model, gates, form, density=round(1 - config.sparsity, 6), layers=layers)
    # A dense run has the data of one with the default gates.
    samples = make_samples(model, tokenizer, data, config, block=max(form.block_q, form.block_k))
    _check_filled(samples, config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return Plan(model, tokenizer, samples, config, gates_start(gates), device or model.device)


def _check_filled(samples: Samples, config: FinetuneConfig) -> None:
    """Refuses data that cannot fill the context."""
    lengths, head = samples.corpus.lengths, int(samples.bos_token_id is not None)
    longest = max(lengths) + head
    if config.context_factor > 1 and longest < config.context:
        raise ValueError(
            f"data must hold documents of {config.context} tokens to extend the context {config.context_factor:g} "
            f"times, got {longest} tokens in the longest; packed documents begin anew at position 0, so use longer "
            "documents or a smaller factor"
        )
    if sum(lengths) + head * len(lengths) < config.context:
        raise ValueError(
            f"data must fill a context of {config.context} tokens, got {sum(lengths)} in all and {longest} in the "
            "longest document; use more text or a shorter context"
        )


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Path] | Corpus,
    config: FinetuneConfig,
    *,
    output: str | Path,
    gates: str | Path | None = None,
    gate: AttnGateConfig | None = None,
    layers: Sequence[int] | None = None,
    resume: bool = False,
) -> PreTrainedModel | PeftModel:
    """Trains all weights of a model and its gates while attention is sparse.

    Under torchrun the samples of a step are spread over the processes. ``output`` gets ``model``, the trained weights
    as `from_pretrained` takes them, ``gates``, an adapter for `seerattn.attach`, ``training.jsonl`` with a record
    every few steps, and ``run.json`` with what decided the run; while it lasts, also ``checkpoints``. A run that was
    killed and is resumed ends as one that was not.

    Args:
        model: a causal language model from transformers, on the device to train on. It is changed.
        tokenizer: its tokenizer.
        data: files, folders or names of datasets, see `seerattn.data.samples.read_documents`, or tokenised text,
            of which no document is shorter than two blocks.
        config: how to train.
        output: folder of the result, to be made; with ``resume`` that of an unfinished run.
        gates: folder of trained gates to start from; by default fresh ones.
        gate: form of fresh gates, by default that of `AttnGateConfig()`.
        layers: indices of the decoder layers that get a fresh gate, by default every full-attention layer.
        resume: continue from the last whole checkpoint, or start if there is none.

    Returns:
        The model, with its gates unless the run is dense.

    Raises:
        ValueError: arguments that do not fit each other, and nothing was written; or a loss that is not finite, and
            the last checkpoint is whole.
        OSError: a file could not be written; the last checkpoint is whole.
    """
    output = Path(output)
    check_output(output, resume=resume)
    return run(plan(model, tokenizer, data, config, gates=gates, gate=gate, layers=layers), output, resume=resume)


def run(prepared: Plan, output: Path, *, resume: bool = False) -> PreTrainedModel | PeftModel:
    """Carries a plan out; see `finetune`."""
    check_output(output, resume=resume)
    config, model, facts = prepared.config, prepared.model, prepared.facts()
    arguments = training_arguments(
        config,
        output,
        lr_scheduler_type="linear",
        # On steps without targets the gates have no gradient.
        ddp_find_unused_parameters=not config.dense and config.target_every > 1,
        bf16=prepared.autocasts and not is_sharded(),
        # Until gradients are reduced FSDP keeps them whole on every process: 30 GiB of an 8B model in fp32.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": is_sharded()}},
        use_cpu=prepared.device.type == "cpu",
    )
    with working(output, facts, arguments, resume=resume):
        if (output / MODEL_NAME).exists():
            _load(prepared, output)
        else:
            _train(prepared, facts, output, arguments)
        if arguments.should_save:
            delete_checkpoints(output / CHECKPOINTS_NAME)
    return model.eval()


def _train(prepared: Plan, facts: dict[str, Any], output: Path, arguments: TrainingArguments) -> None:
    from seerattn.training.finetune_trainer import FinetuneTrainer
    from seerattn.training.objective import Objective

    config = prepared.config
    check_replaced(output)
    objective = Objective(prepared.model)
    if config.gradient_checkpointing:
        objective.set_checkpointing(True)
    trainer = FinetuneTrainer(
        model=objective,
        args=arguments,
        train_dataset=prepared.samples,
        data_collator=collate,
        config=config,
        autocasts=prepared.autocasts and is_sharded(),
        log=output / LOG_NAME,
        keep_checkpoints=config.keep_checkpoints,
        tokens_per_step=config.tokens_per_step,
    )
    trainer.train_from_last()
    if config.gradient_checkpointing:
        objective.set_checkpointing(False)
    state = trainer.whole_state()
    if arguments.should_save:
        _save(prepared, objective, state, facts, output)
    arguments.distributed_state.wait_for_everyone()


def _save(prepared: Plan, objective: Any, state: dict[str, torch.Tensor], facts: dict[str, Any], output: Path) -> None:
    """Writes the model, which comes last and so marks a finished run, and the gates."""
    from seerattn.training.card import finetuned_card

    # They belong to the trained weights, not to those that training began with.
    if not prepared.config.dense:
        prepared.model.active_peft_config.base_model_name_or_path = str(output / MODEL_NAME)
    # Gates of a run that was killed right here.
    shutil.rmtree(output / GATES_NAME, ignore_errors=True)
    with staged(output, "the model") as staging:
        if not prepared.config.dense:
            own = objective.gate_state(state)
            prepared.model.save_pretrained(staging / GATES_NAME, state_dict=own, save_embedding_layers=False)
            card = finetuned_card(facts, str(output / MODEL_NAME), records(output))
            (staging / GATES_NAME / "README.md").write_text(card, encoding="utf-8")
        objective.base.save_pretrained(staging / MODEL_NAME, state_dict=objective.base_state(state))
        prepared.tokenizer.save_pretrained(staging / MODEL_NAME)


def _load(prepared: Plan, output: Path) -> None:
    """Fills the model with what a finished run saved."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from seerattn.training.objective import Objective

    base = Objective(prepared.model).base
    if base.device.type == "meta":
        return  # a process of FSDP that would have got its shard when training began
    place = torch.device("cpu")
    saved = read_model(str(output / MODEL_NAME), dtype=base.dtype, device=place, kind=type(base)).state_dict()
    base.load_state_dict(
        {name: saved[name] for name in base.state_dict() if "seer_gate" not in name},
        strict=False,
    )
    if not prepared.config.dense:
        check_gate_folder(output / GATES_NAME)
        set_peft_model_state_dict(prepared.model, load_file(output / GATES_NAME / "adapter_model.safetensors"))
