"""Many requests at once over one manager of continuous batching, for an event loop.

The manager generates in a thread of its own. Each request has its density, its sampling and its count of blocks; a
request that nobody waits for any more is cancelled, and its place is free for the next forward.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from transformers import ContinuousBatchingConfig, GenerationConfig

from seerattn.hf.batching import choose_for, count_for, forget
from seerattn.hf.meters import DensityMeter
from seerattn.hf.state import attachment_of, check_fits
from seerattn.options import check_options, option
from seerattn.serve.model import AnsweringModel
from seerattn.serve.text import TextStream

Finish = Literal["stop", "length"]
# transformers 5.17 knows pages by their older name alone.
_PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
# Page of the cache in tokens: a multiple of every query block.
PAGE = 256
# Below it the likeliest token is taken: scores over so small a number are no numbers any more.
_LOWEST_TEMPERATURE = 1e-3


class Busy(Exception):
    """There are as many requests as the server takes."""


class Failed(Exception):
    """The model could not answer, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes on at once.

    Attributes:
        slots: requests that run in one forward.
        waiting: requests that may wait for a slot; more are sent away.
        batch_tokens: tokens of one forward; longer prompts come in chunks.
        cache_tokens: tokens that the cache holds, of all requests together; None is what the device has room for, and
            on a CPU four texts as long as the model takes.
    """

    slots: int = option(32, help="Requests that run in one forward.", low=1)
    waiting: int = option(256, help="Requests that may wait for a slot; more are sent away.", low=0)
    batch_tokens: int = option(8192, help="Tokens of one forward; longer prompts come in chunks.", low=256)
    cache_tokens: int | None = option(
        None, help="Tokens that the cache holds; default: what a GPU has room for, on a CPU four long texts.", low=512
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request.

    Attributes:
        tokens: the prompt.
        new: tokens of the answer at most.
        temperature: 0 takes the most likely token, and so does what is next to it.
        top_p: share of probability that is drawn from.
        top_k: tokens that are drawn from, None for all.
        stop: texts at which the answer ends, without them.
        density: of the prompt's attention; None is that of the server.
    """

    tokens: list[int]
    new: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    density: float | None = None


@dataclass(frozen=True)
class Part:
    """What came of an answer since the part before it.

    Attributes:
        text: its text.
        tokens: tokens of the answer so far.
        finish: why it ends here, None while it goes on.
        density: that was counted of the prompt, in the last part.
        first_after: seconds up to its first token.
    """

    text: str
    tokens: int
    finish: Finish | None
    density: float
    first_after: float


