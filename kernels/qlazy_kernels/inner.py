"""The inside of the products: a tile of packed words times the activations that belong to it.

What makes `multiply_rows`, for few tokens, cheap, per weight one mask, one multiply-add and a fraction of a shift:

- A thread holds one 32-bit word of several rows, and the eight (int8: four) activations that lie beside its codes: both are
  read in storage order, x in 16-byte loads, and no value ever changes its thread.
- A code is turned into a float without a conversion. The bits of `word & 0xF0`, read as a float, are the subnormal number
  `code * 2**4 * 2**-149`, and multiply-adds take subnormal numbers at full speed. The factor 2**-4 that evens out the place of
  the code, and 2**64 that keeps the product among the normal numbers, go onto x once for all rows.
- Zero and scale come in once for each word or span: sum((code - zero) * x) = sum(code * x) - zero * sum(x).

Shape legend in docstrings: M = tokens, N = rows, S = spans (columns of a tile that share a scale), W = words of a span.
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
    """The first BLOCK_M tokens by BLOCK_N rows from `first` on, fp32. Inside a tile columns lie as (SPANS, WORDS, codes)."""
    CODES: tl.constexpr = 32 // BITS
    SPANS: tl.constexpr = BLOCK_K // SPAN
    WORDS: tl.constexpr = SPAN // CODES
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row_ok = first + n < rows
    token_ok = m < tokens
    span = tl.arange(0, SPANS)
    # One word a thread: then its activations are one vector load of the same thread, and nothing goes through shared memory.
    word = tl.max_contiguous(span[:, None] * WORDS + tl.arange(0, WORDS)[None, :], (1, 1))
    k = word[:, :, None] * CODES + tl.arange(0, CODES)[None, None, :]
    packed = packed_NP + first * words + (n[:, None, None] * words + word[None, :, :])
    x_tile = x_MK + (m[:, None, None, None] * columns + k[None, :, :, :])
    scales = scale_NG + first * groups + n[:, None] * groups
    zeros = zero_NG + (first + n)[:, None] // 8 * groups
    zero_shift = ((first + n) % 8 * 4).to(tl.int32)[:, None]
    zero = tl.full((BLOCK_N, SPANS), 1 << (BITS - 1), tl.int32)
    if ONE_GROUP and HAS_ZERO:
        zero = (tl.load(zeros, mask=row_ok[:, None], other=0) >> zero_shift & 0xF) + zero * 0
    # One token needs no dimension of its own, and Triton 3.6 finds better layouts without it.
    if BLOCK_M == 1:
        total = tl.full((BLOCK_N, SPANS, WORDS), 0.0, tl.float32)
    else:
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
        elif BLOCK_M == 1:
            total += product * scale[:, :, None]
        else:
            total += product * scale[None, :, :, None]
    y = tl.sum(tl.reshape(total, (BLOCK_M, BLOCK_N, SPANS * WORDS)), axis=2) * 38685626227668133590597632.0  # 2**85
    if ONE_GROUP:
        y *= tl.load(scale_NG + first + n, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def times_int4(words, x, zero, EXACT: tl.constexpr):
    """Sum of (code - zero) * x over the eight codes of each word, times 2**-85.

    Args: words (N, S, W) int32, x (M, S, W, 2, 2, 2) fp32, zero (N, S, 1) int32. Returns (M, N, S, W), for one token (N, S, W).
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
    total += outer(_place(codes, 0, 4, zero, EXACT), x0 * 18446744073709551616.0)  # 2**64
    total += outer(_place(codes, 4, 4, zero, EXACT), x1 * 1152921504606846976.0)  # 2**60
    total += outer(_place(codes, 8, 4, zero, EXACT), x2 * 72057594037927936.0)  # 2**56
    total += outer(_place(codes, 12, 4, zero, EXACT), x3 * 4503599627370496.0)  # 2**52
    total += outer(_place(codes, 16, 4, zero, EXACT), x4 * 281474976710656.0)  # 2**48
    total += outer(_place(high, 8, 4, zero, EXACT), x5 * 72057594037927936.0)
    total += outer(_place(high, 12, 4, zero, EXACT), x6 * 4503599627370496.0)
    total += outer(_place(high, 16, 4, zero, EXACT), x7 * 281474976710656.0)
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
    total += outer(_place(codes, 0, 8, zero, EXACT), x0 * 18446744073709551616.0)  # 2**64
    total += outer(_place(codes, 8, 8, zero, EXACT), x1 * 72057594037927936.0)  # 2**56
    total += outer(_place(high, 0, 8, zero, EXACT), x2 * 18446744073709551616.0)
    total += outer(_place(high, 8, 8, zero, EXACT), x3 * 72057594037927936.0)
    return total


@triton.jit
def _offset(x_sum, zero, EXACT: tl.constexpr):
    """What a sum of products starts from: the zero's share, once for all codes of a word."""
    if EXACT:
        start = outer(tl.zeros_like(zero).to(tl.float32), tl.zeros_like(x_sum))
    else:
        start = outer(zero.to(tl.float32), x_sum * -2.5849394142282115e-26)  # -2**-85
    return start


@triton.jit
def outer(weight, x):
    """(N, S, W) times (M, S, W): (M, N, S, W), and for one token (N, S, W)."""
    if x.shape[0] == 1:
        product = weight * x
    else:
        product = weight[None] * x[:, None]
    return product


@triton.jit
def _place(codes, SHIFT: tl.constexpr, BITS: tl.constexpr, zero, EXACT: tl.constexpr):
    """The code at bit SHIFT as a subnormal float, (N, S, W): value or distance from zero, times 2**(SHIFT - 149)."""
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
            weight = packed.to(tl.float32) * scale[:, :, None]
        weight = tl.reshape(weight, (BLOCK_N, BLOCK_K)).to(x.dtype)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total
