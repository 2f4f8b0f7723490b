"""What `impl="auto"` costs and saves on a model of the user's own: prompts of many lengths and steps of decoding.

    python research/auto_time.py --model outputs/models/smollm2 --gates assets/smollm2-gates --output auto.jsonl

The model without gates and with them, "auto" and "sparse", run in turns in a new order each time, so that none has the
better moments. Times are medians of wall time, host included. Before a length is timed, "auto" must give the logits of
the model without gates bit for bit where it runs dense; where it asks for cuDNN first, of that model with cuDNN.
Exit code 1 if it does not. A length that the file holds is not measured again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from peft import PeftModel
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

import seerattn
from seerattn.bench.session import CheckFailed, Session
from seerattn.bench.timing import synchronize
from seerattn.cli.terminal import print_table, say
from seerattn.hf.attention import CUDNN_FIRST
from seerattn.hf.eval_model import choose_device, choose_dtype
from seerattn.hf.loading import read_model
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

LENGTHS = tuple(2**power for power in range(7, 16))
DENSITIES = (0.1, 0.2)
WARM_UPS = 2


class Arm(NamedTuple):
    """One way to run the model; no density is the model without gates."""

    impl: str
    density: float | None = None

    def __str__(self) -> str:
        return "dense" if self.density is None else f"{self.impl} {self.density:g}"


DENSE, *GATED = Arm("sdpa"), *(Arm(impl, density) for impl in ("auto", "sparse") for density in DENSITIES)
# Decoding is dense, whatever the density.
DECODING = (DENSE, GATED[0])
Model = PreTrainedModel | PeftModel


@dataclass
class AutoTimes:
    """Times of all arms on one device.

    Attributes:
        session: where results go.
        models: by arm, each its own copy, so that nothing is switched between runs.
        name: of the model in results.
        gates: name of the gates.
        repeats: timed runs of an arm.
    """

    session: Session
    models: dict[Arm, Model]
    name: str
    gates: str
    repeats: int

    def prompts(self, batch: int, tokens: int) -> list[Result]:
        """Whole prefills of all arms, "prefill_ms"."""
        ids = self._ids(batch, tokens)

        def run(arm: Arm) -> Callable[[], Any]:
            return lambda: forward(self.models[arm], ids, DynamicCache(config=self.models[arm].config))

        return self._rows("prefill_ms", (DENSE, *GATED), batch, tokens, run, lambda: self._densities(ids))

    def steps(self, batch: int, tokens: int) -> list[Result]:
        """One token more against a cache, "decode_ms"."""
        ids = self._ids(batch, tokens)

        def run(arm: Arm) -> Callable[[], Any]:
            model, cache = self.models[arm], DynamicCache(config=self.models[arm].config)
            forward(model, ids, cache)

            def step() -> None:
                forward(model, ids[:, :1], cache)
                cache.crop(-1)

            return step

        return self._rows("decode_ms", DECODING, batch, tokens, run, dict)

    def _rows(
        self,
        what: str,
        arms: tuple[Arm, ...],
        batch: int,
        tokens: int,
        run: Callable[[Arm], Callable[[], Any]],
        check: Callable[[], dict[Arm, float]],
    ) -> list[Result]:
        blanks = [self._blank(what, arm, batch, tokens) for arm in arms]
        found = [self.session.file.find(blank) for blank in blanks]
        if None not in found:
            return found
        realised = check()
        seconds = in_turns({arm: run(arm) for arm in arms}, self.session.device, self.repeats)
        with self.session.file.together() as cell:
            return [
                cell.setdefault(
                    replace(
                        blank,
                        value=round(median(seconds[arm]) * 1e3, 5),
                        n=self.repeats,
                        samples={"ms": [round(each * 1e3, 4) for each in seconds[arm]]},
                        realised_density=realised.get(arm),
                    )
                )
                for arm, blank in zip(arms, blanks)
            ]

    def _blank(self, what: str, arm: Arm, batch: int, tokens: int) -> Result:
        model = self.models[DENSE]
        cell = {"dtype": str(model.dtype).removeprefix("torch."), "layers": model.config.num_hidden_layers}
        values: dict[str, Any] = {}
        if arm.density is not None:
            policy = seerattn.TopK(density=arm.density)
            values = {"method": "gate", "kind": "learned", "name": self.gates, "settings": policy.to_dict()}
            values |= {"density": arm.density}
        cell |= {"batch": batch}
        return self.session.blank(what, model=self.name, context=tokens, impl=arm.impl, cell=cell, seed=0, **values)

    def _ids(self, batch: int, tokens: int) -> Tensor:
        vocab = self.models[DENSE].config.vocab_size
        ids = torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
        return ids.to(self.session.device)

    def _densities(self, ids: Tensor) -> dict[Arm, float]:
        """Counted densities of all arms.

        Raises:
            CheckFailed: "auto" ran dense and gave other logits than the model without gates.
        """
        counted: dict[Arm, float] = {DENSE: 1.0}
        for arm in GATED:
            with seerattn.record_density(self.models[arm]) as meter:
                forward(self.models[arm], ids)
            counted[arm] = meter.mean()
        plain = forward(self.models[DENSE], ids)
        for arm in GATED:
            if arm.impl != "auto" or counted[arm] < 1:
                continue
            found = forward(self.models[arm], ids)
            if torch.equal(found, plain):
                continue
            with sdpa_kernel(CUDNN_FIRST, set_priority=True):
                expected = forward(self.models[DENSE], ids)
            if not torch.equal(found, expected):
                raise CheckFailed(
                    f"{arm} ran {list(ids.shape)} tokens dense and gave other logits than the model without gates, by "
                    f"{(found - plain).abs().max():.2e}"
                )
        return counted


@torch.no_grad()
def forward(model: Model, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Logits of the last tokens."""
    return model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits


