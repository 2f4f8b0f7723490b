"""`RecordedTrainer`: `transformers.Trainer` with records and checkpoints that are always whole; `DistillTrainer`."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from seerattn.hf.distillation import GateLosses
from seerattn.saving import staged, write_whole
from seerattn.training.layer_loss import RECALL_DENSITIES, LayerLoss


class RecordedTrainer(Trainer):
    """Trains with a loss that is a mean over samples, and writes records and checkpoints.

    Args:
        log: JSON lines of records: the first step, every ``logging_steps``-th, the last.
        keep_checkpoints: older ones are deleted.
        tokens_per_step: tokens of a step over all processes.
        **kwargs: those of `Trainer`.
    """

    # Values of a record that the progress bar shows.
    shown: tuple[str, ...] = ("loss",)

    def __init__(self, *, log: Path, keep_checkpoints: int, tokens_per_step: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The loss is a mean, not a sum over tokens: the Trainer divides it by the accumulation steps, also where a
        # batch has labels that it could count.
        self.model_accepts_loss_kwargs = False
        self.keep_checkpoints = keep_checkpoints
        self._staging: Path | None = None
        self.add_callback(_Recorder(self, log, tokens_per_step))
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

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint that appears under its name when all of it is written.

        Raises:
            OSError: it could not be written; earlier checkpoints are as they were.
        """
        folder, main = Path(self.args.output_dir), self.args.should_save
        with staged(folder, f"the checkpoint of step {self.state.global_step}", main=main) as staging:
            self.accelerator.wait_for_everyone()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
        if main:
            for old in _checkpoints(folder)[: -self.keep_checkpoints]:
                shutil.rmtree(old)


class DistillTrainer(RecordedTrainer):
    """Trains the gates of a model; the model itself runs as in inference.

    Args:
        layer_loss: the loss of a layer; recall is measured at the steps that are recorded.
        **kwargs: those of `RecordedTrainer`.
    """

    shown = ("loss", f"recall@{RECALL_DENSITIES[0]}", f"oracle_recall@{RECALL_DENSITIES[0]}")

    def __init__(self, *, layer_loss: LayerLoss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer_loss = layer_loss
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
        losses = GateLosses(replace(self.layer_loss, measure=self.records(self.state.global_step + 1)))
        # Logits of a whole sample of 64k tokens would take 17 GB.
        outputs = model(**inputs, gate_losses=losses, logits_to_keep=1, use_cache=False)
        self.metrics.append(losses.metrics())
        loss = outputs["loss"].to(self.args.device)
        return (loss, outputs) if return_outputs else loss

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
        return {"loss": loss, **dict(zip(names, numbers[len(layers) :]))}, {"layer_loss": layer_loss}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Recorder(TrainerCallback):
    """Writes a record of the steps since the last one."""

    def __init__(self, trainer: RecordedTrainer, log: Path, tokens_per_step: int) -> None:
        self.trainer, self.log, self.tokens_per_step = trainer, log, tokens_per_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step, self.time = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            trim_log(self.log, state.global_step)

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
            _append_line(self.log, record | rest)


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


def trim_log(log: Path, step: int) -> None:
    """Cuts the records after a step off, and a line that a kill left incomplete."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_whole(log, "".join(kept))


def _append_line(log: Path, record: dict[str, Any]) -> None:
    """One write a line, so that a kill leaves at most the last one incomplete."""
    with log.open("ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())
