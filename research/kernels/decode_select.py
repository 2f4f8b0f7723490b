"""Choosing the blocks of one token: the kernel of one launch beside the torch modules; a part of decode.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seerattn.bench.inputs import Shape
from seerattn.bench.model import gate_form, random_gate
from seerattn.bench.session import CheckFailed, Session
from seerattn.bench.timing import device_time, graph_time
from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_decode import token_rule
from seerattn.ops.decode_select import select_blocks
from seerattn.results.record import Result
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks, group_scores, most_blocks
from seerattn.selection.policies import TopK

FORMS = ("default", "default-group", "paper-group")
DENSITY = 0.1
POLICY = TopK(density=DENSITY)


def by_modules(gate: AttnGate, gate_q: Tensor, gate_k: Tensor, tokens: int) -> tuple[Tensor, DecodeBlocks]:
    """Scores ``[B, HKV, N]`` and lists of the torch modules, in the precision of the vectors."""
    position = torch.arange(tokens - 1, tokens, device=gate_q.device)
    scores = gate.token_scores(gate_q[:, :, None], gate_k, position)
    unscored = POLICY.sink_blocks if gate.config.exclude_forced else 0
    scores = group_scores(scores, gate.num_kv_heads, unscored=unscored)[:, :, 0]
    options = {"tokens": tokens, "block_k": gate.config.block_k, "forced_scored": not gate.config.exclude_forced}
    return scores, choose_blocks(scores, POLICY, **options)


def regret(blocks: DecodeBlocks, scores: Tensor) -> float:
    """By how much a block that was left out outscores the lowest one that was kept, of those that are not forced."""
    number = scores.shape[2]
    kept = torch.zeros(*scores.shape[:2], number + 2, dtype=torch.bool, device=scores.device)
    kept.scatter_(-1, blocks.indices.long().masked_fill(blocks.indices < 0, number + 1), True)
    rivals = kept[..., POLICY.sink_blocks : number]
    scores = scores[..., POLICY.sink_blocks :]
    least = scores.masked_fill(~rivals, torch.inf).amin(-1)
    return float((scores.masked_fill(rivals, -torch.inf).amax(-1) - least).clamp(min=0).max())


def check_lists(gate: AttnGate, gate_q: Tensor, gate_k: Tensor, tokens: int, found: DecodeBlocks) -> None:
    """Holds lists to fp64 scores: no block that was left out is better by more than twice what fp32 modules err by.

    Raises:
        CheckFailed: one is, or lists are of other lengths.
    """
    exact, _ = by_modules(gate, gate_q.double(), gate_k.double(), tokens)
    scores, expected = by_modules(gate, gate_q, gate_k, tokens)
    scored = exact.isfinite()
    bound = 4 * float((scores - exact)[scored].abs().max()) + 2 * torch.finfo(torch.float32).eps * float(
        exact[scored].abs().max()
    )
    if not torch.equal(found.counts, expected.counts):
        raise CheckFailed("lists must be as long as those of the modules")
    # Each block once, in order, the first and the last among them.
    entries = found.indices.masked_fill(found.indices < 0, exact.shape[2] + 1)
    last = found.indices.gather(-1, found.counts[..., None].long() - 1)
    if not bool((entries.diff(dim=-1) > 0).all() and (entries[..., 0] == 0).all() and (last == exact.shape[2]).all()):
        raise CheckFailed("lists must ascend from the first block to that of the token")
    if (error := regret(found, exact)) > bound:
        raise CheckFailed(f"blocks must be the best ones, got one that was left out and is better by {error:.1e}")


def measure_select(
    session: Session,
    shape: Shape,
    batches: list[int],
    lengths: list[int],
) -> list[Result | None]:
    """Scores and choice of one token, by the kernel and by the modules: in a CUDA graph, and launched one by one."""
    return [
        _measured(session, shape, form, batch, tokens, impl, clock)
        for form in FORMS
        for tokens in lengths
        for batch in batches
        for impl in ("triton", "reference")
        for clock in ("graph", "device")
    ]


def _measured(
    session: Session,
    shape: Shape,
    form: str,
    batch: int,
    tokens: int,
    impl: str,
    clock: str,
) -> Result | None:
    device = session.device

    def run() -> dict[str, Any]:
        gate = random_gate(gate_form(form), shape, device)
        blocks = (tokens - 1) // gate.config.block_k
        generator = torch.Generator(device).manual_seed(batch)
        width = gate.gate_dim
        key_heads = gate.k_weight.shape[0]
        gate_q = torch.randn(batch, gate.mask_heads, width, device=device, generator=generator)
        windows = blocks * gate.config.key_subblocks
        gate_k = torch.randn(batch, key_heads, windows, width, device=device, generator=generator)
        rule = token_rule(gate, POLICY)
        sizes = {"kv_heads": gate.num_kv_heads, "tokens": tokens}
        sizes["width"] = most_blocks(POLICY, blocks + 1, gate.config.block_k)

        def call() -> DecodeBlocks:
            if impl == "triton":
                return select_blocks(gate_q, gate_k, rule, **sizes)
            return by_modules(gate, gate_q, gate_k, tokens)[1]

        check_lists(gate, gate_q, gate_k, tokens, call())
        timing = graph_time([call] * 8, device) if clock == "graph" else device_time(call, device)
        return timing.fields() | {"realised_density": float(call().counts.float().mean()) / (blocks + 1)}

    cell = {"form": form, "batch": batch, "clock": clock, "dtype": "fp32"}
    about = {"method": "gate", "kind": "learned", "name": form, "density": DENSITY, "seed": 0}
    blank = session.blank("decode_select_ms", model=str(shape), context=tokens, impl=impl, cell=cell, **about)
    return session.measured(blank, run, label=f"{batch:>3} x {tokens:>7,}, choice by {form}, {impl}, {clock}")


def lines(rows: list[Result]) -> list[str]:
    """A line for each time of choosing."""
    rows = [row for row in rows if row.what == "decode_select_ms" and row.value]
    head = [f"\n{'batch x tokens':>17} {'choice of blocks':<46} {'us':>9}"] if rows else []
    return head + [
        f"{row.cell['batch']:>5} x {row.context:>9,} {row.cell['form']} {row.cell['impl']} {row.cell['clock']:<20} "
        f"{1e3 * row.value:9.1f}"
        for row in rows
    ]
