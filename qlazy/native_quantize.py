"""Compiled quantizers and packers: the same bytes as the plain ones, faster. Each stands aside for what it does not take."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from qlazy import native

GROUPS = (32, 64, 128)
"""Group sizes that the compiled loop takes."""


class _Options(ctypes.Structure):
    _fields_ = (
        ("symmetric", ctypes.c_int32),
        ("bfloat16_in", ctypes.c_int32),
        ("bfloat16_scale", ctypes.c_int32),
        ("candidates", ctypes.c_int32),
        ("factors", ctypes.c_float * 16),
    )


def quantize_int4(
    weight_NK: Tensor, *, group_size: int, symmetric: bool, scale_dtype: torch.dtype, factors: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`qlazy.quantize.quantize_int4` by the compiled loop.

    Args:
        weight_NK: (N, K), on any device.
        group_size: Columns that share a scale.
        symmetric: True: no zeros.
        scale_dtype: Dtype of the scales.
        factors: The candidates.

    Returns:
        Codes, scale and zero as there; None where the loop does not take this weight, or there is no compiler.

    Memory: the results, and four bytes for each group.
    """
    loops = native.library()
    dtypes = (torch.bfloat16, torch.float32)
    taken = (
        group_size in GROUPS and weight_NK.shape[1] % group_size == 0 and weight_NK.dtype in dtypes and scale_dtype in dtypes
    )
    if loops is None or not taken or not native.on_cpu(weight_NK):
        return None
    rows, columns = weight_NK.shape
    groups = columns // group_size
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    scale = torch.empty((rows, groups), dtype=torch.float32)
    zero = torch.empty((rows, groups), dtype=torch.uint8)
    options = _Options(
        symmetric=symmetric,
        bfloat16_in=weight_NK.dtype is torch.bfloat16,
        bfloat16_scale=scale_dtype is torch.bfloat16,
        candidates=len(factors),
        factors=(ctypes.c_float * 16)(*factors),
    )
    loops.qlazy_quantize_int4(
        weight_NK.data_ptr(),
        rows * groups,
        group_size,
        ctypes.addressof(options),
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
    )
    return codes, scale.to(scale_dtype), None if symmetric else zero
