"""What MoA (arXiv 2406.14909) chooses from and by: elastic spans, and how much masking a block changes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.methods.head_rules import HeadRules

METHOD = "moa"
BLOCK = 64
# Keeps the influence finite where one key has all the attention; in fp32 what is left of 1 - A is noise below it.
_EPS = 1e-6
# Scores held at once, in elements; one query block of one KV group at least.
_STRIP_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class SpanRule:
    """An elastic span of ``alpha + beta * N`` tokens at a prompt of ``N`` (section 4.1).

    Attributes:
        alpha: tokens, may be negative.
        beta: share of the prompt.
    """

    alpha: float
    beta: float

    def band(self, length: int) -> int:
        """Blocks of the causal band at a prompt of ``length`` tokens, the diagonal included."""
        return max(1, int(self.alpha / BLOCK + self.beta * length / BLOCK))


def row_density(band: int, length: int) -> float:
    """Density as MoA counts it: blocks that the last row keeps, the sink block included, over those it could keep."""
    blocks = -(-length // BLOCK)
    return min(band + 1, blocks) / blocks


def area_density(band: int, length: int) -> float:
    """Density as it is counted everywhere else here: kept over causal blocks of all rows."""
    blocks = -(-length // BLOCK)
    return sum(min(band + 1, row) for row in range(1, blocks + 1)) / (blocks * (blocks + 1) // 2)


def rule_space(lengths: Sequence[int]) -> list[SpanRule]:
    """MoA's rules: linear grids of alpha and beta whose spans fit into the prompt.

    The grids are the published ones at 2k, 4k and 8k, alpha from -2048 to 8192 in steps of 1024 and beta in eighths;
    other lengths scale alpha.

    Args:
        lengths: of the profile, in tokens.
    """
    least, most = min(lengths), max(lengths)
    alphas = np.linspace(-least, most, (most + least) // (least // 2) + 1)
    return [
        SpanRule(float(alpha), float(beta))
        for alpha, beta in product(alphas, np.linspace(0, 1, 9))
        if alpha + beta * most <= most and alpha + beta * 2 * most <= 2 * most and alpha + beta * least > 0
    ]


def short_rules(lengths: Sequence[int]) -> list[SpanRule]:
    """Spans shorter than MoA's shortest, for densities that its rules cannot reach: a quarter of the causal area at 8k.

    Args:
        lengths: of the profile, in tokens.
    """
    alphas = [BLOCK]
    while 2 * alphas[-1] < min(lengths) // 2:
        alphas.append(2 * alphas[-1])
    return [SpanRule(float(alpha), beta) for alpha in alphas for beta in (0.0, 1 / 64, 1 / 32, 1 / 16)]


@torch.no_grad()
def block_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """How much the loss changes, to first order, where single attention values are masked out (section 4.2).

    With the attention ``A`` and ``G = dL/dA = dO V^T`` it is ``E_ij = -A_ij (G_ij - sum_k G_ik A_ik) / (1 - A_ij)``,
    and ``-A_00 G_00`` for the first token, which has nothing else to attend to. Computed in strips of query blocks.

    Args:
        q: post-RoPE queries ``[B, H, T, D]`` of whole sequences.
        k: keys ``[B, HKV, T, D]``.
        v: values ``[B, HKV, T, D]``.
        grad: gradient of the loss at the output of the attention, ``[B, H, T, D]``.
        scale: factor of q.k before the softmax.
        softcap: tanh soft cap of the logits, or None.
        sinks: ``[H]`` logits of one more key without a value, or None.

    Returns:
        Sums of ``|E|`` over blocks of 64 x 64, fp32 (fp64 for such inputs) ``[B, H, N, N]``.
    """
    batch, heads, tokens, _ = q.shape
    kv_heads, blocks = k.shape[1], -(-tokens // BLOCK)
    group, work = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    found = torch.zeros(batch, heads, blocks, blocks, dtype=work, device=q.device)
    budget = _STRIP_ELEMENTS["cpu" if q.device.type == "cpu" else "cuda"]
    step = max(1, budget // (group * BLOCK * blocks * BLOCK))
    for b in range(batch):
        for kv_head in range(kv_heads):
            ours = slice(kv_head * group, (kv_head + 1) * group)
            keys, values = k[b, kv_head].to(work).T, v[b, kv_head].to(work).T
            sink = None if sinks is None else sinks[ours].to(work)[:, None]
            for block in range(0, blocks, step):
                rows = slice(block * BLOCK, min((block + step) * BLOCK, tokens))
                p = _attention(q[b, ours, rows].to(work), keys[:, : rows.stop], rows.start, scale, softcap, sink)
                slope = grad[b, ours, rows].to(work) @ values[:, : rows.stop]
                # dO.O, without the rounding of an output in low precision: it cancels almost wholly against `slope`
                # where one key has nearly all attention.
                mean = (slope * p).sum(-1, keepdim=True)
                first = (slope[:, 0] * p[:, 0]).abs()
                change = slope.sub_(mean).mul_(p).div_(1 - p + _EPS).abs_()
                if rows.start == 0:
                    change[:, 0] = first
                missing = (0, -rows.stop % BLOCK, 0, -rows.stop % BLOCK)
                tiles = F.pad(change, missing).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
                found[b, ours, block : block + tiles.shape[1], : tiles.shape[3]] = tiles.sum((2, 4))
    return found


def _attention(q: Tensor, keys: Tensor, start: int, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
    """Attention ``[G, rows, keys]`` of the queries from position ``start`` on, up to the last one's own key."""
    scores = (q * scale) @ keys
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    future = torch.ones(scores.shape[1], keys.shape[1] - start, dtype=torch.bool, device=q.device).triu_(1)
    scores[..., start:].masked_fill_(future, -torch.inf)
    p = scores.softmax(-1)
    return p if sink is None else p * torch.sigmoid(scores.logsumexp(-1) - sink)[..., None]


