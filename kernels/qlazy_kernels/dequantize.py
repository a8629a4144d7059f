"""Unpack weights into a dtype that matrix products take: every packed word read once, fp32 arithmetic, one rounding at the end.

For many tokens a product with unpacked weights is fastest: call these with `start`, `stop` and `out`, one block of rows after
the other, so that what stands unpacked at any time is one block.

Shape legend: N = out_features (rows), K = in_features (columns), G = groups along K, P = packed words along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import check_int4, check_int8, float_dtype, result, row_range
from qlazy_kernels.tiles import Tile, span_of

TILE = Tile(block_n=8, block_k=256)
"""Default: 2,048 weights a program, sixteen a thread."""


def dequantize_int4(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    columns: int | None = None,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile = TILE,
    out: Tensor | None = None,
) -> Tensor:
    """Turn packed four-bit codes into a weight: `w = (code - zero) * scale`.

    Bits of the word p in a row of `weight_packed` (codes of one row), and of the word i in a column of `weight_zero_point`
    (zeros of one group), lowest bit on the right::

        bit   31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        code  k=8p+7   k=8p+6   k=8p+5   k=8p+4   k=8p+3   k=8p+2   k=8p+1   k=8p
        zero  n=8i+7   n=8i+6   n=8i+5   n=8i+4   n=8i+3   n=8i+2   n=8i+1   n=8i

    Args:
        weight_packed: (N, P) int32, contiguous, on a CUDA device; any N.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous, same device. A group is a whole number of words: 32,
            64 or 128 columns, or any K with G = 1.
        weight_zero_point: (ceil(N / 8), G) int32, contiguous, same device; None = 8 everywhere (symmetric).
        columns: K, where the last word is not full; None = 8 P.
        start: First row.
        stop: One past the last row; None = N.
        dtype: float16, bfloat16 or float32; None = the dtype of the scales.
        tile: How to cut the work.
        out: (stop - start, K) of `dtype` to write into; None = new.

    Returns:
        Rows `start` to `stop` of the weight, contiguous, same device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and nothing beside it.
    """
    extent = check_int4(weight_packed, weight_scale, weight_zero_point, columns)
    stop, dtype = row_range(start, stop, extent.rows), float_dtype(dtype, weight_scale)
    weight = result(out, (stop - start, extent.columns), dtype, weight_packed.device)
    span = span_of(extent.group_size, tile.block_k) if extent.groups > 1 else tile.block_k
    grid = (triton.cdiv(stop - start, tile.block_n), triton.cdiv(extent.columns, tile.block_k))
    with torch.cuda.device_of(weight):
        dequantize_int4_kernel[grid](
            weight_packed,
            weight_packed,
            weight_scale,
            weight_packed if weight_zero_point is None else weight_zero_point,
            weight,
            start,
            stop,
            extent.rows,
            extent.columns,
            extent.words,
            extent.groups,
            max(1, extent.group_size // span),
            HAS_ZERO=weight_zero_point is not None,
            ONE_GROUP=extent.groups == 1,
            HAS_INDEX=False,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
        )
    return weight


def dequantize_int8(
    weight_packed: Tensor,
    weight_scale: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile = TILE,
    out: Tensor | None = None,
) -> Tensor:
    """Turn eight-bit codes into a weight: `w = (code - 128) * scale`, one byte a weight.

    Args:
        weight_packed: (N, K) uint8, contiguous, on a CUDA device; any N and K.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous, same device; G divides K.
        start: First row.
        stop: One past the last row; None = N.
        dtype: float16, bfloat16 or float32; None = the dtype of the scales.
        tile: How to cut the work.
        out: (stop - start, K) of `dtype` to write into; None = new.

    Returns:
        Rows `start` to `stop` of the weight, contiguous, same device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and nothing beside it.
    """
    extent = check_int8(weight_packed, weight_scale)
    stop, dtype = row_range(start, stop, extent.rows), float_dtype(dtype, weight_scale)
    weight = result(out, (stop - start, extent.columns), dtype, weight_packed.device)
    span = span_of(extent.group_size, tile.block_k) if extent.groups > 1 else tile.block_k
    grid = (triton.cdiv(stop - start, tile.block_n), triton.cdiv(extent.columns, tile.block_k))
    with torch.cuda.device_of(weight):
        dequantize_int8_kernel[grid](
            weight_packed,
            weight_packed,
            weight_scale,
            weight,
            start,
            stop,
            extent.rows,
            extent.columns,
            extent.groups,
            max(1, extent.group_size // span),
            ONE_GROUP=extent.groups == 1,
            HAS_INDEX=False,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
        )
    return weight


@triton.jit
def dequantize_int4_kernel(
    index_T,
    packed_NP,
    scale_NG,
    zero_NG,
    weight_NK,
    start,
    stop,
    rows,
    columns,
    words,
    groups,
    spans_per_group,
    HAS_ZERO: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One tile of BLOCK_N rows and BLOCK_K columns, which lie as (SPANS, words of a span, codes of a word)."""
    SPANS: tl.constexpr = BLOCK_K // SPAN
    # 64 bits: N * K passes 2^31 in the output heads of large models.
    t = start + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, row_ok, wrong = locate_rows(index_T, t, stop, rows, HAS_INDEX)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    word = span[:, None] * (SPAN // 8) + tl.arange(0, SPAN // 8)[None, :]
    k = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    group = span * 0 if ONE_GROUP else span // spans_per_group
    group_ok = row_ok[:, None] & (group < groups)[None, :]

    packed = tl.load(
        packed_NP + (n[:, None, None] * words + word[None, :, :]), mask=row_ok[:, None, None] & (word < words)[None], other=0
    )
    # Casts come right after the loads: Triton's interpreter computes in bfloat16 wrongly, and fp32 is what the result is
    # defined in.
    scale = tl.load(scale_NG + n[:, None] * groups + group[None, :], mask=group_ok, other=0.0).to(tl.float32)
    code = (packed[:, :, :, None] >> (tl.arange(0, 8) * 4)[None, None, None, :]) & 0xF
    if HAS_ZERO:
        zeros = tl.load(zero_NG + (n // 8)[:, None] * groups + group[None, :], mask=group_ok, other=0)
        code -= (zeros >> ((n % 8) * 4).to(tl.int32)[:, None] & 0xF)[:, :, None, None]
    else:
        code -= 8
    weight = tl.where(wrong[:, None, None, None], float("nan"), code.to(tl.float32) * scale[:, :, None, None])
    inside = (t < stop)[:, None, None, None] & (k < columns)[None, :, :, :]
    at = (t - start)[:, None, None, None] * columns + k[None, :, :, :]
    tl.store(weight_NK + at, weight.to(weight_NK.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_int8_kernel(
    index_T,
    packed_NK,
    scale_NG,
    weight_NK,
    start,
    stop,
    rows,
    columns,
    groups,
    spans_per_group,
    ONE_GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One tile of BLOCK_N rows and BLOCK_K columns, which lie as (SPANS, SPAN)."""
    SPANS: tl.constexpr = BLOCK_K // SPAN
    t = start + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, row_ok, wrong = locate_rows(index_T, t, stop, rows, HAS_INDEX)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    k = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    group = span * 0 if ONE_GROUP else span // spans_per_group
    group_ok = row_ok[:, None] & (group < groups)[None, :]
    columns_ok = (k < columns)[None, :, :]
    code = tl.load(packed_NK + n[:, None, None] * columns + k[None, :, :], mask=row_ok[:, None, None] & columns_ok, other=0)
    scale = tl.load(scale_NG + n[:, None] * groups + group[None, :], mask=group_ok, other=0.0).to(tl.float32)
    weight = tl.where(wrong[:, None, None], float("nan"), (code.to(tl.float32) - 128.0) * scale[:, :, None])
    at = (t - start)[:, None, None] * columns + k[None, :, :]
    tl.store(weight_NK + at, weight.to(weight_NK.dtype.element_ty), mask=(t < stop)[:, None, None] & columns_ok)


@triton.jit
def locate_rows(index_T, t, stop, rows, HAS_INDEX: tl.constexpr):
    """Rows of the weight for rows of the result: which, whether to read them, and whether an index points nowhere."""
    if HAS_INDEX:
        n = tl.load(index_T + t, mask=t < stop, other=0).to(tl.int64)
        wrong = (n < 0) | (n >= rows)
        ok = (t < stop) & (n >= 0) & (n < rows)
    else:
        n = t
        wrong = t < 0
        ok = t < stop
    return n, ok, wrong
