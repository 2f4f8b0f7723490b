"""From rotated tokens to pooled windows and gate vectors: one read of Q and K.

Windows of `SIZE` tokens lie on the absolute grid ``position // SIZE``. A program takes `M` windows of one head and
walks their tokens, `STEP` of each window at a time. Head channels are held as two halves, ``[0, D / 2)`` and
``[D / 2, D)``: the pairs of the usual rotation, both of the model and of the gate, are then register to register. A
gate whose model pairs channels otherwise has the first channels of all pairs in one half and the second in the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of ROTATION.
UNROTATED = tl.constexpr(0)
HALVES = tl.constexpr(1)  # channel i turns with i + D / 2
PART_HALVES = tl.constexpr(2)  # channel i turns with i + width / 2, channels from the width on do not turn
INTERLEAVED = tl.constexpr(3)  # channel 2 i turns with 2 i + 1, channels from the width on do not turn

# What the lower half of a split vector is multiplied by, so that it is as large as the upper one.
LOW_SCALE = tl.constexpr(2048.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_LOGIT = tl.constexpr(-3.0e38)  # finite, so that its distance from itself is 0


@triton.jit
def pair_channels(pair, WIDTH: tl.constexpr, PAIRED: tl.constexpr, ALTERNATING: tl.constexpr):
    """First channels of pairs of a vector of `WIDTH`, and how far from them the second ones are.

    The first `PAIRED` channels are those that rotate, as neighbours if `ALTERNATING`, else as halves; the rest are
    halves of their own. See `seerattn.gate.rope.Pairing`.
    """
    first, apart = pair, WIDTH // 2
    if ALTERNATING | (PAIRED != WIDTH):
        turns, step, near = pair < PAIRED // 2, 1, PAIRED // 2
        if ALTERNATING:
            step, near = 2, 1
        first = tl.where(turns, step * pair, pair + PAIRED // 2)
        apart = tl.where(turns, near, (WIDTH - PAIRED) // 2)
    return first, apart


@triton.jit
def turned_back(
    x, x_rows, cos, cos_rows, sin, sin_rows, channel, D: tl.constexpr, ROTATED: tl.constexpr, ROTATION: tl.constexpr,
    COLUMN: tl.constexpr,
):  # fmt: skip
    """Channels ``channel``, of any shape, of un-rotated vectors, fp32; for every rotation that exists."""
    real = channel < D
    value = tl.load(x + x_rows + channel, mask=real, other=0.0).to(tl.float32)
    if ROTATION == UNROTATED:
        return value
    turns = channel < ROTATED
    if ROTATION == INTERLEAVED:
        first = channel % 2 == 0
        partner = channel ^ 1
        column = channel // 2
    else:
        first = channel < ROTATED // 2
        partner = tl.where(first, channel + ROTATED // 2, channel - ROTATED // 2)
        column = tl.where(first, channel, channel - ROTATED // 2)
    other = tl.load(x + x_rows + partner, mask=turns, other=0.0).to(tl.float32)
    c = tl.load(cos + cos_rows + column * COLUMN, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + sin_rows + column * COLUMN, mask=turns, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(c * c + s * s)
    inverse *= inverse
    return value * (c * inverse) + tl.where(first, other, -other) * (s * inverse)


@triton.jit
def _halves(
    x, x_rows, cos, cos_rows, sin, sin_rows, D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    ROTATION: tl.constexpr, COLUMN: tl.constexpr, PAIRED: tl.constexpr, ALTERNATING: tl.constexpr,
):  # fmt: skip
    """First and second channels of all pairs of un-rotated vectors, fp32 ``[M, STEP, HALF]`` each."""
    p = tl.arange(0, HALF)[None, None, :]
    MIDDLE: tl.constexpr = D // 2
    if (ROTATION == HALVES) & (PAIRED == D) & (not ALTERNATING):
        if HALF == MIDDLE:
            low = tl.load(x + x_rows + p).to(tl.float32)
            high = tl.load(x + x_rows + MIDDLE + p).to(tl.float32)
            c = tl.load(cos + cos_rows + p * COLUMN).to(tl.float32)
            s = tl.load(sin + sin_rows + p * COLUMN).to(tl.float32)
        else:
            real = p < MIDDLE
            low = tl.load(x + x_rows + p, mask=real, other=0.0).to(tl.float32)
            high = tl.load(x + x_rows + MIDDLE + p, mask=real, other=0.0).to(tl.float32)
            c = tl.load(cos + cos_rows + p * COLUMN, mask=real, other=1.0).to(tl.float32)
            s = tl.load(sin + sin_rows + p * COLUMN, mask=real, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(c * c + s * s)
        inverse *= inverse
        c *= inverse
        s *= inverse
        return low * c + high * s, high * c - low * s
    else:
        low_channel, apart = pair_channels(p, D, PAIRED, ALTERNATING)
        high_channel = low_channel + apart
        if HALF != MIDDLE:  # what is beyond a half that is no power of two counts as missing
            low_channel, high_channel = tl.where(p < MIDDLE, low_channel, D), tl.where(p < MIDDLE, high_channel, D)
        low = turned_back(x, x_rows, cos, cos_rows, sin, sin_rows, low_channel, D, ROTATED, ROTATION, COLUMN)
        high = turned_back(x, x_rows, cos, cos_rows, sin, sin_rows, high_channel, D, ROTATED, ROTATION, COLUMN)
        return low, high


@triton.constexpr_function
def _among(kind, kinds):
    return kind in kinds


@triton.jit
def pool_windows(
    x, stride_n, x_begin, cos, stride_cos_n, sin, stride_sin_n, salience, windows, begin, end,
    M: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROTATED: tl.constexpr, ROTATION: tl.constexpr, COLUMN: tl.constexpr, KINDS: tl.constexpr, STAGES: tl.constexpr,
    PAIRED: tl.constexpr, ALTERNATING: tl.constexpr,
):  # fmt: skip
    """The tokens of each window pooled in every way of ``KINDS``: of each in turn both halves, fp32 ``[M, HALF]``.

    The halves are the first and the second channels of all pairs, which `pair_channels` names.
    Token 0 of ``x`` has position ``x_begin``; tokens of positions ``begin .. end`` count. A window that lies outside
    altogether has some finite value. ``salience [D]`` is read for "salient" alone.
    """
    AVG: tl.constexpr = _among("avg", KINDS)
    MAX: tl.constexpr = _among("max", KINDS)
    MIN: tl.constexpr = _among("min", KINDS)
    SALIENT: tl.constexpr = _among("salient", KINDS)
    avg_low, avg_high = tl.zeros([M, HALF], tl.float32), tl.zeros([M, HALF], tl.float32)
    max_low, max_high = tl.zeros([M, HALF], tl.float32), tl.zeros([M, HALF], tl.float32)
    min_low, min_high = tl.zeros([M, HALF], tl.float32), tl.zeros([M, HALF], tl.float32)
    # A dimension for the tokens of a step is kept, so that the layout of the tokens is that of what weighs them.
    salient_low, salient_high = tl.zeros([M, 1, HALF], tl.float32), tl.zeros([M, 1, HALF], tl.float32)
    if MAX:
        max_low += float("-inf")
        max_high += float("-inf")
    if MIN:
        min_low += float("inf")
        min_high += float("inf")
    if SALIENT:
        # Of the softmax over the tokens so far: largest logit in units of log 2, sum of weights relative to its own.
        top, total = tl.full([M, 1, 1], LOWEST_LOGIT, tl.float32), tl.zeros([M, 1, 1], tl.float32)
        pair = tl.arange(0, HALF)[None, None, :]
        channel, apart = pair_channels(pair, D, PAIRED, ALTERNATING)
        learned_low = tl.load(salience + channel, mask=pair < D // 2, other=0.0) * LOG2_E
        learned_high = tl.load(salience + apart + channel, mask=pair < D // 2, other=0.0) * LOG2_E
    for t in tl.range(0, SIZE, STEP, num_stages=STAGES):
        position = windows[:, None] * SIZE + t + tl.arange(0, STEP)[None, :]
        real = (position >= begin) & (position < end)
        # A missing token becomes the nearest one, which is of the same window and changes no maximum.
        position = tl.minimum(tl.maximum(position, begin), end - 1)
        x_rows = ((position - x_begin).to(tl.int64) * stride_n)[:, :, None]
        cos_rows = (position.to(tl.int64) * stride_cos_n)[:, :, None]
        sin_rows = (position.to(tl.int64) * stride_sin_n)[:, :, None]
        low, high = _halves(
            x, x_rows, cos, cos_rows, sin, sin_rows, D, HALF, ROTATED, ROTATION, COLUMN, PAIRED, ALTERNATING,
        )  # fmt: skip
        if AVG:
            counts = real.to(tl.float32)[:, :, None]
            avg_low += tl.sum(low * counts, axis=1)
            avg_high += tl.sum(high * counts, axis=1)
        if MAX:
            max_low = tl.maximum(max_low, tl.max(low, axis=1))
            max_high = tl.maximum(max_high, tl.max(high, axis=1))
        if MIN:
            min_low = tl.minimum(min_low, tl.min(low, axis=1))
            min_high = tl.minimum(min_high, tl.min(high, axis=1))
        if SALIENT:
            logits = tl.sum(low * learned_low + high * learned_high, axis=2, keep_dims=True)
            logits = tl.where(real[:, :, None], logits, float("-inf"))
            top_new = tl.maximum(top, tl.max(logits, axis=1, keep_dims=True))
            weights = tl.exp2(logits - top_new)
            shrink = tl.exp2(top - top_new)
            top = top_new
            total = total * shrink + tl.sum(weights, axis=1, keep_dims=True)
            salient_low = salient_low * shrink + tl.sum(low * weights, axis=1, keep_dims=True)
            salient_high = salient_high * shrink + tl.sum(high * weights, axis=1, keep_dims=True)
    if AVG:
        count = tl.minimum((windows + 1) * SIZE, end) - tl.maximum(windows * SIZE, begin)
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        avg_low *= share[:, None]
        avg_high *= share[:, None]
    if SALIENT:
        # The most salient token alone weighs 1; only a window outside has less.
        inverse = 1.0 / tl.maximum(total, 1.0)
        salient_low *= inverse
        salient_high *= inverse
    pooled = ()
    for place in tl.static_range(len(KINDS)):
        if KINDS[place] == "avg":
            pooled += (avg_low, avg_high)
        elif KINDS[place] == "max":
            pooled += (max_low, max_high)
        elif KINDS[place] == "min":
            pooled += (min_low, min_high)
        else:
            pooled += (tl.sum(salient_low, axis=1), tl.sum(salient_high, axis=1))
    return pooled


@triton.jit
def store_features(pooled, rows, real, D: tl.constexpr, HALF: tl.constexpr, KINDS: tl.constexpr):
    """Stores pooled windows, one kind after the other, at ``rows [M, 1]``."""
    channel = tl.arange(0, HALF)[None, :]
    mask = real[:, None] & (channel < D // 2)
    for place in tl.static_range(len(KINDS)):
        low, high = pooled[2 * place].to(rows.dtype.element_ty), pooled[2 * place + 1].to(rows.dtype.element_ty)
        tl.store(rows + place * D + channel, low, mask=mask)
        tl.store(rows + place * D + D // 2 + channel, high, mask=mask)


@triton.jit(do_not_specialize=["start", "length", "windows"])
def pool_kernel(
    x, stride_b, stride_h, stride_n, start, cos, stride_cos_b, stride_cos_n, sin, stride_sin_b, stride_sin_n,
    salience, out, heads, length, windows,
    M: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROTATED: tl.constexpr, ROTATION: tl.constexpr, COLUMN: tl.constexpr, KINDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pooled features ``out [B, H, W, len(KINDS) * D]``; ``salience [H, D]``."""
    program = tl.program_id(0)
    head = program % heads
    tiles = tl.cdiv(windows, M)
    tile = program // heads % tiles
    b = (program // heads // tiles).to(tl.int64)
    row = tile * M + tl.arange(0, M)
    pooled = pool_windows(
        x + b * stride_b + head.to(tl.int64) * stride_h, stride_n, start,
        cos + b * stride_cos_b, stride_cos_n, sin + b * stride_sin_b, stride_sin_n, salience + head * D,
        start // SIZE + row, start, start + length,
        M, SIZE, STEP, D, HALF, ROTATED, ROTATION, COLUMN, KINDS, STAGES, D, False,
    )  # fmt: skip
    out += ((b * heads + head) * windows + row)[:, None] * (len(KINDS) * D)
    store_features(pooled, out, row < windows, D, HALF, KINDS)
