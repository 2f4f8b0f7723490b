"""Block scores and the choice, in one kernel: scores of a strip of query blocks never leave the program's scratch."""

from __future__ import annotations

import triton
import triton.language as tl

from seerattn.ops.arithmetic import log2
from seerattn.ops.gate_scores.kernels.choice import (
    SHARE,
    chosen_by_level,
    elements,
    row_min,
    top_count,
    wanted_count,
    wide,
    write_bits,
    write_lists,
)
from seerattn.ops.gate_scores.kernels.pooling import LOW_SCALE

LARGEST = tl.constexpr(float("inf"))


@triton.jit
def _log_power_sum(x, POWER: tl.constexpr):
    """``log2(sum(2^(POWER * x))) / POWER`` over the second of three axes; -inf where all of them are."""
    largest = tl.max(x, axis=1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return base + log2(tl.sum(tl.exp2((x - base[:, None, :]) * POWER), axis=1)) / POWER


@triton.jit
def _score_tile(
    q_high, q_low, keys, key_row, plane_rows, k_scales, scratch, stride, factor, bias, q_last, last_end, m, total, n,
    BM: tl.constexpr, BN: tl.constexpr, Q_SUBBLOCKS: tl.constexpr, K_SUBBLOCKS: tl.constexpr, K_SIZE: tl.constexpr,
    PLANES: tl.constexpr, NORMALIZE: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of key windows, reduced to key blocks (and query blocks, if not normalised) into scratch."""
    BLOCKS: tl.constexpr = BN // K_SUBBLOCKS
    k_high = keys.load([key_row + n * BN, 0])
    s = tl.dot(q_high, tl.trans(k_high))
    if PLANES == 2:
        k_low = keys.load([plane_rows + key_row + n * BN, 0])
        rest = tl.dot(q_high, tl.trans(k_low))
        rest = tl.dot(q_low, tl.trans(k_high), rest)
        s += rest * (1.0 / LOW_SCALE)
    if MASKED:
        place = tl.arange(0, BN)
        window = n * BN + place % BLOCKS * K_SUBBLOCKS + place // BLOCKS
        s = tl.where((window * K_SIZE)[None, :] <= q_last[:, None], s, float("-inf"))
    column = n * BLOCKS + tl.arange(0, BLOCKS)
    # All windows of a block have one scale, so that no score is multiplied but within an exponent.
    k_scale = k_scales + key_row // K_SUBBLOCKS + column
    if MASKED:
        k_scale = tl.load(k_scale, mask=column * (K_SUBBLOCKS * K_SIZE) < last_end, other=1.0)
    else:
        k_scale = tl.load(k_scale)
    scale = factor[:, None] * k_scale[None, :]
    if K_SUBBLOCKS > 1:
        s = tl.reshape(s, [BM, K_SUBBLOCKS, BLOCKS])
        best = tl.max(s, axis=1) * scale
        scaled = s * scale[:, None, :]
    else:
        best = s * scale
        scaled = best
    of_block = best
    if SUM:
        base = best
        if MASKED:
            base = tl.where(best == float("-inf"), 0.0, best)
        mass = tl.sum(tl.exp2(scaled - base[:, None, :]), axis=1)
        of_block = base + log2(mass)
    if NORMALIZE:
        m_new = tl.maximum(m, tl.max(best, axis=1))
        if SUM:
            p = mass * tl.exp2(base - m_new[:, None])
        elif K_SUBBLOCKS > 1:
            p = tl.sum(tl.exp2(scaled - m_new[:, None, None]), axis=1)
        else:
            p = tl.exp2(scaled - m_new[:, None])
        total = total * tl.exp2(m - m_new) + tl.sum(p, axis=1)
        m = m_new
        row = tl.arange(0, BM)
        tl.store(scratch + row[:, None] * stride + column[None, :], of_block)
    else:
        best = of_block + bias[:, None]
        row = tl.arange(0, BM // Q_SUBBLOCKS)
        if Q_SUBBLOCKS > 1:
            pieces = tl.reshape(best, [BM // Q_SUBBLOCKS, Q_SUBBLOCKS, BLOCKS])
            best = tl.max(pieces, axis=1) if POWER == LARGEST else _log_power_sum(pieces, POWER)
        tl.store(scratch + row[:, None] * stride + column[None, :], best)
    return m, total


@triton.jit(
    do_not_specialize=[
        "items", "q_rows", "k_rows", "plane_rows", "width", "word_stride", "q_start", "q_end", "first_window",
        "num_q_blocks", "dense_from",
    ]
)  # fmt: skip
def score_and_choose_kernel(
    gate_q, q_plane, q_scales, keys, k_scales, scratch, log_totals, settings, indices, counts, words,
    items, heads, group, q_rows, k_rows, plane_rows, stride, width, word_stride,
    q_start, q_end, first_window, num_q_blocks, scale, setting, sink_blocks, dense_from,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, Q_SUBBLOCKS: tl.constexpr, K_SUBBLOCKS: tl.constexpr,
    PLANES: tl.constexpr, NORMALIZE: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr, FORCED_SCORED: tl.constexpr,
    RULE: tl.constexpr, PER_HEAD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Walks strips of `BM` query windows, the longest first: scores against all earlier key windows, then the choice.

    A block's score takes the log-sum-exp over its key windows with ``SUM``, else the maximum; then over query windows
    ``log(mean(exp(POWER * score))) / POWER``, or the maximum. ``scratch [programs, rows, stride]`` belongs to the
    program, which alone writes and reads it.
    """
    Q_SIZE: tl.constexpr = BLOCK_Q // Q_SUBBLOCKS
    K_SIZE: tl.constexpr = BLOCK_K // K_SUBBLOCKS
    STRIP: tl.constexpr = BM // Q_SUBBLOCKS  # query blocks of a strip
    SCRATCH_ROWS: tl.constexpr = BM if NORMALIZE else STRIP
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * SCRATCH_ROWS * stride
    log_totals += program * BM
    strips = tl.cdiv(num_q_blocks, STRIP)
    for item in range(program, items, tl.num_programs(0)):
        strip = strips - 1 - item // (items // strips)
        bh = item % (items // strips)  # batch row and head
        row = strip * BM + tl.arange(0, BM)
        window = first_window + row
        live = ((window + 1) * Q_SIZE > q_start) & (window * Q_SIZE < q_end)
        q_last = tl.where(live, tl.minimum((window + 1) * Q_SIZE, q_end) - 1, -1)
        at = (bh.to(tl.int64) * q_rows + row)[:, None] * WIDTH_D + tl.arange(0, WIDTH_D)[None, :]
        q_high = tl.load(gate_q + at, mask=live[:, None], other=0.0)
        q_low = q_high
        if PLANES == 2:
            q_low = tl.load(gate_q + q_plane + at, mask=live[:, None], other=0.0)
        factor = tl.load(q_scales + bh.to(tl.int64) * q_rows + row, mask=live, other=1.0) * scale
        bias = tl.where(live, 0.0, float("-inf"))
        # A strip needs the key windows up to its last token; those up to its first one need no mask.
        first_token = tl.maximum((first_window + strip * BM) * Q_SIZE, q_start)
        first_end = tl.minimum((first_token // Q_SIZE + 1) * Q_SIZE, q_end)
        last_end = tl.minimum((first_window + (strip + 1) * BM) * Q_SIZE, q_end)
        whole = ((first_end - 1) // K_SIZE + 1) // BN
        tiles = tl.cdiv((last_end - 1) // K_SIZE + 1, BN)
        key_row = (bh // heads * (heads // group) + bh % heads // group) * k_rows
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for n in range(0, whole):
            m, total = _score_tile(
                q_high, q_low, keys, key_row, plane_rows, k_scales, scratch, stride, factor, bias, q_last, last_end,
                m, total, n,
                BM, BN, Q_SUBBLOCKS, K_SUBBLOCKS, K_SIZE, PLANES, NORMALIZE, SUM, POWER, False,
            )  # fmt: skip
        for n in range(whole, tiles):
            m, total = _score_tile(
                q_high, q_low, keys, key_row, plane_rows, k_scales, scratch, stride, factor, bias, q_last, last_end,
                m, total, n,
                BM, BN, Q_SUBBLOCKS, K_SUBBLOCKS, K_SIZE, PLANES, NORMALIZE, SUM, POWER, True,
            )  # fmt: skip
        if NORMALIZE:
            tl.store(log_totals + tl.arange(0, BM), tl.where(live, m + log2(total), float("inf")))
        tl.debug_barrier()

        value = setting
        if PER_HEAD:
            value = tl.load(settings + bh % heads)
        column = elements(C, P, L)
        for r in range(0, STRIP, R):
            local = r + tl.arange(0, R)
            block = strip * STRIP + local
            # Geometry of the rows: absolute query block, its first and last token, its key blocks.
            absolute = q_start // BLOCK_Q + block
            begin = tl.maximum(absolute * BLOCK_Q, q_start)
            real = block < num_q_blocks
            num_causal = tl.where(real, (tl.minimum((absolute + 1) * BLOCK_Q, q_end) - 1) // BLOCK_K + 1, 0)
            rows_at = wide(local * (SCRATCH_ROWS // STRIP) * stride)
            if not NORMALIZE:
                x = tl.load(scratch + rows_at + column)
            elif POWER == LARGEST:
                x = tl.load(scratch + rows_at + column)
                x -= wide(tl.load(log_totals + local * Q_SUBBLOCKS))
                for sub in range(1, Q_SUBBLOCKS):
                    y = tl.load(scratch + rows_at + sub * stride + column)
                    x = tl.maximum(x, y - wide(tl.load(log_totals + local * Q_SUBBLOCKS + sub)))
            else:
                # No block holds more than all of its row, so its power needs no base but where it is too small.
                x = tl.zeros([R, C, P, L], tl.float32)
                for sub in range(0, Q_SUBBLOCKS):
                    y = tl.load(scratch + rows_at + sub * stride + column)
                    x += tl.exp2(y * POWER - wide(tl.load(log_totals + local * Q_SUBBLOCKS + sub)) * POWER)
                lowest = tl.min(row_min(tl.where(column < wide(num_causal), x, 1.0)), axis=0)
                x = log2(x) / POWER
                if lowest < 1e-30:
                    base = tl.load(scratch + rows_at + column)
                    base -= wide(tl.load(log_totals + local * Q_SUBBLOCKS))
                    for sub in range(1, Q_SUBBLOCKS):
                        y = tl.load(scratch + rows_at + sub * stride + column)
                        base = tl.maximum(base, y - wide(tl.load(log_totals + local * Q_SUBBLOCKS + sub)))
                    base = tl.where(base == float("-inf"), 0.0, base)
                    x = tl.zeros([R, C, P, L], tl.float32)
                    for sub in range(0, Q_SUBBLOCKS):
                        y = tl.load(scratch + rows_at + sub * stride + column)
                        y -= wide(tl.load(log_totals + local * Q_SUBBLOCKS + sub))
                        x += tl.exp2((y - base) * POWER)
                    x = base + log2(x) / POWER
            if (POWER != LARGEST) & (RULE > SHARE):  # a sum so far; no choice of a number sees it
                last = tl.minimum((absolute + 1) * BLOCK_Q, q_end) - 1
                windows = tl.where(real, last // Q_SIZE - begin // Q_SIZE + 1, 1)
                x -= wide(tl.log2(windows.to(tl.float32)) / POWER)
            num_free = begin // BLOCK_K
            num_free = tl.where(block >= dense_from, 0, num_free - tl.minimum(num_free, sink_blocks))
            num_free = tl.where(real, num_free, 0)
            rows = bh * num_q_blocks + block
            causal = column < wide(num_causal)
            # Free blocks lie between the sinks and the diagonal.
            free = (column - sink_blocks).to(tl.uint32) < wide(num_free).to(tl.uint32)
            if RULE <= SHARE:  # the length of lists is known
                count = wanted_count(value, num_causal, num_causal - num_free, RULE)
                keep = top_count(x, free, causal & ~free, num_free, count - (num_causal - num_free), count)
                write_lists(keep, count, column, indices, counts, real, rows, width, 128)
            else:
                scored = causal
                if not FORCED_SCORED:
                    scored = free
                keep = (chosen_by_level(x, scored, value, RULE) & causal) | (causal & ~free)
                write_bits(keep, counts, words, real, rows, word_stride, R, C, P, L)
        tl.debug_barrier()
