"""Steps of training on one GPU and on several, by the commands' own runs; the parts of `several_gpus.py` that train."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import AutoConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from seerattn.bench.attention import Sparse, require_dense, require_selection, require_sparse, share_of
from seerattn.bench.attention_map import attention_with_map
from seerattn.bench.check import check_attention_map
from seerattn.bench.dense import sdpa_backend
from seerattn.bench.finetune import check_step
from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form
from seerattn.bench.session import Session
from seerattn.bench.timing import peak_gib, reset_peak, synchronize
from seerattn.cli.training import Setup, plan
from seerattn.hf.eval_model import choose_dtype
from seerattn.ops.resolve import preferred
from seerattn.results.record import Result
from seerattn.training.config import RunConfig
from seerattn.training.distill import DistillConfig, DistillRun
from seerattn.training.finetune import FinetuneConfig, FinetuneRun
from seerattn.training.processes import is_sharded, processes
from seerattn.training.run import TrainingRun

FORM = "default"  # of the gates
ARMS = {"distill": ("gates",), "finetune": ("sparse", "cudnn", "flash", "sdpa")}
QUANTITIES = ("step_s", "tokens_per_second", "peak_memory_gib")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is trained, and how long.

    Attributes:
        part: distill or finetune.
        arm: of `ARMS`: by gates, or densely by one of SDPA's backends.
        model: folder of the model.
        gates: folder of gates to start from.
        text: one long document.
        context: tokens of a sample.
        batch: samples of a step, over all processes.
        density: of sparse attention.
        repeats: timed steps; the first one is not timed.
        limit: seconds after which no further step is begun; None for no limit.
    """

    part: str
    arm: str
    model: Path
    gates: Path
    text: Path
    context: int
    batch: int
    density: float
    repeats: int
    limit: float | None

    def __post_init__(self) -> None:
        if self.arm not in ARMS[self.part]:
            raise ValueError(f"arms of {self.part} must be among {', '.join(ARMS[self.part])}, got {self.arm}")

    @property
    def dense(self) -> bool:
        """Whether no gate has a part in it."""
        return self.part == "finetune" and self.arm != "sparse"

    def kind(self) -> tuple[type[TrainingRun], RunConfig]:
        """The run of the command, and its config: one step more than are run, so that nothing is saved."""
        steps = self.repeats + 2
        shared: dict[str, Any] = {"context": self.context, "steps": steps, "batch_size": self.batch}
        # A record of the first step alone: the others are not measured in.
        shared |= {"logging_steps": 2 * steps, "save_steps": 2 * steps}
        if self.part == "distill":
            return DistillRun, DistillConfig(**shared)
        # Weights that are bfloat16 already are computed with as they are.
        own = {"dense": True} if self.dense else {"sparsity": round(1 - self.density, 6)}
        return FinetuneRun, FinetuneConfig(**shared, **own, autocast=False)


class Told(NamedTuple):
    """What a training told.

    Attributes:
        seconds: of each timed step, of the process that took longest.
        loss: of the first step, over all processes.
        density: realised, 1 where nothing chose.
        planned: bytes of a process by the plan that ``--dry-run`` shows, by their purpose.
        peak: GiB on the fullest GPU; empty on CPUs.
    """

    seconds: list[float]
    loss: float
    density: float
    planned: dict[str, int]
    peak: dict[str, float]


@dataclass
class Clock(TrainerCallback):
    """Times steps, each from the end of the one before, and ends the training after some, or in time."""

    device: torch.device
    repeats: int
    limit: float | None
    seconds: list[float] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        reset_peak(self.device)
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if state.global_step == 1:
            self.first = state.log_history[0]
        else:
            self.seconds.append(now - self._last)
        late = self.limit is not None and now - self._begin > self.limit
        # All processes must end with the same step.
        if len(self.seconds) >= self.repeats or self._slowest([float(late)])[0]:
            control.should_training_stop = True
        synchronize(self.device)
        self._last = time.perf_counter()

    def told(self) -> Told:
        """What was measured, of all processes; all have to ask."""
        if not self.seconds:
            raise ValueError(f"time_limit must leave room for two steps, got {self.limit:g} s; give it more")
        peak = peak_gib(self.device)
        return Told(
            seconds=self._slowest(self.seconds),
            loss=self.first["loss"],
            density=1 - self.first.get("sparsity", 0.0),
            planned=self.planned,
            peak=dict(zip(peak, self._slowest(list(peak.values())))) if peak else {},
        )

    def _slowest(self, values: list[float]) -> list[float]:
        """The largest one over all processes, of each value."""
        if processes() == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()


def timed(kind: type[TrainingRun], clock: Clock) -> type[TrainingRun]:
    """A kind of run that a clock watches and ends. It saves nothing."""

    class Timed(kind):
        def run(self, output: Path, *, resume: bool = False) -> Any:
            way = "FSDP2" if is_sharded() else "DDP" if processes() > 1 else "one process"
            plans = self._memory()
            clock.planned = next(parts for name, parts in plans.items() if way in name)
            trainer = self.trainer(output, self._arguments(output))
            trainer.add_callback(clock)
            trainer.train()
            return self.model

    return Timed


