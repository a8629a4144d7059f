"""Refuses what a kernel would read out of bounds or out of step; every message has the two numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of activations, scales, biases and results."""


class Extent(NamedTuple):
    """Sizes of a packed weight."""

    rows: int
    """N, out_features."""
    columns: int
    """K, in_features."""
    words: int
    """Elements of a packed row: 32-bit words of int4, bytes of int8."""
    groups: int
    """Scales of a row."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.groups


def check_int4(packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int | None = None) -> Extent:
    """Sizes of an int4 weight whose tensors belong together.

    Args:
        packed: (N, ceil(K / 8)) int32.
        scale: (N, G) float16, bfloat16 or float32.
        zero_point: (ceil(N / 8), G) int32, or None.
        columns: K; None = eight to a word.

    Returns:
        The sizes.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together.
    """
    check_tensors(2, weight_packed=packed, weight_scale=scale, weight_zero_point=zero_point)
    for name, tensor in (("weight_packed", packed), ("weight_zero_point", zero_point)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; it must be torch.int32, eight codes to a word.")
    rows, words = packed.shape
    groups = scale.shape[1]
    columns = 8 * words if columns is None else columns
    if -(-columns // 8) != words:
        raise ValueError(f"{columns} columns are {-(-columns // 8)} words of eight codes, weight_packed has {words}.")
    # A group of a single row may end inside a word: the codes behind it meet no column.
    if columns % groups or (groups > 1 and columns % (8 * groups)):
        raise ValueError(f"{columns} columns do not divide into {groups} groups of whole words (8 columns each).")
    _check_scale(scale, rows)
    if zero_point is not None and tuple(zero_point.shape) != (-(-rows // 8), groups):
        raise ValueError(
            f"weight_zero_point has shape {tuple(zero_point.shape)}; {rows} rows in "
            f"{groups} groups need {(-(-rows // 8), groups)}."
        )
    return Extent(rows, columns, words, groups)


def check_int8(packed: Tensor, scale: Tensor) -> Extent:
    """Sizes of an int8 weight whose tensors belong together.

    Args:
        packed: (N, K) uint8.
        scale: (N, G) float16, bfloat16 or float32.

    Returns:
        The sizes.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together.
    """
    check_tensors(2, weight_packed=packed, weight_scale=scale)
    if packed.dtype != torch.uint8:
        raise ValueError(f"weight_packed is {packed.dtype}; it must be torch.uint8.")
    rows, columns = packed.shape
    groups = scale.shape[1]
    if columns % groups:
        raise ValueError(f"{columns} columns do not divide into {groups} groups.")
    _check_scale(scale, rows)
    return Extent(rows, columns, columns, groups)


def check_codebook4(packed: Tensor, absmax: Tensor, code: Tensor, rows: int, columns: int, *, nested: bool) -> None:
    """That the tensors of an NF4 or FP4 weight belong together.

    Args:
        packed: (ceil(N K / 2),) uint8.
        absmax: (ceil(N K / 64),) float32, or uint8 where it is nested.
        code: (16,) float32.
        rows: N.
        columns: K.
        nested: Whether absmax is stored in 8 bits.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together.
    """
    check_tensors(1, weight_packed=packed, absmax=absmax, code=code)
    count = rows * columns
    for name, tensor, dtype, want in (
        ("weight_packed", packed, torch.uint8, -(-count // 2)),
        ("absmax", absmax, torch.uint8 if nested else torch.float32, -(-count // 64)),
        ("code", code, torch.float32, 16),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}.")
        if tensor.shape[0] != want:
            raise ValueError(f"{name} has {tensor.shape[0]} elements; {rows} x {columns} weights need {want}.")


def check_nested(nested: tuple[Tensor, Tensor, Tensor] | None, absmax: Tensor) -> None:
    """That what unpacks an 8-bit absmax belongs to it.

    Args:
        nested: (256,) float32 values, (ceil(B / 256),) float32 absmax of the absmax, () float32 offset; or None.
        absmax: (B,).

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together.
    """
    if nested is None:
        return
    values, nested_absmax, offset = nested
    check_tensors(1, absmax=absmax, nested_code=values, nested_absmax=nested_absmax, nested_offset=offset.reshape(-1))
    for name, tensor, want in (
        ("nested_code", values, 256),
        ("nested_absmax", nested_absmax, -(-absmax.shape[0] // 256)),
        ("nested_offset", offset, 1),
    ):
        if tensor.dtype != torch.float32 or tensor.numel() != want:
            raise ValueError(f"{name} is {tensor.dtype} with {tensor.numel()} elements; it must be torch.float32 with {want}.")


def check_tokens(x: Tensor, columns: int, device: torch.device) -> Tensor:
    """The activations as contiguous rows.

    Args:
        x: (..., K) float16, bfloat16 or float32.
        columns: K of the weight.
        device: Where the weight is.

    Returns:
        (M, K), contiguous.

    Raises:
        ValueError: another width, dtype or device.
    """
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {columns}.")
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; it must be float16, bfloat16 or float32.")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, the weight on {device}; they need one device.")
    return x.reshape(-1, columns).contiguous()


def check_bias(bias: Tensor | None, rows: int, device: torch.device) -> None:
    """That a bias fits.

    Args:
        bias: (N,) float16, bfloat16 or float32, or None.
        rows: N of the weight.
        device: Where the weight is.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if bias is None:
        return
    if tuple(bias.shape) != (rows,) or not bias.is_contiguous():
        raise ValueError(f"bias has shape {tuple(bias.shape)}; a weight of {rows} rows needs a contiguous ({rows},).")
    if bias.dtype not in FLOATS or bias.device != device:
        raise ValueError(f"bias is {bias.dtype} on {bias.device}; it must be floating and on {device}.")


