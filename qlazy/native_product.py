"""Compiled products with low-bit weights, and their dequantization. Each stands aside for what it does not take."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qlazy import native


class _Codebook4(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax_packed", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("nested_offset", ctypes.c_float),
        ("code", ctypes.c_float * 16),
        ("columns", ctypes.c_int64),
        ("all_rows", ctypes.c_int64),
    )


def codebook4_product(
    x_MK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    code: Tensor,
    out_features: int,
) -> Tensor | None:
    """Multiply a few tokens by an NF4 or FP4 weight without unpacking it.

    Args:
        x_MK: (M, K) in any float dtype, K a multiple of 64.
        packed: uint8, the weight's codes.
        absmax: float32 for every 64 weights, or uint8 where `nested`.
        nested: Nested absmax, offset, and the 256 values of `absmax`; None where it is float32.
        code: float32 (16,), the values of the codes.
        out_features: N.

    Returns:
        (M, N) in the dtype of `x_MK`, summed in float32; None where the loop does not take it, or there is no compiler.

    Memory: the result and `x_MK` in float32.
    """
    loops = native.library()
    tokens, columns = x_MK.shape
    if loops is None or columns % 64 or x_MK.device.type != "cpu" or not native.on_cpu(packed, absmax):
        return None
    sorted_MK = x_MK.float().view(tokens, -1, 32, 2).transpose(2, 3).contiguous()
    y_MN = torch.empty((tokens, out_features), dtype=torch.float32)
    weight = _Codebook4(
        packed=packed.data_ptr(),
        absmax=None if nested else absmax.data_ptr(),
        absmax_packed=absmax.data_ptr() if nested else None,
        nested_absmax=nested[0].data_ptr() if nested else None,
        nested_offset=float(nested[1]) if nested else 0.0,
        nested_code=nested[2].data_ptr() if nested else None,
        code=(ctypes.c_float * 16)(*code.tolist()),
        columns=columns,
        all_rows=out_features,
    )

    loops.qlazy_codebook4_product(
        ctypes.addressof(weight), sorted_MK.data_ptr(), tokens, torch.get_num_threads(), y_MN.data_ptr()
    )
    return y_MN.to(x_MK.dtype)


def unpack_int4_cpu(packed: Tensor, scale: Tensor, start: int, stop: int) -> Tensor | None:
    """Dequantize rows of a weight in torch's AVX-512 order.

    Args:
        packed: uint8 (N, K/2).
        scale: bfloat16 (G, N, 2): scale, and (8 - zero) * scale.
        start: First row, a multiple of 64.
        stop: One past the last row, likewise.

    Returns:
        bfloat16 (K, stop - start), the transpose of the rows; None where there is no compiler.

    Memory: the result.
    """
    loops = native.library()
    if loops is None or not native.on_cpu(packed, scale):
        return None
    all_rows, columns = packed.shape[0], packed.shape[1] * 2
    out = torch.empty((columns, stop - start), dtype=torch.bfloat16)
    first_packed, first_scale = packed[start:].data_ptr(), scale[0, start:].data_ptr()
    loops.qlazy_unpack_int4_cpu(first_packed, first_scale, stop - start, columns, scale.shape[0], all_rows, out.data_ptr())
    return out
