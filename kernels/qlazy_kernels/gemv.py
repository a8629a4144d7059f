"""A few tokens times a packed weight, the weight read once and never written down: y_MN = x_MK @ W_NK.T + bias_N.

Made for M = 1 to 16, where the time is that of reading the packed bytes; `inner.py` says what makes it cheap. The sums are fp32
in an order that depends on the tile alone: no atomics, the same bits every time.

Limits: |x| < 2**64; a product is exact to 2**-64 (far below what float16, bfloat16 or float32 activations carry).

Shape legend: M = tokens, N = out_features (rows), K = in_features (columns), G = groups along K, P = packed words along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import Extent, check_bias, check_int4, check_int8, check_tokens, result
from qlazy_kernels.inner import multiply_rows, store_tile
from qlazy_kernels.tiles import Tile, next_power_of_two, span_of

TILES = {
    4: {
        1: Tile(block_m=1, block_n=8, block_k=1024),
        2: Tile(block_m=2, block_n=8, block_k=1024),
        4: Tile(block_m=4, block_n=4, block_k=512, num_warps=2),
        8: Tile(block_m=8, block_n=2, block_k=1024),
    },
    8: {
        1: Tile(block_m=1, block_n=8, block_k=512),
        2: Tile(block_m=2, block_n=8, block_k=512),
        4: Tile(block_m=4, block_n=4, block_k=512),
        8: Tile(block_m=8, block_n=2, block_k=512),
    },
}
"""Default tile by bits and number of tokens, rounded up; more than eight go in blocks of eight. One word a thread and row."""


def gemv_int4(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a few tokens by a four-bit weight in the logical layout: `w = (code - zero) * scale`.

    Bits of the word p in a row of `weight_packed`, and of the word i in a column of `weight_zero_point`::

        bit   31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        code  k=8p+7   k=8p+6   k=8p+5   k=8p+4   k=8p+3   k=8p+2   k=8p+1   k=8p
        zero  n=8i+7   n=8i+6   n=8i+5   n=8i+4   n=8i+3   n=8i+2   n=8i+1   n=8i
        read as  ------- (word >> 12) & mask ----  ---------------- word & mask ----------------

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device.
        weight_packed: (N, ceil(K / 8)) int32, contiguous, same device; any N and K.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous. G divides K into groups of whole words; G = 1 is the row.
        weight_zero_point: (ceil(N / 8), G) int32, contiguous; None = 8 everywhere (symmetric).
        bias: (N,) floating, or None.
        tile: How to cut the work; None = by number of tokens.
        out: (..., N) of x's dtype to write into; None = new.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and a copy of `x` where it is not contiguous.
    """
    extent = check_int4(weight_packed, weight_scale, weight_zero_point, x.shape[-1])
    return _gemv(x, weight_packed, weight_scale, weight_zero_point, bias, extent, 4, tile, out)


def gemv_int8(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a few tokens by an eight-bit weight: `w = (code - 128) * scale`.

    A row is read four bytes at a time, as the word p::

        bit   31..24    23..16    15..8     7..0
        code  k=4p+3    k=4p+2    k=4p+1    k=4p
        read as  (word >> 16) & mask   --- word & mask ---

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device.
        weight_packed: (N, K) uint8, contiguous, same device, on a multiple of four bytes; K a multiple of 4, any N.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous. G divides K into groups of multiples of 4.
        bias: (N,) floating, or None.
        tile: How to cut the work; None = by number of tokens.
        out: (..., N) of x's dtype to write into; None = new.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and a copy of `x` where it is not contiguous.
    """
    extent = check_int8(weight_packed, weight_scale)
    if extent.group_size % 4 or weight_packed.data_ptr() % 4:
        raise ValueError(
            f"Groups of {extent.group_size} columns at address {weight_packed.data_ptr()}: both must be multiples of 4, "
            "as four bytes are read at a time."
        )
    words = weight_packed.view(torch.int32)
    return _gemv(x, words, weight_scale, None, bias, extent._replace(words=words.shape[1]), 8, tile, out)


def default_tile(bits: int, tokens: int) -> Tile:
    """The tile for a number of tokens.

    Args:
        bits: 4 or 8.
        tokens: M, at least 1.

    Returns:
        One of `TILES`.
    """
    return TILES[bits][min(next_power_of_two(tokens), max(TILES[bits]))]


def row_span(extent: Extent, tile: Tile) -> int:
    """Columns that are summed up before their scale comes in.

    Args:
        extent: Sizes of the weight.
        tile: How its work is cut.

    Returns:
        A power of two.
    """
    # A row of one group has any length: its scale comes in at the end.
    return min(128, tile.block_k) if extent.groups == 1 else span_of(extent.group_size, tile.block_k)


def _gemv(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    extent: Extent,
    bits: int,
    tile: Tile | None,
    out: Tensor | None,
) -> Tensor:
    x_MK = check_tokens(x, extent.columns, words.device)
    check_bias(bias, extent.rows, words.device)
    tokens = x_MK.shape[0]
    y = result(out, (*x.shape[:-1], extent.rows), x.dtype, x.device)
    if tokens == 0:
        return y
    tile = default_tile(bits, tokens) if tile is None else tile
    span = row_span(extent, tile)
    grid = (triton.cdiv(extent.rows, tile.block_n), triton.cdiv(tokens, tile.block_m))
    with torch.cuda.device_of(words):
        gemv_kernel[grid](
            x_MK,
            words,
            scale,
            words if zero_point is None else zero_point,
            x_MK if bias is None else bias,
            y,
            tokens,
            extent.rows,
            extent.columns,
            extent.words,
            extent.groups,
            1 if extent.groups == 1 else extent.group_size // span,
            BITS=bits,
            ONE_GROUP=extent.groups == 1,
            HAS_ZERO=zero_point is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


@triton.jit
def gemv_kernel(
    x_MK,
    packed_NP,
    scale_NG,
    zero_NG,
    bias_N,
    y_MN,
    tokens,
    rows,
    columns,
    words,
    groups,
    spans_per_group,
    BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """BLOCK_M tokens by BLOCK_N rows, all of K."""
    # 64 bits: N * P passes 2^31 in stacked experts.
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_M
    y = multiply_rows(
        x_MK + first_token * columns,
        packed_NP,
        scale_NG,
        zero_NG,
        first,
        tokens - first_token,
        rows,
        columns,
        words,
        groups,
        spans_per_group,
        BITS,
        ONE_GROUP,
        HAS_ZERO,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPAN,
    )
    store_tile(y_MN, y, bias_N, first_token, first, tokens, rows, HAS_BIAS)
