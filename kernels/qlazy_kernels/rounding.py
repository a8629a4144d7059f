"""What the quantizers round by: operations with one IEEE-754 answer, each rounded by itself, as `quantize.py` says."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_weight(pointers, ok, FP8: tl.constexpr):
    """Weights in fp32; the bytes of float8_e4m3fn are widened by their bits, which every generation can."""
    if FP8:
        byte = tl.load(pointers, mask=ok, other=0).to(tl.int32)
        magnitude = byte & 0x7F
        value = (magnitude << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2**120
        value = tl.where(magnitude == 0x7F, float("nan"), value)
        value = tl.where(byte >= 128, -value, value)
    else:
        # The cast comes right after the load: Triton's interpreter computes in bfloat16 wrongly.
        value = tl.load(pointers, mask=ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def round_even(x):
    """To the nearest integer, halves to the even one: exact for |x| < 2**22, and beyond that every clamp here cuts off."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23


@triton.jit
def clamp_code(q, zero):
    """Clamp to what codes 0 to 15 can stand for."""
    return tl.minimum(tl.maximum(q, -zero[:, :, None]), (15.0 - zero)[:, :, None])


@triton.jit
def round_scale(scale, span, STORED: tl.constexpr):
    """`scale` as it will be stored, in fp32: never 0, and 1 for a group of zeros."""
    least = 1.1754943508222875e-38  # 2**-126
    if STORED == tl.float16:  # noqa: SIM300
        scale = scale.to(tl.float16).to(tl.float32)
        least = 5.960464477539063e-08  # 2**-24, its least subnormal
    elif STORED == tl.bfloat16:  # noqa: SIM300
        bits = scale.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(span == 0, 1.0, tl.maximum(scale, least))


@triton.jit
def tree_sum(x, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, LEVELS: tl.constexpr):
    """Sum over the last axis, always the same tree: fold the upper half onto the lower. Two terms add up the same both ways."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (8, BLOCK_G, 2, GROUP >> (level + 1))), axis=2)
    return tl.reshape(x, (8, BLOCK_G))
