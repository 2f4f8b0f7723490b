"""Attention of transformers' continuous batching: one packed forward of many requests over a paged cache.

A forward holds rows: the new tokens of one request each, one after the other, with all keys of that request. A row of a
prompt goes sparse, a row that is decoded goes dense, by the attention that the model had before. Each is computed as if
it were alone, so that nothing of a request reaches another one, not even its failure (`seerattn.hf.faults`).

Which request a row belongs to, and how long its prompt is, is known to the manager of the batches alone (`Batching`):
the number of blocks of a short chunk, and whether "auto" runs it dense, are those of the whole prompt.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from seerattn.hf.call import LayerCall, logits_of
from seerattn.hf.mask import CallMask
from seerattn.hf.meters import DensityMeter, attend_counted, count_dense, density_meters
from seerattn.hf.state import NO_GATE_BLOCK, Attachment, LayerState, Running, check_filled
from seerattn.ops.crossover import LayerShape, prefer_dense
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import Policy, TopK
from seerattn.selection.selector import AttentionContext, Kept, LastRowsDense, Memory, Selector, needs_length

logger = logging.getLogger(__name__)

# transformers 5.17 gives the indices one by one and has names with a prefix; newer ones edit the keywords of the call.
EDITS_KEYWORDS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
_PREFIX = "" if EDITS_KEYWORDS else "paged|"
# Names under which continuous batching knows our implementations, by the one that they replace. With "flash" in it
# transformers makes no mask of all requests by all keys; with a 2 or 3 behind it, it would call FlashAttention.
PAGED = {"sdpa": f"{_PREFIX}seer_flash_attention", "eager": f"{_PREFIX}seer_flash_attention_eager"}
# Keywords of a packed forward, of no use to the attention of one row.
_PACKED = ("cache", "read_index", "write_index", "block_table", "logits_indices", "logits_processor_args", "use_cache")
_PACKED += tuple(f"{name}_{side}" for name in ("cu_seq_lens", "max_seqlen", "max_length") for side in "qk")
_PACKED += ("position_ids", "k_cache", "v_cache")

# Attention of one row by the implementation that ours replaced: of q, k, v, mask and keywords.
Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], tuple[Tensor, Tensor | None]]


@dataclass(eq=False)
class Request:
    """One request of a manager.

    Attributes:
        prompt: its tokens.
        running: what its prompt runs, from its first chunk to its last.
        shares: whether others may read its pages, and it theirs.
        meters: count the blocks of its prompt.
        kept: what the selector of a layer keeps for the next chunk, and of how many tokens.
    """

    prompt: int
    running: Running
    shares: bool
    meters: tuple[DensityMeter, ...] = ()
    kept: dict[int, tuple[int, Kept | None]] = field(default_factory=dict)


class Choice(NamedTuple):
    """What was chosen for one request before it came; see `seerattn.hf.batching.choose_for`."""

    running: Running
    meter: DensityMeter | None


class Row(NamedTuple):
    """Tokens ``begin .. end`` of a packed forward and the keys ``k_begin .. k_end`` of their request."""

    begin: int
    end: int
    k_begin: int
    k_end: int

    @property
    def start(self) -> int:
        """Keys before the first token."""
        return (self.k_end - self.k_begin) - (self.end - self.begin)


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
    """

    attachment: Attachment
    rows: Callable[[], list[Any]]
    choices: dict[str, Choice] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    shared: Running | None = None
    failed: dict[str, Exception] = field(default_factory=dict)
    suspects: list[str] = field(default_factory=list)
    unsound: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _lengths: Tensor | None = None
    _bounds: dict[bool, list[Row]] = field(default_factory=dict)
    _masks: dict[int, CallMask] = field(default_factory=dict)

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

    def cleared(self, request_id: str) -> None:
        """Ends the suspicion against a request."""
        self.suspects = [one for one in self.suspects if one != request_id]

    def forward(self, cu_q: Tensor, cu_k: Tensor, windowed: bool) -> list[Row]:
        """The rows of the forward at hand; lengths are read from the device once."""
        if self._lengths is not cu_q:
            self._lengths, self._bounds, self._masks = cu_q, {}, {}
        if windowed not in self._bounds:
            ends = pairwise(cu_q.tolist()), pairwise(cu_k.tolist())
            self._bounds[windowed] = [Row(*q, *k) for q, k in zip(*ends)]
        return self._bounds[windowed]

    def mask(self, number: int, row: Row) -> CallMask:
        """What the layers share of a row of a prompt: the tables of its keys."""
        if number not in self._masks:
            given = {"q_length": row.end - row.begin, "q_offset": row.start, "attention_mask": None}
            self._masks[number] = CallMask(self.attachment.dense, given)
        return self._masks[number]