def result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor that a kernel writes: the one given, if it fits, or a new one.

    Args:
        out: Where the caller wants it, or None.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.

    Returns:
        `out`, or uninitialised storage.

    Raises:
        ValueError: `out` has another shape, dtype, device, or gaps.

    Memory: the result where `out` is None.
    """
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}; "
            f"the result is contiguous {dtype} {shape} on {device}."
        )
    return out


def check_weight(weight: Tensor) -> tuple[int, int]:
    """Sizes of a weight that is to be quantized.

    Args:
        weight: (N, K) floating, or uint8 for the bytes of float8_e4m3fn.

    Returns:
        Rows and columns.

    Raises:
        ValueError: another dtype, or gaps.
    """
    check_tensors(2, weight=weight)
    if weight.dtype not in (*FLOATS, torch.uint8):
        raise ValueError(f"weight is {weight.dtype}; it must be floating, or torch.uint8 for the bytes of float8_e4m3fn.")
    return weight.shape[0], weight.shape[1]


def row_range(start: int, stop: int | None, rows: int) -> int:
    """The end of a range of rows.

    Args:
        start: First row.
        stop: One past the last, or None for all.
        rows: How many there are.

    Returns:
        `stop` as a number.

    Raises:
        ValueError: no range of these rows.
    """
    stop = rows if stop is None else stop
    if not 0 <= start < stop <= rows:
        raise ValueError(f"Rows {start} to {stop} of a weight of {rows} rows: 0 <= start < stop <= rows must hold.")
    return stop


def float_dtype(dtype: torch.dtype | None, scale: Tensor | None = None) -> torch.dtype:
    """A dtype that results and scales can have.

    Args:
        dtype: What is asked for; None = that of the scales.
        scale: The scales.

    Returns:
        float16, bfloat16 or float32.

    Raises:
        ValueError: another one.
    """
    dtype = scale.dtype if dtype is None and scale is not None else dtype
    if dtype is None or dtype not in FLOATS:
        raise ValueError(f"{dtype} is asked for; it must be float16, bfloat16 or float32.")
    return dtype


def check_tensors(ndim: int, **tensors: Tensor | None) -> None:
    """That tensors have `ndim` dimensions, none of them 0, no gaps, and one device.

    Args:
        ndim: How many dimensions each has.
        **tensors: By the name that the message gives; None is passed over.

    Raises:
        ValueError: one does not.
    """
    device, first = None, ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.ndim != ndim or 0 in tensor.shape:
            count = ("no dimension", "one dimension", "two dimensions", "three dimensions")[ndim]
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs {count}, none of them 0.")
        if device is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}; they need one device.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()} at shape {tuple(tensor.shape)}; it must be contiguous.")
        if device is None:
            device, first = tensor.device, name


def _check_scale(scale: Tensor, rows: int) -> None:
    if scale.dtype not in FLOATS:
        raise ValueError(f"scales are {scale.dtype}; they must be float16, bfloat16 or float32.")
    if scale.shape[0] != rows:
        raise ValueError(f"weight_scale has {scale.shape[0]} rows, weight_packed {rows}.")
