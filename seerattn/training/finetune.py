"""`finetune`: trains a model and its gates together while attention is sparse (arXiv 2410.13276, section 4.2).

The weights adapt to what the gates leave out, and the gates follow the moving attention maps. With a context factor
the model's context is extended on the way (YaRN).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from seerattn.data.corpus import Corpus
from seerattn.data.samples import Samples
from seerattn.gate import AttnGateConfig
from seerattn.hf.config import check_gate_folder
from seerattn.hf.loading import read_model
from seerattn.options import option
from seerattn.saving import staged
from seerattn.training.card import MODEL_NAME
from seerattn.training.config import TRAINING, RunConfig
from seerattn.training.memory import estimate_finetuning, ways
from seerattn.training.objective import Objective
from seerattn.training.output import GATES_NAME, check_output, records
from seerattn.training.processes import is_sharded, processes
from seerattn.training.run import TrainingRun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from seerattn.training.finetune_trainer import FinetuneTrainer

_SPARSITY = "Sparsity and gates"  # the panel of --help


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """How a model and its gates are trained together.

    The published recipe (8k to 32k) is ``context=32768, context_factor=4, steps=400, batch_size=8``, 1000 steps of
    distillation before. The learning rates warm up, then fall linearly to zero.

    Attributes:
        lr: peak learning rate of the model.
        dense: train with dense attention and without gates, to compare with.
        sparsity: share of the causal block area that attention leaves out, in [0, 1).
        anneal: share of the steps over which the sparsity rises from 0; 0 is fixed.
        context_factor: extends the model's context so many times with YaRN.
        target_every: steps from one on which the gates learn to the next.
        gate_lr: peak learning rate of the gates; None is that of `fitting_lr`, 1e-3 for narrow heads. The two losses
            need no other balance, see `FinetuneTrainer`.
        budgets: share the density among heads as gates to start from do. Weights and gates then adapt to it.
        gradient_checkpointing: run layers again in the backward pass in place of keeping what they computed.
        autocast: compute in bfloat16 on an accelerator where the weights are fp32.
    """

    lr: float = option(1e-5, help="Peak learning rate of the model.", above=0, panel=TRAINING)
    dense: bool = option(False, help="Dense attention, no gates: to compare with.", panel=_SPARSITY)
    sparsity: float = option(0.9, help="Share of the causal blocks to leave out.", low=0, below=1, panel=_SPARSITY)
    anneal: float = option(0.0, help="Share of the steps over which sparsity rises from 0.", low=0, high=1, flag=False)
    context_factor: float = option(1.0, help="Extend the context so many times with YaRN.", low=1, panel=_SPARSITY)
    target_share: float = option(
        0.1, help="Share of the query blocks that gates learn from, others every step.", above=0, high=1, flag=False
    )
    target_every: int = option(1, help="Steps from one on which gates learn to the next.", low=1, flag=False)
    gate_lr: float | None = option(
        None, help="Peak learning rate of the gates; default: one that fits the head dim.", above=0, flag=False
    )
    budgets: bool = option(True, help="Keep the budgets of gates to start from.", flag=False)
    gradient_checkpointing: bool = option(True, help="Run layers twice in place of keeping activations.", flag=False)
    autocast: bool = option(True, help="Compute in bfloat16 where weights are float32, on an accelerator.", flag=False)

    gate_rate: ClassVar[str] = "gate_lr"
    narrow_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is the default, nobody need have asked for.
        if self.dense and (self.anneal or self.sparsity not in (0.0, FinetuneConfig.sparsity)):
            raise ValueError(
                f"dense must be given without sparsity and anneal, got {self.sparsity:g} and {self.anneal:g}; leave "
                "them out"
            )

    @property
    def has_gates(self) -> bool:
        """See `RunConfig`."""
        return not self.dense

    @property
    def keeps_budgets(self) -> bool:
        """See `RunConfig`."""
        return self.budgets

    @property
    def density(self) -> float:
        """Of the policy that is saved with the gates, rounded for people who read it."""
        return round(1 - self.sparsity, 6)

    def sparsity_at(self, step: int) -> float:
        """Sparsity of a step, counted from 0."""
        rising = self.anneal * self.steps
        return self.sparsity if step >= rising else self.sparsity * step / rising


@dataclass(frozen=True, kw_only=True)
class FinetuneRun(TrainingRun):
    """A fine-tuning that is ready: every weight of the model is trained."""

    config: FinetuneConfig

    result: ClassVar[str] = MODEL_NAME
    schedule: ClassVar[str] = "linear"

    @classmethod
    def plan(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Sequence[str | Path] | Corpus,
        config: FinetuneConfig,
        **gates: Any,
    ) -> FinetuneRun:
        """See `TrainingRun`; extends the context first."""
        from seerattn.hf.yarn import extend_context

        if config.dense and any(gates.get(name) is not None for name in ("gates", "gate", "layers")):
            raise ValueError(
                "gates must not be given for a dense run, which has none; leave gates, gate and layers out"
            )
        if model.dtype == torch.float16:
            raise ValueError("dtype must be float32 or bfloat16 to train all weights, got float16, which underflows")
        dropout = getattr(model.config.get_text_config(), "attention_dropout", 0)
        if dropout:
            raise ValueError(f"attention_dropout must be 0, got {dropout}; set it in the model's config")
        extend_context(model, config.context_factor)
        run = super().plan(model, tokenizer, data, config, **gates)
        _check_filled(run.samples, config)
        run.model.requires_grad_(True)
        return run

    @property
    def autocasts(self) -> bool:
        """Whether fp32 weights compute in bfloat16."""
        weight = next(p for p in self.model.parameters() if p.requires_grad)
        return self.config.autocast and self.device.type != "cpu" and weight.dtype == torch.float32

    def facts(self) -> dict[str, Any]:
        """See `TrainingRun`."""
        return {"kind": "finetune", "autocasts": self.autocasts} | super().facts()

    def _details(self) -> dict[str, str]:
        config, shown = self.config, {}
        if config.dense:
            shown["attention"] = "dense, no gates"
        else:
            rising = f", rising from 0 over the first {config.anneal:.0%} of the steps" if config.anneal else ""
            shown["sparsity"] = f"{config.sparsity:g}{rising}; gates learn every {config.target_every} step(s)"
        return shown | {"context": f"{config.context} tokens, YaRN factor {config.context_factor:g}"}

    def _rates(self) -> str:
        config = self.config
        return f"{config.lr:g}" if config.dense else f"{config.lr:g}, gates {config.gate_lr:.3g}"

    def _memory(self) -> dict[str, dict[str, int]]:
        sizes = {
            "micro_batch_size": self.config.micro_batch_size,
            "context": self.config.context,
            "checkpointing": self.config.gradient_checkpointing,
            "autocast": self.autocasts,
            "target_share": self.config.target_share,
            "masked": self._masked,
        }
        config = self.model.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return {
            f"memory, {way}": estimate_finetuning(self.model, self.gates, **sizes, way=way)
            for way in ways(processes(), kv_heads)
        }

    @property
    def _masked(self) -> bool:
        """Whether packed documents meet dense attention: everywhere, in the first steps or in layers without a gate."""
        config = self.config
        layers = self.model.config.get_text_config().num_hidden_layers
        dense = config.dense or config.sparsity_at(0) == 0 or len(self.gates) < layers
        plan = self.samples.plan
        unlike = len(plan.windows) > 1 and config.micro_batch_size > 1
        return dense and (unlike or plan.has_packed())

    def _trainer(self, **options: Any) -> FinetuneTrainer:
        from seerattn.training.finetune_trainer import FinetuneTrainer

        objective = Objective(self.model)
        if self.config.gradient_checkpointing:
            objective.set_checkpointing(True)
        return FinetuneTrainer(model=objective, autocasts=self.autocasts and is_sharded(), **options)

    def _arguments(self, output: Path, **options: Any) -> TrainingArguments:
        return super()._arguments(
            output,
            # On steps without targets the gates have no gradient.
            ddp_find_unused_parameters=self.config.has_gates and self.config.target_every > 1,
            bf16=self.autocasts and not is_sharded(),
            # Until gradients are reduced FSDP keeps them whole on every process: 30 GiB of an 8B model in fp32.
            accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": is_sharded()}},
        )

    def _state(self, trainer: FinetuneTrainer) -> dict[str, Tensor]:
        if self.config.gradient_checkpointing:
            Objective(self.model).set_checkpointing(False)
        return trainer.whole_state()

    def _save(self, state: dict[str, Tensor], facts: dict[str, Any], output: Path) -> None:
        from seerattn.training.card import finetuned_card

        objective, place = Objective(self.model), str(output / MODEL_NAME)
        # Gates of a run that was killed right here.
        shutil.rmtree(output / GATES_NAME, ignore_errors=True)
        # The model comes last, and so marks a finished run.
        with staged(output, "the model") as staging:
            if self.config.has_gates:
                # They belong to the trained weights, not to those that training began with.
                self.model.active_peft_config.base_model_name_or_path = place
                own = objective.gate_state(state)
                self.model.save_pretrained(staging / GATES_NAME, state_dict=own, save_embedding_layers=False)
                card = finetuned_card(facts, place, records(output))
                (staging / GATES_NAME / "README.md").write_text(card, encoding="utf-8")
            objective.base.save_pretrained(staging / MODEL_NAME, state_dict=objective.base_state(state))
            self.tokenizer.save_pretrained(staging / MODEL_NAME)

    def _load(self, output: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        base = Objective(self.model).base
        if base.device.type == "meta":
            return  # a process of FSDP that would have got its shard when training began
        place = torch.device("cpu")
        saved = read_model(str(output / MODEL_NAME), dtype=base.dtype, device=place, kind=type(base)).state_dict()
        base.load_state_dict(
            {name: saved[name] for name in base.state_dict() if "seer_gate" not in name},
            strict=False,
        )
        if self.config.has_gates:
            check_gate_folder(output / GATES_NAME)
            set_peft_model_state_dict(self.model, load_file(output / GATES_NAME / "adapter_model.safetensors"))


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
    run = FinetuneRun.plan(model, tokenizer, data, config, gates=gates, gate=gate, layers=layers)
    return run.run(output, resume=resume)
