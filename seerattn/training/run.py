"""`TrainingRun`: a run that was checked and is ready, and how it is carried out; `distill` and `finetune` share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from seerattn.data.corpus import Corpus, tokenize
from seerattn.data.samples import Samples, collate
from seerattn.data.text import read_documents
from seerattn.gate import AttnGate, AttnGateConfig
from seerattn.hf.identity import transformers_model
from seerattn.selection.policies import TopK
from seerattn.training.checkpoints import delete_checkpoints
from seerattn.training.config import RunConfig
from seerattn.training.memory import Way
from seerattn.training.output import CHECKPOINTS_NAME, LOG_NAME, begun, check_output, check_replaced
from seerattn.training.processes import is_main, is_sharded, processes
from seerattn.training.watch import watching

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from seerattn.training.trainer import RecordedTrainer

R = TypeVar("R", bound="TrainingRun")


@dataclass(frozen=True, kw_only=True)
class TrainingRun(ABC):
    """A run that was checked and is ready; nothing has been written.

    Attributes:
        model: the model, with gates if the run trains some.
        tokenizer: its tokenizer.
        samples: the data.
        config: how to train.
        start: folder of the gates to start from, with the hash of their weights; None are fresh ones.
        device: where it will train; a model without weights, or one to be sharded, is elsewhere before.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    samples: Samples
    config: RunConfig
    start: tuple[str, str] | None
    device: torch.device

    # What is written last, and so marks a finished run; how the learning rate falls after the warm-up.
    result: ClassVar[str]
    schedule: ClassVar[str]

    @classmethod
    def plan(
        cls: type[R],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Sequence[str | Path] | Corpus,
        config: RunConfig,
        *,
        gates: str | Path | None = None,
        gate: AttnGateConfig | None = None,
        layers: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> R:
        """Checks everything, reads the data, and attaches gates. See `distill` and `finetune` for the arguments.

        ``device`` is where it will train, by default where the model is. A model on the meta device can be planned for.

        Raises:
            ValueError: the model, the data, the gates and the config do not fit each other.
        """
        form = _form(gates, gate, layers)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and config.context > longest:
            raise ValueError(
                f"context must be at most {longest}, the model's own, got {config.context}; use a shorter one, or "
                "finetune with a larger context_factor"
            )
        # A run without gates has the data of one with the default ones.
        samples = _make_samples(model, tokenizer, data, config, block=max(form.block_q, form.block_k))
        torch.manual_seed(config.seed)
        if config.has_gates:
            model = _attach_gates(
                model, gates, form, density=config.density, layers=layers, budgets=config.keeps_budgets
            )
            widest = max(module.head_dim for module in model.modules() if isinstance(module, AttnGate))
            config = config.with_fitting_rate(widest)
        return cls(
            model=model,
            tokenizer=tokenizer,
            samples=samples,
            config=config,
            start=_start(gates),
            device=device or model.device,
        )

    def run(self, output: Path, *, resume: bool = False) -> PreTrainedModel | PeftModel:
        """Carries the run out; see `distill` and `finetune`."""
        check_output(output, resume=resume)
        facts, arguments = self.facts(), self._arguments(output)
        with _working(output, facts, arguments, resume=resume):
            if (output / self.result).exists():
                self._load(output)
            else:
                check_replaced(output)
                trainer = self.trainer(output, arguments)
                trainer.train_from_last()
                state = self._state(trainer)
                if arguments.should_save:
                    self._save(state, facts, output)
                arguments.distributed_state.wait_for_everyone()
            if arguments.should_save:
                delete_checkpoints(output / CHECKPOINTS_NAME)
        return self.model.eval()

    def trainer(self, output: Path, arguments: TrainingArguments) -> RecordedTrainer:
        """What trains on the samples of the run, with its records in ``output``."""
        return self._trainer(
            args=arguments,
            train_dataset=self.samples,
            data_collator=collate,
            config=self.config,
            log=output / LOG_NAME,
        )

    @property
    def gates(self) -> list[AttnGate]:
        """The gates, in the order of the layers."""
        return [module for module in self.model.modules() if isinstance(module, AttnGate)]

    @property
    def parameters(self) -> int:
        """Parameters of all gates together."""
        return sum(p.numel() for gate in self.gates for p in gate.parameters())

    def facts(self) -> dict[str, Any]:
        """What decides the run, in plain JSON types."""
        facts = {
            "model": self.model.config.name_or_path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "config": {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self.config).items()},
            "data": list(self.samples.corpus.sources),
            "data_hash": self.samples.corpus.fingerprint(),
            "weights": _base_weights(self.model),
        }
        if self.config.has_gates:
            adapter = self.model.active_peft_config
            facts |= {"base_model": adapter.base_model, "gate": adapter.gate, "layers": adapter.layers}
            facts |= {"gates": None if self.start is None else list(self.start)}
        return facts

    def describe(self, *, every_way: bool = True) -> dict[str, str]:
        """What will be done, for people; with ``every_way`` also the memory of ways to run that it does not take."""
        config, gates, base = self.config, self.gates, transformers_model(self.model)
        weights = sum(p.numel() for p in self.model.parameters()) - self.parameters
        shown = {"model": f"{base.config.name_or_path or type(base).__name__}, {weights:,} parameters"}
        if gates:
            start = f"from {self.start[0]}" if self.start else "fresh"
            shown["gates"] = f"{self.parameters:,} parameters in {len(gates)} layers, {start}"
            shown["form"] = ", ".join(f"{name} {value}" for name, value in gates[0].config.to_dict().items())
            shown["loss"] = f"{config.loss}, rows {config.row_weight}"
            share = f"{config.target_share:.0%} of the query blocks, others every step"
            shown["targets"] = "of " + ("all query blocks" if config.target_share == 1 else share)
        shown |= self._details() | _describe_samples(self.samples) | {"steps": config.describe_steps()}
        shown["learning rate"] = f"{self._rates()}, {self.schedule}, {config.warmup} steps of warm-up"
        own = f"memory, {Way(processes(), sharded=processes() > 1 and is_sharded())}"
        for name, parts in self._memory().items():
            if not every_way and name != own:
                continue
            told = ", ".join(f"{part} {_as_bytes(size)}" for part, size in parts.items())
            shown[name] = f"{_as_bytes(sum(parts.values()))} on each process (estimate): {told}"
        return shown

    def _arguments(self, output: Path, **options: Any) -> TrainingArguments:
        """Arguments of the Trainer for a run that writes to ``output``."""
        from transformers import TrainingArguments

        config = self.config
        arguments = TrainingArguments(
            output_dir=str(output / CHECKPOINTS_NAME),
            max_steps=config.steps,
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.accumulation(processes()),
            learning_rate=config.lr,
            lr_scheduler_type=self.schedule,
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
            use_cpu=self.device.type == "cpu",
            **options,
        )
        # Without torchrun, one process trains on one device, however many there are.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    @abstractmethod
    def _details(self) -> dict[str, str]:
        """What `describe` tells of this kind of run alone."""

    @abstractmethod
    def _rates(self) -> str:
        """The peak learning rates, for people."""

    @abstractmethod
    def _memory(self) -> dict[str, dict[str, int]]:
        """Bytes that a process needs, by their purpose, for each way of running."""

    @abstractmethod
    def _trainer(self, **options: Any) -> RecordedTrainer:
        """What trains, given what all kinds of run tell it."""

    @abstractmethod
    def _state(self, trainer: RecordedTrainer) -> dict[str, Tensor]:
        """The trained weights, gathered by all processes."""

    @abstractmethod
    def _save(self, state: dict[str, Tensor], facts: dict[str, Any], output: Path) -> None:
        """Writes the trained weights, `result` last."""

    @abstractmethod
    def _load(self, output: Path) -> None:
        """Fills the model with what a finished run saved."""


