"""Tokens times the packed experts of a mixture-of-experts layer, all of them in one launch.

Tokens come sorted by expert. `group_blocks` cuts them into blocks of `block_m` that never mix two experts, on the device and
without waiting for it: how many blocks there are is bounded by the number of tokens and experts; the last ones may be empty.

Shape legend: T = rows of x (tokens times experts a token, where each is sorted on its own), E = experts, N = out_features of an
expert, K = in_features, G = groups along K, P = packed elements along K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import FLOATS, check_int4, check_int8, check_tensors, check_tokens, result
from qlazy_kernels.gemm import default_tile
from qlazy_kernels.inner import multiply_tile
from qlazy_kernels.tiles import Tile, span_of


class Blocks(NamedTuple):
    """Which tokens each program takes."""

    expert: Tensor
    """(B,) int32: the expert of each block; E where a block is empty."""
    first: Tensor
    """(B,) int32: its first token in the sorted order."""
    end: Tensor
    """(E,) int32: one past the last token of each expert."""
    block_m: int
    """Tokens of a block."""


def group_blocks(counts: Tensor, tokens: int, block_m: int) -> Blocks:
    """Cut sorted tokens into blocks of one expert each.

    Args:
        counts: (E,) integers: tokens of each expert; they add up to `tokens`.
        tokens: T.
        block_m: Tokens of a block.

    Returns:
        ceil(T / block_m) + E blocks; nothing here waits for the device.

    Memory: a few integers for each block.
    """
    end = counts.cumsum(0)
    blocks = (counts + block_m - 1) // block_m
    last = blocks.cumsum(0)
    number = torch.arange(-(-tokens // block_m) + counts.shape[0], device=counts.device)
    expert = torch.searchsorted(last, number, right=True)
    owner = expert.clamp(max=counts.shape[0] - 1)
    first = (end - counts)[owner] + (number - (last - blocks)[owner]) * block_m
    return Blocks(expert.int(), first.int(), end.int(), block_m)


def grouped_gemm_int4(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    blocks: Blocks,
    *,
    index: Tensor | None = None,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each token by the four-bit weight of its expert; bits lie as `gemm_int4` draws them, expert after expert.

    Args:
        x: (T, K) float16, bfloat16 or float32, sorted by expert, on a CUDA device; with `index` in any order and number.
        weight_packed: (E, N, ceil(K / 8)) int32, contiguous, same device.
        weight_scale: (E, N, G) floating, contiguous.
        weight_zero_point: (E, ceil(N / 8), G) int32, contiguous; None = 8 everywhere (symmetric).
        blocks: From `group_blocks`.
        index: (T,) int32 or int64: the row of `x` that is the token at each place of the sorted order; None = x is sorted.
        tile: How to cut the work; its `block_m` is that of `blocks`, `split_k` does not count. None = by it.
        out: (T, N) of x's dtype to write into; None = new.

    Returns:
        (T, N) in the dtype of `x`, in the sorted order.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result.
    """
    check_tensors(3, weight_packed=weight_packed, weight_scale=weight_scale, weight_zero_point=weight_zero_point)
    zeros = None if weight_zero_point is None else weight_zero_point[0]
    check_int4(weight_packed[0], weight_scale[0], zeros, x.shape[-1])
    return _grouped(x, weight_packed, weight_scale, weight_zero_point, blocks, index, 4, tile, out)


