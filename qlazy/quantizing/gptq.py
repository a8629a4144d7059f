"""Weights to packed storage with regard to what the layer's inputs were: by `Curvature`, with error feedback, then descent.

What comes out has the layout of `qlazy.quantizing.quantize` to the bit, so whatever reads the one reads the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlazy.errors import UsageError
from qlazy.formats import Int4, Int8
from qlazy.quantizing.curvature import Curvature
from qlazy.quantizing.descent import descend
from qlazy.quantizing.feedback import BLOCK, INT4, INT4_SYMMETRIC, INT8, Grid, round_rows
from qlazy.quantizing.packing import pack_int4, pack_zero_points
from qlazy.quantizing.quantize import is_finite

TILE = 1024
"""Rows at a time."""


def quantize_calibrated(
    weight_NK: Tensor, fmt: Int4 | Int8, curvature: Curvature, *, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Packed tensors whose products with inputs like those seen differ least from the weight's.

    Args:
        weight_NK: Shape (N, K), bfloat16, float16 or float32.
        fmt: Format to store in; its groups divide the columns.
        curvature: Of the layer's inputs.
        scale_dtype: Dtype of the scales.

    Returns:
        The tensors that `fmt.storage(N, K, ...)` lists.

    Raises:
        UsageError: The group size does not divide the columns or 128, or the curvature has other columns.

    Memory: the results, and as `store_calibrated`.
    """
    rows, columns = weight_NK.shape
    name = str(scale_dtype).removeprefix("torch.")
    stored = {
        key: torch.empty(storage.shape, dtype=getattr(torch, storage.dtype), device=weight_NK.device)
        for key, storage in fmt.storage(rows, columns, name).items()
    }
    store_calibrated(
        weight_NK,
        fmt,
        curvature,
        packed_out=stored["weight_packed"],
        scale_out=stored["weight_scale"],
        zero_out=stored.get("weight_zero_point"),
    )
    return stored


def store_calibrated(
    weight_NK: Tensor,
    fmt: Int4 | Int8,
    curvature: Curvature,
    *,
    packed_out: Tensor,
    scale_out: Tensor,
    zero_out: Tensor | None = None,
) -> bool:
    """Quantizes rows of a weight straight into their storage.

    Rows do not depend on each other: a weight may come in pieces of rows, of eight each where zeros are packed.

    Args:
        weight_NK: Shape (N, K), bfloat16, float16 or float32.
        fmt: Format to store in; its groups divide the columns.
        curvature: Of the layer's inputs.
        packed_out: `weight_packed` of these rows.
        scale_out: `weight_scale` of these rows; its dtype is that of the scales.
        zero_out: `weight_zero_point` of these rows; None: symmetric.

    Returns:
        Whether all weights are finite.

    Raises:
        UsageError: The group size does not divide the columns or 128, or the curvature has other columns.

    Memory: six float32 copies of 1024 rows.
    """
    rows, columns = weight_NK.shape
    group = columns if fmt.group_size == -1 else fmt.group_size
    if columns % group or (group != columns and (group > BLOCK or BLOCK % group)):
        raise UsageError(
            f"Calibration takes no groups of {group} of {columns} columns.",
            hint="Use groups of 32, 64 or 128 that divide the columns, or -1 for one scale per row.",
        )
    if curvature.columns != columns:
        raise UsageError(f"A weight with {columns} columns was given the curvature of {curvature.columns} inputs.")
    grid = _grid(fmt)
    for start in range(0, rows, TILE):
        tile = slice(start, min(start + TILE, rows))
        count = tile.stop - tile.start
        planes = torch.zeros((columns, count + -count % 32), dtype=torch.float32, device=weight_NK.device)
        planes[:, :count] = weight_NK[tile].t()
        planes = curvature.corrected(planes)
        rounded = round_rows(planes, curvature, grid, group, scale_out.dtype)
        descend(planes, rounded, curvature, grid, scale_out.dtype)
        scale_out[tile] = rounded.scale[:, :count].t().to(scale_out.dtype)
        if isinstance(fmt, Int8):
            packed_out[tile] = rounded.steps[:, :count].t().add(128).to(torch.uint8)
            continue
        zero = rounded.zero if grid.asymmetric else torch.full_like(rounded.zero, 8.0)
        codes = rounded.steps.view(len(zero), group, -1).add_(zero.unsqueeze(1)).view(columns, -1)[:, :count]
        packed_out[tile] = pack_int4(codes.to(torch.uint8).t().contiguous())
        if zero_out is not None:
            words = slice(start // 8, -(-tile.stop // 8))
            zero_out[words] = pack_zero_points(zero[:, :count].to(torch.uint8).t().contiguous())
    return is_finite(scale_out)


def _grid(fmt: Int4 | Int8) -> Grid:
    if isinstance(fmt, Int8):
        return INT8
    return INT4_SYMMETRIC if fmt.symmetric else INT4
