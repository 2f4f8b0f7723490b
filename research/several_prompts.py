"""Prompts on one GPU, or on several by heads or by tokens; the parts of `several_gpus.py` that read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import seerattn
from seerattn.bench.attention import share_of
from seerattn.bench.session import Session
from seerattn.bench.timing import long_runs, peak_gib, reset_peak, synchronize
from seerattn.bench.ttft import prefill
from seerattn.hf.context_parallel import Spread
from seerattn.hf.eval_model import choose_dtype
from seerattn.hf.state import attachment_of
from seerattn.results.record import Result

PROMPTS = ("one", "tensor", "context")
CHECKED = 2048  # tokens of the prompt whose logits are compared


@dataclass(frozen=True)
class Arm:
    """One way to attend; no density is dense attention."""

    density: float | None = None

    def __str__(self) -> str:
        return "dense" if self.density is None else f"density {self.density:g}"

    @property
    def policy(self) -> seerattn.TopK | None:
        """What chooses the blocks."""
        return None if self.density is None else seerattn.TopK(density=self.density)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is read, and how often.

    Attributes:
        part: one, tensor or context.
        model: folder of the model.
        gates: folder of its gates.
        lengths: tokens of prompts.
        arms: ways to attend.
        repeats: runs of a cell; long ones are run twice.
        kept: file of the logits that all parts are compared with.
    """

    part: Literal["one", "tensor", "context"]
    model: Path
    gates: Path
    lengths: Sequence[int]
    arms: Sequence[Arm]
    repeats: int
    kept: Path


def measure_prompts(prompts: Prompts, session: Session, known: set[str], late: Callable[[], bool]) -> None:
    """Compares the logits of a short prompt with those that are kept, or keeps them, then times prompts.

    Args:
        prompts: what to read.
        session: of this process; those but the first have no file.
        known: keys of results that need no measuring.
        late: whether nothing new is to be begun.
    """
    part, device = prompts.part, session.device
    dtype = getattr(torch, choose_dtype("auto", device))
    if part == "one" and not prompts.kept.exists():
        higher = torch.promote_types(dtype, HIGHER[dtype])
        exact = Runs(part, load(prompts.model, prompts.gates, higher, device, part), device)
        expected = {str(arm): exact.logits(arm) for arm in prompts.arms}
        del exact
        torch.save({"exact": expected}, prompts.kept)
    runs = Runs(part, load(prompts.model, prompts.gates, dtype, device, part), device)
    found = {str(arm): runs.logits(arm) for arm in prompts.arms}
    told = torch.load(prompts.kept)
    if part == "one":
        torch.save(told | {"one": found}, prompts.kept)
        told |= {"one": found}
    for arm in prompts.arms:
        error, bound = (off(x[str(arm)], told["exact"][str(arm)]) for x in (found, told["one"]))
        checked = (error, 2 * bound)
        session.check(f"{part}, {arm}", lambda checked=checked: checked, oracle="one process in twice the precision")
    for tokens in prompts.lengths:
        for arm in prompts.arms:
            label = f"{part}, {tokens:,} tokens, {arm}"
            blank = runs.blank(session, arm, tokens)
            if blank.key in known:
                continue
            if late():
                session.left_out.append(label)
                continue
            row = runs.time(arm, tokens, prompts.repeats)
            session.measured(blank, lambda row=row: row, label=label)


HIGHER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error of logits."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def load(model: Path, gates: Path, dtype: torch.dtype, device: torch.device, part: str) -> nn.Module:
    """The model with its gates, in one piece or the heads of this process."""
    where = {"tp_plan": "auto"} if part == "tensor" else {"device_map": device}
    found = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **where).eval()
    return seerattn.attach(found, gates, impl="sparse")


class Runs:
    """Prompts of a model.

    Args:
        part: how it is spread.
        model: with gates.
        device: of this process.
    """

    def __init__(self, part: Literal["one", "tensor", "context"], model: nn.Module, device: torch.device) -> None:
        self.part, self.model, self.device = part, model, device
        self.config = model.base_model.model.config
        self.processes = dist.get_world_size() if part != "one" else 1

    def ids(self, tokens: int) -> Tensor:
        """Random tokens ``[1, T]``, the same in every process."""
        drawn = torch.randint(3, self.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        return drawn.to(self.device)

    def logits(self, arm: Arm) -> Tensor:
        """The last logits ``[V]`` of the prompt that is compared, on the host."""
        with ExitStack() as stack:
            spread = self._arm(stack, arm)
            last = self.model(input_ids=self.ids(CHECKED), use_cache=False, logits_to_keep=1).logits
            return (last[:, -1] if spread is None else spread.last(last))[0].float().cpu()

    def time(self, arm: Arm, tokens: int, repeats: int) -> dict[str, object]:
        """Fields of the result of a cell."""
        ids = self.ids(tokens)
        with ExitStack() as stack:
            spread = self._arm(stack, arm)

            def run() -> None:
                if spread is None:
                    prefill(self.model, ids)
                else:
                    self.model(input_ids=ids, logits_to_keep=1)

            with seerattn.record_density(self.model) as meter:
                run()
            reset_peak(self.device)
            seconds = self._slowest(run, repeats)
        samples = {"seconds": [round(value, 5) for value in seconds]} | peak_gib(self.device)
        density = meter.mean() if meter.layers else 1.0
        return {"value": round(median(seconds), 5), "n": len(seconds), "samples": samples, "realised_density": density}

    def blank(self, session: Session, arm: Arm, tokens: int) -> Result:
        """The result of a cell without its value."""
        cell = {"parts": self.part, "processes": self.processes, "layers": self.config.num_hidden_layers}
        cell |= {"dtype": str(self.model.dtype).removeprefix("torch.")}
        values = {}
        if arm.density is not None:
            values = {"method": "gate", "kind": "learned", "name": "default", "density": arm.density, "seed": 0}
            values |= {"settings": arm.policy.to_dict()}
            form = next(iter(attachment_of(self.model).gates().values())).config
            cell |= {"block_q": form.block_q, "block_k": form.block_k, "share": share_of(form)}
        name = f"Llama of width {self.config.hidden_size}"
        return session.blank("ttft_s", model=name, context=tokens, impl=str(arm), cell=cell, **values)

    def _arm(self, stack: ExitStack, arm: Arm) -> Spread | None:
        stack.enter_context(torch.no_grad())
        stack.enter_context(seerattn.policy(self.model, arm.policy))
        return stack.enter_context(seerattn.context_parallel(self.model)) if self.part == "context" else None

    def _slowest(self, run: Callable[[], None], repeats: int) -> list[float]:
        """Seconds of each run, of the process that took longest."""
        if self.part == "one":
            return long_runs(run, self.device, repeats=repeats)[0]
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            synchronize(self.device)
            begin = time.perf_counter()
            run()
            synchronize(self.device)
            seconds.append(time.perf_counter() - begin)
        slowest = torch.tensor(seconds, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.tolist()
