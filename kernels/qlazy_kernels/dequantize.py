"""Unpack weights into a dtype that matrix products take: every packed word read once, fp32 arithmetic, one rounding at the end.

For many tokens a product with unpacked weights is fastest: call these with `start`, `stop` and `out`, one block of rows after
the other, so that what stands unpacked at any time is one block.

Shape legend: N = out_features (rows), K = in_features (columns), G = groups along K, P = packed words along K, B = blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import FLOATS, check_codebook4, check_int4, check_int8, check_nested, result
from qlazy_kernels.tiles import Tile, span_of

TILE = Tile(block_n=8, block_k=256)
"""Default: 2,048 weights a program, sixteen a thread."""

BLOCK = 64
"""Elements that share an absmax in NF4 and FP4."""


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
    stop, dtype = _rows(start, stop, extent.rows), _dtype(dtype, weight_scale)
    weight = result(out, (stop - start, extent.columns), dtype, weight_packed.device)
    span = span_of(extent.group_size, tile.block_k) if extent.groups > 1 else tile.block_k
    grid = (triton.cdiv(stop - start, tile.block_n), triton.cdiv(extent.columns, tile.block_k))
    with torch.cuda.device_of(weight):
        dequantize_int4_kernel[grid](
            weight_packed,
            weight_scale,
            weight_packed if weight_zero_point is None else weight_zero_point,
            weight,
            start,
            stop,
            extent.columns,
            extent.words,
            extent.groups,
            max(1, extent.group_size // span),
            HAS_ZERO=weight_zero_point is not None,
            ONE_GROUP=extent.groups == 1,
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
    """Turn eight-bit codes into a weight: `w = q * scale`, one byte `q` in -127..127 a weight.

    Args:
        weight_packed: (N, K) int8, contiguous, on a CUDA device; any N and K.
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
    stop, dtype = _rows(start, stop, extent.rows), _dtype(dtype, weight_scale)
    weight = result(out, (stop - start, extent.columns), dtype, weight_packed.device)
    span = span_of(extent.group_size, tile.block_k) if extent.groups > 1 else tile.block_k
    grid = (triton.cdiv(stop - start, tile.block_n), triton.cdiv(extent.columns, tile.block_k))
    with torch.cuda.device_of(weight):
        dequantize_int8_kernel[grid](
            weight_packed,
            weight_scale,
            weight,
            start,
            stop,
            extent.columns,
            extent.groups,
            max(1, extent.group_size // span),
            ONE_GROUP=extent.groups == 1,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
        )
    return weight


def dequantize_codebook4(
    weight_packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    rows: int,
    columns: int,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype,
    tile: Tile = TILE,
    out: Tensor | None = None,
) -> Tensor:
    """Turn NF4 or FP4 codes into a weight: `w = code[nibble] * absmax` of its block of 64 elements of the flat weight.

    Bits of the byte j of `weight_packed`::

        bit      7..4     3..0
        element  2j       2j+1      of the weight, row after row

    Args:
        weight_packed: (ceil(N K / 2),) uint8, contiguous, on a CUDA device.
        absmax: (B,) float32; with `nested` uint8.
        code: (16,) float32, the value of each code.
        nested: Where absmax is stored in 8 bits: the 256 values of its codes, (ceil(B / 256),) its own absmax, () its
            offset, all float32: `absmax = values[absmax] * nested_absmax + offset`.
        rows: N.
        columns: K.
        start: First row; even where K is odd.
        stop: One past the last row; None = N.
        dtype: float16, bfloat16 or float32.
        tile: How to cut the work; its rows and columns are taken together, as the weight is flat.
        out: (stop - start, K) of `dtype` to write into; None = new.

    Returns:
        Rows `start` to `stop` of the weight, contiguous, same device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and nothing beside it.
    """
    check_codebook4(weight_packed, absmax, code, rows, columns, nested=nested is not None)
    check_nested(nested, absmax)
    stop = _rows(start, stop, rows)
    weight = result(out, (stop - start, columns), _dtype(dtype, code), weight_packed.device)
    first, count = start * columns, (stop - start) * columns
    if first % 2:
        raise ValueError(
            f"Row {start} of {columns} columns starts at element {first}, in the middle of a byte; take an even row."
        )
    size = tile.block_n * tile.block_k
    values, nested_absmax, offset = (code, code, code) if nested is None else nested
    with torch.cuda.device_of(weight):
        dequantize_codebook4_kernel[(triton.cdiv(count, size),)](
            weight_packed,
            absmax,
            code,
            values,
            nested_absmax,
            offset,
            weight,
            first // 2,
            -(-count // 2),
            count,
            NESTED=nested is not None,
            SIZE=size,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # absmax is a product and a sum, each rounded, as it is everywhere else
        )
    return weight


@triton.jit
def dequantize_int4_kernel(
    packed_NP,
    scale_NG,
    zero_NG,
    weight_NK,
    start,
    stop,
    columns,
    words,
    groups,
    spans_per_group,
    HAS_ZERO: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One tile of BLOCK_N rows and BLOCK_K columns, which lie as (SPANS, words of a span, codes of a word)."""
    SPANS: tl.constexpr = BLOCK_K // SPAN
    # 64 bits: N * K passes 2^31 in the output heads of large models.
    n = start + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    word = span[:, None] * (SPAN // 8) + tl.arange(0, SPAN // 8)[None, :]
    k = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    row_ok = n < stop
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
    weight = code.to(tl.float32) * scale[:, :, None, None]
    inside = row_ok[:, None, None, None] & (k < columns)[None, :, :, :]
    at = (n - start)[:, None, None, None] * columns + k[None, :, :, :]
    tl.store(weight_NK + at, weight.to(weight_NK.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_int8_kernel(
    packed_NK,
    scale_NG,
    weight_NK,
    start,
    stop,
    columns,
    groups,
    spans_per_group,
    ONE_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One tile of BLOCK_N rows and BLOCK_K columns, which lie as (SPANS, SPAN)."""
    SPANS: tl.constexpr = BLOCK_K // SPAN
    n = start + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    k = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    row_ok = n < stop
    group = span * 0 if ONE_GROUP else span // spans_per_group
    group_ok = row_ok[:, None] & (group < groups)[None, :]
    inside = row_ok[:, None, None] & (k < columns)[None, :, :]
    code = tl.load(packed_NK + (n[:, None, None] * columns + k[None, :, :]), mask=inside, other=0)
    scale = tl.load(scale_NG + n[:, None] * groups + group[None, :], mask=group_ok, other=0.0).to(tl.float32)
    weight = code.to(tl.float32) * scale[:, :, None]
    at = (n - start)[:, None, None] * columns + k[None, :, :]
    tl.store(weight_NK + at, weight.to(weight_NK.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_codebook4_kernel(
    packed,
    absmax_B,
    code,
    nested_code,
    nested_absmax,
    offset,
    weight,
    first_byte,
    packed_count,
    count,
    NESTED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """SIZE elements, the first of them in byte `first_byte`."""
    begin = tl.program_id(0).to(tl.int64) * (SIZE // 2)
    byte = begin + tl.arange(0, SIZE // 2)
    ok = byte < packed_count
    pair = tl.load(packed + first_byte + byte, mask=ok, other=0).to(tl.int32)
    nibble = (pair[:, None] >> (4 - tl.arange(0, 2) * 4)[None, :]) & 0xF
    # Both elements of a byte lie in one block.
    scale = load_absmax(absmax_B, nested_code, nested_absmax, offset, (first_byte + byte) // 32, ok, NESTED)
    values = tl.reshape(tl.load(code + nibble) * scale[:, None], (SIZE,))
    at = begin * 2 + tl.arange(0, SIZE)
    tl.store(weight + at, values.to(weight.dtype.element_ty), mask=at < count)


@triton.jit
def load_absmax(absmax_B, nested_code, nested_absmax, offset, block, ok, NESTED: tl.constexpr):
    """The fp32 absmax of blocks, unpacked from its 8 bits where it is nested."""
    if NESTED:
        place = tl.load(absmax_B + block, mask=ok, other=0).to(tl.int32)
        scale = tl.load(nested_absmax + block // 256, mask=ok, other=0.0)
        absmax = tl.load(nested_code + place) * scale + tl.load(offset)
    else:
        absmax = tl.load(absmax_B + block, mask=ok, other=0.0)
    return absmax


def _rows(start: int, stop: int | None, rows: int) -> int:
    stop = rows if stop is None else stop
    if not 0 <= start < stop <= rows:
        raise ValueError(f"Rows {start} to {stop} of a weight of {rows} rows: 0 <= start < stop <= rows must hold.")
    return stop


def _dtype(dtype: torch.dtype | None, scale: Tensor) -> torch.dtype:
    dtype = scale.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"The result is to be {dtype}; it must be float16, bfloat16 or float32.")
    return dtype
