"""Tokens times a packed weight on tensor cores: tiles of the weight are unpacked in registers, never written to memory.

Made for M = 2 to 64, where the bytes of the weight still cost more than the arithmetic: the columns are shared out among
`split_k` programs that write fp32 parts, and a second kernel adds the parts in order: the result is the same every time. With
`split_k = 1` it is a product with the unpacking fused in. For many tokens unpack blocks of rows instead (`dequantize.py`) and
multiply them with the vendor's library.

A weight is (code - zero) * scale in fp32, rounded once to the dtype of x, as the unpacked weight would be; products are summed
in fp32.

Shape legend: M = tokens, N = out_features (rows), K = in_features (columns), G = groups along K, P = packed elements along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import Extent, check_bias, check_int4, check_int8, check_tokens, result
from qlazy_kernels.inner import multiply_tile, store_tile
from qlazy_kernels.tiles import Tile, span_of

TILES = {
    16: Tile(block_m=16, block_n=32, block_k=128, split_k=4, num_warps=4, num_stages=3),
    32: Tile(block_m=32, block_n=64, block_k=64, split_k=4, num_warps=4, num_stages=3),
    64: Tile(block_m=64, block_n=64, block_k=64, split_k=2, num_warps=4, num_stages=3),
    128: Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
}
"""Default tile by number of tokens, rounded up."""

FLOAT32_TILE = Tile(block_m=16, block_n=32, block_k=32, split_k=4, num_warps=4, num_stages=2)
"""For any number of tokens in float32, which no tensor core multiplies: a larger one would not fit the registers."""

REDUCE_SIZE = 1024
"""Results that a program of the reduction adds up."""


def gemm_int4(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    tile: Tile | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply tokens by a four-bit weight in the logical layout: `w = (code - zero) * scale`.

    Bits of the word p in a row of `weight_packed`, and of the word i in a column of `weight_zero_point`::

        bit   31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        code  k=8p+7   k=8p+6   k=8p+5   k=8p+4   k=8p+3   k=8p+2   k=8p+1   k=8p
        zero  n=8i+7   n=8i+6   n=8i+5   n=8i+4   n=8i+3   n=8i+2   n=8i+1   n=8i

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device.
        weight_packed: (N, ceil(K / 8)) int32, contiguous, same device; any N and K.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous. G divides K into groups of whole words; G = 1 is the row.
        weight_zero_point: (ceil(N / 8), G) int32, contiguous; None = 8 everywhere (symmetric).
        bias: (N,) floating, or None.
        tile: How to cut the work; None = by number of tokens.
        workspace: float32, at least `split_k * M * N` elements where `split_k` is more than 1; None = new.
        out: (..., N) of x's dtype to write into; None = new.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, the workspace, and a copy of `x` where it is not contiguous.
    """
    extent = check_int4(weight_packed, weight_scale, weight_zero_point, x.shape[-1])
    return _gemm(x, weight_packed, weight_scale, weight_zero_point, bias, extent, 4, tile, workspace, out)


