"""Tokens of answers in continuous batching, over the blocks that a decode policy chooses for them.

Rows of a forward for which the same gates choose by the same policy are chosen for in one launch, and attended to in
another one, each over the pages of its own request. What they need beside their queries are their gate keys, which lie
request by request: a table of their addresses is made anew when a block is finished, or when other requests come.
Rows of any other selector, of a policy that the kernel has not, and all on a CPU, go one by one with their keys
gathered. So do rows that failed together, of which only the one at fault then fails.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seerattn.gate_decode import GateDecoder
from seerattn.gate_memory import known_keys
from seerattn.hf.call import LayerCall, logits_of
from seerattn.hf.decode import attend_to, count_all, decode_impl
from seerattn.hf.dense_steps import is_dense
from seerattn.hf.pages import Pages, Row, Together
from seerattn.hf.requests import Batching, Request
from seerattn.hf.rotary import token_queries
from seerattn.hf.state import check_filled
from seerattn.ops.decode_select import KeyTable
from seerattn.selection.decode_selector import tells_all
from seerattn.selection.selector import AttentionContext, Kept, Memory, RotaryTables

logger = logging.getLogger(__name__)


def decode_together(
    batching: Batching,
    pages: Pages,
    done: Sequence[int],
    seer: LayerCall | None,
    query: Tensor,
    kwargs: dict[str, Any],
) -> list[tuple[Together, Tensor]]:
    """Attention of the rows of a forward that one launch can choose for, in groups that share what chooses.

    Args:
        batching: of the manager.
        pages: keys and values of the layer.
        done: rows that attended to all of their keys already, of which those are counted that might have chosen.
        seer: set where the layer was attached to.
        query: of all rows ``[1, H, T, D]``.
        kwargs: what the architecture passes on.

    Returns:
        Rows and their attention ``[m, H, D]``, by group. Other rows are left to `decode_alone`.
    """
    if seer is not None:
        _count_done(batching, pages, done, seer, query.device)
    if seer is None or (seer.state.rotation is not None and seer.position_embeddings is None):
        return []
    found = []
    for requests in _groups(batching, pages, done, seer, query.device):
        try:
            found.append(_attend(batching, pages, seer.on(query.device), requests, query, kwargs))
        # Whosever fault it is: nothing was kept or counted yet, and alone only the one at fault fails.
        except Exception as error:
            logger.warning("%d rows failed together, each is decoded alone", len(requests), exc_info=error)
    return found


def _count_done(batching: Batching, pages: Pages, done: Sequence[int], seer: LayerCall, device: torch.device) -> None:
    """Counts all blocks of rows that "auto" decoded dense though something would choose."""
    rows, futures = pages.layout.rows, batching.rows()
    for number in done:
        request = batching.requests[futures[number].state.request_id]
        if request.running.decoders.get(seer.state.layer) is not None:
            count_all(request.meters, request.running, seer.state, rows[number].k_end, device)


def _groups(
    batching: Batching, pages: Pages, done: Sequence[int], seer: LayerCall, device: torch.device
) -> list[dict[int, Request]]:
    """Requests by the numbers of their rows, together where the same decoder chooses and the same kernel attends."""
    groups: dict[tuple[int, str], dict[int, Request]] = {}
    for number, (row, future) in enumerate(zip(pages.layout.rows, batching.rows())):
        request = batching.requests.get(future.state.request_id)
        if number in done or request is None or future.state.request_id in batching.failed or not request.writes(row):
            continue
        running = request.running
        decoder = running.decoders.get(seer.state.layer)
        if isinstance(decoder, GateDecoder) and not (running.impl == "auto" and tells_all(decoder, row.k_end)):
            groups.setdefault((id(decoder), running.op_impl), {})[number] = request
    served = (_served(pages, seer.state.layer, requests, device) for requests in groups.values())
    return [requests for requests in served if requests]


def _served(pages: Pages, layer: int, requests: dict[int, Request], device: torch.device) -> dict[int, Request]:
    """Those that the kernel can choose for; a text that is too long for it is no reason to leave out the others."""
    decoder, rows = next(iter(requests.values())).running.decoders[layer], pages.layout.rows
    try:
        if decoder.serves_many(device, max(rows[number].k_end for number in requests)):
            return requests
        return {number: one for number, one in requests.items() if decoder.serves_many(device, rows[number].k_end)}
    except ValueError:  # of an impl that was named, which tells each row alone why it cannot run
        return {}


@torch.no_grad()
def _attend(
    batching: Batching,
    pages: Pages,
    seer: LayerCall,
    requests: dict[int, Request],
    query: Tensor,
    kwargs: dict[str, Any],
) -> tuple[Together, Tensor]:
    """One choice and one attention for the rows of some requests; what is kept and counted is so at the end."""
    state, running = seer.state, next(iter(requests.values())).running
    if state.layer in running.gates:
        check_filled(running.gates[state.layer], state.layer)
    decoder, rows, logits = running.decoders[state.layer], pages.layout.together([*requests]), logits_of(query, kwargs)
    q = rows.of(query, 2)
    kept = _kept(batching, pages, seer, decoder, requests, q, logits)
    table = _table(batching, state.layer, decoder, kept, q.device)
    blocks = decoder.select_many(*_queries(seer, rows, q), table, rows.lengths, tokens=rows.longest)
    out = pages.read(rows, q, blocks, decode_impl(running), logits)
    for (number, request), one, counts in zip(requests.items(), kept, blocks.counts.split(1)):
        tokens = pages.layout.rows[number].k_end
        request.kept[state.layer] = (tokens, one)
        for meter in request.meters:
            meter.decode.add(state.layer, state.heads, counts, tokens, blocks.block_k)
    return rows, out


def _kept(
    batching: Batching,
    pages: Pages,
    seer: LayerCall,
    decoder: GateDecoder,
    requests: dict[int, Request],
    q: Tensor,
    logits: dict[str, Any],
) -> list[Kept | None]:
    """What is kept of each request, with gate keys of all of its finished blocks; most steps finish none."""
    layer, rows = seer.state.layer, pages.layout.rows
    kept = [_valid(request, layer, rows[number].start) for number, request in requests.items()]
    for place, (number, keys) in enumerate(zip(requests, known_keys(kept, decoder.gate))):
        row = rows[number]
        if decoder.finished_windows(row.k_end) > (0 if keys is None else keys.shape[2]):
            k, memory = pages.row(number)[0], Memory(row.start, kept[place])
            context = row_context(batching, number, row, seer, q[:, :, place : place + 1], k, logits)
            decoder.keep_keys(k, replace(context, memory=memory))
            kept[place] = memory.kept
    return kept


def _table(
    batching: Batching, layer: int, decoder: GateDecoder, kept: Sequence[Kept | None], device: torch.device
) -> KeyTable:
    """Where the gate keys are; that of the last forward as long as they are the same tensors."""
    gate, name = decoder.gate, (layer, id(decoder))
    keys, found = known_keys(kept, gate), batching.tables.get(name)
    if found is None or not found.is_of(keys):
        found = KeyTable.of(keys, heads=gate.k_weight.shape[0], dim=gate.gate_dim, device=device)
        batching.tables[name] = found
    return found


def _queries(seer: LayerCall, rows: Together, q: Tensor) -> tuple[Tensor, RotaryTables]:
    """Queries ``[m, H, D]`` and how they were rotated, each by the tables of its own position that the model made."""
    tables = tuple(rows.of(x, 1).transpose(0, 1) for x in seer.position_embeddings or ())
    return token_queries(seer.state.rotation, q.transpose(0, 2), tables)


def decode_alone(
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
    """Attention ``[1, 1, H, D]`` of a decoded token over the blocks that are chosen for it; None where it is dense."""
    state, running, tokens = seer.state, request.running, k.shape[2]
    decoder = running.decoders.get(state.layer)
    if decoder is None:
        return None
    if running.impl == "auto" and is_dense(decoder, [tokens], state.found, q.device):
        count_all(request.meters, running, state, tokens, q.device)
        return None
    if state.layer in running.gates:
        check_filled(running.gates[state.layer], state.layer)
    logits = logits_of(q, kwargs)
    context = row_context(batching, number, row, seer, q, k, logits)
    memory = recall(request, state.layer, tokens - 1)
    blocks = decoder.select_token(q, k, replace(context, memory=memory))
    request.kept[state.layer] = (tokens, memory.kept)
    for meter in request.meters:
        meter.decode.add(state.layer, state.heads, blocks.counts, tokens, blocks.block_k)
    return attend_to(q, k, v, blocks, running, logits)


def row_context(
    batching: Batching, number: int, row: Row, seer: LayerCall, q: Tensor, k: Tensor, logits: dict[str, Any]
) -> AttentionContext:
    """What a selector may know of a row."""
    call = seer.on(q.device).part(0, row.begin, row.end)
    return call.context(row=None, q_len=q.shape[2], k_len=k.shape[2], mask=batching.mask(number, row), **logits)


def recall(request: Request, layer: int, past: int) -> Memory:
    """What a selector kept of the first ``past`` tokens; nothing where they came otherwise."""
    kept = _valid(request, layer, past)
    request.kept.pop(layer, None)
    return Memory() if kept is None else Memory(past, kept)


def _valid(request: Request, layer: int, past: int) -> Kept | None:
    known, kept = request.kept.get(layer, (0, None))
    return kept if known == past else None
