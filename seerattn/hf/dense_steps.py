"""Whether ``impl="auto"`` decodes a token dense: where all blocks would be read, or dense attention is faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from seerattn.hf.state import AttentionLayer, Running
from seerattn.ops.crossover import LayerShape
from seerattn.ops.crossover_decode import prefer_dense_decode
from seerattn.selection.decode_selector import DecodeSelector, tells_all, told_density


def is_dense(
    decoder: DecodeSelector,
    tokens: Sequence[int],
    layer: AttentionLayer,
    device: torch.device,
    *,
    graphs: bool = False,
) -> bool:
    """Whether one token of every sequence is decoded dense in a layer.

    Args:
        decoder: what would choose. One that does not tell how much it reads is taken to read nothing.
        tokens: keys of every sequence, that of the token included.
        layer: which one.
        device: where it runs.
        graphs: whether CUDA graphs repeat the step.
    """
    if all(tells_all(decoder, number) for number in {*tokens}):
        return True
    keys = sum(tokens)
    density = sum(number * (told_density(decoder, number) or 0.0) for number in tokens) / keys
    shape = LayerShape(len(tokens), layer.num_heads, layer.num_kv_heads, layer.head_dim)
    return prefer_dense_decode(keys=keys, density=density, device=device, shape=shape, graphs=graphs)


def dense_layers(
    running: Running, layers: Iterable[AttentionLayer], tokens: Sequence[int], device: torch.device
) -> set[AttentionLayer]:
    """Those of some layers that "auto" decodes dense though something would choose their blocks; see `is_dense`."""
    found: set[AttentionLayer] = set()
    if running.impl != "auto":
        return found
    # Layers that choose by one policy decide as one: that of 30 layers would take longer than a layer may.
    kinds: dict[tuple[Any, ...], bool] = {}
    for layer in layers:
        one = running.decoders.get(layer.layer)
        if one is None:
            continue
        policy, size = getattr(one, "policy", one), getattr(one, "block_size", 0)
        kind = (id(policy), size, layer.num_heads, layer.num_kv_heads, layer.head_dim)
        if kind not in kinds:
            kinds[kind] = is_dense(one, tokens, layer, device)
        if kinds[kind]:
            found.add(layer)
    return found
