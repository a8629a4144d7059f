"""The inside of the products: a tile of packed words times the activations that belong to it.

What makes `multiply_rows`, for few tokens, cheap, per weight one mask, one multiply-add and a fraction of a shift:

- A thread holds one 32-bit word of several rows, and the eight (int8: four) activations that lie beside its codes: both are
  read in storage order, x in 16-byte loads, and no value ever changes its thread.
- A code is turned into a float without a conversion. The bits of `word & 0xF0`, read as a float, are the subnormal number
  `code * 2**4 * 2**-149`, and multiply-adds take subnormal numbers at full speed. The factor 2**-4 that evens out the place of
  the code, and 2**64 that keeps the product among the normal numbers, go onto x once for all rows.
- Zero and scale come in once for each word or span: sum((code - zero) * x) = sum(code * x) - zero * sum(x).

Shape legend in docstrings: M = tokens, N = rows, W = words of a tile along K.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_rows(
    x_MK,
    packed_NP,
    scale_NG,
    zero_NG,
    first,
    tokens,
    rows,
    columns,
    words,
    groups,
    spans_per_group,
    BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The first BLOCK_M tokens by BLOCK_N rows from `first` on, a multiple of BLOCK_N; fp32."""
    CODES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = BLOCK_K // CODES
    n = first + tl.arange(0, BLOCK_N)[None, :, None]
    m = tl.arange(0, BLOCK_M)[:, None, None]
    word = tl.arange(0, WORDS)[None, None, :]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    packed = packed_NP + n * words + word
    x_tile = x_MK + (m * columns + k)
    scales = scale_NG + n * groups
    # Up to eight rows have their zeros in one word, as `first` is a multiple of them.
    zero_row = n if BLOCK_N > 8 else first + tl.arange(0, 1)[None, :, None]
    zeros = zero_NG + zero_row // 8 * groups
    zero_shift = (n % 8 * 4).to(tl.int32)
    zero = tl.full((1, BLOCK_N, WORDS), 1 << (BITS - 1), tl.int32)
    if ONE_GROUP and HAS_ZERO:
        zero = (tl.load(zeros, mask=zero_row < rows, other=0) >> zero_shift & 0xF) + zero * 0
    total = tl.full((BLOCK_M, BLOCK_N, WORDS), 0.0, tl.float32)
    for start in range(0, columns, BLOCK_K):
        at = start // CODES
        word_ok = word < words - at
        codes = tl.load(one_a_thread(packed, at, 4), mask=(n < rows) & word_ok, other=0, eviction_policy="evict_first")
        # The cast comes right after the load: Triton's interpreter computes in bfloat16 wrongly.
        x_at = tl.max_contiguous(x_tile + start, (1, 1, CODES))  # those of its word to a thread, no more
        x = tl.load(x_at, mask=(m < tokens) & (k < columns - start), other=0.0).to(tl.float32)
        if not ONE_GROUP:
            group = (at + word) // (SPAN // CODES) // spans_per_group
            scale = tl.load(one_a_thread(scales, group, 2), mask=(n < rows) & word_ok, other=0.0).to(tl.float32)
            if HAS_ZERO:
                zero = tl.load(one_a_thread(zeros, group, 4), mask=(zero_row < rows) & word_ok, other=0) >> zero_shift & 0xF
        if BITS == 4:
            x_parts = tl.reshape(x, (BLOCK_M, 1, WORDS, 2, 2, 2))
            product = times_int4(codes, x_parts, zero, x_MK.dtype.element_ty == tl.float32)
        else:
            x_parts = tl.reshape(x, (BLOCK_M, 1, WORDS, 2, 2))
            product = times_int8(codes, x_parts, zero, x_MK.dtype.element_ty == tl.float32)
        total += product if ONE_GROUP else product * scale
    y = tl.sum(total, axis=2) * 38685626227668133590597632.0  # 2**85
    if ONE_GROUP:
        row = first + tl.arange(0, BLOCK_N)
        y *= tl.load(scale_NG + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def one_a_thread(pointers, offset, SIZE: tl.constexpr):
    """Pointers (1, N, W) plus an offset, to SIZE bytes each: a thread has one word of every row, its neighbour the next.

    The compiler lays a load out by what it knows of the addresses: the axis along which they are contiguous comes first, and as
    many as are aligned go to one thread. Said to be contiguous in pairs and aligned to one element, all loads of a tile and the
    activations beside them have one layout in every release of Triton, and no value changes its thread.
    """
    return tl.max_contiguous(tl.multiple_of(pointers + offset, (1, 1, SIZE)), (1, 1, 2))


@triton.jit
def times_int4(words, x, zero, EXACT: tl.constexpr):
    """Sum of (code - zero) * x over the eight codes of each word, times 2**-85.

    Args: words (1, N, W) int32, x (M, 1, W, 2, 2, 2) fp32, zero (1, N, W) int32. Returns (M, N, W).
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
    total += _place(codes, 0, 4, zero, EXACT) * (x0 * 18446744073709551616.0)  # 2**64
    total += _place(codes, 4, 4, zero, EXACT) * (x1 * 1152921504606846976.0)  # 2**60
    total += _place(codes, 8, 4, zero, EXACT) * (x2 * 72057594037927936.0)  # 2**56
    total += _place(codes, 12, 4, zero, EXACT) * (x3 * 4503599627370496.0)  # 2**52
    total += _place(codes, 16, 4, zero, EXACT) * (x4 * 281474976710656.0)  # 2**48
    total += _place(high, 8, 4, zero, EXACT) * (x5 * 72057594037927936.0)
    total += _place(high, 12, 4, zero, EXACT) * (x6 * 4503599627370496.0)
    total += _place(high, 16, 4, zero, EXACT) * (x7 * 281474976710656.0)
    return total


@triton.jit
def times_int8(words, x, zero, EXACT: tl.constexpr):
    """The same of the four bytes of each word; x (M, 1, W, 2, 2)."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    codes = words.to(tl.uint32, bitcast=True)
    high = codes >> 16
    total = _offset((x0 + x1) + (x2 + x3), zero, EXACT)
    total += _place(codes, 0, 8, zero, EXACT) * (x0 * 18446744073709551616.0)  # 2**64
    total += _place(codes, 8, 8, zero, EXACT) * (x1 * 72057594037927936.0)  # 2**56
    total += _place(high, 0, 8, zero, EXACT) * (x2 * 18446744073709551616.0)
    total += _place(high, 8, 8, zero, EXACT) * (x3 * 72057594037927936.0)
    return total


@triton.jit
def _offset(x_sum, zero, EXACT: tl.constexpr):
    """What a sum of products starts from: the zero's share, once for all codes of a word."""
    if EXACT:
        start = tl.zeros_like(zero).to(tl.float32) * tl.zeros_like(x_sum)
    else:
        start = zero.to(tl.float32) * (x_sum * -2.5849394142282115e-26)  # -2**-85
    return start


@triton.jit
def _place(codes, SHIFT: tl.constexpr, BITS: tl.constexpr, zero, EXACT: tl.constexpr):
    """The code at bit SHIFT as a subnormal float: value or distance from zero, times 2**(SHIFT - 149)."""
    value = (codes & (((1 << BITS) - 1) << SHIFT)).to(tl.float32, bitcast=True)
    if EXACT:
        value -= (zero << SHIFT).to(tl.float32, bitcast=True)
    return value


@triton.jit
def multiply_tile(
    x_rows,
    token_ok,
    packed_NP,
    scale_NG,
    zero_NG,
    n,
    row_ok,
    step,
    steps,
    columns,
    words,
    groups,
    spans_per_group,
    BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Steps of BLOCK_K columns, from `step` until `steps`, of a tile of results, (BLOCK_M, BLOCK_N) fp32."""
    SPANS: tl.constexpr = BLOCK_K // SPAN
    CODES: tl.constexpr = 8 if BITS == 4 else 1
    WORDS: tl.constexpr = SPAN // CODES
    k = tl.arange(0, BLOCK_K)
    span = tl.arange(0, SPANS)
    word = span[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for index in range(step, steps):
        start = index * BLOCK_K
        x = tl.load(x_rows + (start + k)[None, :], mask=token_ok[:, None] & (start + k < columns)[None, :], other=0.0)
        at = start // CODES + word
        word_ok = row_ok[:, None, None] & (at < words)[None, :, :]
        packed = tl.load(packed_NP + n[:, None, None] * words + at[None, :, :], mask=word_ok, other=0)
        group = start // SPAN + span
        if ONE_GROUP:
            group = span * 0
        else:
            group = group // spans_per_group
        group_ok = row_ok[:, None] & (group < groups)[None, :]
        scale = tl.load(scale_NG + n[:, None] * groups + group[None, :], mask=group_ok, other=0.0).to(tl.float32)
        if BITS == 4:
            code = (packed[:, :, :, None] >> (tl.arange(0, 8) * 4)[None, None, None, :]) & 0xF
            if HAS_ZERO:
                zeros = tl.load(zero_NG + (n // 8)[:, None] * groups + group[None, :], mask=group_ok, other=0)
                code -= (zeros >> (n % 8 * 4).to(tl.int32)[:, None] & 0xF)[:, :, None, None]
            else:
                code -= 8
            weight = code.to(tl.float32) * scale[:, :, None, None]
        else:
            weight = (packed.to(tl.float32) - 128.0) * scale[:, :, None]
        weight = tl.reshape(weight, (BLOCK_N, BLOCK_K)).to(x.dtype)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def store_tile(y_MN, y, bias_N, first_token, first, tokens, rows, HAS_BIAS: tl.constexpr):
    """A tile of results (M, N) from a token and a row on: the bias, one rounding, and only what is there."""
    token = first_token + tl.arange(0, y.shape[0])
    row = first + tl.arange(0, y.shape[1])
    if HAS_BIAS:
        y += tl.load(bias_N + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_MN + token[:, None] * rows + row[None, :],
        y.to(y_MN.dtype.element_ty),
        mask=(token < tokens)[:, None] & (row < rows)[None, :],
    )
