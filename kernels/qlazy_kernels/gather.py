"""Rows of a packed embedding by their index: what `torch.nn.functional.embedding` does, with only those rows unpacked.

Shape legend: T = indices, N = rows of the table, K = columns, G = groups along K, P = packed words along K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qlazy_kernels.checks import Extent, check_int4, check_int8, float_dtype, result
from qlazy_kernels.dequantize import dequantize_int4_kernel, dequantize_int8_kernel
from qlazy_kernels.tiles import Tile, span_of

TILE = Tile(block_n=1, block_k=1024)
"""Default: a piece of one row a program, as neighbouring indices point anywhere."""


def gather_int4(
    index: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    columns: int | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile = TILE,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of a four-bit table, `w = (code - zero) * scale`; bits lie as `qlazy_kernels.dequantize.dequantize_int4` draws them.

    Args:
        index: (...) int32 or int64, on a CUDA device.
        weight_packed: (N, P) int32, contiguous, same device.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous.
        weight_zero_point: (ceil(N / 8), G) int32, contiguous; None = 8 everywhere (symmetric).
        columns: K, where the last word is not full; None = 8 P.
        dtype: float16, bfloat16 or float32; None = the dtype of the scales.
        tile: How to cut the work.
        out: (..., K) of `dtype` to write into; None = new.

    Returns:
        (..., K) in `dtype`. A row whose index is below 0 or not below N is NaN: it is seen, and nothing else is read.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result.
    """
    extent = check_int4(weight_packed, weight_scale, weight_zero_point, columns)
    zeros = weight_packed if weight_zero_point is None else weight_zero_point
    pointers, fixed = (weight_packed, weight_scale, zeros), {"HAS_ZERO": weight_zero_point is not None}
    return _gather(dequantize_int4_kernel, index, pointers, extent, (extent.words,), fixed, dtype, tile, out)


def gather_int8(
    index: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile = TILE,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of an eight-bit table, `w = (code - 128) * scale`, one byte a weight.

    Args:
        index: (...) int32 or int64, on a CUDA device.
        weight_packed: (N, K) uint8, contiguous, same device.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous; G divides K.
        dtype: float16, bfloat16 or float32; None = the dtype of the scales.
        tile: How to cut the work.
        out: (..., K) of `dtype` to write into; None = new.

    Returns:
        (..., K) in `dtype`. A row whose index is below 0 or not below N is NaN: it is seen, and nothing else is read.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result.
    """
    extent = check_int8(weight_packed, weight_scale)
    return _gather(dequantize_int8_kernel, index, (weight_packed, weight_scale), extent, (), {}, dtype, tile, out)


def _gather(
    kernel: Any,
    index: Tensor,
    pointers: tuple[Tensor, ...],
    extent: Extent,
    words: tuple[int, ...],
    fixed: dict[str, bool],
    dtype: torch.dtype | None,
    tile: Tile,
    out: Tensor | None,
) -> Tensor:
    packed, scale = pointers[:2]
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index is {index.dtype}; it must be torch.int32 or torch.int64.")
    if index.device != packed.device:
        raise ValueError(f"index is on {index.device}, the table on {packed.device}; they need one device.")
    rows = index.reshape(-1).contiguous()
    y = result(out, (*index.shape, extent.columns), float_dtype(dtype, scale), packed.device)
    if rows.numel() == 0:
        return y
    span = span_of(extent.group_size, tile.block_k) if extent.groups > 1 else tile.block_k
    with torch.cuda.device_of(y):
        kernel[(triton.cdiv(rows.numel(), tile.block_n), triton.cdiv(extent.columns, tile.block_k))](
            rows,
            *pointers,
            y,
            0,
            rows.numel(),
            extent.rows,
            extent.columns,
            *words,
            extent.groups,
            max(1, extent.group_size // span),
            ONE_GROUP=extent.groups == 1,
            HAS_INDEX=True,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
            **fixed,
        )
    return y
