"""Gate queries and gate keys: pooled windows, projected, normed, rotated, split into halves of a float.

The halves of a gate vector are the first and the second channels of the pairs that rotate together, in the order of
the frequencies: for the Llama family the vector as it is, for others one permutation of queries and keys alike, which
their products do not see. Weights are read where they lie, so training may change them at any time.

A vector is stored as ``scale * (high + low / LOW_SCALE)``: ``scale`` is a power of two that brings its largest entry,
of keys the largest one of all windows of a block, to 1 .. 2; ``high`` is the vector in fp16 (11 bits), ``low`` what is
missing (11 more). The product of the high parts alone is as accurate as TF32 at twice its speed; with both cross
products it is as accurate as fp32. Where the high parts are enough, features and weights are projected in fp16 with
scales as well, one a window and one a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seerattn.ops.gate_scores.kernels.arithmetic import turn
from seerattn.ops.gate_scores.kernels.pooling import LOW_SCALE, pair_channels, pool_windows, store_features

RMS_NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def _exponent(largest):
    """Biased exponent of fp32 numbers, of which the opposite exists as well; that of 1 for 0."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.where(exponent == 0, 127, tl.minimum(exponent, 253))


@triton.jit
def power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(pooled):
    """Largest magnitude of each row of pooled windows."""
    largest = tl.maximum(tl.abs(pooled[0]), tl.abs(pooled[1]))
    for i in tl.static_range(2, len(pooled)):
        largest = tl.maximum(largest, tl.abs(pooled[i]))
    return tl.max(largest, axis=1)


@triton.jit
def _multiplied(pooled, factor):
    scaled = ()
    for i in tl.static_range(len(pooled)):
        scaled += (pooled[i] * factor,)
    return scaled


