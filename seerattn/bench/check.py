"""Oracles in fp64 that every variant must match, on a small prompt, before it is timed.

An error is a largest absolute difference. Its bound is twice the error that plain PyTorch in the same dtype makes, and
one rounding of the largest value to that dtype.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.bench.inputs import Shape, random_blocks, random_lists, random_qkv, uneven_qkv
from seerattn.gate.attn_gate import AttnGate
from seerattn.selection.block_indices import BlockIndices, forced_block_mask
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.map_form import PUBLISHED, MapForm
from seerattn.selection.policies import TopK

TOKENS = 1000  # whole blocks of no size
GATE_TOKENS = 1024
BLOCK = 64


def check_attention(
    attend: Callable[[Tensor, Tensor, Tensor, BlockIndices], Tensor],
    shape: Shape,
    device: torch.device,
    *,
    block_q: int,
    block_k: int,
    mask_heads: int,
    tokens: int = TOKENS,
) -> tuple[float, float]:
    """Error and bound of a block-sparse attention at density 0.3.

    Args:
        attend: gets q, k, v and blocks.
        shape: heads and dtype of the inputs.
        device: where it runs.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        mask_heads: heads with lists of their own.
        tokens: length of the prompt.
    """
    q, k, v = random_qkv(shape, tokens, device, seed=1)
    sizes = {"tokens": tokens, "block_q": block_q, "block_k": block_k, "mask_heads": mask_heads}
    blocks, mask = blocks_and_mask(shape, device, **sizes)
    return _compare(attend(q, k, v, blocks), q, k, v, mask)


def check_skipping(
    attend: Callable[[Tensor, Tensor, Tensor, BlockIndices], tuple[Tensor, Tensor]],
    shape: Shape,
    device: torch.device,
    *,
    block_q: int,
    block_k: int,
    mask_heads: int,
    threshold: float,
    tokens: int = TOKENS,
) -> tuple[float, float]:
    """Error and bound of a block-sparse attention that skips by the running maximum, on uneven inputs.

    More blocks that it computed than the rule says in fp64, or fewer, count as an infinite error, and so does a rule
    that skips nothing here. A block within 1e-3 of the threshold may go either way.

    Args:
        attend: gets q, k, v and blocks, and returns the output and the number of blocks that it computed in full.
        shape: heads and dtype of the inputs.
        device: where it runs.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        mask_heads: heads with lists of their own.
        threshold: of the rule.
        tokens: length of the prompt.
    """
    q, k, v = uneven_qkv(shape, tokens, device, seed=1)
    sizes = {"tokens": tokens, "block_q": block_q, "block_k": block_k}
    blocks = random_blocks(mask_heads=mask_heads, density=0.8, device=device, seed=1, **sizes)
    out, counts = attend(q, k, v, replace(blocks, skip_threshold=threshold))
    listed = blocks.to_mask().repeat_interleave(shape.heads // mask_heads, 1)
    seen = listed.repeat_interleave(block_q, 2)[:, :, :tokens].repeat_interleave(block_k, 3)[..., :tokens].tril()
    scores = q.double() @ k.double().repeat_interleave(shape.heads // shape.kv_heads, 1).mT * shape.head_dim**-0.5
    scores = F.pad(scores.masked_fill(~seen, -torch.inf), (0, -tokens % block_k), value=-torch.inf)
    largest = scores.unflatten(3, (-1, block_k)).amax(4)
    excess = (largest - largest.cummax(3).values).nan_to_num(-torch.inf, neginf=-torch.inf)
    excess = F.pad(excess, (0, 0, 0, -tokens % block_q), value=-torch.inf).unflatten(2, (-1, block_q)).amax(3)
    geometry = (0, tokens, blocks.num_q_blocks, blocks.num_k_blocks, block_q, block_k)
    forced = forced_block_mask(*geometry, sink_blocks=0).to(device) | (listed & (listed.cumsum(3) == 1))
    kept = listed & (forced | (excess >= math.log(threshold)))
    unsure = (listed & ~forced & ((excess - math.log(threshold)).abs() < 1e-3)).sum(3)
    if ((counts - kept.sum(3)).abs() > unsure).any() or not (listed & ~kept).any():
        return torch.inf, 0.0
    mask = kept.repeat_interleave(block_q, 2)[:, :, :tokens].repeat_interleave(block_k, 3)[..., :tokens].tril()
    error, bound = _compare(out, q, k, v, mask)
    return error, bound + 2 * block_k * threshold * float(unsure.max()) * float(v.abs().max())


def blocks_and_mask(
    shape: Shape, device: torch.device, *, tokens: int, block_q: int, block_k: int, mask_heads: int
) -> tuple[BlockIndices, Tensor]:
    """Random blocks at density 0.3, and which keys each query sees, bool ``[1, H, T, T]``."""
    sizes = {"tokens": tokens, "block_q": block_q, "block_k": block_k}
    blocks = random_blocks(mask_heads=mask_heads, density=0.3, device=device, seed=1, **sizes)
    mask = blocks.to_mask().repeat_interleave(shape.heads // mask_heads, 1)
    mask = mask.repeat_interleave(block_q, 2)[:, :, :tokens].repeat_interleave(block_k, 3)[..., :tokens]
    return blocks, mask.tril()


def check_dense(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: Shape, device: torch.device, *, tokens: int = TOKENS
) -> tuple[float, float]:
    """Error and bound of a dense causal attention."""
    q, k, v = random_qkv(shape, tokens, device, seed=1)
    return _compare(attend(q, k, v), q, k, v, torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril())


def check_attention_map(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    shape: Shape,
    device: torch.device,
    *,
    form: MapForm = PUBLISHED,
    tokens: int = TOKENS,
) -> tuple[float, float]:
    """Error over bound, and 1: the worse one of an attention's output and map, in 64 x 64 blocks."""
    q, k, v = random_qkv(shape, tokens, device, seed=1)
    out, found = attend(q, k, v)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    error, bound = _compare(out, q, k, v, causal)
    exact, eager = (_map(_probabilities(*x, causal), form) for x in ((q.double(), k.double()), (q, k)))
    map_error, map_bound = float((found - exact).abs().max()), _bound(eager.to(q.dtype), exact)
    return max(error / bound, map_error / map_bound), 1.0