def grouped_gemm_int8(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    blocks: Blocks,
    *,
    index: Tensor | None = None,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each token by the eight-bit weight of its expert, `w = (code - 128) * scale`, one byte a weight.

    Args:
        x: (T, K) float16, bfloat16 or float32, sorted by expert, on a CUDA device; with `index` in any order and number.
        weight_packed: (E, N, K) uint8, contiguous, same device.
        weight_scale: (E, N, G) floating, contiguous.
        blocks: From `group_blocks`.
        index: (T,) int32 or int64: the row of `x` that is the token at each place of the sorted order; None = x is sorted.
        tile: How to cut the work; its `block_m` is that of `blocks`, `split_k` does not count. None = by it.
        out: (T, N) of x's dtype to write into; None = new.

    Returns:
        (T, N) in the dtype of `x`, in the sorted order.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result.
    """
    check_tensors(3, weight_packed=weight_packed, weight_scale=weight_scale)
    check_int8(weight_packed[0], weight_scale[0])
    return _grouped(x, weight_packed, weight_scale, None, blocks, index, 8, tile, out)


def _grouped(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    blocks: Blocks,
    index: Tensor | None,
    bits: int,
    tile: Tile | None,
    out: Tensor | None,
) -> Tensor:
    experts, rows, words = packed.shape
    groups, columns = scale.shape[2], x.shape[-1]
    check_tensors(1, expert=blocks.expert, first=blocks.first, end=blocks.end)
    for name, tensor in (("weight_scale", scale), ("weight_zero_point", zero_point), ("blocks.end", blocks.end)):
        if tensor is not None and tensor.shape[0] != experts:
            raise ValueError(f"{name} is for {tensor.shape[0]} experts, weight_packed for {experts}.")
    if blocks.expert.device != packed.device or x.dim() != 2:
        raise ValueError(f"blocks are on {blocks.expert.device}, x has {x.dim()} dimensions; {packed.device} and 2 are needed.")
    width = columns if bits == 8 else -(-columns // 8)
    if words != width:
        raise ValueError(f"x has {columns} columns, weight_packed {words} elements a row; {width} are needed.")
    x_MK = check_tokens(x, columns, packed.device)
    if index is not None:
        check_tensors(1, index=index, weight_packed=packed.view(-1))
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"index is {index.dtype}; it must be torch.int32 or torch.int64.")
    assert x.dtype in FLOATS
    tile = default_tile(blocks.block_m, x.dtype) if tile is None else tile
    if tile.block_m != blocks.block_m:
        raise ValueError(f"The tile takes {tile.block_m} tokens, blocks have {blocks.block_m}; they must be the same.")
    y = result(out, (x_MK.shape[0] if index is None else index.shape[0], rows), x.dtype, x.device)
    group_size = columns // groups
    span = tile.block_k if groups == 1 else span_of(group_size, tile.block_k)
    with torch.cuda.device_of(x):
        grouped_gemm_kernel[(triton.cdiv(rows, tile.block_n), blocks.expert.shape[0])](
            x_MK,
            blocks.expert if index is None else index,
            packed,
            scale,
            packed if zero_point is None else zero_point,
            blocks.expert,
            blocks.first,
            blocks.end,
            y,
            experts,
            rows,
            columns,
            words,
            groups,
            1 if groups == 1 else group_size // span,
            BITS=bits,
            ONE_GROUP=groups == 1,
            HAS_ZERO=zero_point is not None,
            HAS_INDEX=index is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


@triton.jit
def grouped_gemm_kernel(
    x_MK,
    index_T,
    packed_ENP,
    scale_ENG,
    zero_ENG,
    block_expert,
    block_first,
    expert_end,
    y_TN,
    experts,
    rows,
    columns,
    words,
    groups,
    spans_per_group,
    BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """BLOCK_M tokens of one expert by BLOCK_N of its rows, all of K."""
    expert = tl.load(block_expert + tl.program_id(1)).to(tl.int64)
    if expert < experts:
        t = tl.load(block_first + tl.program_id(1)) + tl.arange(0, BLOCK_M)
        token_ok = t < tl.load(expert_end + expert)
        m = t.to(tl.int64)
        if HAS_INDEX:
            m = tl.load(index_T + t, mask=token_ok, other=0).to(tl.int64)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = multiply_tile(
            x_MK + m[:, None] * columns,
            token_ok,
            packed_ENP + expert * rows * words,
            scale_ENG + expert * rows * groups,
            zero_ENG + expert * tl.cdiv(rows, 8) * groups,
            n,
            n < rows,
            0,
            tl.cdiv(columns, BLOCK_K),
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
        y = y_TN + t.to(tl.int64)[:, None] * rows + n[None, :]
        tl.store(y, total.to(y_TN.dtype.element_ty), mask=token_ok[:, None] & (n < rows)[None, :])