@triton.jit
def _project(
    features, weight, M: tl.constexpr, WIDTH: tl.constexpr, DG: tl.constexpr, GATE_HALF: tl.constexpr,
    PAIRED: tl.constexpr, ALTERNATING: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, low, high,
):  # fmt: skip
    """Adds ``features [M, WIDTH]`` times ``weight [WIDTH, DG]`` to both halves of gate vectors."""
    pair = tl.arange(0, GATE_HALF)[None, :]
    here = pair < DG // 2
    column, apart = pair_channels(pair, DG, PAIRED, ALTERNATING)
    for begin in range(0, WIDTH, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        at, real = tl.arange(0, M)[:, None] * WIDTH + depth[None, :], here
        if WIDTH % DEPTH == 0:
            x = tl.load(features + at)
        else:
            real = here & (depth < WIDTH)[:, None]
            x = tl.load(features + at, mask=(depth < WIDTH)[None, :], other=0.0)
        rows = weight + depth[:, None] * DG + column
        if (WIDTH % DEPTH == 0) & (GATE_HALF == DG // 2):
            w_low, w_high = tl.load(rows), tl.load(rows + apart)
        else:
            w_low, w_high = tl.load(rows, mask=real, other=0.0), tl.load(rows + apart, mask=real, other=0.0)
        low = tl.dot(x, w_low, low, input_precision=PRECISION)
        high = tl.dot(x, w_high, high, input_precision=PRECISION)
    return low, high


@triton.jit
def _finish(
    low, high, norm, inv_freq, out, plane, scales, place, row, position, mask,
    DG: tl.constexpr, GATE_HALF: tl.constexpr, PAIRED: tl.constexpr, ALTERNATING: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, PLANES: tl.constexpr, SHARING: tl.constexpr,
):  # fmt: skip
    """Norm, rotation and storing of gate vectors with halves ``low, high [M, GATE_HALF]`` as rows ``row``.

    ``SHARING`` adjacent vectors have one scale, which is stored by the first of them.
    """
    M: tl.constexpr = low.shape[0]
    pair = tl.arange(0, GATE_HALF)
    real = pair < DG // 2
    if NORM:
        channel, apart = pair_channels(pair, DG, PAIRED, ALTERNATING)
        total = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        inverse = tl.rsqrt(total / DG + RMS_NORM_EPS)[:, None]
        low *= inverse * tl.load(norm + channel, mask=real, other=0.0)[None, :]
        high *= inverse * tl.load(norm + apart + channel, mask=real, other=0.0)[None, :]
    if ROPE:
        c, s = turn(position.to(tl.float32)[:, None] * tl.load(inv_freq + pair, mask=real, other=0.0)[None, :])
        low, high = low * c - high * s, high * c + low * s
    largest = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    if SHARING > 1:
        largest = tl.max(tl.reshape(tl.where(mask, largest, 0.0), [M // SHARING, SHARING]), axis=1)
        largest = tl.reshape(tl.broadcast_to(largest[:, None], [M // SHARING, SHARING]), [M])
    exponent = _exponent(largest)
    first = mask
    if SHARING > 1:
        first = mask & (tl.arange(0, M) % SHARING == 0)
    tl.store(scales + place, power_of_two(exponent), mask=first)
    shrink = power_of_two(254 - exponent)[:, None]
    low *= shrink
    high *= shrink
    out += row.to(tl.int64)[:, None] * (2 * GATE_HALF) + pair[None, :]
    tl.store(out, low.to(tl.float16), mask=mask[:, None])
    tl.store(out + GATE_HALF, high.to(tl.float16), mask=mask[:, None])
    if PLANES == 2:
        low_rest = (low - low.to(tl.float16).to(tl.float32)) * LOW_SCALE
        high_rest = (high - high.to(tl.float16).to(tl.float32)) * LOW_SCALE
        tl.store(out + plane, low_rest.to(tl.float16), mask=mask[:, None])
        tl.store(out + plane + GATE_HALF, high_rest.to(tl.float16), mask=mask[:, None])


@triton.jit
def _vectors(
    item, tiles, first_tile, heads, x, stride_b, stride_h, stride_n, x_begin,
    cos, stride_cos_b, stride_cos_n, sin, stride_sin_b, stride_sin_n,
    salience, weight, weight_scales, norm, inv_freq, features, feature_scales, out, plane, scales, rows,
    first_window, begin, end,
    M: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROTATED: tl.constexpr, ROTATION: tl.constexpr, COLUMN: tl.constexpr, KINDS: tl.constexpr,
    MEMBERS: tl.constexpr, OUTPUTS: tl.constexpr, LINEAR: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    DG: tl.constexpr, GATE_HALF: tl.constexpr, PAIRED: tl.constexpr, ALTERNATING: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, TILE: tl.constexpr, SUBBLOCKS: tl.constexpr,
):  # fmt: skip
    """`M` gate vectors from the windows of `MEMBERS` heads together, or `OUTPUTS` times `M` from those of one head."""
    # Heads run fastest: they read the same rows of the rotary tables.
    head = item % heads
    tile = first_tile + item // heads % tiles
    b = (item // heads // tiles).to(tl.int64)
    cos += b * stride_cos_b
    sin += b * stride_sin_b
    x += b * stride_b
    row = tile * M + tl.arange(0, M)
    windows = first_window + row
    mask = ((windows + 1) * SIZE > begin) & (windows * SIZE < end)
    if SUBBLOCKS > 1:
        # Sub-blocks of one block lie `TILE / SUBBLOCKS` apart: their maximum is then one of registers.
        block = row % TILE // SUBBLOCKS
        row = row // TILE * TILE + row % SUBBLOCKS * (TILE // SUBBLOCKS) + block
    place = tile * M + tl.arange(0, M)
    if LINEAR:
        WIDTH: tl.constexpr = len(KINDS) * D
        low, high = tl.zeros([M, GATE_HALF], tl.float32), tl.zeros([M, GATE_HALF], tl.float32)
        for m in range(MEMBERS):
            member = head * MEMBERS + m
            for part in range(0, M, PART):
                local = part + tl.arange(0, PART)
                pooled = pool_windows(
                    x + member.to(tl.int64) * stride_h, stride_n, x_begin,
                    cos, stride_cos_n, sin, stride_sin_n, salience + member * D,
                    first_window + tile * M + local, begin, end,
                    PART, SIZE, STEP, D, HALF, ROTATED, ROTATION, COLUMN, KINDS, STAGES, D, False,
                )  # fmt: skip
                if PLANES == 1:
                    exponent = _exponent(_largest(pooled))
                    tl.store(feature_scales + local, power_of_two(exponent))
                    pooled = _multiplied(pooled, power_of_two(254 - exponent)[:, None])
                store_features(pooled, features + local[:, None] * WIDTH, local >= 0, D, HALF, KINDS)
            tl.debug_barrier()
            if OUTPUTS == 1:
                at = member.to(tl.int64) * (WIDTH * DG)
                if PLANES == 1:
                    none = tl.zeros([M, GATE_HALF], tl.float32)
                    part_low, part_high = _project(
                        features, weight + at, M, WIDTH, DG, GATE_HALF, PAIRED, ALTERNATING, DEPTH, PRECISION,
                        none, none,
                    )  # fmt: skip
                    scale = tl.load(feature_scales + tl.arange(0, M))[:, None] * tl.load(weight_scales + head)
                    low += part_low * scale
                    high += part_high * scale
                else:
                    low, high = _project(
                        features, weight + at, M, WIDTH, DG, GATE_HALF, PAIRED, ALTERNATING, DEPTH, PRECISION,
                        low, high,
                    )  # fmt: skip
                tl.debug_barrier()
        for o in range(OUTPUTS):
            made = head * OUTPUTS + o
            if OUTPUTS > 1:
                low, high = tl.zeros([M, GATE_HALF], tl.float32), tl.zeros([M, GATE_HALF], tl.float32)
                at = made.to(tl.int64) * (WIDTH * DG)
                low, high = _project(
                    features, weight + at, M, WIDTH, DG, GATE_HALF, PAIRED, ALTERNATING, DEPTH, PRECISION, low, high,
                )  # fmt: skip
                if PLANES == 1:
                    scale = tl.load(feature_scales + tl.arange(0, M))[:, None] * tl.load(weight_scales + made)
                    low *= scale
                    high *= scale
            vector = (b * heads * OUTPUTS + made) * rows
            _finish(
                low, high, norm, inv_freq, out + vector * (2 * GATE_HALF), plane, scales + vector // SUBBLOCKS,
                place // SUBBLOCKS, row, windows * SIZE,
                mask, DG, GATE_HALF, PAIRED, ALTERNATING, NORM, ROPE, PLANES, SUBBLOCKS,
            )  # fmt: skip
        tl.debug_barrier()
    else:
        pooled = pool_windows(
            x + head.to(tl.int64) * stride_h, stride_n, x_begin,
            cos, stride_cos_n, sin, stride_sin_n, salience + head * D, windows, begin, end,
            M, SIZE, STEP, D, HALF, ROTATED, ROTATION, COLUMN, KINDS, STAGES, PAIRED, ALTERNATING,
        )  # fmt: skip
        vector = (b * heads + head) * rows
        _finish(
            pooled[0], pooled[1], norm, inv_freq, out + vector * (2 * GATE_HALF), plane, scales + vector, place, row,
            windows * SIZE, mask, DG, GATE_HALF, PAIRED, ALTERNATING, NORM, ROPE, PLANES, 1,
        )  # fmt: skip


@triton.jit
def halve_kernel(weights, out, scales, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """Weights of each head ``[heads, COUNT]`` as fp16 of entries up to 2, and the power of two that they lack."""
    head = tl.program_id(0)
    at = head.to(tl.int64) * COUNT + tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, COUNT, CHUNK):
        here = begin + tl.arange(0, CHUNK) < COUNT
        largest = tl.maximum(largest, tl.abs(tl.load(weights + at + begin, mask=here, other=0.0)))
    exponent = _exponent(tl.max(largest, axis=0))
    tl.store(scales + head, power_of_two(exponent))
    shrink = power_of_two(254 - exponent)
    for begin in range(0, COUNT, CHUNK):
        here = begin + tl.arange(0, CHUNK) < COUNT
        w = tl.load(weights + at + begin, mask=here, other=0.0) * shrink
        tl.store(out + at + begin, w.to(tl.float16), mask=here)


# What follows from lengths has no kernels of its own where it is 1 or a multiple of 16: parts of prompts that come
# together are cut anywhere, and each kernel takes seconds to compile.
@triton.jit(
    do_not_specialize=[
        "q_tiles", "q_rows", "q_first_window", "k_tiles", "k_rows", "k_items", "items", "q_start", "q_len", "k_begin",
    ]
)  # fmt: skip
def vectors_kernel(
    q, q_stride_b, q_stride_h, q_stride_n, k, k_stride_b, k_stride_h, k_stride_n,
    cos, stride_cos_b, stride_cos_n, sin, stride_sin_b, stride_sin_n,
    q_salience, k_salience, q_weight, q_weight_scales, k_weight, k_weight_scales, q_norm, k_norm, inv_freq,
    features, feature_scales,
    gate_q, q_plane, q_scales, gate_k, k_plane, k_scales,
    q_heads, q_tiles, q_rows, q_first_window, k_heads, k_tiles, k_rows, k_items, items, q_start, q_len, k_begin,
    Q_M: tl.constexpr, Q_SIZE: tl.constexpr, Q_STEP: tl.constexpr, Q_PART: tl.constexpr,
    Q_KINDS: tl.constexpr, Q_MEMBERS: tl.constexpr, Q_LINEAR: tl.constexpr,
    K_M: tl.constexpr, K_SIZE: tl.constexpr, K_STEP: tl.constexpr, K_PART: tl.constexpr,
    K_KINDS: tl.constexpr, K_OUTPUTS: tl.constexpr, K_TILE: tl.constexpr, K_SUBBLOCKS: tl.constexpr,
    FEATURES: tl.constexpr, SCALES: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, ROTATION: tl.constexpr, COLUMN: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, DG: tl.constexpr, GATE_HALF: tl.constexpr,
    PAIRED: tl.constexpr, ALTERNATING: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    CONTINUED: tl.constexpr,
):  # fmt: skip
    """All gate keys (the first ``k_items`` items) and gate queries of a call.

    If it is `CONTINUED`, gate keys begin at the key block of position ``k_begin``. That is a kernel of its own: the
    one that begins at 0 stays the same, instruction by instruction.

    ``features [programs, FEATURES]`` and their scales ``[programs, SCALES]`` are scratch between pooling and
    projection; its slots are used again and again and so stay in the L2 cache.
    """
    program = tl.program_id(0)
    features += program.to(tl.int64) * FEATURES
    feature_scales += program * SCALES
    for item in range(program, items, tl.num_programs(0)):
        if item < k_items:
            begin, first_tile = 0, 0
            if CONTINUED:
                begin, first_tile = k_begin, k_begin // K_SIZE // K_M
            _vectors(
                item, k_tiles, first_tile, k_heads, k, k_stride_b, k_stride_h, k_stride_n, 0,
                cos, stride_cos_b, stride_cos_n, sin, stride_sin_b, stride_sin_n,
                k_salience, k_weight, k_weight_scales, k_norm, inv_freq, features, feature_scales, gate_k, k_plane,
                k_scales, k_rows, 0, begin, q_start + q_len,
                K_M, K_SIZE, K_STEP, K_PART, D, HALF, ROTATED, ROTATION, COLUMN, K_KINDS,
                1, K_OUTPUTS, True, NORM, ROPE, DG, GATE_HALF, PAIRED, ALTERNATING, PLANES, PRECISION, DEPTH, STAGES,
                K_TILE, K_SUBBLOCKS,
            )  # fmt: skip
        else:
            _vectors(
                item - k_items, q_tiles, 0, q_heads, q, q_stride_b, q_stride_h, q_stride_n, q_start,
                cos, stride_cos_b, stride_cos_n, sin, stride_sin_b, stride_sin_n,
                q_salience, q_weight, q_weight_scales, q_norm, inv_freq, features, feature_scales, gate_q, q_plane,
                q_scales, q_rows, q_first_window, q_start, q_start + q_len,
                Q_M, Q_SIZE, Q_STEP, Q_PART, D, HALF, ROTATED, ROTATION, COLUMN, Q_KINDS,
                Q_MEMBERS, 1, Q_LINEAR, NORM, ROPE, DG, GATE_HALF, PAIRED, ALTERNATING, PLANES, PRECISION, DEPTH,
                STAGES, 1, 1,
            )  # fmt: skip