BATCHING: ContextVar[Batching | None] = ContextVar("seerattn_batching", default=None)


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether an attention function was called by continuous batching."""
    return "cu_seq_lens_q" in kwargs and isinstance(kwargs.get("cache"), PagedAttentionCache)


def paged_attention(
    dense: Dense,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seer: LayerCall | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed forward.

    Args:
        dense: attention of one row by the implementation that ours replaced.
        module: the attention module.
        query: post-RoPE ``[1, H, T, D]``, the new tokens of all requests.
        key: the same of the keys ``[1, HKV, T, D]``.
        value: and of the values.
        seer: set where the layer was attached to.
        kwargs: what the architecture passes on, and what continuous batching does.

    Returns:
        ``[1, T, H, D]`` and None.

    Raises:
        ValueError: the manager was not made by ``model.init_continuous_batching``.
    """
    batching = BATCHING.get()
    if batching is None:
        raise ValueError(
            "continuous batching must begin with model.init_continuous_batching or model.generate_batch where gates "
            "or selectors are attached, got a manager that was made otherwise"
        )
    window = kwargs.get("sliding_window")
    key, value, cu_k = _update(module, key, value, kwargs, is_windowed=window is not None)
    rows = batching.forward(kwargs["cu_seq_lens_q"], cu_k, window is not None)
    own = {name: x for name, x in kwargs.items() if name not in _PACKED}
    states = batching.rows()
    out = []
    for number, row in enumerate(rows):
        if row.begin == row.end:
            continue
        q = query[:, :, row.begin : row.end]
        k, v = (x[:, :, row.k_begin : row.k_end] for x in (key, value))
        state = states[number].state
        if state.request_id not in batching.failed:
            try:
                parts = _attend(dense, batching, number, row, batching.request(state), seer, q, k, v, window, own)
            # Whatever a selector, a policy or a kernel raises is the fault of this request alone.
            except Exception as error:
                logger.error("attention of request %s failed", state.request_id, exc_info=error)
                batching.failed[state.request_id] = error.with_traceback(None)
        if state.request_id in batching.failed:
            parts = [q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])]
        out += parts
    return torch.cat(out, 1), None


def _attend(
    dense: Dense,
    batching: Batching,
    number: int,
    row: Row,
    request: Request,
    seer: LayerCall | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """Attention of one row, in parts ``[1, t, H, D]``: what is of the prompt, and what was written behind it."""
    tokens = row.end - row.begin
    told = 0  # tokens that ran sparse
    # A prompt of one token is decoded, as in `generate`.
    if seer is not None and request.prompt > 1 and (window is None or window >= request.prompt):
        told = min(tokens, max(0, request.prompt - row.start))
    out = []
    if told:
        short = row._replace(end=row.begin + told, k_end=row.k_end - (tokens - told))
        at = short.k_end - row.k_begin
        part = _sparse(batching, number, short, request, seer, q[:, :, :told], k[:, :, :at], v[:, :, :at], kwargs)
        if part is not None:
            out.append(part.transpose(1, 2))
            if told == tokens:
                return out
            q = q[:, :, told:]
    mask = _dense_mask(batching.attachment.dense, q, k, window)
    out.append(dense(q, k, v, mask, kwargs)[0])
    return out


def _update(
    module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any], *, is_windowed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys and values ``[1, HKV, S, D]`` of the requests once the new ones are in the cache, and where they end."""
    cache, states = kwargs["cache"], {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if EDITS_KEYWORDS:
        edited = dict(kwargs)
        key, value = cache.update(**states, kwargs=edited)
        return key, value, edited["cu_seq_lens_k"]
    key, value = cache.update(**states, read_index=kwargs["read_index"], write_index=kwargs["write_index"])
    ends = kwargs["cu_seq_lens_k"]
    if isinstance(ends, dict):
        ends = ends["sliding_attention" if is_windowed else "full_attention"]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], ends


def _sparse(
    batching: Batching,
    number: int,
    row: Row,
    request: Request,
    seer: LayerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Sparse attention ``[1, H, t, D]`` of the tokens of a prompt, or None where its request runs them dense."""
    state, running = seer.state, request.running
    selector = running.selectors.get(state.layer)
    if selector is None:
        return None
    if state.layer in running.gates:
        check_filled(running.gates[state.layer], state.layer)
    if running.impl == "auto" and _dense_is_faster(state, request, q):
        count_dense(request.meters, running, state, [(q.shape[2], row.k_end - row.k_begin)], q.device)
        return None
    call = seer.on(q.device).part(0, row.begin, row.end)
    logits = logits_of(q, kwargs)
    context = call.context(row=None, q_len=q.shape[2], k_len=k.shape[2], mask=batching.mask(number, row), **logits)
    blocks = _select(selector, request, state.layer, q, k, context)
    for meter in request.meters:
        meter.add(state.layer, state.heads, blocks)
    counting = {"layer": state.layer, "meters": request.meters}
    return attend_counted(q, k, v, blocks, impl=running.op_impl, **counting, **logits)


def _select(
    selector: Selector, request: Request, layer: int, q: Tensor, k: Tensor, context: AttentionContext
) -> BlockIndices:
    """Lists of a part of a prompt; what the selector keeps for its next part goes with the last one."""
    tokens, past = k.shape[2], k.shape[2] - q.shape[2]
    if tokens == request.prompt and not past:
        return selector.select(q, k, context)
    known, kept = request.kept.pop(layer, (0, None))
    memory = Memory(past, kept) if kept is not None and known == past else Memory()
    blocks = selector.select(q, k, replace(context, memory=memory))
    if tokens < request.prompt:
        request.kept[layer] = (tokens, memory.kept)
    return blocks


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


def _dense_is_faster(state: LayerState, request: Request, q: Tensor) -> bool:
    """Whether "auto" expects it of the whole prompt, however it is cut.

    Of a selector that tells no density only what choosing costs counts: a part of a prompt does not show that of all.
    """
    kind = request.running.kind(state.found)
    shape = LayerShape(1, *kind.sizes)
    return prefer_dense(
        q_len=request.prompt, k_len=request.prompt, device=q.device, shape=shape, density=kind.expected or 0.0
    )


def _dense_mask(dense: str, q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """The mask of one row for the implementation that ours replaced; None where it makes its own, or needs none."""
    t, s = q.shape[2], k.shape[2]
    hides = window is not None and s > window
    if not hides and (t == 1 or (dense == "sdpa" and t == s)):
        return None
    at = torch.arange(s, device=q.device)
    behind = at[s - t :, None] - at[None]
    seen = behind >= 0
    if hides:
        seen &= behind < window
    if dense == "sdpa":
        return seen[None, None]
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)[None, None]
