"""How Triton kernels read keys and values: of rows in one piece, or in pages that a table names.

In one piece (`PAGE` is 0) key 0 of a row is at `slot` of `batch`. In pages of `PAGE` tokens those of the row are named
from `pages_ptr + slot` on. Where a page does not hold whole tiles every key is looked up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_page(pages_ptr, batch, slot, first_key, end, PAGE: tl.constexpr, TILE_K: tl.constexpr):
    """Where the tile of keys from `first_key` on lies, for `key_tile`: a batch, a page, or a page for every key."""
    if PAGE == 0:
        place = batch
    elif PAGE % TILE_K == 0:
        place = tl.load(pages_ptr + slot + first_key // PAGE, mask=first_key < end, other=0)
    else:
        key = first_key + tl.arange(0, TILE_K)
        place = tl.load(pages_ptr + slot + key // PAGE, mask=key < end, other=0)
    return place


@triton.jit
def key_tile(
    source,
    strides,
    place,
    kv_head,
    slot,
    first_key,
    end,
    PAGE: tl.constexpr,
    TILE_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CUT: tl.constexpr,
):
    """Keys or values ``[TILE_K, BLOCK_D]`` from the key `first_key` of a row on.

    `source` is a tensor descriptor whose box is a tile, or a pointer if there are `strides`, those of (batch or page,
    head, token). With `CUT` pointers read nothing from the key `end` on, and what is not read is 0; a descriptor reads
    its whole box.
    """
    first = first_key % PAGE if PAGE else slot + first_key
    if strides is None:
        tile = source.load([place, kv_head, first, 0]).reshape(TILE_K, BLOCK_D)
    else:
        key = tl.arange(0, TILE_K)
        token = (first_key + key) % PAGE if PAGE and PAGE % TILE_K else first + key
        # int64, as caches exceed 2^31 elements.
        row = place.to(tl.int64) * strides[0] + kv_head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
        d = tl.arange(0, BLOCK_D)
        at = source + row[:, None] + d[None, :]
        if CUT:
            tile = tl.load(at, mask=(first_key + key < end)[:, None] & (d[None, :] < D), other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=d[None, :] < D, other=0.0)
    return tile
