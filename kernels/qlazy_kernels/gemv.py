"""A few tokens times a packed weight, the weight read once and never written down: y_MN = x_MK @ W_NK.T + bias_N.

Made for M = 1 to 16, where the time is that of reading the packed bytes. What makes it cheap, per weight one mask, one
multiply-add and a fraction of a shift:

- A thread holds one 32-bit word of several rows, and the eight (int8: four) activations that lie beside its codes: both are
  read in storage order, x in 16-byte loads, and no value ever changes its thread.
- A code is turned into a float without a conversion. The bits of `word & 0xF0`, read as a float, are the subnormal number
  `code * 2**4 * 2**-149`, and multiply-adds take subnormal numbers at full speed. The factor 2**-4 that evens out the place of
  the code, and 2**64 that keeps the product among the normal numbers, go onto x once for all rows.
- Zero and scale come in once for each word or span: sum((code - zero) * x) = sum(code * x) - zero * sum(x).

The sums are fp32 in an order that depends on the tile alone: no atomics, the same bits every time.

Limits: |x| < 2**64; a product is exact to 2**-64 (far below what float16, bfloat16 or float32 activations carry).

Shape legend: M = tokens, N = out_features (rows), K = in_features (columns), G = groups along K, P = packed words along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import Extent, check_bias, check_int4, check_int8, check_tokens, result
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
    """Multiply a few tokens by an eight-bit weight: `w = q * scale`.

    A row is read four bytes at a time, as the word p with its sign bits flipped, so that a byte holds q + 128::

        bit   31..24    23..16    15..8     7..0
        code  k=4p+3    k=4p+2    k=4p+1    k=4p
        read as  (word >> 16) & mask   --- word & mask ---

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device.
        weight_packed: (N, K) int8, contiguous, same device, on a multiple of four bytes; K a multiple of 4, any N.
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
    # A row of one group has any length: its scale comes in at the end.
    span = min(128, tile.block_k) if extent.groups == 1 else span_of(extent.group_size, tile.block_k)
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
    """BLOCK_M tokens by BLOCK_N rows, all of K. Inside a tile the columns lie as (SPANS, WORDS, codes of a word)."""
    CODES: tl.constexpr = 32 // BITS
    SPANS: tl.constexpr = BLOCK_K // SPAN
    WORDS: tl.constexpr = SPAN // CODES
    # 64 bits: N * P passes 2^31 in stacked experts.
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_M
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row_ok = first + n < rows
    token_ok = first_token + m < tokens
    span = tl.arange(0, SPANS)
    # One word a thread: then its activations are one vector load of the same thread, and nothing goes through shared memory.
    word = tl.max_contiguous(span[:, None] * WORDS + tl.arange(0, WORDS)[None, :], (1, 1))
    k = word[:, :, None] * CODES + tl.arange(0, CODES)[None, None, :]
    packed = packed_NP + first * words + (n[:, None, None] * words + word[None, :, :])
    x_tile = x_MK + first_token * columns + (m[:, None, None, None] * columns + k[None, :, :, :])
    scales = scale_NG + first * groups + n[:, None] * groups
    zeros = zero_NG + (first + n)[:, None] // 8 * groups
    zero_shift = ((first + n) % 8 * 4).to(tl.int32)[:, None]
    zero = tl.full((BLOCK_N, SPANS), 1 << (BITS - 1), tl.int32)
    if ONE_GROUP and HAS_ZERO:
        zero = (tl.load(zeros, mask=row_ok[:, None], other=0) >> zero_shift & 0xF) + zero * 0
    total = tl.full((BLOCK_M, BLOCK_N, SPANS, WORDS), 0.0, tl.float32)
    for start in range(0, columns, BLOCK_K):
        word_ok = row_ok[:, None, None] & (word < words - start // CODES)[None, :, :]
        codes = tl.load(packed + start // CODES, mask=word_ok, other=0, eviction_policy="evict_first")
        x_ok = token_ok[:, None, None, None] & (k < columns - start)[None, :, :, :]
        # The cast comes right after the load: Triton's interpreter computes in bfloat16 wrongly.
        x = tl.load(x_tile + start, mask=x_ok, other=0.0).to(tl.float32)
        if not ONE_GROUP:
            group = (start // SPAN + span)[None, :] // spans_per_group
            group_ok = row_ok[:, None] & (group < groups)
            scale = tl.load(scales + group, mask=group_ok, other=0.0).to(tl.float32)
            if HAS_ZERO:
                zero = tl.load(zeros + group, mask=group_ok, other=0) >> zero_shift & 0xF
        if BITS == 4:
            x_parts = tl.reshape(x, (BLOCK_M, SPANS, WORDS, 2, 2, 2))
            product = times_int4(codes, x_parts, zero[:, :, None], x_MK.dtype.element_ty == tl.float32)
        else:
            x_parts = tl.reshape(x, (BLOCK_M, SPANS, WORDS, 2, 2))
            product = times_int8(codes, x_parts, zero[:, :, None], x_MK.dtype.element_ty == tl.float32)
        if ONE_GROUP:
            total += product
        else:
            total += product * scale[None, :, :, None]
    y = tl.sum(tl.reshape(total, (BLOCK_M, BLOCK_N, SPANS * WORDS)), axis=2) * 38685626227668133590597632.0  # 2**85
    if ONE_GROUP:
        y *= tl.load(scale_NG + first + n, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_N + first + n, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    store_ok = token_ok[:, None] & row_ok[None, :]
    y_tile = y_MN + first_token * rows + first + (m[:, None] * rows + n[None, :])
    tl.store(y_tile, y.to(y_MN.dtype.element_ty), mask=store_ok)


@triton.jit
def times_int4(words, x, zero, EXACT: tl.constexpr):
    """Sum of (code - zero) * x over the eight codes of each word, times 2**-85.

    Args: words (N, S, W) int32, x (M, S, W, 2, 2, 2) fp32, zero (N, S, 1) int32. Returns (M, N, S, W).
    EXACT takes the zero off each code, one more addition a weight: as precise as fp32 activations are.
    """
    even, odd = tl.split(x)
    k04, k26 = tl.split(even)
    k15, k37 = tl.split(odd)
    x0, x4 = tl.split(k04)
    x2, x6 = tl.split(k26)
    x1, x5 = tl.split(k15)
    x3, x7 = tl.split(k37)
    codes = words.to(tl.uint32, bitcast=True)
    high = codes >> 12  # code 5 would reach into the exponent where it stands
    x_sum = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    total = _offset(x_sum, zero, EXACT)
    total += _place(codes, 0, 4, zero, EXACT) * (x0 * 18446744073709551616.0)[:, None]  # 2**64
    total += _place(codes, 4, 4, zero, EXACT) * (x1 * 1152921504606846976.0)[:, None]  # 2**60
    total += _place(codes, 8, 4, zero, EXACT) * (x2 * 72057594037927936.0)[:, None]  # 2**56
    total += _place(codes, 12, 4, zero, EXACT) * (x3 * 4503599627370496.0)[:, None]  # 2**52
    total += _place(codes, 16, 4, zero, EXACT) * (x4 * 281474976710656.0)[:, None]  # 2**48
    total += _place(high, 8, 4, zero, EXACT) * (x5 * 72057594037927936.0)[:, None]
    total += _place(high, 12, 4, zero, EXACT) * (x6 * 4503599627370496.0)[:, None]
    total += _place(high, 16, 4, zero, EXACT) * (x7 * 281474976710656.0)[:, None]
    return total


@triton.jit
def times_int8(words, x, zero, EXACT: tl.constexpr):
    """Sum of q * x over the four bytes of each word, times 2**-85; x (M, S, W, 2, 2), the rest as in `times_int4`."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    codes = words.to(tl.uint32, bitcast=True) ^ 0x80808080
    high = codes >> 16
    total = _offset((x0 + x1) + (x2 + x3), zero, EXACT)
    total += _place(codes, 0, 8, zero, EXACT) * (x0 * 18446744073709551616.0)[:, None]  # 2**64
    total += _place(codes, 8, 8, zero, EXACT) * (x1 * 72057594037927936.0)[:, None]  # 2**56
    total += _place(high, 0, 8, zero, EXACT) * (x2 * 18446744073709551616.0)[:, None]
    total += _place(high, 8, 8, zero, EXACT) * (x3 * 72057594037927936.0)[:, None]
    return total


@triton.jit
def _offset(x_sum, zero, EXACT: tl.constexpr):
    """What a sum of products starts from: the zero's share, once for all codes of a word."""
    if EXACT:
        start = tl.zeros_like(x_sum)[:, None]
    else:
        start = zero.to(tl.float32)[None] * (x_sum * -2.5849394142282115e-26)[:, None]  # -2**-85
    return start


@triton.jit
def _place(codes, SHIFT: tl.constexpr, BITS: tl.constexpr, zero, EXACT: tl.constexpr):
    """The code at bit SHIFT as a subnormal float, (1, N, S, W): value or distance from zero, times 2**(SHIFT - 149)."""
    value = (codes & (((1 << BITS) - 1) << SHIFT)).to(tl.float32, bitcast=True)
    if EXACT:
        value -= (zero << SHIFT).to(tl.float32, bitcast=True)
    return value[None]
