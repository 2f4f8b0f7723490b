"""Choosing blocks from rows of scores that are held in registers, and writing index lists.

A tile ``[R, C, P, L]`` holds `R` rows of ``C * P * L`` key blocks, in this order.
In this shape, with 32 lanes along `L`, Triton gives a row to one warp, so that no count over a row has to cross warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of RULE.
COUNT = tl.constexpr(0)  # so many blocks of every row
SHARE = tl.constexpr(1)  # this share of every row's causal blocks, rounded up
SOFTMAX = tl.constexpr(2)  # softmax over the row above a threshold
SCORE = tl.constexpr(3)  # score above a threshold
MASS = tl.constexpr(4)  # the fewest blocks that hold this share of the row's softmax

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
SMALLEST = tl.constexpr(-3.4028234663852886e38)
STEPS = tl.constexpr(4)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_sum(x):
    return tl.sum(tl.sum(tl.sum(x, axis=1), axis=1), axis=1)


@triton.jit
def row_max(x):
    return tl.max(tl.max(tl.max(x, axis=1), axis=1), axis=1)


@triton.jit
def row_min(x):
    return tl.min(tl.min(tl.min(x, axis=1), axis=1), axis=1)


@triton.jit
def elements(C: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """Numbers of the elements of a row, ``[1, C, P, L]``."""
    chunk = tl.arange(0, C)[None, :, None, None] * P + tl.arange(0, P)[None, None, :, None]
    return chunk * L + tl.arange(0, L)[None, None, None, :]


@triton.jit
def wide(x):
    """A value of each row ``[R]`` beside its elements."""
    return x[:, None, None, None]


@triton.jit
def number(keep):
    """How many are kept of each row."""
    return row_sum(tl.where(keep, 1.0, 0.0)).to(tl.int32)


@triton.jit
def places(keep):
    """Number of kept elements up to and including each element, in its row."""
    P: tl.constexpr = keep.shape[2]
    L: tl.constexpr = keep.shape[3]
    tl.static_assert((P == 1) | (L < 2 ** (32 // P)))
    # Counts of `P` elements share a word, so that fewer sums go over lanes.
    BITS: tl.constexpr = 32 // P
    LOW: tl.constexpr = (1 << BITS) - 1 if P > 1 else -1
    C: tl.constexpr = keep.shape[1]
    chunk = tl.arange(0, C)[None, :, None, None]
    part = tl.arange(0, P)[None, None, :, None]
    # All four dimensions stay: what lacks one would go through shared memory to be scanned.
    packed = tl.sum(keep.to(tl.int32) << part * BITS, axis=2, keep_dims=True)
    totals = tl.sum(packed, axis=3, keep_dims=True)
    inner = (tl.cumsum(packed, axis=3) >> part * BITS) & LOW
    before = tl.zeros_like(tl.sum(totals, axis=1, keep_dims=True))
    for c in tl.static_range(C):
        of_chunk = tl.sum(tl.where(chunk == c, totals, 0), axis=1, keep_dims=True)
        for p in tl.static_range(P):
            inner += tl.where((chunk == c) & (part == p), before, 0)
            before += (of_chunk >> p * BITS) & LOW
    return inner


@triton.jit
def ordered(x):
    """int32 images of fp32 values in the same order; both zeros have one image, and none is `LOWEST`."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & HIGHEST)