def check_selection(
    select: Callable[[Tensor, Tensor], BlockIndices],
    gate: AttnGate,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    *,
    density: float,
) -> tuple[float, float]:
    """Error and bound of gate and top-k: by how much a block that was left out outscores one that was kept.

    Scores are those of `gate_scores`. Blocks that are equal up to the rounding of q and k and of fp32 sums may be
    exchanged. A row with more or fewer blocks than top-k keeps counts as an infinite error.

    Args:
        select: gets q and k after RoPE, of `GATE_TOKENS` tokens.
        gate: the gate that it uses.
        shape: heads and dtype.
        tables: the model's (cos, sin) of the positions, ``[1, T, D]``.
        density: that it selects.
    """
    q, k, _ = random_qkv(shape, GATE_TOKENS, tables[0].device, seed=1, drift=1.0)
    blocks = select(q, k)
    exact = gate_scores(gate, *(_unrotated(x, *tables) for x in (q, k)))
    c = gate.config
    sizes = {"q_start": 0, "q_len": GATE_TOKENS, "block_q": c.block_q, "block_k": c.block_k}
    wanted = TopK(density=density).select(exact.float(), forced_scored=not c.exclude_forced, **sizes)
    if not torch.equal(blocks.counts, wanted.counts):
        return torch.inf, 0.0
    kept = blocks.to_mask()
    geometry = (0, GATE_TOKENS, *exact.shape[2:], c.block_q, c.block_k)
    forced = forced_block_mask(*geometry)[0].to(exact.device)
    if bool((forced & ~kept).any()):
        return torch.inf, 0.0
    return _outscored(exact, kept, kept & ~forced, shape.dtype)


