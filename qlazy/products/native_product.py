"""Compiled products with low-bit weights, and their dequantization. Each stands aside for what it does not take."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from qlazy import native

INT4, INT8, CODEBOOK4 = range(3)
"""Kinds of weight, as in `csrc/product.c`."""

# Arguments go over as a row of 64-bit integers, addresses among them, as the structs of the C code have them: to make one of
# ctypes' own structures takes longer than a small product.
_PRODUCT, _BLOCK = struct.Struct("19q"), struct.Struct("16q")


class Weight(NamedTuple):
    """A low-bit weight as the loops read it; all tensors on the host and contiguous."""

    kind: int
    """`INT4`, `INT8` or `CODEBOOK4`."""
    shape: tuple[int, int]
    """N and K."""
    group_size: int
    """Columns that share a scale, a divisor of K."""
    packed: Tensor
    """As `qlazy.formats` has it."""
    scale: Tensor
    """(N, G) in any float dtype; of codebooks the absmax, float32 or where nested uint8, for every 64 weights."""
    zero: Tensor | None = None
    """int32 (ceil(N/8), G); None where symmetric."""
    nested: tuple[Tensor, Tensor, Tensor] | None = None
    """Nested absmax, offset, and the 256 values of `scale`."""
    code: Tensor | None = None
    """float32 (16,), the values of a codebook."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """Multiply a few tokens by a low-bit weight without unpacking it; each packed byte is read from memory once.

    Columns of x become 16-bit integers with one scale for every 32 of them (two such planes in float32), products are summed
    exactly within a vector lane and then in float32: the error is that of rounding y, as in torch's own product.

    Args:
        x: (..., K) in bfloat16, float16 or float32, at least one token.
        weight: The weight.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`; None where the loop does not take it, or there is no compiler.

    Memory: the result and ten bytes for each element of x.
    """
    loops = native.library()
    x_dtype = native.DTYPES.get(x.dtype)
    if loops is None or x_dtype is None or not _taken(weight) or not x.is_cpu:
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    rows, columns = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    arguments = _PRODUCT.pack(
        *_addresses(weight),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        weight.kind,
        native.DTYPES.get(weight.scale.dtype, 1),
        x_dtype,
        0 if bias is None else native.DTYPES[bias.dtype],
        x.numel() // columns,
        rows,
        columns,
        weight.group_size,
        torch.get_num_threads(),
    )
    return None if loops.qlazy_linear(arguments) else y


def dequantize(weight: Weight, start: int, stop: int, out: Tensor) -> bool:
    """Rows of a weight as the model computes with them: code times scale in float32, rounded once.

    Args:
        weight: The weight.
        start: First row.
        stop: One past the last row.
        out: (stop - start, K) in bfloat16, float16 or float32, contiguous, to write to.

    Returns:
        False where the loop does not take it, or there is no compiler.

    Memory: none.
    """
    loops = native.library()
    dtype = native.DTYPES.get(out.dtype)
    if loops is None or dtype is None or not _taken(weight) or not native.on_cpu(out):
        return False
    arguments = _BLOCK.pack(
        *_addresses(weight),
        out.data_ptr(),
        weight.kind,
        native.DTYPES.get(weight.scale.dtype, 1),
        dtype,
        start,
        stop - start,
        weight.shape[1],
        weight.group_size,
        torch.get_num_threads(),
    )
    loops.qlazy_dequantize(arguments)
    return True


def takes(weight: Weight) -> bool:
    """Whether the loops know this kind of weight, wherever it lies.

    Args:
        weight: The weight.

    Returns:
        True where they do.
    """
    columns, group = weight.shape[1], weight.group_size
    return not (columns % 8 or (group % 32 and group != columns) or (weight.kind == CODEBOOK4 and columns % 64))


def _taken(weight: Weight) -> bool:
    packed, scale = weight.packed, weight.scale
    return takes(weight) and packed.is_cpu and packed.is_contiguous() and scale.is_contiguous()


def _addresses(weight: Weight) -> tuple[int, int, int, int, int, int, int]:
    zero, nested, code = weight.zero, weight.nested, weight.code
    return (
        weight.packed.data_ptr(),
        weight.scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        *((0, 0, 0) if nested is None else (nested[0].data_ptr(), nested[1].data_ptr(), nested[2].data_ptr())),
        0 if code is None else code.data_ptr(),
    )
