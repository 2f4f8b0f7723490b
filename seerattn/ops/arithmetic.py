"""Functions of numbers that kernels share, where Triton has only slower, more exact ones."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter knows no instructions.
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def log2(x):
    """Logarithm of fp32, to 2e-7 absolutely up to 2 and 2e-7 of itself beyond; Triton's takes some 20 instructions."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)