def influence_by_distance(influence: Tensor) -> Tensor:
    """Sums over the diagonals of block maps, without the sink block, which every rule keeps.

    Args:
        influence: ``[..., N, N]`` by query and key block.

    Returns:
        ``[..., N]``: entry ``d`` is what all blocks ``d`` blocks before their query hold; a band of ``w`` blocks loses
        the entries from ``w`` on.
    """
    blocks = influence.shape[-1]
    place = torch.arange(blocks, device=influence.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (place > 0)
    sums = influence.new_zeros(*influence.shape[:-2], blocks)
    return sums.index_add_(-1, distance[seen], influence[..., seen])


@dataclass(frozen=True, eq=False)
class Profile:
    """What a profile found of a model.

    Attributes:
        lengths: tokens of its documents, ascending.
        layers: indices of the layers with full attention.
        influence: for each length fp64 ``[layers, H, N]``, see `influence_by_distance`.
        kv_heads: KV heads of a layer.
    """

    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    influence: tuple[np.ndarray, ...]
    kv_heads: int

    @classmethod
    def of(cls, plan: HeadRules) -> Profile:
        """The profile that a plan keeps.

        Raises:
            ValueError: the plan is of another method, or holds no whole profile.
        """
        if plan.method != METHOD:
            raise ValueError(f"plan must be one of {METHOD}, got one of {plan.method}")
        try:
            lengths = tuple(int(length) for length in plan.made["lengths"])
            layers = tuple(layer for layer, heads in enumerate(plan.rules) if heads)
            influence = tuple(
                np.array([[rule["influence"][i] for rule in plan.rules[layer]] for layer in layers], dtype=np.float64)
                for i in range(len(lengths))
            )
            if not lengths or list(lengths) != sorted(set(lengths)):
                raise ValueError(f"lengths {lengths}")
            for length, found in zip(lengths, influence):
                if found.ndim != 3 or found.shape[-1] != length // BLOCK or not (found >= 0).all():
                    raise ValueError(f"influence at {length} tokens of shape {found.shape}")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"plan must hold a whole profile, got one with a wrong {error}; make it again") from error
        return cls(lengths, layers, influence, plan.model["kv_heads"])

    @property
    def unit_layers(self) -> np.ndarray:
        """Layer of each unit, counted among those with full attention."""
        return np.repeat(np.arange(len(self.layers)), self.kv_heads)

    def losses(self, rules: Sequence[SpanRule]) -> list[np.ndarray]:
        """For each length ``[units, rules]``: influence of all that a rule masks out, as a share of what the narrowest
        bands would mask out; of a group that head counts that loses most."""
        found = []
        for length, influence in zip(self.lengths, self.influence):
            beyond = np.cumsum(influence[..., ::-1], -1)[..., ::-1]
            beyond = np.concatenate((beyond, np.zeros_like(beyond[..., :1])), -1)
            lost = beyond[..., [min(rule.band(length), length // BLOCK) for rule in rules]]
            lost = lost.reshape(len(self.layers) * self.kv_heads, -1, len(rules)).max(1)
            found.append(lost / (lost.max(1).sum() or 1.0))
        return found

    def spans(self, choice: np.ndarray, rules: Sequence[SpanRule]) -> dict[int, tuple[SpanRule, ...]]:
        """The rules of each layer's KV heads."""
        by_layer = choice.reshape(len(self.layers), self.kv_heads)
        return {layer: tuple(rules[r] for r in row) for layer, row in zip(self.layers, by_layer)}
