"""Cosine and sine for gate vectors: Triton's own take some 40 instructions each and branch for large angles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(angle):
    """Cosine and sine of fp32 angles of at most 1e6, to 1e-7 absolutely; one reduction for both, no branch.

    On a GPU, where products are fused with the sums that follow; if they are rounded first, to 2e-6 and at most 1e5.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # Quarter turns in three parts (Cody and Waite), so that what is left loses nothing.
    rest = angle - quarter * 1.5703125
    rest = rest - quarter * 4.837512969970703125e-4
    rest = rest - quarter * 7.549789954891882e-8
    square = rest * rest
    c = 2.443315711809948e-5 * square - 1.388731625493765e-3
    c = (c * square + 4.166664568298827e-2) * square - 0.5
    c = c * square + 1.0
    s = -1.9515295891e-4 * square + 8.3321608736e-3
    s = (s * square - 1.6666654611e-1) * square
    s = s * rest + rest
    turns = quarter.to(tl.int32)
    odd = (turns & 1) != 0
    sign_s = (turns & 2) << 30
    sign_c = ((turns + 1) & 2) << 30
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = (cos.to(tl.int32, bitcast=True) ^ sign_c).to(tl.float32, bitcast=True)
    sin = (sin.to(tl.int32, bitcast=True) ^ sign_s).to(tl.float32, bitcast=True)
    return cos, sin
