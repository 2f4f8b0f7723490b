"""`RecordedTrainer`: `transformers.Trainer` with records and checkpoints that are always whole; `DistillTrainer`."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from seerattn.hf.distillation import GateLosses
from seerattn.results.appending import Appended
from seerattn.saving import staged, write_whole
from seerattn.training.checkpoints import checkpoints, last_whole, step_of, was_sharded, write_manifest
from seerattn.training.layer_loss import RECALL_DENSITIES, LayerLoss
from seerattn.training.processes import is_sharded

if TYPE_CHECKING:
    from seerattn.training.config import RunConfig
    from seerattn.training.distill import DistillConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Losses fall from the first step on. That is of few samples, of which others may well have half as much again.
RISEN = 2.0


class Stopped(ValueError):
    """Why a run ended on all of its processes."""


class RecordedTrainer(Trainer):
    """Trains with a loss that is a mean over samples, and writes records and checkpoints.

    Args:
        config: how to train.
        log: JSON lines of records: the first step, every ``logging_steps``-th, the last.
        **kwargs: those of `Trainer`.
    """

    # Values of a record that the progress bar shows.
    shown: tuple[str, ...] = ("loss",)
    # What keeps a loss finite.
    remedy = "a smaller lr"

    def __init__(self, *, config: RunConfig, log: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The loss is a mean, not a sum over tokens: the Trainer divides it by the accumulation steps, also where a
        # batch has labels that it could count.
        self.model_accepts_loss_kwargs = False
        self.config, self.log_file = config, log
        self._staging: Path | None = None
        self._first_loss: float | None = None
        self.add_callback(_Recorder(self, config.tokens_per_step))
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Bar(self.shown))

    def records(self, step: int) -> bool:
        """Whether a step, counted from 1, ends with a record."""
        return step == 1 or step % self.args.logging_steps == 0 or step == self.args.max_steps

    def summarize(self, micro_batches: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a record says of the steps since the last one, over all processes: single values, and the rest.

        Args:
            micro_batches: of the last step, on this process.
        """
        raise NotImplementedError

    def mean_over_processes(self, values: Tensor) -> list[float]:
        """Means of the values of all processes, fp64."""
        return self.accelerator.reduce(values.double().to(self.args.device), reduction="mean").tolist()

    def tell_rise(self, loss: float) -> None:
        """Says once, on one process, that the gates unlearn; to be told the gates' loss of every record."""
        if self._first_loss is None:
            self._first_loss = loss
        elif loss > RISEN * self._first_loss:
            if self.args.should_save:
                logger.warning(
                    "the gates' loss rose from %.4g to %.4g: the learning rate %.3g is too high for this model; end "
                    "the run and begin anew in another folder with a lower %s",
                    self._first_loss,
                    loss,
                    getattr(self.config, self.config.gate_rate),
                    self.config.gate_rate,
                )
            self._first_loss = math.inf

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def train_from_last(self) -> None:
        """Trains from the newest whole checkpoint on, or from the beginning.

        Raises:
            ValueError: weights are not finite in the end, or it was sharded otherwise; the last checkpoint is whole.
        """
        # Each process must begin with the same one, and to read all of them is enough for the first.
        last = _of_first(last_whole(Path(self.args.output_dir)) if self.args.should_save else None)
        if last is not None and was_sharded(last) != is_sharded():
            raise ValueError(
                f"a run that was begun {'with' if was_sharded(last) else 'without'} FSDP must go on so, got the other; "
                "launch it as before, the number of processes may be another, or begin anew in another folder"
            )
        self.train(resume_from_checkpoint=None if last is None else str(last))
        self._check_weights()

    def stop(self, what: str, where: str, step: int) -> NoReturn:
        """Ends the run for numbers that are not finite, on all processes."""
        raise Stopped(
            f"{what} at step {step}, {where}; the run stopped and its last checkpoint is as it was; resuming repeats "
            "the step on the same text, which helps after a fault of the machine alone, otherwise begin anew in "
            f"another folder with {self.remedy} or with other text"
        )

    def _check_weights(self) -> None:
        """Refuses to keep weights that the last step left without a meaning."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        first = first_not_finite([(name, p.detach()) for name, p in trained])
        if first is not None:
            self.stop("weights must be finite, got others", f"first seen in {first}", self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint that appears under its name when all of it is written.

        Raises:
            OSError: it could not be written; earlier checkpoints are as they were.
            ValueError: weights are not finite.
        """
        self._check_weights()
        folder, main = Path(self.args.output_dir), self.args.should_save
        what = f"the checkpoint of step {self.state.global_step}"
        with staged(folder, what, main=main, agree=_of_first) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if main:
                for checkpoint in checkpoints(staging):
                    shutil.copyfile(self.log_file, checkpoint / self.log_file.name)
                    write_manifest(checkpoint)
        if main:
            for old in checkpoints(folder)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)


