"""Compiled products with low-bit weights, and their dequantization. Each stands aside for what it does not take."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from qlazy import native

INT4, INT8, CODEBOOK4 = range(3)
"""Kinds of weight, as in `csrc/product.c`."""

_DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}
_A, _I = ctypes.c_void_p, ctypes.c_int64
_WEIGHT = [(name, _A) for name in ("packed", "scale", "zero", "nested_absmax", "nested_offset", "nested_code", "code")]


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


class _Product(ctypes.Structure):
    _fields_ = [
        *_WEIGHT,
        ("x", _A),
        ("bias", _A),
        ("y", _A),
        ("kind", _I),
        ("scale_dtype", _I),
        ("x_dtype", _I),
        ("y_dtype", _I),
        ("bias_dtype", _I),
        ("tokens", _I),
        ("rows", _I),
        ("columns", _I),
        ("group", _I),
        ("threads", _I),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *_WEIGHT,
        ("out", _A),
        ("kind", _I),
        ("scale_dtype", _I),
        ("out_dtype", _I),
        ("first", _I),
        ("rows", _I),
        ("columns", _I),
        ("group", _I),
        ("threads", _I),
    ]


def linear(x_MK: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """Multiply a few tokens by a low-bit weight without unpacking it; each packed byte is read from memory once.

    Columns of x become 16-bit integers with one scale for every 32 of them (two such planes in float32), products are summed
    exactly within a vector lane and then in float32: the error is that of rounding y, as in torch's own product.

    Args:
        x_MK: (M, K) in bfloat16, float16 or float32.
        weight: The weight.
        bias: (N,), or None.

    Returns:
        (M, N) in the dtype of `x_MK`; None where the loop does not take it, or there is no compiler.

    Memory: the result and ten bytes for each element of x.
    """
    loops = native.library()
    if loops is None or not _taken(weight, x_MK.dtype) or x_MK.device.type != "cpu" or x_MK.shape[0] == 0:
        return None
    x_MK = x_MK.contiguous()
    rows, columns = weight.shape
    y_MN = torch.empty((x_MK.shape[0], rows), dtype=x_MK.dtype)
    product = _Product(
        *_addresses(weight),
        x_MK.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y_MN.data_ptr(),
        weight.kind,
        _DTYPES.get(weight.scale.dtype, 1),
        _DTYPES[x_MK.dtype],
        _DTYPES[x_MK.dtype],
        0 if bias is None else _DTYPES[bias.dtype],
        x_MK.shape[0],
        rows,
        columns,
        weight.group_size,
        torch.get_num_threads(),
    )
    return None if loops.qlazy_linear(ctypes.addressof(product)) else y_MN


def dequantize(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor | None:
    """Rows of a weight as the model computes with them: code times scale in float32, rounded once.

    Args:
        weight: The weight.
        dtype: Of the result.
        start: First row.
        stop: One past the last row.

    Returns:
        (stop - start, K); None where the loop does not take it, or there is no compiler.

    Memory: the result.
    """
    loops = native.library()
    if loops is None or not _taken(weight, dtype):
        return None
    rows = torch.empty((stop - start, weight.shape[1]), dtype=dtype)
    block = _Block(
        *_addresses(weight),
        rows.data_ptr(),
        weight.kind,
        _DTYPES.get(weight.scale.dtype, 1),
        _DTYPES[dtype],
        start,
        stop - start,
        weight.shape[1],
        weight.group_size,
        torch.get_num_threads(),
    )
    loops.qlazy_dequantize(ctypes.addressof(block))
    return rows


def _taken(weight: Weight, dtype: torch.dtype) -> bool:
    columns, group = weight.shape[1], weight.group_size
    shapes = columns % 8 == 0 and (group % 32 == 0 or group == columns) and (weight.kind != CODEBOOK4 or columns % 64 == 0)
    return shapes and dtype in _DTYPES and native.on_cpu(weight.packed, weight.scale)


def _addresses(weight: Weight) -> tuple[int | None, ...]:
    nested = (None, None, None) if weight.nested is None else weight.nested
    tensors = (weight.packed, weight.scale, weight.zero, *nested, weight.code)
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)
