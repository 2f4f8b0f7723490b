"""The kernel of attention maps: one walk over the keys, then from a scratch of maxima or sums to rows of the maps.

A resident program takes one tile of query rows after the other. While it walks the keys with an online softmax it
leaves, per row and key block, the raw maximum or the raw sum (or both, as the maps ask) in a scratch of its own. Only
after the walk is a row's normaliser known: the scratch, mostly still in L2, is then read back and reduced to rows of
the maps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seerattn.ops.arithmetic import log2

INFINITE = tl.constexpr(float("inf"))


@triton.jit
def _walk(
    acc,
    top,
    total,
    q,
    position,
    first_key,
    k_tiles,
    v_tiles,
    maxima_ptr,
    sums_ptr,
    batch,
    kv_head,
    k_slot,
    begin,
    end,
    scale,
    inner_scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys ``begin .. end``; maxima and sums are left in log2 units, a column a block."""
    for key in tl.range(begin, end, KEYS):
        k = k_tiles.load([batch, kv_head, k_slot + key, 0]).reshape(KEYS, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), exact at both ends.
            scores = 1.0 - 2.0 / (tl.exp2(scores * inner_scale) + 1.0)
        if MASKED:
            k_pos = key + tl.arange(0, KEYS)
            visible = k_pos[None, :] <= position[:, None]
            if first_key is not None:
                visible &= k_pos[None, :] >= first_key[:, None]
            scores = tl.where(visible, scores, -float("inf"))
        columns = key // COLUMN + tl.arange(0, KEYS // COLUMN)
        slots = columns[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        peak = tl.max(scores, 1) * scale
        if maxima_ptr is not None:
            if KEYS == COLUMN:
                tl.store(maxima_ptr + key // COLUMN * ROWS + tl.arange(0, ROWS), peak)
            else:
                # Not folded into `peak`: its layout would drag all of p through shared memory for the sum.
                peaks = tl.max(scores.reshape(ROWS, KEYS // COLUMN, COLUMN), 2) * scale
                tl.store(maxima_ptr + slots, peaks)
        new_top = tl.maximum(top, peak)
        base = new_top
        if MASKED and first_key is not None:
            # The document of a row may begin after all of these keys.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores * scale - base[:, None])
        if KEYS == COLUMN:
            p_sum = tl.sum(p, 1)
            if sums_ptr is not None:
                tl.store(sums_ptr + key // COLUMN * ROWS + tl.arange(0, ROWS), log2(p_sum) + base)
        else:
            # In the same order whether they are kept or not, so that the other maps and the output do not see it.
            sums = tl.sum(p.reshape(ROWS, KEYS // COLUMN, COLUMN), 2)
            p_sum = tl.sum(sums, 1)
            if sums_ptr is not None:
                tl.store(sums_ptr + slots, log2(sums) + base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + p_sum
        if v_tiles is not None:
            acc = acc * shrink[:, None]
            v = v_tiles.load([batch, kv_head, k_slot + key, 0]).reshape(KEYS, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _power_mean(shares, SUM: tl.constexpr, POWER: tl.constexpr):
    """Log2 of what each tile of ``shares [CHUNK, COLUMNS, BLOCKS, BLOCK_Q]``, in log2, is worth, up to a constant."""
    if not SUM:
        rows = tl.max(shares, 1)
    elif shares.shape[1] == 1:
        rows = tl.reshape(shares, (shares.shape[0], shares.shape[2], shares.shape[3]))
    else:
        rows = log2(tl.sum(tl.exp2(shares), 1))
    largest = tl.max(rows, 2)
    if POWER == INFINITE:
        return largest
    else:
        # Relative to the largest row, whose power may be too small a number.
        base = tl.where(largest == -float("inf"), 0.0, largest)
        powers = tl.exp2((rows - base[:, :, None]) * POWER)
        return base + log2(tl.sum(powers, 2)) / POWER


@triton.jit
def _write_map(
    map_ptr,
    columns_ptr,
    normaliser,
    begin,
    end,
    written,
    first_block,
    num_q_blocks,
    num_k_blocks,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
    POWER: tl.constexpr,
):
    """Reduces the columns of scratch to rows of a map over the key blocks ``begin .. end``, each divided by its sum.

    ``COLUMNS`` columns are a key block, ``written`` of all have been written; ``normaliser [ROWS]`` is infinite for
    rows that count for nothing.
    """
    CHUNK: tl.constexpr = 64 // COLUMNS
    BLOCKS: tl.constexpr = ROWS // BLOCK_Q
    row = tl.arange(0, ROWS)
    block = first_block + tl.arange(0, BLOCKS)
    map_rows = map_ptr + block.to(tl.int64) * num_k_blocks
    total = tl.zeros([BLOCKS], tl.float32)
    for first in range(begin, end, CHUNK):
        column = first * COLUMNS + tl.arange(0, CHUNK * COLUMNS)
        logs = tl.load(
            columns_ptr + column[:, None] * ROWS + row[None, :], mask=column[:, None] < written, other=-float("inf")
        )
        shares = (logs - normaliser[None, :]).reshape(CHUNK, COLUMNS, BLOCKS, BLOCK_Q)
        if SUM and POWER == 1:
            values = tl.sum(tl.sum(tl.exp2(shares), 3), 1)
        elif not SUM and POWER == INFINITE:
            values = tl.exp2(tl.max(tl.max(shares, 3), 1))
        else:
            values = tl.exp2(_power_mean(shares, SUM, POWER))
        total += tl.sum(values, 0)
        k_block = first + tl.arange(0, CHUNK)
        inside = (k_block[:, None] < end) & (block[None, :] < num_q_blocks)
        tl.store(map_rows[None, :] + k_block[:, None], values, mask=inside)
    # What other threads of this program have stored is read from here on.
    tl.debug_barrier()
    factor = 1.0 / tl.where(total > 0, total, 1.0)
    for first in range(begin, end, 256):
        k_block = first + tl.arange(0, 256)
        inside = (block[:, None] < num_q_blocks) & (k_block[None, :] < end)
        pointers = map_rows[:, None] + k_block[None, :]
        tl.store(pointers, tl.load(pointers, mask=inside) * factor[:, None], mask=inside)


@triton.jit(
    do_not_specialize=[
        "whole_start",
        "whole_q",
        "whole_k",
        "section_heads",
        "num_tiles",
        "num_q_blocks",
        "num_k_blocks",
    ]
)
def attention_map_fwd(
    q_ptr,
    k_tiles,
    v_tiles,
    out_ptr,
    maps_ptr,
    maxima_ptr,
    sums_ptr,
    sinks_ptr,
    geometry_ptr,
    starts_ptr,
    rows_ptr,
    ticket_ptr,
    whole_start,
    whole_q,
    whole_k,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    heads,
    all_heads,
    section_heads,
    num_tiles,
    num_q_blocks,
    num_k_blocks,
    slot,
    scale,
    inner_scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUMS: tl.constexpr,
    POWERS: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ALIGN: tl.constexpr = max(KEYS, BLOCK_K)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    own = tl.program_id(0).to(tl.int64) * slot
    if maxima_ptr is not None:
        maxima_ptr += own
    if sums_ptr is not None:
        sums_ptr += own
    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)

    # Tickets share out the tiles: sections of heads one after the other, in a section late (long) tiles first. Which
    # program computes a tile does not change the result.
    work = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while work < all_heads * num_tiles:
        section = work // (section_heads * num_tiles)
        rest = work - section * section_heads * num_tiles
        here = tl.minimum(section_heads, all_heads - section * section_heads)
        tile = num_tiles - 1 - rest // here
        flat_head = section * section_heads + rest % here
        batch = flat_head // heads
        head = flat_head % heads

        q_slot, k_slot, q_start, q_len = 0, 0, whole_start, whole_q
        if geometry_ptr is not None:
            q_slot = tl.load(geometry_ptr + batch * 4)
            k_slot = tl.load(geometry_ptr + batch * 4 + 1)
            q_start = tl.load(geometry_ptr + batch * 4 + 2)
            q_len = tl.load(geometry_ptr + batch * 4 + 3)
        if rows_ptr is None:
            tile_first = q_start // BLOCK_Q * BLOCK_Q + tile * ROWS
            wanted = tile_first + r
            first = tl.maximum(tile_first, q_start)
            last = tl.minimum(tile_first + ROWS, q_start + q_len) - 1
        else:
            # The listed blocks that are neighbours in the list, wherever they lie; they ascend, so `first .. last`
            # spans them all. Slots past the end of the list repeat its last block; their map rows are not written.
            row = tile * (ROWS // BLOCK_Q)
            last_row = tl.minimum(row + ROWS // BLOCK_Q, num_q_blocks) - 1
            listed = tl.load(rows_ptr + tl.minimum(row + r // BLOCK_Q, last_row))
            wanted = listed * BLOCK_Q + r % BLOCK_Q
            first = tl.load(rows_ptr + row) * BLOCK_Q
            last = tl.minimum((tl.load(rows_ptr + last_row) + 1) * BLOCK_Q, q_len) - 1
        # Tiles of shorter rows of the batch may hold no query.
        if first <= last:
            # Slots without a query act as their nearest real neighbour and count for nothing in the end.
            real = (wanted >= first) & (wanted <= last)
            position = tl.minimum(tl.maximum(wanted, first), last)
            token = q_slot + position - q_start
            q_base = q_ptr + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
            q_offset = token.to(tl.int64) * q_stride_t
            q = tl.load(q_base + q_offset[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)

            # Keys before `begin` are of earlier documents, those of `whole .. diagonal` are visible to all rows.
            begin = 0
            whole = 0
            first_key = None
            if starts_ptr is not None:
                starts = starts_ptr + batch.to(tl.int64) * whole_k + k_slot
                first_key = tl.load(starts + position)
                begin = tl.load(starts + first) // ALIGN * ALIGN
                whole = tl.cdiv(tl.load(starts + last), KEYS) * KEYS
            diagonal = tl.maximum((first + 1) // KEYS * KEYS, begin)
            end = last + 1

            top = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for part in tl.static_range(3):
                if part > 0 or starts_ptr is not None:
                    acc, top, total = _walk(
                        acc,
                        top,
                        total,
                        q,
                        position,
                        first_key,
                        k_tiles,
                        v_tiles,
                        maxima_ptr,
                        sums_ptr,
                        batch,
                        head // GROUP,
                        k_slot,
                        begin if part == 0 else (tl.minimum(whole, diagonal) if part == 1 else diagonal),
                        tl.minimum(whole, diagonal) if part == 0 else (diagonal if part == 1 else end),
                        scale,
                        inner_scale,
                        ROWS=ROWS,
                        KEYS=KEYS,
                        COLUMN=COLUMN,
                        BLOCK_D=BLOCK_D,
                        MASKED=part != 1,
                        CAPPED=CAPPED,
                        PRECISION=PRECISION,
                    )

            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
                new_top = tl.maximum(top, sink)
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.exp2(sink - new_top)
                acc = acc * shrink[:, None]
                top = new_top
            if v_tiles is not None:
                out_base = out_ptr + batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
                pointers = out_base + token.to(tl.int64)[:, None] * out_stride_t + d[None, :]
                out = (acc / total[:, None]).to(DTYPE)
                tl.store(pointers, out, mask=real[:, None] & (d[None, :] < D))

            normaliser = tl.where(real, top + tl.log2(total), float("inf"))
            tl.debug_barrier()
            for form in tl.static_range(len(SUMS)):
                _write_map(
                    maps_ptr + (form * all_heads + flat_head).to(tl.int64) * num_q_blocks * num_k_blocks,
                    sums_ptr if SUMS[form] else maxima_ptr,
                    normaliser,
                    begin // BLOCK_K,
                    last // BLOCK_K + 1,
                    tl.cdiv(end, KEYS) * (KEYS // COLUMN),
                    tile * (ROWS // BLOCK_Q),
                    num_q_blocks,
                    num_k_blocks,
                    ROWS=ROWS,
                    BLOCK_Q=BLOCK_Q,
                    COLUMNS=BLOCK_K // COLUMN,
                    SUM=SUMS[form],
                    POWER=POWERS[form],
                )
            # The next tile writes over the scratch.
            tl.debug_barrier()
        work = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