def told_of(steps: Steps, device: torch.device) -> Told:
    """Trains as the command does, for some steps, in all processes together."""
    kind, config = steps.kind()
    clock = Clock(device, steps.repeats, steps.limit)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            model=str(steps.model),
            data=(str(steps.text),),
            gates=None if steps.dense else steps.gates,
            output=Path(folder) / "run",
            device=None if device.type == "cuda" else device.type,
            dtype=choose_dtype("auto", device),
        )
        with sdpa_backend(steps.arm if steps.dense else "sdpa", device):
            run = plan(timed(kind, clock), config, setup)
            run.run(setup.output)
    return clock.told()


def measure_steps(steps: Steps, session: Session, known: set[str]) -> None:
    """Checks what a step consists of, times steps, and writes the results by the session of the first process.

    Args:
        steps: what to train.
        session: of this process; those but the first have no file.
        known: keys of results that need no measuring.
    """
    blanks = _blanks(steps, session)
    if all(blank.key in known for blank in blanks):
        return
    _check(steps, session)
    session.release()
    label = f"{steps.part} {steps.arm}, {steps.context:,} tokens x {steps.batch}, {processes()} process(es)"
    alone = {blank.what: _alone(session, blank) for blank in blanks}

    def run() -> dict[str, dict[str, Any]]:
        told = told_of(steps, session.device)
        _compare(steps, session, told, alone["step_s"], label)
        return _fields(steps, told)

    # One process may lack memory, which is a result. Of several, those that wait for the others must not live on.
    fields = run() if processes() > 1 else None
    rows = session.measured_together(blanks, run if fields is None else lambda: fields, label=label)
    for row in rows:
        one = alone.get(row.what) if row is not None else None
        if one is not None and one.value and row.value and processes() > 1:
            session.say(f"{row.what}: {row.value / one.value:.3f} of that of one process, {one.value:.4g}")


def _blanks(steps: Steps, session: Session) -> list[Result]:
    """The results without their values."""
    config = AutoConfig.from_pretrained(steps.model)
    form, values = gate_form(FORM), {}
    cell = {"parts": steps.part, "work": f"{steps.part} with the optimizer", "processes": processes()}
    cell |= {"sharded": is_sharded(), "batch": steps.batch, "layers": config.num_hidden_layers}
    cell |= {"dtype": choose_dtype("auto", session.device)}
    if not steps.dense:
        values = {"method": "gate", "kind": "learned", "name": FORM, "seed": 0}
        cell |= {"block_q": form.block_q, "block_k": form.block_k, "share": share_of(form)}
        cell |= {"target_share": steps.kind()[1].target_share}
    if steps.arm == "sparse":
        values |= {"density": steps.density}
    name = f"Llama of width {config.hidden_size}"
    return [
        session.blank(what, model=name, context=steps.context, impl=steps.arm, cell=cell, **values)
        for what in QUANTITIES
        if what != "peak_memory_gib" or session.device.type == "cuda"
    ]


def _alone(session: Session, blank: Result) -> Result | None:
    """The finished result of one process."""
    return session.file.find(replace(blank, cell=blank.cell | {"processes": 1, "sharded": False}))


def _check(steps: Steps, session: Session) -> None:
    """What a step computes against its fp64 oracles, on a small prompt, in every process."""
    config, device = AutoConfig.from_pretrained(steps.model), session.device
    dtype = getattr(torch, choose_dtype("auto", device))
    shape = Shape(config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype)
    if steps.dense:
        require_dense(session, shape, steps.arm, backward=True)
        return
    session.check("map", lambda: check_attention_map(attention_with_map, shape, device))
    if steps.part == "finetune":
        form, impl = gate_form(FORM), preferred("block_sparse_attention", "auto", device)
        sparse = Sparse(impl, form.block_q, form.block_k, share_of(form))
        require_sparse(session, shape, sparse, backward=True)
        require_selection(session, shape, FORM, form.block_q, form.block_k, "auto")
        session.check("a step with all blocks", lambda: check_step(shape, device, form=FORM, impl=impl))


def _compare(steps: Steps, session: Session, told: Told, alone: Result | None, label: str) -> None:
    """Refuses steps whose first loss is not that of one process on the same samples, where that is known."""
    if processes() == 1 or not isinstance(session.file.path, Path):
        return
    if alone is None or alone.value is None:
        session.say(f"{label}: not compared, as there is no result of one process")
        return
    (expected,) = alone.sampled("first_loss")
    # The same kernels on the same samples, whose mean is summed in another order; a kernel may sum otherwise as well.
    dtype = getattr(torch, choose_dtype("auto", session.device))
    bound = abs(expected) * (torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps)
    session.check(label, lambda: (abs(told.loss - expected), bound), oracle="the first loss of one process")


def _fields(steps: Steps, told: Told) -> dict[str, dict[str, Any]]:
    samples = {
        "seconds": [round(value, 5) for value in told.seconds],
        "first_loss": [told.loss],
        "planned_gib": [round(sum(told.planned.values()) / 2**30, 3)],
        "planned": [f"{name}: {size / 2**30:.3f} GiB" for name, size in told.planned.items()],
    }
    second = median(told.seconds)
    found = {"step_s": second, "tokens_per_second": steps.context * steps.batch / second} | told.peak
    shared = {"n": len(told.seconds), "samples": samples, "realised_density": told.density}
    return {what: shared | {"value": round(value, 5)} for what, value in found.items()}