def gemm_int8(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    tile: Tile | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply tokens by an eight-bit weight: `w = (code - 128) * scale`, one byte a weight.

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device.
        weight_packed: (N, K) uint8, contiguous, same device; any N and K.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous; G divides K.
        bias: (N,) floating, or None.
        tile: How to cut the work; None = by number of tokens.
        workspace: float32, at least `split_k * M * N` elements where `split_k` is more than 1; None = new.
        out: (..., N) of x's dtype to write into; None = new.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, the workspace, and a copy of `x` where it is not contiguous.
    """
    extent = check_int8(weight_packed, weight_scale)
    return _gemm(x, weight_packed, weight_scale, None, bias, extent, 8, tile, workspace, out)


def default_tile(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """The tile for a number of tokens.

    Args:
        tokens: M, at least 1.
        dtype: Of the activations.

    Returns:
        One of `TILES`, or `FLOAT32_TILE`.
    """
    if dtype == torch.float32:
        return FLOAT32_TILE
    return TILES[min(size for size in TILES if size >= min(tokens, max(TILES)))]


def _gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    extent: Extent,
    bits: int,
    tile: Tile | None,
    workspace: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    x_MK = check_tokens(x, extent.columns, packed.device)
    check_bias(bias, extent.rows, packed.device)
    tokens = x_MK.shape[0]
    y = result(out, (*x.shape[:-1], extent.rows), x.dtype, x.device)
    if tokens == 0:
        return y
    tile = default_tile(tokens, x.dtype) if tile is None else tile
    # No more parts than there are tiles along K.
    steps = triton.cdiv(extent.columns, tile.block_k)
    split_k = min(tile.split_k, steps)
    span = tile.block_k if extent.groups == 1 else span_of(extent.group_size, tile.block_k)
    parts = y if split_k == 1 else _workspace(workspace, split_k * tokens * extent.rows, x.device)
    grid = (triton.cdiv(extent.rows, tile.block_n), triton.cdiv(tokens, tile.block_m), split_k)
    with torch.cuda.device_of(packed):
        gemm_kernel[grid](
            x_MK,
            packed,
            scale,
            packed if zero_point is None else zero_point,
            x_MK if bias is None else bias,
            parts,
            tokens,
            extent.rows,
            extent.columns,
            extent.words,
            extent.groups,
            1 if extent.groups == 1 else extent.group_size // span,
            triton.cdiv(steps, split_k),
            BITS=bits,
            ONE_GROUP=extent.groups == 1,
            HAS_ZERO=zero_point is not None,
            HAS_BIAS=bias is not None and split_k == 1,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if split_k > 1:
            add_parts_kernel[(triton.cdiv(y.numel(), REDUCE_SIZE),)](
                parts,
                x_MK if bias is None else bias,
                y,
                y.numel(),
                extent.rows,
                SPLIT_K=split_k,
                HAS_BIAS=bias is not None,
                SIZE=REDUCE_SIZE,
                num_warps=4,
            )
    return y


@triton.jit
def gemm_kernel(
    x_MK,
    packed_NP,
    scale_NG,
    zero_NG,
    bias_N,
    y_SMN,
    tokens,
    rows,
    columns,
    words,
    groups,
    spans_per_group,
    steps_per_part,
    BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """BLOCK_M tokens by BLOCK_N rows, the columns of one part."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_M
    n = first + tl.arange(0, BLOCK_N)
    m = first_token + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    step = part * steps_per_part
    steps = tl.minimum(step + steps_per_part, tl.cdiv(columns, BLOCK_K))
    total = multiply_tile(
        x_MK + m[:, None] * columns,
        m < tokens,
        packed_NP,
        scale_NG,
        zero_NG,
        n,
        n < rows,
        step,
        steps,
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
    y_MN = y_SMN + part.to(tl.int64) * tokens * rows
    store_tile(y_MN, total, bias_N, first_token, first, tokens, rows, HAS_BIAS)


@triton.jit
def add_parts_kernel(part_SMN, bias_N, y_MN, count, rows, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    """SIZE results: their parts added in order, the bias, one rounding."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    ok = at < count
    total = tl.full((SIZE,), 0.0, tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(part_SMN + part * count + at, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_N + at % rows, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_MN + at, total.to(y_MN.dtype.element_ty), mask=ok)


def _workspace(given: Tensor | None, count: int, device: torch.device) -> Tensor:
    if given is None:
        return torch.empty(count, dtype=torch.float32, device=device)
    if given.dtype != torch.float32 or given.numel() < count or given.device != device or not given.is_contiguous():
        raise ValueError(
            f"workspace is {given.dtype} with {given.numel()} elements on {given.device}; "
            f"it must be contiguous torch.float32 with at least {count} on {device}."
        )
    return given
