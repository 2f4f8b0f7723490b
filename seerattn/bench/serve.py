"""Serving: time to the first token and throughput of many requests at once, through the engine of `seerattn serve`."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from seerattn.bench.attention import share_of
from seerattn.bench.dense import BACKENDS, sdpa_backend
from seerattn.bench.model import Size, gate_form
from seerattn.bench.model_runs import ModelRuns
from seerattn.bench.options import ModelBench, contexts, densities, gates, impl
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import LONG_RUN
from seerattn.hf.attach import set_policy
from seerattn.ops.resolve import preferred
from seerattn.options import option
from seerattn.results.record import Result
from seerattn.selection.policies import KeepAll, TopK
from seerattn.serve.engine import Ask, Engine, Limits, Part
from seerattn.serve.model import AnsweringModel

# The prompt by which answers are checked is so many tokens longer than a forward; how long they are.
CHECKED, CHECKED_ANSWER = 300, 8
# What an answer may differ by from the likeliest one: so many roundings of the largest score.
ROUNDINGS = 16


@dataclass(frozen=True, kw_only=True)
class ServeBench(ModelBench):
    """Time to the first token ("serve_first_s", the median of all requests) and "serve_tokens_per_second".

    As many prompts as are told come at the same moment, each a random one; throughput counts their tokens and those of
    their answers, to the end of the last one. Dense requests go through the same engine and the same gated model, with
    density 1. Before the clock starts, answers of both are held against one forward of the unpatched model.

    Attributes:
        densities: shares of the causal block area that are computed of a prompt.
        baselines: SDPA backends of dense requests.
        at_once: prompts that come together; more than the cache holds wait, as they would.
        answer: tokens of an answer.
        batch_tokens: tokens of one forward, see `Limits`.
        cache_tokens: tokens that the cache holds, see `Limits`.
        impl: of the sparse attention; None is the fastest one.
    """

    contexts: tuple[int, ...] = contexts(32768, 65536, 131072, low=2)
    densities: tuple[float, ...] = densities(0.1, 0.2)
    gates: tuple[str, ...] = gates("default")
    baselines: tuple[str, ...] = option(
        (), help="Dense attention; default: flash, on a CPU sdpa; cudnn serves whole prompts alone.",
        choices=(*BACKENDS,), flag=False,
    )  # fmt: skip
    at_once: tuple[int, ...] = option((1, 4, 16), help="Prompts that come together.", low=1)
    answer: int = option(16, help="Tokens of an answer.", low=1, flag=False)
    batch_tokens: int = option(8192, help="Tokens of one forward; longer prompts come in chunks.", low=256, flag=False)
    cache_tokens: int | None = option(
        None, help="Tokens that the cache holds; default: what the device has room for.", low=512, flag=False
    )
    impl: str | None = impl()

    def run(self, session: Session, subject: Size) -> list[Result]:
        """See `Bench`."""
        impl = self.impl or preferred("block_sparse_attention", "auto", session.device)
        rows: list[Result | None] = []
        for form in self.gates:
            bench = _Requests(session, subject, self, impl, form)
            try:
                # What decides comes first, should time be up before the end: few prompts, then many.
                for n, tokens in product(sorted(set(self.at_once)), self.lengths):
                    for name in self.baselines or (default_dense(session.device),):
                        rows += bench.dense(tokens, n, name)
                    for density in sorted(self.densities):
                        rows += bench.sparse(tokens, n, density)
            finally:
                bench.close()
        return [row for row in rows if row is not None]


def default_dense(device: torch.device) -> str:
    """The backend of dense attention: of parts of a prompt FlashAttention is the only one on a GPU."""
    return "flash" if device.type == "cuda" else "sdpa"


class Round(NamedTuple):
    """What came of requests that were sent together: their last parts, and seconds to the end of all."""

    parts: list[Part]
    seconds: float


class _Requests(ModelRuns):
    """Requests to one engine, which is made when the first ones come."""

    quantities = ("serve_first_s", "serve_tokens_per_second")

    def __init__(self, session: Session, size: Size, bench: ServeBench, impl: str, form: str) -> None:
        super().__init__(session, size, bench.repeats, impl)
        self.bench, self.form = bench, form
        self._loop = asyncio.new_event_loop()
        self._engine: Engine | None = None
        self._warm: set[tuple[int, bool]] = set()  # tokens of a prompt, and whether it ran dense

    def dense(self, tokens: int, n: int, name: str) -> list[Result | None]:
        """Requests of density 1, with one SDPA backend."""

        def run() -> dict[str, dict[str, Any]]:
            with sdpa_backend(name, self.device):
                return self._run(tokens, n, 1.0)

        label = f"{n:>2} at once, dense {name}"
        return self.measure(tokens, name, run, label, cell=self._cell(n), realised_density=1.0)

    def sparse(self, tokens: int, n: int, density: float) -> list[Result | None]:
        """Requests of a density."""
        settings = TopK(density=density).to_dict()
        values = of_gates(self.form) | {"settings": settings, "density": density, "seed": 0}
        c = gate_form(self.form)
        cell = self._cell(n) | {"block_q": c.block_q, "block_k": c.block_k, "share": share_of(c)}
        label = f"{n:>2} at once, gates {self.form}, density {density:g}"
        return self.measure(tokens, self.impl, partial(self._run, tokens, n, density), label, cell=cell, **values)

    def close(self) -> None:
        """Ends the engine."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None
        self._loop.close()

    def _cell(self, n: int) -> dict[str, Any]:
        return {"at_once": n, "answer": self.bench.answer, "batch_tokens": self.bench.batch_tokens}

    def _run(self, tokens: int, n: int, density: float) -> dict[str, dict[str, Any]]:
        self._check(density)
        if (tokens, density == 1) not in self._warm:
            # Kernels that choose blocks are compiled by the length of rows, up to a power of two.
            self._round(tokens, 1, density, seed=0)
            self._warm.add((tokens, density == 1))
        rounds: list[Round] = []
        # Many requests repeat one another.
        enough = 2 if n == 1 else 1
        while len(rounds) < self.repeats and (len(rounds) < enough or rounds[0].seconds < LONG_RUN):
            rounds.append(self._round(tokens, n, density, seed=len(rounds) + 1))
        first = [part.first_after for one in rounds for part in one.parts]
        speed = [n * (tokens + self.bench.answer) / one.seconds for one in rounds]
        found = {"serve_first_s": median(first), "serve_tokens_per_second": median(speed)}
        realised = sum(part.density for one in rounds for part in one.parts) / len(first)
        return self.fields(
            found, {"seconds": [one.seconds for one in rounds], "first": first}, realised_density=realised
        )

    @property
    def engine(self) -> Engine:
        """The engine, started; another one where one has failed."""
        if self._engine is not None and not self._engine.runs:
            self._engine.stop()
            self._engine = None
        if self._engine is None:
            checked = self.bench.batch_tokens + CHECKED + CHECKED_ANSWER
            longest = max(max(self.bench.lengths) + self.bench.answer, checked)
            model = self.model.gated(self.form)
            loaded = AnsweringModel(self.size.name, model, numbers(self.size.vocab), longest, "same_k", True)
            limits = Limits(
                slots=max(self.bench.at_once),
                batch_tokens=self.bench.batch_tokens,
                cache_tokens=self.bench.cache_tokens,
            )
            self._engine = Engine(loaded, limits)
            self._loop.run_until_complete(_start(self._engine))
        return self._engine

    def _round(self, tokens: int, n: int, density: float, *, seed: int) -> Round:
        prompts = [_prompt(self.size, tokens, seed * n + number) for number in range(n)]
        asks = [Ask(tokens=prompt, new=self.bench.answer, density=density) for prompt in prompts]
        return self._loop.run_until_complete(_together(self.engine, asks))

    def _check(self, density: float) -> None:
        """Holds what the engine writes against one forward of the unpatched model, once for dense and once for sparse.

        Raises:
            CheckFailed: a token that is not the likeliest one, roundings aside.
        """
        is_dense, engine = density == 1, self.engine
        model = self.model.gated(self.form)

        def run() -> tuple[float, float]:
            set_policy(model, KeepAll())
            prompt = _prompt(self.size, self.bench.batch_tokens + CHECKED, 0)
            ask = Ask(tokens=prompt, new=CHECKED_ANSWER, density=1.0 if is_dense else None)
            (part,) = self._loop.run_until_complete(_together(engine, [ask])).parts
            said = [int(word) for word in part.text.split()]
            ids = torch.tensor([prompt + said], device=self.device)
            with torch.no_grad(), model.disable_adapter():
                logits = model(input_ids=ids, logits_to_keep=len(said) + 1).logits[0, :-1].double()
            short = logits.amax(-1) - logits[range(len(said)), said]
            bound = ROUNDINGS * torch.finfo(self.shape.dtype).eps * float(logits.abs().max())
            return float(short.max()), bound

        what = "dense" if is_dense else f"{self.impl} with all blocks"
        self.session.check(f"answers of the engine, {what}", run, oracle="a forward of the unpatched model")


def _prompt(size: Size, tokens: int, seed: int) -> list[int]:
    return random.Random(f"{tokens} {seed}").choices(range(3, size.vocab), k=tokens)


async def _start(engine: Engine) -> None:
    engine.start()


async def _together(engine: Engine, asks: list[Ask]) -> Round:
    begin = time.perf_counter()
    parts = await asyncio.gather(*map(engine.whole, asks))
    return Round(parts, time.perf_counter() - begin)


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose texts are the numbers of their tokens."""
    words = {str(number): number for number in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