def _form(gates: str | Path | None, gate: AttnGateConfig | None, layers: Sequence[int] | None) -> AttnGateConfig:
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


def _attach_gates(
    model: PreTrainedModel,
    gates: str | Path | None,
    form: AttnGateConfig,
    *,
    density: float,
    layers: Sequence[int] | None,
    budgets: bool,
) -> PeftModel:
    """The model with gates to be trained, saved ones or fresh ones of a form, that run at a density when loaded.

    ``budgets``: whether those of saved gates stay.
    """
    from seerattn.hf.attach import attach, set_policy

    policy, indices = TopK(density=density), None if layers is None else list(layers)
    model.requires_grad_(False)
    gated = attach(model, form, policy=policy, layers=indices) if gates is None else attach(model, str(gates))
    if gates is not None:
        # They come frozen and marked as such, with the name of the model that they were made for.
        gated.active_peft_config.inference_mode = False
        gated.active_peft_config.base_model_name_or_path = model.config.name_or_path
        attachment = gated.base_model.attachment
        found = attachment.budgets[attachment.active]
        if not budgets:
            gated.active_peft_config.budgets = None
            attachment.budgets[attachment.active] = None
        elif found is not None and density < found.ladder[0]:
            raise ValueError(
                f"sparsity must be at most {1 - found.ladder[0]:g} with the budgets of the gates to start from, got "
                f"{1 - density:g}; use budgets=false, or calibrate them with a lower rung"
            )
        for module in gated.modules():
            if isinstance(module, AttnGate):
                module.requires_grad_(True)
        set_policy(gated, policy)
    return gated


def _make_samples(
    model: PreTrainedModel,
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
        windows=config.window_lengths,
    )


def _describe_samples(samples: Samples) -> dict[str, str]:
    """Documents and samples, for people."""
    corpus, plan = samples.corpus, samples.plan
    # Not counted one by one: a run may be of millions.
    passes = len(samples) * (1 - plan.retrieval_share) * samples.context / len(corpus.tokens)
    windows = "" if plan.windows == (samples.context,) else f"; windows of {', '.join(map(str, plan.windows))} tokens"
    return {
        "documents": f"{len(corpus.lengths)} with {len(corpus.tokens):,} tokens, {corpus.dropped} too short",
        "samples": f"{len(samples)} of {samples.context} tokens, {plan.retrieval_share:.0%} retrieval documents; "
        f"{plan.short} documents are packed{windows}; the text {passes:,.1f} times over",
    }


@contextmanager
def _working(output: Path, facts: dict[str, Any], arguments: TrainingArguments, *, resume: bool) -> Iterator[None]:
    """The run in its folder, see `begun`, for all of its processes."""
    everyone = arguments.distributed_state
    # Every process has found the output as it must be before the first one writes to it.
    everyone.wait_for_everyone()
    with begun(output, facts, resume=resume, main=arguments.should_save), watching():
        everyone.wait_for_everyone()
        yield


def _start(gates: str | Path | None) -> tuple[str, str] | None:
    """Folder of the gates that a run starts from, with the hash of their weights; None for fresh ones."""
    from seerattn.results.environment import fingerprint

    return None if gates is None else (str(gates), fingerprint(gates))


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


def _as_bytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
