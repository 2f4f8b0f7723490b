"""What a manager of continuous batching knows of its requests, and the rows of the forward that it runs.

Which request a row belongs to, and how long its prompt is, is known to the manager of the batches alone: the number of
blocks of a short chunk, and whether "auto" runs it dense, are those of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from seerattn.hf.dense_steps import dense_layers
from seerattn.hf.mask import CallMask
from seerattn.hf.meters import DensityMeter, density_meters
from seerattn.hf.pages import Layout, Row
from seerattn.hf.state import NO_GATE_BLOCK, Attachment, Running
from seerattn.ops.decode_select import KeyTable
from seerattn.selection.decode_selector import tells_all
from seerattn.selection.policies import Policy, TopK
from seerattn.selection.selector import Kept, LastRowsDense, Selector, needs_length


@dataclass(eq=False)
class Request:
    """One request of a manager.

    Attributes:
        prompt: its tokens.
        running: what its prompt runs, from its first chunk to its last.
        shares: whether others may read its pages, and it theirs.
        meters: count the blocks of its prompt.
        kept: what the selector of a layer keeps for the next chunk or decoded token, and of how many tokens.
    """

    prompt: int
    running: Running
    shares: bool
    meters: tuple[DensityMeter, ...] = ()
    kept: dict[int, tuple[int, Kept | None]] = field(default_factory=dict)

    @property
    def chooses(self) -> bool:
        """Whether something chooses blocks of its prompt; else it runs as in the unpatched model."""
        return any(selector is not None for selector in self.running.selectors.values())

    @property
    def decodes(self) -> bool:
        """Whether something chooses the blocks of its decoded tokens."""
        return any(decoder is not None for decoder in self.running.decoders.values())

    def writes(self, row: Row) -> bool:
        """Whether a row of it is one token of its answer; a prompt of one token is decoded, as in `generate`."""
        return row.end - row.begin == 1 and (row.start >= self.prompt or self.prompt == 1)


class Choice(NamedTuple):
    """What was chosen for one request before it came; see `seerattn.hf.batching.choose_for`."""

    running: Running
    meter: DensityMeter | None


@dataclass(eq=False)
class Batching:
    """What one manager of continuous batching runs.

    Attributes:
        attachment: of the model.
        rows: numbers and states of the requests of the forward at hand, in their order.
        choices: what was chosen for single requests, by their ids.
        requests: those that are under way, by their ids.
        shared: what the pages that requests share were made by, once there are any.
        failed: requests of the forward at hand whose attention could not be computed, and why.
        suspects: requests, by their ids, of which one made a forward fail; they run one at a time.
        unsound: whether the scores of next tokens of the last forward were not finite, bool ``[n]``.
        tables: where the gate keys of requests lie that were last chosen for together, by layer and what chose.
    """

    attachment: Attachment
    rows: Callable[[], list[Any]]
    choices: dict[str, Choice] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    shared: Running | None = None
    failed: dict[str, Exception] = field(default_factory=dict)
    suspects: list[str] = field(default_factory=list)
    unsound: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    tables: dict[tuple[int, int], KeyTable] = field(default_factory=dict)
    _lengths: Tensor | None = None
    _bounds: dict[bool, list[Row]] = field(default_factory=dict)
    _masks: dict[int, CallMask] = field(default_factory=dict)
    _layout: Layout | None = None

    @property
    def block_q(self) -> int:
        """Multiple of which chunks begin: blocks of queries are then chosen by all of their queries."""
        return max((gate.config.block_q for gate in self.attachment.gates().values()), default=NO_GATE_BLOCK)

    def request(self, state: Any) -> Request:
        """What is known of a request, from the state that transformers keeps of it.

        Raises:
            ValueError: a policy that looks at the end of a call.
        """
        if state.request_id not in self.requests:
            choice = self.choices.get(state.request_id)
            running = self.attachment.now() if choice is None else choice.running
            # Later it may be more: a request that had to make room begins anew, with what it wrote behind its prompt.
            prompt = len(state.initial_tokens)
            whole = _of_prompt(running, prompt)
            if self.shared is None and whole is running:
                self.shared = whole
            meters = density_meters(self.attachment) + (
                [] if choice is None or choice.meter is None else [choice.meter]
            )
            self.requests[state.request_id] = Request(prompt, whole, whole is self.shared, tuple(meters))
        return self.requests[state.request_id]

    def end(self, request_id: str) -> None:
        """Forgets a request, and where its gate keys are."""
        del self.requests[request_id]
        self.tables.clear()

    def cleared(self, request_id: str) -> None:
        """Ends the suspicion against a request."""
        self.suspects = [one for one in self.suspects if one != request_id]

    def forward(self, cu_q: Tensor, cu_k: Tensor, windowed: bool) -> list[Row]:
        """The rows of the forward at hand; lengths are read from the device once."""
        self._begin(cu_q)
        if windowed not in self._bounds:
            ends = pairwise(cu_q.tolist()), pairwise(cu_k.tolist())
            self._bounds[windowed] = [Row(*q, *k) for q, k in zip(*ends)]
        return self._bounds[windowed]

    def layout(self, cu_q: Tensor, cache: PagedAttentionCache) -> Layout:
        """Where the rows of the forward at hand have their keys, in a cache that was left in its pages.

        Decoded together are requests that choose the blocks of their prompts, and those that "auto" decodes dense. The
        end of a prompt is not decoded, and what runs dense is attended to as in the unpatched model.
        """
        self._begin(cu_q)
        if self._layout is None:
            futures = self.rows()
            dense = self._decoded_dense(futures, cu_q.device)
            decoded = [number in dense or self._is_decoded(future.state) for number, future in enumerate(futures)]
            self._layout = Layout.of(cache, futures, decoded, cu_q.device)
        return self._layout

    def _decoded_dense(self, futures: list[Any], device: torch.device) -> set[int]:
        """Rows that "auto" decodes dense though something would choose; those with the same decoders do alike."""
        groups: dict[int, dict[int, int]] = {}
        for number, future in enumerate(futures):
            known, tokens = self.requests.get(future.state.request_id), future.state.position_offset
            if known is not None and known.decodes and known.running.impl == "auto" and tokens > known.prompt:
                groups.setdefault(id(known.running.decoders), {})[number] = tokens
        found: set[int] = set()
        for rows in groups.values():
            running = self.requests[futures[next(iter(rows))].state.request_id].running
            deciders = [one for one in running.decoders.values() if one is not None]
            whole = {number for number, tokens in rows.items() if all(tells_all(one, tokens) for one in deciders)}
            others = [tokens for number, tokens in rows.items() if number not in whole]
            dense = dense_layers(running, self.attachment.layers.values(), others, device) if others else ()
            found |= {*rows} if len(dense) == len(deciders) else whole
        return found

    def _is_decoded(self, state: Any) -> bool:
        known = self.requests.get(state.request_id)
        if known is None or known.decodes:
            return False
        return known.chooses and state.position_offset > known.prompt

    def _begin(self, cu_q: Tensor) -> None:
        """Forgets the forward before."""
        if self._lengths is not cu_q:
            self._lengths, self._bounds, self._masks, self._layout = cu_q, {}, {}, None

    def mask(self, number: int, row: Row) -> CallMask:
        """What the layers share of a row of a prompt: the tables of its keys."""
        if number not in self._masks:
            given = {"q_length": row.end - row.begin, "q_offset": row.start, "attention_mask": None}
            self._masks[number] = CallMask(self.attachment.dense, given)
        return self._masks[number]


BATCHING: ContextVar[Batching | None] = ContextVar("seerattn_batching", default=None)


def check_running(running: Running) -> None:
    """Refuses what gives a prompt in chunks other blocks than a whole one, in a way that no length mends.

    Raises:
        ValueError: a policy or selector that looks at the end of a call, of which a chunk has one as well, or one that
            needs the length and cannot be told it.
    """
    for selector in running.selectors.values():
        if isinstance(selector, LastRowsDense) or getattr(_policy(selector), "last_rows_dense", 0):
            raise ValueError(
                "last_rows_dense must be 0 in continuous batching, where every chunk of a prompt has last rows, got a "
                "policy with some"
            )
        if selector is not None and needs_length(selector) and not isinstance(_policy(selector), TopK):
            raise ValueError(
                "a selector must choose in chunks as in one call in continuous batching, or do so by a TopK, which is "
                f"told the length of the prompt, got {type(selector).__name__}"
            )


def _policy(selector: Selector | None) -> Policy | None:
    return getattr(selector, "policy", None)


def _of_prompt(running: Running, prompt: int) -> Running:
    """What the prompt of a request runs: a policy that needs the whole length is told it.

    Raises:
        ValueError: see `check_running`.
    """
    check_running(running)
    needy = {layer: s for layer, s in running.selectors.items() if s is not None and needs_length(s)}
    if not needy:
        return running
    told = {layer: replace(s, policy=replace(s.policy, length=prompt)) for layer, s in needy.items()}
    return replace(running, selectors={**running.selectors, **told})