@triton.jit
def value_of(image):
    """The inverse of `ordered`."""
    return (image ^ ((image >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def top_count(x, candidates, beside, total, need, wanted):
    """The ``need [R]``, 0 to ``total``, largest of the ``total [R]`` candidates of each row; the first among equals.

    Elements ``beside`` the candidates are taken as well, ``wanted [R]`` in all. Scores are halved by value and, so that
    it ends, by their ordered images, but compared as they are.
    """
    x = tl.where(candidates, tl.maximum(x, SMALLEST), float("-inf"))
    lowest = ordered(tl.zeros_like(need).to(tl.float32) + SMALLEST)
    high = tl.maximum(ordered(row_max(x)), lowest)
    low = ordered(row_min(tl.where(candidates, x, float("inf"))))
    key = tl.where(beside, float("inf"), x)
    low = tl.where(need == total, lowest, low)
    low = tl.where(need == 0, ordered(tl.zeros_like(need).to(tl.float32) + float("inf")), low)
    high = tl.where((need == 0) | (need == total), low, high)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        # Asking whether all rows are done is a barrier; rows that are done stay as they are.
        for step in tl.static_range(STEPS):
            middle = (low | high) - ((low ^ high) >> 1)  # (low + high) / 2 rounded up, without overflow
            if step > 0:
                # Halving values instead of images meets the sought one in 11 steps instead of 16 where scores have both
                # signs (2048 normal numbers, the largest tenth); the first step of each round bounds the worst case.
                half = ordered(0.5 * value_of(low) + 0.5 * value_of(high))
                middle = tl.minimum(tl.maximum(half, low + (low < high).to(tl.int32)), high)
            count = number(key >= wide(value_of(middle)))
            open = low < high
            high = tl.where(open & (count < wanted), middle - 1, tl.where(open & (count == wanted), middle, high))
            low = tl.where(open & (count >= wanted), middle, low)
    edge = wide(value_of(low))
    keep = key >= edge
    surplus = number(keep) - wanted
    if tl.max(surplus, axis=0) > 0:
        equal = key == edge
        among = number(equal) - surplus
        keep = keep & (~equal | (places(equal) <= wide(among)))
    return keep


@triton.jit
def probabilities(x, scored):
    """Softmax over the scored elements of each row, from scores in units of log 2; zero in rows that have none."""
    x = tl.where(scored, x, float("-inf"))
    largest = row_max(x)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    e = tl.exp2(x - wide(largest))
    total = row_sum(e)
    return e * wide(1.0 / tl.where(total > 0, total, 1.0))


@triton.jit
def top_mass(x, scored, p):
    """The largest of the scored elements of each row while the mass before them is short of ``p``."""
    mass = probabilities(x, scored)
    key = tl.where(scored, ordered(x), LOWEST)
    low = row_min(tl.where(scored, key, HIGHEST))
    high = row_max(key)
    low = tl.minimum(low, high)
    # Bisection for the least image above which the mass is short of p.
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        short = row_sum(tl.where(key > wide(middle), mass, 0.0)) < p
        open = low < high
        high = tl.where(open & short, middle, high)
        low = tl.where(open & ~short, middle + 1, low)
    above = key > wide(low)
    equal = (key == wide(low)) & scored
    held = row_sum(tl.where(above, mass, 0.0))
    each = row_max(tl.where(equal, mass, 0.0))
    earlier = places(equal) - 1
    return above | (equal & (wide(held) + earlier.to(tl.float32) * wide(each) < p))


@triton.jit
def wanted_count(setting, num_causal, num_forced, RULE: tl.constexpr):
    """Blocks that each row keeps, known without its scores: ``[R]``."""
    count = tl.zeros_like(num_causal) + tl.ceil(setting).to(tl.int32)
    if RULE == SHARE:
        count = tl.ceil(num_causal.to(tl.float32) * setting).to(tl.int32)
    return tl.maximum(tl.minimum(count, num_causal), num_forced)


@triton.jit
def chosen_by_level(x, scored, setting, RULE: tl.constexpr):
    """Chosen blocks of rows of scores in units of log 2."""
    if RULE == SOFTMAX:
        keep = probabilities(x, scored) > setting
    elif RULE == SCORE:
        keep = tl.where(scored, x * LN_2, float("-inf")) > setting
    else:
        keep = top_mass(x, scored, setting)
    return keep


@triton.jit
def write_lists(keep, count, column, indices, counts, live, rows, width, FILL: tl.constexpr):
    """Ascending lists ``indices [rows, width]``, padded with -1, and their counts; rows that are not live keep none."""
    tl.store(counts + rows, count, mask=live)
    at = indices + rows.to(tl.int64) * width
    # Not true, but the mask keeps stores single; without it Triton would move all three through shared memory.
    to = tl.max_contiguous(tl.multiple_of(wide(at) + places(keep) - 1, [1, 1, 1, 16]), [1, 1, 1, 4])
    tl.store(to, column, mask=keep)
    begin = tl.min(tl.where(live, count, width), axis=0) // FILL * FILL
    for w in range(begin, width, FILL):
        pad = w + tl.arange(0, FILL)[None, :]
        tl.store(at[:, None] + pad, -1, mask=live[:, None] & (pad >= count[:, None]) & (pad < width))


@triton.jit
def write_bits(
    keep, counts, words, live, rows, stride,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One bit a block, ``words [rows, stride]``, and counts: the lists once their width is known."""
    tl.store(counts + rows, number(keep), mask=live)
    bits = tl.reshape(keep.to(tl.int32), [R, C, P, L // 32, 32]) << tl.arange(0, 32)[None, None, None, None, :]
    packed = tl.sum(bits, axis=4)
    column = elements(C, P, L // 32)
    at = words + rows.to(tl.int64) * stride
    tl.store(wide(at) + column, packed, mask=wide(live) & (column < stride))


@triton.jit(do_not_specialize=["stride", "width"])
def expand_kernel(words, counts, indices, stride, width, CHUNK: tl.constexpr):
    """Lists of one row from its bits."""
    row = tl.program_id(0).to(tl.int64)
    done = 0
    for begin in range(0, stride * 32, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        word = tl.load(words + row * stride + column // 32, mask=column < stride * 32, other=0)
        keep = (word >> (column % 32)) & 1
        place = done + tl.cumsum(keep, axis=0) - 1
        tl.store(indices + row * width + place, column, mask=keep != 0)
        done += tl.sum(keep, axis=0)
    count = tl.load(counts + row)
    for begin in range(count // CHUNK * CHUNK, width, CHUNK):
        pad = begin + tl.arange(0, CHUNK)
        tl.store(indices + row * width + pad, -1, mask=(pad >= count) & (pad < width))
