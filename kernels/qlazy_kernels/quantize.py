"""Quantize on the device, straight into packed storage: one pass, the bytes that the plain PyTorch definition gives on a CPU.

Equal bytes, because only operations with one IEEE-754 answer are used, each rounded by itself: no fused multiply-add, division
rounded to nearest, the sum of squares by one fixed tree (the upper half of a group added onto the lower, again and again), the
same order of candidates, a later one taken only if strictly less. Rounding to bfloat16 is done on the bits.

A group that holds a NaN or an infinity gets a scale that is NaN; its codes mean nothing.

Weights come in bfloat16, float16, float32, or as the bytes of float8_e4m3fn (uint8), any rows at a time: what a group becomes
depends on that group alone.

Shape legend: N = out_features (rows), K = in_features (columns), G = groups along K, P = packed words along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import check_tensors, check_weight, float_dtype, result
from qlazy_kernels.rounding import clamp_code, load_weight, round_even, round_scale, tree_sum
from qlazy_kernels.tiles import Tile, next_power_of_two

INT4_GROUPS = (32, 64, 128)
"""Group sizes of `quantize_int4`; for others the tree of the sum has other branches."""

INT4_ELEMENTS = 2048
"""Weights that a program takes in four bits: eight rows, so that it owns the words that the zeros of a group are packed in."""

INT8_TILE = Tile(block_n=2, block_k=1024)


def quantize_int4(
    weight: Tensor,
    factors: Tensor,
    *,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    out: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Four-bit codes with the scale, and where asymmetric the integer zero, of least squared error among the candidates.

    The first candidate is plain rounding, the others its scale times a factor; the best is fitted to its codes.
    Bits of the word p in a row of codes and of the word i in a column of zeros, as `qlazy_kernels.dequantize` reads them::

        bit   31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        code  k=8p+7   k=8p+6   k=8p+5   k=8p+4   k=8p+3   k=8p+2   k=8p+1   k=8p
        zero  n=8i+7   n=8i+6   n=8i+5   n=8i+4   n=8i+3   n=8i+2   n=8i+1   n=8i

    Args:
        weight: (N, K) floating, or uint8 for the bytes of float8_e4m3fn; contiguous, on a CUDA device. Any N; where a weight
            comes in blocks of rows, each block but the last is a multiple of eight.
        factors: Candidates, float32, on the same device, tried in this order; the first is 1.
        group_size: 32, 64 or 128; divides K.
        symmetric: True: the zero is 8 everywhere and is not stored.
        scale_dtype: float16, bfloat16 or float32.
        out: Storage to write: packed (N, K / 8) int32, scale (N, G), zeros (ceil(N / 8), G) int32 or None; None = new.

    Returns:
        Packed codes, scale, zeros (None where symmetric).

    Raises:
        ValueError: a shape, dtype, device or group size that does not fit; the message has both numbers.

    Memory: the results.
    """
    rows, columns = check_weight(weight)
    if group_size not in INT4_GROUPS or columns % group_size:
        raise ValueError(f"Group size {group_size} for {columns} columns: it must be one of {INT4_GROUPS} and divide them.")
    float_dtype(scale_dtype)
    check_tensors(1, weight=weight.view(-1), factors=factors)
    if factors.dtype != torch.float32:
        raise ValueError(f"factors are {factors.dtype}; they must be torch.float32.")
    groups, device = columns // group_size, weight.device
    packed_out, scale_out, zero_out = (None, None, None) if out is None else out
    packed = result(packed_out, (rows, columns // 8), torch.int32, device)
    scale = result(scale_out, (rows, groups), scale_dtype, device)
    zero = None if symmetric else result(zero_out, (-(-rows // 8), groups), torch.int32, device)
    block_g = max(1, INT4_ELEMENTS // 8 // group_size)
    with torch.cuda.device_of(weight):
        quantize_int4_kernel[(triton.cdiv(rows, 8), triton.cdiv(groups, block_g))](
            weight,
            factors,
            packed,
            scale,
            packed if zero is None else zero,
            rows,
            groups,
            CANDIDATES=factors.shape[0],
            SYMMETRIC=symmetric,
            FP8=weight.dtype == torch.uint8,
            GROUP=group_size,
            BLOCK_G=block_g,
            LEVELS=group_size.bit_length() - 1,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return packed, scale, zero


def quantize_int8(
    weight: Tensor,
    *,
    group_size: int,
    scale_dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
    tile: Tile = INT8_TILE,
) -> tuple[Tensor, Tensor]:
    """Eight-bit symmetric codes, one byte a weight, the scale spanning the largest magnitude of each group.

    Args:
        weight: (N, K) floating, or uint8 for the bytes of float8_e4m3fn; contiguous, on a CUDA device.
        group_size: Columns that share a scale, any divisor of K; -1 = the whole row.
        scale_dtype: float16, bfloat16 or float32.
        out: Storage to write: codes (N, K) uint8, scale (N, G); None = new.
        tile: `block_n * block_k` weights are taken at a time.

    Returns:
        Codes in 1..255, which are 128 too large, and scale.

    Raises:
        ValueError: a shape, dtype, device or group size that does not fit; the message has both numbers.

    Memory: the results.
    """
    rows, columns = check_weight(weight)
    group_size = columns if group_size == -1 else group_size
    if group_size <= 0 or columns % group_size:
        raise ValueError(f"Group size {group_size} does not divide {columns} columns.")
    float_dtype(scale_dtype)
    codes_out, scale_out = (None, None) if out is None else out
    codes = result(codes_out, (rows, columns), torch.uint8, weight.device)
    scale = result(scale_out, (rows, columns // group_size), scale_dtype, weight.device)
    block_k = min(next_power_of_two(group_size), tile.block_k)
    block_g = max(1, tile.block_n * tile.block_k // block_k)
    with torch.cuda.device_of(weight):
        quantize_int8_kernel[(triton.cdiv(scale.numel(), block_g),)](
            weight,
            codes,
            scale,
            scale.numel(),
            group_size,
            FP8=weight.dtype == torch.uint8,
            BLOCK_G=block_g,
            BLOCK_K=block_k,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return codes, scale


@triton.jit
def quantize_int4_kernel(
    weight_NK,
    factors,
    packed_NP,
    scale_NG,
    zero_NG,
    rows,
    groups,
    CANDIDATES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Eight rows by BLOCK_G groups; a tile is (8, BLOCK_G, GROUP), what a group has in common (8, BLOCK_G)."""
    # 64 bits: N * K passes 2^31 in the output heads of large models.
    n = tl.program_id(0).to(tl.int64) * 8 + tl.arange(0, 8)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    ok = (n < rows)[:, None] & (g < groups)[None, :]
    group = n[:, None] * groups + g[None, :]
    w = load_weight(weight_NK + (group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]), ok[:, :, None], FP8)
    high = tl.max(w, axis=2)
    low = tl.min(w, axis=2)
    if SYMMETRIC:
        span = tl.maximum(high, -low)
        widest = tl.div_rn(span, 7.0)
        middle = span
    else:
        # Zero has to be a code, so the range always takes in 0.
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0)
        span = high - low
        widest = tl.div_rn(span, 15.0)
        middle = (high + low) * 0.5
    scale = span
    zero = span
    least = span
    for index in tl.static_range(CANDIDATES):
        s = round_scale(widest * tl.load(factors + index), span, scale_NG.dtype.element_ty)
        if SYMMETRIC:
            z = tl.full((8, BLOCK_G), 8.0, tl.float32)
        else:
            # Plain rounding puts the lowest weight on code 0; the others put the middle of the range on that of the codes.
            if index == 0:
                z = -tl.div_rn(low, s)
            else:
                z = -tl.div_rn(middle, s) + 7.5
            z = tl.minimum(tl.maximum(round_even(z), 0.0), 15.0)
        # The error in units of the scale: clamp(round(w/s), -zero, 15 - zero) - w/s.
        units = w * tl.div_rn(1.0, s)[:, :, None]
        error = clamp_code(round_even(units), z) - units
        loss = tree_sum(error * error, GROUP, BLOCK_G, LEVELS) * s * s
        if index == 0:
            scale = s
            zero = z
            least = loss
        else:
            better = loss < least
            scale = tl.where(better, s, scale)
            zero = tl.where(better, z, zero)
            least = tl.where(better, loss, least)
    # The scale that fits the codes best, sum(w * q) / sum(q * q). Where every code is the zero there is nothing to fit.
    q = clamp_code(round_even(w * tl.div_rn(1.0, scale)[:, :, None]), zero)
    along = tree_sum(w * q, GROUP, BLOCK_G, LEVELS)
    square = tree_sum(q * q, GROUP, BLOCK_G, LEVELS)
    fitted = round_scale(tl.div_rn(along, tl.where(square > 0, square, 1.0)), square, scale_NG.dtype.element_ty)
    scale = tl.where(square > 0, fitted, scale)
    code = round_even(w * tl.div_rn(1.0, scale)[:, :, None]) + zero[:, :, None]
    code = tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)

    poison = tl.sum(w * 0.0, axis=2)  # NaN once a weight is NaN or infinite
    scale = tl.where(poison == poison, scale, float("nan"))
    tl.store(scale_NG + group, scale.to(scale_NG.dtype.element_ty), mask=ok)
    bits = tl.reshape(code, (8, BLOCK_G, GROUP // 8, 8)) << (tl.arange(0, 8) * 4)[None, None, None, :]
    words = tl.sum(bits, axis=3)
    at = group[:, :, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, None, :]
    tl.store(packed_NP + at, words, mask=ok[:, :, None])
    if not SYMMETRIC:
        # Rows that are not there count 0 in the word of the last ones.
        bits = tl.where(ok, zero, 0.0).to(tl.int32) << (tl.arange(0, 8) * 4)[:, None]
        tl.store(zero_NG + tl.program_id(0).to(tl.int64) * groups + g, tl.sum(bits, axis=0), mask=g < groups)


@triton.jit
def quantize_int8_kernel(
    weight_GK, code_GK, scale_G, groups, group_size, FP8: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr
):
    """BLOCK_G groups, each a run of consecutive weights, read twice: for the largest magnitude, and for the codes."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    group_ok = group < groups
    k = tl.arange(0, BLOCK_K)
    at = group[:, None] * group_size + k[None, :]
    span = tl.full((BLOCK_G,), 0.0, tl.float32)
    poison = tl.full((BLOCK_G,), 0.0, tl.float32)
    for start in range(0, group_size, BLOCK_K):
        ok = group_ok[:, None] & (k < group_size - start)[None, :]
        w = load_weight(weight_GK + at + start, ok, FP8)
        span = tl.maximum(span, tl.max(tl.abs(w), axis=1))
        poison += tl.sum(w * 0.0, axis=1)
    scale = round_scale(tl.div_rn(span, 127.0), span, scale_G.dtype.element_ty)
    inverse = tl.div_rn(1.0, scale)[:, None]
    for start in range(0, group_size, BLOCK_K):
        ok = group_ok[:, None] & (k < group_size - start)[None, :]
        w = load_weight(weight_GK + at + start, ok, FP8)
        code = tl.minimum(tl.maximum(round_even(w * inverse), -127.0), 127.0) + 128.0
        tl.store(code_GK + at + start, code.to(tl.int32).to(tl.uint8), mask=ok)
    scale = tl.where(poison == poison, scale, float("nan"))
    tl.store(scale_G + group, scale.to(scale_G.dtype.element_ty), mask=group_ok)
