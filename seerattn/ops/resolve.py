"""Which implementation runs: the one place that knows what `impl="auto"` means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

KNOWN_IMPLS: dict[str, tuple[str, ...]] = {
    "block_sparse_attention": ("reference",),
    "pooled_attention": ("reference",),
}


def resolve(op: str, impl: str) -> str:
    """Turns ``impl`` into the name of an implementation of ``op``.

    Raises:
        ValueError: an explicit ``impl`` that does not exist; nothing is substituted for it.
    """
    known = KNOWN_IMPLS[op]
    if impl == "auto":
        return known[0]
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(('auto',) + known)} for {op}, got {impl!r}")
    return impl


@dataclass(frozen=True)
class SparseCost:
    """Cost of gate + selection + sparse attention in units of dense attention, for one kind of device.

    Attributes:
        per_density: cost of a listed block against the same block in dense attention.
        per_key: fixed cost (pooling, scoring, choosing) for every key, in dense (query, key) pairs.
    """

    per_density: float
    per_key: float


# CPU: AVX-512 Xeon, one thread, CPU time in ms, default gate, H 8, HKV 2, D 64, fp32, 64 x 64 blocks; dense first:
#   T  512:   5    density .42:  11
#   T 1024:  14    density .23:  20   .43:  24
#   T 2048:  47    density .12:  43   .28:  55   .38:  63   .52:  75
#   T 4096: 164    density .09:  78   .31: 146   .41: 152   .50: 189   .61: 219
# and with two threads, wall time: T 16384: 1270, density .10: 365.
# CUDA: one H100, the reference model's whole prefill of 8 x 8192 tokens, several runs sharing the card: dense 2.4 s,
# density .1 4.9 s, .5 9.2 s. Gathers in plain torch do not pay where dense attention has a fused kernel.
COSTS = {"cpu": SparseCost(per_density=1.6, per_key=700.0), "cuda": SparseCost(per_density=0.0, per_key=math.inf)}


def prefer_dense(*, q_len: int, k_len: int, density: float, device: torch.device | str) -> bool:
    """Whether plain dense attention is expected to be faster than gate + selection + sparse attention.

    Args:
        q_len: query tokens ``T`` of the call, the last of its keys.
        k_len: key tokens ``S``.
        density: expected share of the causal block area that would be computed.
        device: where the call runs. A device that was not measured never prefers dense.
    """
    cost = COSTS.get(torch.device(device).type)
    if cost is None:
        return False
    pairs = q_len * (k_len - q_len) + q_len * (q_len + 1) / 2
    return cost.per_density * density + cost.per_key * k_len / pairs > 1
