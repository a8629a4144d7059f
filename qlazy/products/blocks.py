"""A low-bit weight as values, block of rows by block of rows: what many tokens are multiplied by, and `weight` reads as."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qlazy import gpu
from qlazy.formats import BNB_BLOCK
from qlazy.products import native_product
from qlazy.products.native_product import CODEBOOK4, INT4, INT8, Weight
from qlazy.quantizing import codebook
from qlazy.quantizing.nested import unnest_absmax
from qlazy.quantizing.packing import unpack_int4, unpack_zero_points

BLOCK_ELEMENTS = 1 << 21
"""Elements dequantized at a time: few enough to stay in a cache, enough for torch's product to be at its best."""

GPU_BLOCK_ELEMENTS = 1 << 25
"""The same on a GPU, 64 MiB in 16 bits: enough rows to keep all of it busy."""

ROW_BLOCK = 64
"""Blocks begin at multiples of this, so that they begin on a block of every format."""

assert ROW_BLOCK % BNB_BLOCK == 0


def dequantize_rows(weight: Weight, start: int, stop: int, out: Tensor) -> Tensor:
    """Rows of a weight as the model computes with them: the product of code and scale, rounded once.

    Args:
        weight: On any device.
        start: First row, a multiple of 64.
        stop: One past the last row.
        out: Contiguous (at least stop - start, K), any float dtype, on the same device, to write to.

    Returns:
        The first rows of `out`.

    Memory: without the compiled loops nine bytes for each element.
    """
    rows = out[: stop - start]
    if not _dequantized(weight, start, stop, rows):
        plain = {INT4: _plain_int4, INT8: _plain_int8, CODEBOOK4: _plain_codebook4}[weight.kind]
        rows.copy_(plain(weight, out.dtype, start, stop))
    return rows


def row_ranges(weight: Weight) -> list[tuple[int, int]]:
    """The blocks of rows in which a weight is dequantized.

    Args:
        weight: The weight.

    Returns:
        First row and one past the last: as many elements at a time as the constants say, or 64 rows where these are more.
    """
    rows, columns = weight.shape
    elements = GPU_BLOCK_ELEMENTS if weight.packed.is_cuda else BLOCK_ELEMENTS
    step = max(ROW_BLOCK, elements // columns // ROW_BLOCK * ROW_BLOCK)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def row_blocks(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """A whole weight, dequantized block by block into one scratch.

    Args:
        weight: On any device.
        dtype: Of the values.

    Yields:
        First row, one past the last, and their values, which hold until the next block.

    Memory: the scratch of one block.
    """
    ranges = row_ranges(weight)
    scratch = torch.empty(ranges[0][1], weight.shape[1], dtype=dtype, device=weight.packed.device)
    for start, stop in ranges:
        yield start, stop, dequantize_rows(weight, start, stop, scratch)


def _dequantized(weight: Weight, start: int, stop: int, rows: Tensor) -> bool:
    """Whether a kernel or a compiled loop has done it."""
    if gpu.has_kernels(rows):
        from qlazy.products import triton_products

        return triton_products.dequantize(weight, start, stop, rows)
    return native_product.dequantize(weight, start, stop, rows)


def _plain_int4(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    rows, columns, groups = stop - start, weight.shape[1], weight.scale.shape[1]
    codes = unpack_int4(weight.packed[start:stop], columns)
    zeros = 8 if weight.zero is None else unpack_zero_points(weight.zero[start // 8 : -(-stop // 8)], rows).unsqueeze(2)
    centred = codes.view(rows, groups, columns // groups).to(torch.float32).sub_(zeros)
    return centred.mul_(weight.scale[start:stop].unsqueeze(2)).view(rows, columns).to(dtype)


def _plain_int8(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    block, factors = weight.packed[start:stop], weight.scale[start:stop]
    grouped = block.view(stop - start, factors.shape[1], -1)
    # Codes of 8 bits are exact in every float dtype, and a product of two elements of one dtype is rounded once.
    work = dtype if dtype == factors.dtype else torch.float32
    return grouped.to(work).sub_(128).mul_(factors.to(work).unsqueeze(2)).view(block.shape).to(dtype)


def _plain_codebook4(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    columns, absmax = weight.shape[1], weight.scale
    if weight.nested is not None:
        absmax = unnest_absmax(absmax, weight.nested[0], weight.nested[1])
    kind = "nf4" if weight.code is codebook.CODES["nf4"] else "fp4"
    flat = codebook.dequantize_blocks(weight.packed, absmax, kind, dtype, start * columns, (stop - start) * columns)
    return flat.view(stop - start, columns)