def first_not_finite(named: list[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that is not finite on any process; all processes have to ask."""
    broken = (i for i, (_, tensor) in enumerate(named) if not bool(_local(tensor).isfinite().all()))
    first = min(gather_object([next(broken, len(named))]))
    return None if first == len(named) else named[first][0]


def _of_first(value: T) -> T:
    """What the first process gives; all processes have to ask."""
    return broadcast_object_list([value])[0]


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class DistillTrainer(RecordedTrainer):
    """Trains the gates of a model; the model itself runs as in inference.

    Recall is measured at the steps that are recorded.
    """

    config: DistillConfig
    shown = (
        "loss",
        *(
            f"{what}@{RECALL_DENSITIES[0]}"
            for what in ("recall", "oracle_recall", "decode_recall", "oracle_decode_recall")
        ),
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics: list[dict[int, dict[str, Tensor]]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Mean of the gates' losses over the layers."""
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        config, step = self.config, self.state.global_step
        layer_loss = LayerLoss(
            loss=config.loss,
            row_weight=config.row_weight,
            drop_rows=config.drop_rows,
            measure=self.records(step + 1),
        )
        drawn = {"seed": config.seed, "step": step, "decode_rows": config.decode_rows}
        losses = GateLosses(layer_loss, target_share=config.target_share, phase=config.phase, **drawn)
        # Logits of a whole sample of 64k tokens would take 17 GB.
        outputs = model(**inputs, gate_losses=losses, logits_to_keep=1, use_cache=False)
        self.metrics.append(losses.metrics())
        loss = outputs["loss"].to(self.args.device)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """See `Trainer`.

        Raises:
            ValueError: a loss or a gradient is not finite on some process.
        """
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        # Of gradients over all processes, and so known to each. Clipping by one that is not finite leaves none finite.
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in named])
        if not bool(torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)):
            losses = [
                (f"the gate's loss of layer {layer}", values["loss"])
                for metrics in self.metrics[-self.args.gradient_accumulation_steps :]
                for layer, values in metrics.items()
            ]
            where = first_not_finite(losses) or first_not_finite(named) or "their norm, which overflows"
            step = self.state.global_step + 1
            self.stop("losses and gradients must be finite, got others", f"first seen in {where}", step)
        return super()._clip_grad_norm(model)

    def summarize(self, micro_batches: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Losses over all micro-batches since the last record, recalls over those of the last step."""
        metrics, self.metrics = self.metrics, []
        layers = sorted(metrics[0])
        names = sorted(metrics[-1][layers[0]].keys() - {"loss"})
        losses = torch.stack([torch.stack([m[layer]["loss"] for layer in layers]) for m in metrics]).mean(0)
        values = [torch.stack([m[layer][name] for m in metrics[-micro_batches:] for layer in layers]) for name in names]
        numbers = self.mean_over_processes(torch.cat([losses, torch.stack(values).mean(1)]))
        layer_loss = {str(layer): x for layer, x in zip(layers, numbers)}
        loss = sum(layer_loss.values()) / len(layer_loss)
        self.tell_rise(loss)
        return {"loss": loss, **dict(zip(names, numbers[len(layers) :]))}, {"layer_loss": layer_loss}


class _Recorder(TrainerCallback):
    """Writes a record of the steps since the last one."""

    def __init__(self, trainer: RecordedTrainer, tokens_per_step: int) -> None:
        self.trainer, self.tokens_per_step = trainer, tokens_per_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step, self.time = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            folder, log = Path(args.output_dir), self.trainer.log_file
            restore_log(log, folder / f"{PREFIX_CHECKPOINT_DIR}-{self.step}", self.step)
            self.file = Appended(log)
            size = log.stat().st_size if log.exists() else 0
            self.file.begin(size=size, whole=size)
            # Those that are damaged; the run goes over their steps once more.
            for later in checkpoints(folder):
                if step_of(later) > self.step:
                    shutil.rmtree(later)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.lr = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.trainer.records(state.global_step):
            return
        steps, now = state.global_step - self.step, time.perf_counter()
        values, rest = self.trainer.summarize(args.gradient_accumulation_steps)
        record = {
            "step": state.global_step,
            **values,
            "lr": self.lr,
            "tokens": state.global_step * self.tokens_per_step,
            "tokens_per_second": steps * self.tokens_per_step / (now - self.time),
        }
        self.step, self.time = state.global_step, now
        self.trainer.log(dict(record))
        if state.is_world_process_zero:
            self.file.append((json.dumps(record | rest) + "\n").encode())


class _Bar(ProgressCallback):
    """The Trainer's progress bar, with values of the last record beside it in place of lines above it."""

    def __init__(self, shown: tuple[str, ...]) -> None:
        super().__init__()
        self.shown = shown

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix({name: f"{logs[name]:.4f}" for name in self.shown if name in logs})


def restore_log(log: Path, checkpoint: Path, step: int) -> None:
    """Makes the records those up to a step: what the checkpoint has of them, or where it has none the log itself."""
    kept = checkpoint / log.name
    if kept.exists():
        write_whole(log, kept.read_text(encoding="utf-8"))
        return
    if not log.exists():
        return
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            of = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            break
        if of <= step:
            lines.append(line + "\n")
    write_whole(log, "".join(lines))
