"""`distill`: learns the gates of a model from the model's own attention maps (arXiv 2410.13276, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from seerattn.data.corpus import Corpus
from seerattn.gate import AttnGateConfig
from seerattn.hf.config import check_gate_folder
from seerattn.hf.distillation import DECODE_ROWS, Phase
from seerattn.options import option
from seerattn.saving import staged
from seerattn.training.config import TRAINING, RunConfig
from seerattn.training.memory import estimate_memory, ways
from seerattn.training.output import check_output, records
from seerattn.training.processes import processes
from seerattn.training.run import TrainingRun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from seerattn.training.trainer import DistillTrainer


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """How gates are trained. The defaults are what taught most in a given time on a public model (docs/LOG.md).

    The learning rate warms up, then falls along a cosine to zero. The published recipe has 500 steps of 16 samples of
    65536 tokens at a learning rate of 1e-3, and leaves out a quarter of the rows.

    Attributes:
        lr: peak learning rate of AdamW; None is that of `fitting_lr`, 5e-3 for narrow heads.
        batch_size: see `RunConfig`; gates learn more of many small steps than of few large ones.
        target_share: see `RunConfig`; a quarter of the query blocks teaches as much as all of them.
        phase: what gates learn to choose blocks for: the query blocks of prompts, single tokens that are decoded, or
            both, whose losses are added.
        decode_rows: single tokens of a sample that gates learn from in the phases "decode" and "both", others every
            step.
        drop_rows: share of the first query-block rows of every document that the loss leaves out; officially 0.25.
        density: of the `TopK` policy that is saved with the gates and applied when they are loaded. Training does not
            depend on it, and `set_policy` changes it at any time.
    """

    lr: float | None = option(
        None, help="Peak learning rate; default: one that fits the head dim.", above=0, panel=TRAINING
    )
    batch_size: int = option(2, help="Samples of a step, over all processes.", low=1, panel=TRAINING)
    target_share: float = option(
        0.25, help="Share of the query blocks to learn from, others every step.", above=0, high=1, flag=False
    )
    phase: Phase = option(
        "prefill", help="What gates learn to choose for: prompts, decoded tokens, or both.", panel=TRAINING
    )
    decode_rows: int = option(
        DECODE_ROWS, help="Single tokens of a sample to learn from, others every step.", low=1, flag=False
    )
    drop_rows: float = option(
        0.0, help="Share of early query rows to leave out; officially 0.25.", low=0, below=1, flag=False
    )
    density: float = option(
        0.2, help="Density that the gates run at when they are loaded.", above=0, high=1, flag=False
    )

    narrow_rate: ClassVar[float] = 5e-3


@dataclass(frozen=True, kw_only=True)
class DistillRun(TrainingRun):
    """A distillation that is ready: the model is a `PeftModel` whose gates alone are trained."""

    config: DistillConfig

    result: ClassVar[str] = "adapter_model.safetensors"
    schedule: ClassVar[str] = "cosine"

    def run(self, output: Path, *, resume: bool = False) -> PeftModel:
        """See `TrainingRun`."""
        use_cache = self.model.config.use_cache
        try:
            return super().run(output, resume=resume)
        finally:
            self.model.config.use_cache = use_cache  # the Trainer turns it off

    def _details(self) -> dict[str, str]:
        tokens = f"{self.config.decode_rows} single tokens of every sample, others every step"
        phases = {"prefill": "prompts", "decode": f"decoding; {tokens}", "both": f"prompts and decoding; {tokens}"}
        left_out = f"the first {self.config.drop_rows:.0%} of every document left out"
        return {"phase": phases[self.config.phase], "rows": left_out}

    def _rates(self) -> str:
        return f"{self.config.lr:.3g}"

    def _memory(self) -> dict[str, dict[str, int]]:
        config = self.config
        sizes = {"micro_batch_size": config.micro_batch_size, "context": config.context}
        rows = 0 if config.phase == "prefill" else config.decode_rows
        share = {"target_share": config.target_share, "decode_rows": rows}
        kv_heads = min(gate.num_kv_heads for gate in self.gates)
        return {
            f"memory, {way}": estimate_memory(self.model, self.gates, **sizes, **share, way=way)
            for way in ways(processes(), kv_heads)
        }

    def _trainer(self, **options: Any) -> DistillTrainer:
        from seerattn.training.trainer import DistillTrainer

        return DistillTrainer(model=self.model, **options)

    def _arguments(self, output: Path, **options: Any) -> TrainingArguments:
        return super()._arguments(output, ddp_find_unused_parameters=False)

    def _state(self, trainer: DistillTrainer) -> dict[str, Tensor]:
        # Gathered where FSDP shards them, by all processes; the frozen model stays where it is.
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=whole)

    def _save(self, state: dict[str, Tensor], facts: dict[str, Any], output: Path) -> None:
        from seerattn.training.card import model_card

        with staged(output, "the gates") as staging:
            self.model.save_pretrained(staging, state_dict=state)
            card = model_card(facts, self.parameters, records(output))
            (staging / "README.md").write_text(card, encoding="utf-8")

    def _load(self, output: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        check_gate_folder(output)
        set_peft_model_state_dict(self.model, load_file(output / self.result))


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
    run = DistillRun.plan(model, tokenizer, data, config, gates=gates, gate=gate, layers=layers)
    return run.run(output, resume=resume)