def check_token_choice(
    select: Callable[[Tensor, Tensor], DecodeBlocks],
    gate: AttnGate,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    *,
    density: float,
) -> tuple[float, float]:
    """Error and bound of the choice for the first token behind `GATE_TOKENS` others, as those of `check_selection`.

    Args:
        select: gets the query ``[1, H, 1, D]`` of the token and all keys after RoPE.
        gate: the gate that it uses.
        shape: heads and dtype.
        tables: the model's (cos, sin) of the positions, ``[1, T, D]``.
        density: that it selects, with the first block forced.
    """
    q, k, _ = random_qkv(shape, GATE_TOKENS + 1, tables[0].device, seed=1, drift=1.0)
    blocks = select(q[:, :, -1:], k)
    c, (q, k) = gate.config, (_unrotated(x, *tables) for x in (q, k))
    # A prompt whose next window of queries is the token, again and again, for a gate whose query blocks are windows.
    size, number = c.block_q // c.query_subblocks, GATE_TOKENS // c.block_k
    token = q[:, :, -1:].expand(-1, -1, size, -1)
    pad = k.new_zeros(1, 1, c.block_k, 1)
    queries = torch.cat((q[:, :, :-1], token, (q[:, :, :1] * pad)[:, :, : c.block_k - size]), 2)
    windows = copy.copy(gate)
    windows.config = SimpleNamespace(**vars(c) | {"block_q": size, "query_subblocks": 1, "normalize_subblocks": False})
    exact = gate_scores(windows, queries, torch.cat((k[:, :, :-1], k[:, :, :1] * pad), 2))
    exact = exact[0, :, GATE_TOKENS // size, :number]
    exact = exact[:, int(c.exclude_forced) :].log_softmax(-1)
    exact = exact.unflatten(0, (shape.kv_heads, -1)).amax(1)[:, 1 - int(c.exclude_forced) :]
    wanted = max(2, math.ceil(density * (number + 1)))
    kept = torch.zeros(shape.kv_heads, number + 2, dtype=torch.bool, device=exact.device)
    kept.scatter_(1, blocks.indices[0].long().masked_fill(blocks.indices[0] < 0, number + 1), True)
    if bool((blocks.counts != wanted).any()) or not bool((kept[:, 0] & kept[:, number]).all()):
        return torch.inf, 0.0
    kept = kept[:, 1:number]
    return _outscored(exact, kept, kept, shape.dtype)


def _outscored(exact: Tensor, kept: Tensor, rivals: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """By how much a block that is not among the ``kept`` outscores one of the ``rivals``, and the bound for it."""
    gap = exact.masked_fill(kept, -torch.inf).amax(-1) - exact.masked_fill(~rivals, torch.inf).amin(-1)
    size = float(exact[exact.isfinite()].abs().max())
    return float(gap.clamp(min=0.0).max()), (torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * size


def check_decoding(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, DecodeBlocks | None], Tensor],
    shape: Shape,
    device: torch.device,
    *,
    block_k: int | None,
    tokens: int = TOKENS,
) -> tuple[float, float]:
    """Error and bound of attention of one token over three tenths of the blocks, or over all keys.

    Args:
        attend: gets q ``[1, H, D]``, k, v, lengths and blocks, and returns ``[1, H, D]``.
        shape: heads and dtype of the inputs.
        device: where it runs.
        block_k: key block size in tokens; None for all keys.
        tokens: keys.
    """
    q, k, v = random_qkv(shape, tokens, device, seed=1)
    lengths = torch.full((1,), tokens, dtype=torch.int32, device=device)
    blocks, mask = None, torch.ones(1, shape.heads, 1, tokens, dtype=torch.bool, device=device)
    if block_k is not None:
        blocks = random_lists(shape, lengths, tokens, block_k=block_k, density=0.3, seed=1)
        places = torch.arange(tokens, device=device) // block_k
        listed = (blocks.indices[0, :, :, None] == places).any(1)
        mask = listed.repeat_interleave(shape.heads // shape.kv_heads, 0)[None, :, None]
    found = attend(q[:, :, -1], k, v, lengths, blocks)
    return _compare(found[:, :, None], q[:, :, -1:], k, v, mask)


def gate_scores(gate: AttnGate, q: Tensor, k: Tensor) -> Tensor:
    """Block scores in fp64, written down once more from the formulas (arXiv 2410.13276, section 3).

    Args:
        gate: its weights and form; without distance bias and norms.
        q: fp64 queries before RoPE ``[1, H, T, D]``, whole blocks from position 0 on.
        k: fp64 keys before RoPE ``[1, HKV, T, D]``.
    """
    c = gate.config
    if c.qk_norm or c.distance_bias:
        raise ValueError("the gate's oracle must have a gate without norms and distance bias")
    q_size, k_size = c.block_q // c.query_subblocks, c.block_k // c.key_subblocks

    def pooled(x: Tensor, size: int, kinds: tuple[str, ...], salience: Tensor | None) -> list[Tensor]:
        windows = x[0].unflatten(1, (-1, size))
        of = {
            "avg": lambda: windows.mean(2),
            "max": lambda: windows.amax(2),
            "min": lambda: windows.amin(2),
            "salient": lambda: (windows * (windows @ salience.double()[:, None, :, None]).softmax(2)).sum(2),
        }
        return [of[kind]() for kind in kinds]

    def placed(x: Tensor, size: int) -> Tensor:
        if gate.inv_freq is None:
            return x
        positions = torch.arange(x.shape[1], device=x.device) * size
        angle = positions[:, None].double() * gate.inv_freq.double()
        turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    queries = torch.cat(pooled(q, q_size, c.q_pooling, gate.q_salience), -1)
    if c.share == "kv_group":
        queries = torch.stack([torch.cat(list(members), -1) for members in queries.split(gate.group)])
    if gate.q_weight is not None:
        queries = queries @ gate.q_weight.double()
    keys = torch.cat(pooled(k, k_size, c.k_pooling, gate.k_salience), -1)
    heads = torch.arange(gate.mask_heads, device=q.device)
    kv = heads if c.share == "kv_group" else heads // gate.group
    own = heads if gate.k_weight.shape[0] == gate.num_heads else kv
    keys = keys[kv] @ gate.k_weight.double()[own]
    scores = placed(queries, q_size) @ placed(keys, k_size).transpose(1, 2) / gate.gate_dim**0.5
    last = torch.arange(scores.shape[1], device=q.device) * q_size + q_size - 1
    ahead = torch.arange(scores.shape[2], device=q.device) * k_size > last[:, None]
    scores = scores.masked_fill(ahead, -torch.inf)
    if c.normalize_subblocks:
        scores = scores.log_softmax(-1)
    pieces = scores.unflatten(2, (-1, c.key_subblocks))
    scores = pieces.amax(3) if c.target_keys == "max" else pieces.exp().sum(3).log()
    pieces, power = scores.unflatten(1, (-1, c.query_subblocks)), c.target_power
    scores = pieces.amax(2) if power is None else (power * pieces).exp().mean(2).log() / power
    return scores[None]


def _unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [1, h, T, D]`` before a rotation of its halves by the tables, in fp64."""
    cos, sin = (table.double()[:, None, : x.shape[2], : x.shape[3] // 2] for table in (cos, sin))
    first, second = x.double().chunk(2, -1)
    norm = cos**2 + sin**2
    return torch.cat(((first * cos + second * sin) / norm, (second * cos - first * sin) / norm), -1)


def _compare(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[float, float]:
    group = q.shape[1] // k.shape[1]
    values = v.repeat_interleave(group, 1)
    exact = _probabilities(q.double(), k.double(), mask) @ values.double()
    eager = _probabilities(q, k, mask).to(q.dtype) @ values
    return float((out.double() - exact).abs().max()), _bound(eager, exact)


def _bound(eager: Tensor, exact: Tensor) -> float:
    own = float((eager.double() - exact).abs().max())
    return 2 * own + torch.finfo(eager.dtype).eps / 2 * float(exact.abs().max())


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Softmax rows ``[1, H, T, T]``, in fp32 or better."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def _map(p: Tensor, form: MapForm) -> Tensor:
    """What rows give to key blocks, averaged as the form says over query blocks, rows divided by their sum."""
    pad = -p.shape[-1] % BLOCK
    tiles = F.pad(p, (0, pad, 0, pad)).unflatten(-1, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    # An order of a norm may be infinite.
    tiles = torch.linalg.vector_norm(tiles.amax(5) if form.keys == "max" else tiles.sum(5), form.power, dim=3)
    return tiles / tiles.sum(-1, keepdim=True)