def in_turns(runs: dict[Arm, Callable[[], Any]], device: torch.device, repeats: int) -> dict[Arm, list[float]]:
    """Seconds of each run, in an order that is drawn anew for every repeat."""
    seconds: dict[Arm, list[float]] = {arm: [] for arm in runs}
    order, draw = list(runs), random.Random(0)
    for repeat in range(WARM_UPS + repeats):
        draw.shuffle(order)
        for arm in order:
            synchronize(device)
            begin = time.perf_counter()
            runs[arm]()
            synchronize(device)
            if repeat >= WARM_UPS:
                seconds[arm].append(time.perf_counter() - begin)
    return seconds


def show(rows: list[list[Result]], arms: tuple[Arm, ...], title: str) -> None:
    """Prints a line a length: milliseconds of the model without gates, and what the others take longer."""
    say(title)
    body = []
    for row in rows:
        dense = row[0].value
        cells = [f"{each.value:.3f} ({each.value / dense - 1:+.1%})" for each in row[1:]]
        counted = [f"{each.realised_density:.2f}" for each in row[1:] if each.realised_density is not None]
        body.append([str(row[0].cell["batch"]), f"{row[0].context:,}", f"{dense:.3f}", *cells, " ".join(counted)])
    print_table(["batch", "tokens", *(f"{arm} ms" for arm in arms), "computed"], body)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    gates: Annotated[Path, typer.Option(help="Folder of its gates.")],
    output: Annotated[Path | None, typer.Option(help="Results file.")] = None,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens.")] = ",".join(map(str, LENGTHS)),
    batches: Annotated[str, typer.Option(help="Sequences of a batch.")] = "1",
    max_length: Annotated[int, typer.Option(help="Longest one, of a whole batch together.")] = LENGTHS[-1],
    repeats: Annotated[int, typer.Option(help="Timed runs of each.", min=2)] = 15,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto is bfloat16 on an accelerator and float32 on a CPU.")] = "auto",
) -> None:
    """Time prompts and decoding of a model without gates and with them."""
    place = choose_device(device)
    kind = getattr(torch, choose_dtype(dtype, place))

    def load() -> PreTrainedModel:
        return read_model(str(model), dtype=kind, device=place).eval()

    models: dict[Arm, Model] = {DENSE: load()}
    for arm in GATED:
        policy = seerattn.TopK(density=arm.density)
        models[arm] = seerattn.attach(load(), gates, policy=policy, impl=arm.impl).eval()
    times = AutoTimes(Session(place, ResultsFile(output, place), say), models, model.name, gates.name, repeats)
    prompts, steps = [], []
    for batch in map(int, batches.split(",")):
        for tokens in map(int, lengths.split(",")):
            if batch * tokens > max_length:
                continue
            say(f"{batch} x {tokens:,} tokens")
            try:
                prompts.append(times.prompts(batch, tokens))
            except CheckFailed as error:
                say(f"FAILED {error}")
                raise typer.Exit(1) from None
            steps.append(times.steps(batch, tokens))
    show(prompts, (DENSE, *GATED), "prompts")
    show(steps, DECODING, "a token more")


if __name__ == "__main__":
    typer.run(main)
