"""How Triton kernels read keys and values: of rows in one piece, or in pages that a table names."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_tile(
    source,
    strides,
    pages_ptr,
    batch,
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

    In one piece (`PAGE` is 0) key 0 is at `slot` of `batch`. In pages of `PAGE` tokens those of the row are named from
    `pages_ptr + slot` on. `source` is a tensor descriptor whose box is a tile within a page, or a pointer if there are
    `strides`, those of (batch or page, head, token). With `CUT` pointers read nothing from the key `end` on, and what
    is not read is 0; a descriptor reads its whole box.
    """
    SCATTERED: tl.constexpr = PAGE % TILE_K != 0 if PAGE else False
    if not SCATTERED:
        place, first = batch, slot + first_key
        if PAGE:
            place, first = tl.load(pages_ptr + slot + first_key // PAGE), first_key % PAGE
    if strides is None:
        tile = source.load([place, kv_head, first, 0]).reshape(TILE_K, BLOCK_D)
    else:
        # int64, as caches exceed 2^31 elements.
        key = tl.arange(0, TILE_K)
        inside = first_key + key < end
        if SCATTERED:
            key += first_key
            place = (
                tl.load(pages_ptr + slot + key // PAGE, mask=inside, other=0)
                if CUT
                else tl.load(pages_ptr + slot + key // PAGE)
            )
            token = place.to(tl.int64) * strides[0] + (key % PAGE).to(tl.int64) * strides[2]
        else:
            token = place.to(tl.int64) * strides[0] + (first + key).to(tl.int64) * strides[2]
        d = tl.arange(0, BLOCK_D)
        at = source + kv_head.to(tl.int64) * strides[1] + token[:, None] + d[None, :]
        if CUT:
            tile = tl.load(at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=d[None, :] < D, other=0.0)
    return tile
