"""Managers of transformers' continuous batching for models with gates or selectors.

``model.generate_batch`` and ``model.init_continuous_batching`` work as without gates. A manager of such a model

- runs in the context in which it was made: inside `seerattn.policy` by that policy, inside `record_density` counted;
- cuts prompts at multiples of the gates' query block alone, so that a request gets what it gets alone;
- lets requests share the pages of equal beginnings only where both are read by the same selectors;
- fails a request alone where its attention, or a forward, fails (`seerattn.hf.faults`);
- leaves keys in the pages of its cache (`seerattn.hf.pages`), but has no CUDA graphs, which it says once.

The name of the attention implementation that transformers asks for stands in the config while a manager lives.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from seerattn.hf.capturing import CAPTURE
from seerattn.hf.faults import isolate_faults
from seerattn.hf.meters import DensityMeter, time_meter
from seerattn.hf.paged import PAGED
from seerattn.hf.pages import leave_in_pages
from seerattn.hf.placement import execution_device
from seerattn.hf.requests import BATCHING, Batching, Choice, check_running
from seerattn.hf.state import Attachment, attachment_of, check_fits, check_gated, check_policy
from seerattn.selection.policies import Policy

logger = logging.getLogger(__name__)

# What a manager of ours cannot have, and what it has in place of it.
_OFF = {
    "use_cuda_graph": False,
    "use_async_batching": False,
    "max_blocks_per_request": 0,
    "varlen_compile_config": None,
    "decode_compile_config": None,
    "default_compile_level": 0,
}
_BATCHINGS: weakref.WeakKeyDictionary[ContinuousBatchingManager, Batching] = weakref.WeakKeyDictionary()


def let_batch(base: PreTrainedModel) -> None:
    """Makes continuous batching of a model that was attached to go through its selectors."""
    if hasattr(base, "init_continuous_batching"):
        base.init_continuous_batching = partial(_init_batching, base)


def leave_batching(base: PreTrainedModel) -> None:
    """Takes back what `let_batch` did, and ends a manager that was kept."""
    if _is_ours(_kept(base)):
        base.destroy_cached_continuous_batching_manager()
    base.__dict__.pop("init_continuous_batching", None)


def _kept(base: nn.Module) -> ContinuousBatchingManager | None:
    """The manager that transformers keeps for the next batch, if it was asked to."""
    return base.__dict__.get("_cached_continuous_batching_manager")


def _is_ours(manager: ContinuousBatchingManager | None) -> bool:
    return manager is not None and manager in _BATCHINGS


def choose_for(manager: ContinuousBatchingManager, request_id: str, policy: Policy | None, meter: DensityMeter) -> None:
    """Lets one request, before it is added to a manager, have a policy of its own, and counts its blocks.

    Call `forget` when it is done. Requests with policies of their own share no pages.

    Args:
        manager: of a model with gates.
        request_id: under which it will be added.
        policy: chooses the blocks of its prompt; None runs dense. Answers are decoded as those of the model are.
        meter: counts them.

    Raises:
        ValueError: no policy, or one that does not fit the gates.
    """
    batching = _BATCHINGS[manager]
    check_policy(policy)
    check_gated(manager.model, policy)
    check_fits(policy, batching.attachment)
    now = batching.attachment.now()
    running = replace(now.with_policy(policy), decoders=now.decoders)
    check_running(running)
    batching.choices[request_id] = Choice(running, meter)


def count_for(manager: ContinuousBatchingManager, request_id: str, meter: DensityMeter) -> None:
    """Counts the blocks of one request, before it is added; see `choose_for`."""
    batching = _BATCHINGS[manager]
    batching.choices[request_id] = Choice(batching.attachment.now(), meter)


def forget(manager: ContinuousBatchingManager, request_id: str) -> None:
    """Ends what `choose_for` or `count_for` began."""
    _BATCHINGS[manager].choices.pop(request_id, None)


def _init_batching(
    base: PreTrainedModel,
    generation_config: Any = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> ContinuousBatchingManager:
    """`PreTrainedModel.init_continuous_batching` of a model that was attached to.

    Raises:
        ValueError: a model, or options, that cannot be served this way.
    """
    attachment = attachment_of(base)
    _check_model(base, attachment)
    check_running(attachment.now())
    if CAPTURE.get() is not None or time_meter(attachment) is not None:
        raise ValueError(
            "attention that is watched, trained or timed must run in forwards of its own, got continuous batching; use "
            "generate or call the model"
        )
    if _kept(base) is not None and not _is_ours(_kept(base)):
        raise ValueError(
            "a manager that is kept must be one of the model with its gates, got one from before they were attached; "
            "call model.destroy_cached_continuous_batching_manager()"
        )
    if continuous_batching_config is None:
        generation = generation_config or getattr(base, "generation_config", None)
        continuous_batching_config = getattr(generation, "continuous_batching_config", None)
    config = _servable(base, continuous_batching_config or ContinuousBatchingConfig(), attachment)
    before = base.config._attn_implementation
    base.config._attn_implementation = PAGED[attachment.dense]
    try:
        manager = type(base).init_continuous_batching(base, generation_config, config, workload_hints)
    except BaseException:
        base.config._attn_implementation = before
        raise
    if before != PAGED[attachment.dense]:
        # What `stop` puts back.
        manager._original_attn_impl = before
    batching = _BATCHINGS.setdefault(manager, Batching(attachment, partial(_requests, weakref.ref(manager))))
    isolate_faults(manager, batching)
    context = copy_context()
    context.run(BATCHING.set, batching)
    manager._run_generation_loop = partial(_run_in, context, weakref.ref(manager))
    return manager


def _page(config: ContinuousBatchingConfig) -> int:
    return getattr(config, "page_size", None) or config.block_size


def _requests(manager: weakref.ref[ContinuousBatchingManager]) -> list[Any]:
    """The requests of the forward that a manager runs, in their order."""
    return manager().batch_processor.inputs_and_outputs.requests_in_batch


def _run_in(context: Any, manager: weakref.ref[ContinuousBatchingManager]) -> None:
    """The loop of a manager, in the context in which it was made; the thread keeps the manager alive meanwhile."""
    alive = manager()
    context.run(type(alive)._run_generation_loop, alive)


def _check_model(base: nn.Module, attachment: Attachment) -> None:
    if base.config.get_text_config() is not base.config:
        raise ValueError(
            f"continuous batching with gates must have a model of text alone, got {type(base).__name__}; use generate"
        )
    places = {str(execution_device(layer.module)) for layer in attachment.layers.values()}
    if len(places) > 1:
        raise ValueError(
            "continuous batching must have all layers on one device, where its pages are, got "
            f"{', '.join(sorted(places))}; use generate, or vLLM with tensor parallelism"
        )
    for layer in attachment.layers.values():
        if layer.not_cached is not None:
            raise ValueError(
                f"continuous batching with gates must have layers that can be followed against a cache, got layer "
                f"{layer.layer}, which cannot ({layer.not_cached}); use generate"
            )
        if layer.rotation is not None and layer.rotation.depends_on_length:
            raise ValueError(
                "continuous batching with gates must have a model whose rotation does not depend on the longest text "
                f"of a batch, got {type(base).__name__}; use generate"
            )


def _servable(base: nn.Module, config: ContinuousBatchingConfig, attachment: Attachment) -> ContinuousBatchingConfig:
    """The options with what cannot be had switched off, which is told.

    Raises:
        ValueError: pages that cut query blocks, batches that hold none, or no such scheduler.
    """
    config, block_q = copy.copy(config), Batching(attachment, list).block_q
    page = _page(config)
    if config.allow_block_sharing and page % block_q:
        raise ValueError(
            f"pages must be multiples of the query block of the gates, {block_q} tokens, so that requests can share "
            f"them, got {page}; or pass allow_block_sharing=False"
        )
    if config.max_batch_tokens is not None and config.max_batch_tokens < block_q:
        raise ValueError(f"max_batch_tokens must be at least a query block of the gates, {block_q}, got "
                         f"{config.max_batch_tokens}")  # fmt: skip
    ours = f"seer_{config.scheduler_type.removeprefix('seer_')}"
    if ours not in SCHEDULER_MAPPING:
        raise ValueError(f"scheduler_type must be one of {', '.join(_SCHEDULERS)}, got {config.scheduler_type!r}")
    wanted = [
        name
        for name, off in _OFF.items()
        if hasattr(config, name) and getattr(config, name) not in (None, off, (off, off))
    ]
    if wanted or base.device.type == "cuda":
        _tell_what_is_off(", ".join(wanted))
    for name, off in _OFF.items():
        if hasattr(config, name):
            setattr(config, name, off)
    config.scheduler_type = ours
    return config


@functools.cache
def _tell_what_is_off(asked: str) -> None:
    logger.warning(
        "continuous batching with gates runs without CUDA graphs, asynchronous batches, compilation and the tables of "
        "FlashAttention%s",
        f"; asked for were {asked}" if asked else "",
    )


@functools.cache
def _tell_of_pages() -> None:
    logger.warning(
        "requests share no pages of equal beginnings where they run by different policies, or by one that knows the "
        "length of the prompt, as TopK does with rule='same_k'; rule='row_share' lets them"
    )


class _Aligned(Scheduler):
    """What a scheduler of ours does otherwise; the class beside it schedules."""

    def __init__(self, cache: PagedAttentionCache, *others: Any, **options: Any) -> None:
        super().__init__(cache, *others, **options)
        leave_in_pages(cache)

    def add_waiting_request(self, state: Any) -> None:
        # What cannot be served fails here, where transformers fails the request alone.
        BATCHING.get().request(state)
        super().add_waiting_request(state)

    def schedule_batch(self, *budgets: Any) -> Any:
        batching = BATCHING.get()
        # transformers asks for an answer before it lets others in again; where all were cancelled none would come.
        self.block_new_requests &= bool(self.active_requests)
        found = self._one_suspect_or_others(*budgets)
        under_way = self.active_requests.keys() | self.waiting_requests.keys()
        for request_id in [one for one in batching.requests if one not in under_way]:
            batching.end(request_id)
        # Of a request for which no whole block was left nothing runs this time.
        scheduled = found[0] and [future for future in found[0] if future.query_length]
        for future in scheduled or ():
            request = batching.request(future.state)
            ends = future.state.position_offset + future.query_length
            # Complete pages are what others find: none that hold what was decoded, and so attended to everything.
            if future.complete_blocks and not (request.shares and ends <= request.prompt):
                nothing = dict.fromkeys(future.complete_blocks, 0) if isinstance(future.complete_blocks, dict) else 0
                future.complete_blocks = nothing
        return scheduled, *found[1:]

    def _one_suspect_or_others(self, *budgets: Any) -> Any:
        """A batch of one of those that made a forward fail; of the others where there is no room for it."""
        batching = BATCHING.get()
        batching.suspects = [
            one for one in batching.suspects if one in self.active_requests or one in self.waiting_requests
        ]
        if not batching.suspects:
            return super().schedule_batch(*budgets)
        with self._showing(lambda one: one == batching.suspects[0]):
            alone = super().schedule_batch(*budgets)
        if alone[0]:
            return alone
        with self._showing(lambda one: one not in batching.suspects):
            others = super().schedule_batch(*budgets)
        # None says that there is no room, which others are then made to give.
        return others if others[0] or others[0] is None else alone

    @contextmanager
    def _showing(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        """Schedules as if there were only some requests."""
        active = {name: state for name, state in self.active_requests.items() if not wanted(name)}
        waiting = {name: state for name, state in self.waiting_requests.items() if not wanted(name)}
        order = [name for name in self.waiting_requests_order if not wanted(name)]
        self.active_requests = {name: x for name, x in self.active_requests.items() if name not in active}
        self.waiting_requests = {name: x for name, x in self.waiting_requests.items() if name not in waiting}
        self.waiting_requests_order = deque(name for name in self.waiting_requests_order if wanted(name))
        try:
            yield
        finally:
            self.active_requests = active | self.active_requests
            self.waiting_requests = waiting | self.waiting_requests
            self.waiting_requests_order.extend(order)

    def _infer_request_tokens(self, state: Any, *others: Any) -> list[int]:
        if state.status != RequestStatus.PENDING or not self.cache.use_prefix_sharing:
            return super()._infer_request_tokens(state, *others)
        batching = BATCHING.get()
        if not batching.request(state).shares:
            _tell_of_pages()
            return state.remaining_prefill_tokens
        tokens = super()._infer_request_tokens(state, *others)
        # transformers 5.17 leaves the last token alone of a prompt that is all there.
        back = state.position_offset % batching.block_q
        if back and state.status == RequestStatus.PREFILLING:
            state.position_offset -= back
            tokens = state.remaining_prefill_tokens = state.initial_tokens[state.position_offset :]
        return tokens

    def _schedule_request(self, state: Any, request_tokens: list[int], token_budget: int, *others: Any) -> None:
        if state.status != RequestStatus.DECODING and len(request_tokens) > token_budget:
            end = state.position_offset + token_budget
            token_budget -= min(token_budget, end % BATCHING.get().block_q)
        super()._schedule_request(state, request_tokens, token_budget, *others)


_SCHEDULERS = [name for name in SCHEDULER_MAPPING if not name.startswith("seer_")]
for _name in _SCHEDULERS:
    SCHEDULER_MAPPING[f"seer_{_name}"] = type(f"Aligned{_name}", (_Aligned, SCHEDULER_MAPPING[_name]), {})
