"""Prompts on several GPUs: heads dealt out (tensor parallelism), or tokens (context parallelism), beside one GPU.

    python research/shape_model.py --layers 32 --output outputs/llama-shape
    python research/several_gpus.py one --output several.jsonl
    torchrun --nproc-per-node 2 research/several_gpus.py tensor --output several.jsonl
    torchrun --nproc-per-node 2 research/several_gpus.py context --lengths 131072,262144,524288 --output several.jsonl

Seconds to the first token of a prompt of random tokens ("ttft_s"), dense and by gates with random weights at each
density; of several processes those of the slowest. `one` goes first: it keeps the last logits of a short prompt beside
OUTPUT, of the model as it is and in twice the precision. The others may be off by twice what it is off; else nothing is
timed. A cell that the file holds is not measured again. `context` keeps no cache, the others do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import seerattn
from seerattn.bench.attention import share_of
from seerattn.bench.session import Session
from seerattn.bench.timing import long_runs, peak_gib, reset_peak, synchronize
from seerattn.bench.ttft import prefill
from seerattn.hf.context_parallel import Spread
from seerattn.hf.eval_model import choose_device, choose_dtype
from seerattn.hf.state import attachment_of
from seerattn.options import parse_value
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.record import Result

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


def main(
    part: Annotated[str, typer.Argument(help="one, tensor or context.")],
    output: Annotated[Path, typer.Option(help="Results file.")],
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("outputs/llama-shape/model"),
    gates: Annotated[Path, typer.Option(help="Folder of its gates.")] = Path("outputs/llama-shape/default"),
    lengths: Annotated[str, typer.Option(help="Tokens of prompts.")] = "32768,65536,131072",
    densities: Annotated[str, typer.Option(help="Densities beside dense.")] = "0.1",
    repeats: Annotated[int, typer.Option(help="Runs of a cell; long ones are run twice.", min=2)] = 5,
) -> None:
    """Time prompts on one GPU, or on several by heads or by tokens."""
    if part not in ("one", "tensor", "context"):
        raise typer.BadParameter(f"part must be one, tensor or context, got {part}")
    rank, device = int(os.environ.get("RANK", 0)), choose_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if part != "one" and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = getattr(torch, choose_dtype("auto", device))
    arms = [Arm(), *map(Arm, parse_value("densities", densities, tuple[float, ...]))]
    kept = output.with_suffix(".checks.pt")
    if part == "one" and not kept.exists():
        exact = Runs("one", load(model, gates, torch.promote_types(dtype, HIGHER[dtype]), device, "one"), device)
        expected = {str(arm): exact.logits(arm) for arm in arms}
        del exact
        torch.save({"exact": expected}, kept)
    runs = Runs(part, load(model, gates, dtype, device, part), device)
    found = {str(arm): runs.logits(arm) for arm in arms}
    told = torch.load(kept)
    if part == "one":
        torch.save(told | {"one": found}, kept)
        told |= {"one": found}
    # All processes decide alike: they read the file before the first one opens it to write.
    known = {row.key for row in read_results([output])} if output.exists() else set()
    if part != "one":
        dist.barrier()
    file = ResultsFile(output if rank == 0 else None, device)
    session = Session(device, file, say=print if rank == 0 else lambda text: None)
    for arm in arms:
        error, bound = (off(x[str(arm)], told["exact"][str(arm)]) for x in (found, told["one"]))
        checked = (error, 2 * bound)
        session.check(f"{part}, {arm}", lambda checked=checked: checked, oracle="one process in twice the precision")
    for tokens in parse_value("lengths", lengths, tuple[int, ...]):
        for arm in arms:
            blank = runs.blank(session, arm, tokens)
            if blank.key not in known:
                row = runs.time(arm, tokens, repeats)
                if rank == 0:
                    session.measured(blank, lambda row=row: row, label=f"{part}, {tokens:,} tokens, {arm}")
    if dist.is_initialized():
        dist.destroy_process_group()


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


if __name__ == "__main__":
    typer.run(main)
