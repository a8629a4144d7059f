"""A few tokens times an NF4 or FP4 weight, unpacked nowhere: y_MN = x_MK @ W_NK.T + bias_N.

Each code is looked up in a table of sixteen values, one cache line that every thread of a warp reads at once.

Shape legend: M = tokens, N = out_features (rows), K = in_features (columns), B = blocks of 64 elements of the flat weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import check_bias, check_codebook4, check_nested, check_tokens, result
from qlazy_kernels.gemv import default_tile
from qlazy_kernels.inner import one_a_thread, store_tile
from qlazy_kernels.tiles import Tile


def gemv_codebook4(
    x: Tensor,
    weight_packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    rows: int,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a few tokens by an NF4 or FP4 weight: `w = code[nibble] * absmax` of its block of 64 elements.

    Four bytes are read at a time, as the little-endian word p::

        bit     31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        weight  k=8p+6   k=8p+7   k=8p+4   k=8p+5   k=8p+2   k=8p+3   k=8p     k=8p+1

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device; K a multiple of 64, so that blocks do not cross rows.
        weight_packed: (N K / 2,) uint8, contiguous, same device, on a multiple of four bytes.
        absmax: (B,) float32; with `nested` uint8.
        code: (16,) float32, the value of each code.
        nested: Where absmax is stored in 8 bits: the 256 values of its codes, (ceil(B / 256),) its own absmax, () its offset.
        bias: (N,) floating, or None.
        rows: N.
        tile: How to cut the work; None = by number of tokens.
        out: (..., N) of x's dtype to write into; None = new.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and a copy of `x` where it is not contiguous.
    """
    columns = x.shape[-1]
    check_codebook4(weight_packed, absmax, code, rows, columns, nested=nested is not None)
    check_nested(nested, absmax)
    if columns % 64 or weight_packed.data_ptr() % 4:
        raise ValueError(
            f"{columns} columns at address {weight_packed.data_ptr()}: a row must be whole blocks of 64, and start on 4 bytes."
        )
    x_MK = check_tokens(x, columns, weight_packed.device)
    check_bias(bias, rows, weight_packed.device)
    tokens = x_MK.shape[0]
    y = result(out, (*x.shape[:-1], rows), x.dtype, x.device)
    if tokens == 0:
        return y
    tile = default_tile(4, tokens) if tile is None else tile
    values, nested_absmax, offset = (code, code, code) if nested is None else nested
    with torch.cuda.device_of(x):
        gemv_codebook4_kernel[(triton.cdiv(rows, tile.block_n), triton.cdiv(tokens, tile.block_m))](
            x_MK,
            weight_packed.view(torch.int32),
            absmax,
            code,
            values,
            nested_absmax,
            offset,
            x_MK if bias is None else bias,
            y,
            tokens,
            rows,
            columns,
            NESTED=nested is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


@triton.jit
def gemv_codebook4_kernel(
    x_MK,
    packed,
    absmax_B,
    code,
    nested_code,
    nested_absmax,
    offset,
    bias_N,
    y_MN,
    tokens,
    rows,
    columns,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M tokens by BLOCK_N rows, all of K; laid out as in `inner.multiply_rows`."""
    WORDS: tl.constexpr = BLOCK_K // 8
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_M
    n = first + tl.arange(0, BLOCK_N)[None, :, None]
    m = first_token + tl.arange(0, BLOCK_M)[:, None, None]
    word = tl.arange(0, WORDS)[None, None, :]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    words_NP = packed + n * (columns // 8) + word
    x_tile = x_MK + (m * columns + k)
    absmax_N = absmax_B + n * (columns // 64)
    total = tl.full((BLOCK_M, BLOCK_N, WORDS), 0.0, tl.float32)
    for start in range(0, columns, BLOCK_K):
        at = start // 8
        ok = (n < rows) & (word < columns // 8 - at)
        words = tl.load(one_a_thread(words_NP, at, 4), mask=ok, other=0, eviction_policy="evict_first")
        words = words.to(tl.uint32, bitcast=True)
        # The cast comes right after the load: Triton's interpreter computes in bfloat16 wrongly.
        x_at = tl.max_contiguous(x_tile + start, (1, 1, 8))  # those of its word to a thread, no more
        x = tl.load(x_at, mask=(m < tokens) & (k < columns - start), other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCK_M, 1, WORDS, 2, 2, 2)))
        k04, k26 = tl.split(even)
        k15, k37 = tl.split(odd)
        x0, x4 = tl.split(k04)
        x2, x6 = tl.split(k26)
        x1, x5 = tl.split(k15)
        x3, x7 = tl.split(k37)
        product = _look_up(code, words, 4) * x0
        product += _look_up(code, words, 0) * x1
        product += _look_up(code, words, 12) * x2
        product += _look_up(code, words, 8) * x3
        product += _look_up(code, words, 20) * x4
        product += _look_up(code, words, 16) * x5
        product += _look_up(code, words, 28) * x6
        product += _look_up(code, words, 24) * x7
        block = n * (columns // 64) + (at + word) // 8
        if NESTED:
            place = tl.load(one_a_thread(absmax_N, (at + word) // 8, 1), mask=ok, other=0).to(tl.int32)
            scale = tl.load(one_a_thread(nested_absmax, block // 256, 4), mask=ok, other=0.0)
            absmax = tl.load(one_a_thread(nested_code, place, 4)) * scale + tl.load(offset)
        else:
            absmax = tl.load(one_a_thread(absmax_N, (at + word) // 8, 4), mask=ok, other=0.0)
        total += product * absmax
    store_tile(y_MN, tl.sum(total, axis=2), bias_N, first_token, first, tokens, rows, HAS_BIAS)


@triton.jit
def _look_up(code, words, SHIFT: tl.constexpr):
    return tl.load(one_a_thread(code, ((words >> SHIFT) & 0xF).to(tl.int32), 4))