class Engine:
    """Answers requests.

    A request that fails, fails alone (`seerattn.hf.faults`). What cannot be laid to one ends the manager: those under
    way are told, `runs` is False from then on, and nothing is taken any more.

    Args:
        loaded: the model.
        limits: what it takes on.
    """

    def __init__(self, loaded: AnsweringModel, limits: Limits) -> None:
        self.loaded = loaded
        self._limits = limits
        self._queues: set[asyncio.Queue] = set()
        self._stopping = False
        self._watcher: threading.Thread | None = None
        self._numbers = itertools.count()
        self.active = 0
        own = loaded.model.generation_config
        self._ends = own.eos_token_id
        # Every request brings its own; what stands here only makes transformers prepare for them.
        drawn = {"do_sample": True, "temperature": 0.5, "top_k": 1, "top_p": 0.5}
        config: dict[str, Any] = {_PAGE: PAGE, "max_batch_tokens": limits.batch_tokens}
        config |= {"max_requests_per_batch": limits.slots, "per_request_processors": True}
        held = limits.cache_tokens
        if held is None and loaded.model.device.type == "cpu":
            held = 4 * (loaded.longest or 8192)
        if held is not None:
            config["num_blocks"] = -(-held // PAGE) + 1
        self._room = loaded.longest if held is None else min(loaded.longest or held, held)
        if "auto_switch_to_flash" in ContinuousBatchingConfig.__dataclass_fields__:
            # Never another attention than the one that the model was loaded with, also without gates.
            config["auto_switch_to_flash"] = False
        self._manager = loaded.model.init_continuous_batching(
            GenerationConfig(eos_token_id=-1 if own.eos_token_id is None else own.eos_token_id, **drawn),
            ContinuousBatchingConfig(**config),
        )

    def start(self, failed: Callable[[], None] = lambda: None) -> None:
        """Begins to generate, in a thread. Called in the event loop that answers are for.

        Args:
            failed: called in it once the thread has ended without being told to.
        """
        self._manager.start()
        thread, loop = self._manager._generation_thread, asyncio.get_running_loop()

        def ended() -> None:
            # Who has been told of a failure has left; who has not would wait for good.
            for queue in self._queues:
                queue.put_nowait(None)
            if not self._stopping:
                failed()

        def watch() -> None:
            thread.join()
            loop.call_soon_threadsafe(ended)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Ends once all requests are answered."""
        self._stopping = True
        self._manager.stop()
        self._watcher.join()

    @property
    def runs(self) -> bool:
        """Whether requests are answered."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    def check(self, ask: Ask) -> None:
        """Refuses what cannot be answered.

        Raises:
            ValueError: too long for the model or the cache, or a density that the gates cannot give.
            Busy: there is no place to wait, or nothing is answered any more.
        """
        if not self.runs:
            raise Busy("the server has failed, or is going down, and takes no more requests")
        self.loaded.check_room(len(ask.tokens), ask.new)
        if self._room is not None and len(ask.tokens) + ask.new > self._room:
            raise ValueError(
                f"prompt and answer must be at most the {self._room} tokens that the cache of this server holds, got a "
                f"prompt of {len(ask.tokens)} and an answer of up to {ask.new}"
            )
        if ask.density is not None:
            policy = self.loaded.policy_of(ask.density)
            if policy is not None:
                check_fits(policy, attachment_of(self.loaded.model))
        if self.active >= self._limits.slots + self._limits.waiting:
            raise Busy(f"the server takes {self._limits.slots + self._limits.waiting} requests at once; come again")

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.loaded.model.config.get_text_config().vocab_size

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and its answer may have together, None where nothing says."""
        return self._room

    async def answer(self, ask: Ask) -> AsyncIterator[Part]:
        """The answer to a request that was checked, in parts. A caller that leaves early frees its place.

        Raises:
            Failed: the model could not answer.
            ValueError: the gates cannot give the density.
        """
        name, meter, queue = f"ask-{next(self._numbers)}", DensityMeter(), asyncio.Queue()
        if self.loaded.gated:
            if ask.density is None:
                count_for(self._manager, name, meter)
            else:
                choose_for(self._manager, name, self.loaded.policy_of(ask.density), meter)
        begin, first, over = time.perf_counter(), None, False
        text = TextStream(self.loaded.tokenizer, ask.stop)
        self.active += 1
        self._queues.add(queue)
        try:
            self._manager.register_result_handler(name, queue.put_nowait)
            self._add(name, ask)
            finish: Finish | None = None
            while finish is None:
                output = await queue.get()
                if output is None:
                    raise Failed("the server has failed and answers no more")
                over = output.is_finished()
                if output.error is not None:
                    raise Failed(f"the model could not answer: {output.error}")
                first = first or time.perf_counter() - begin
                new = output.generated_tokens
                piece, stopped = text.add(new, last=over)
                if stopped or (over and new and self._is_end(new[-1])):
                    finish = "stop"
                elif over:
                    finish = "length"
                if piece or finish:
                    density = meter.mean() if finish and meter.layers else 1.0
                    yield Part(piece, len(new), finish, density, first)
        finally:
            self.active -= 1
            self._queues.discard(queue)
            if not over:
                self._manager.cancel_request(name)
            self._manager.output_router.result_handlers.pop(name, None)
            if self.loaded.gated:
                forget(self._manager, name)

    async def whole(self, ask: Ask) -> Part:
        """The whole answer at once; see `answer`."""
        texts = []
        async with aclosing(self.answer(ask)) as parts:
            async for part in parts:
                texts.append(part.text)
        return Part("".join(texts), part.tokens, part.finish, part.density, part.first_after)

    def _add(self, name: str, ask: Ask) -> None:
        greedy = ask.temperature < _LOWEST_TEMPERATURE
        added = self._manager.add_request(
            ask.tokens,
            request_id=name,
            max_new_tokens=ask.new,
            streaming=True,
            eos_token_id=self._ends,
            temperature=1.0 if greedy else float(ask.temperature),
            top_k=1 if greedy else min(ask.top_k or self.vocabulary, self.vocabulary),
            top_p=1.0 if greedy else float(ask.top_p),
        )
        if added is None:
            raise Failed("the server is going down and takes no more requests")

    def _is_end(self, token: int) -> bool:
        return token in (self._ends if isinstance(self._ends, list) else [self._ends])
