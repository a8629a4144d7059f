"""Compiled quantizers: the same bytes as the plain ones, straight into storage. Each stands aside for what it does not take.

One call quantizes all rows that it is given and holds no lock of Python's meanwhile, so that threads run side by side.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from qlazy import native

GROUPS = (32, 64, 128)
"""Group sizes that the loop of int4 takes."""

_A, _I = ctypes.c_void_p, ctypes.c_int64


class _Quantize(ctypes.Structure):
    _fields_ = (
        *((name, _A) for name in ("weight", "packed", "scale", "zero", "factors")),
        *((name, _I) for name in ("dtype", "scale_dtype", "rows", "columns", "group", "count")),
    )


def int4(
    weight_NK: Tensor, *, group_size: int, factors: Tensor, packed_out: Tensor, scale_out: Tensor, zero_out: Tensor | None
) -> bool | None:
    """Quantize rows as `qlazy.quantizing.quantize.store_int4` does.

    Args:
        weight_NK: (N, K), on any device.
        group_size: Columns that share a scale.
        factors: float32, the candidates.
        packed_out: int32 (N, K/8).
        scale_out: (N, G) in any float dtype.
        zero_out: int32 (ceil(N/8), G); None: symmetric.

    Returns:
        Whether all weights are finite; None where the loop does not take this weight, or there is no compiler.
    """
    if group_size not in GROUPS:
        return None
    return _run("qlazy_quantize_int4", weight_NK, group_size, packed_out, scale_out, zero_out, factors, len(factors))


def int8(weight_NK: Tensor, *, group_size: int, packed_out: Tensor, scale_out: Tensor) -> bool | None:
    """Quantize rows as `qlazy.quantizing.quantize.store_int8` does.

    Args:
        weight_NK: (N, K), on any device.
        group_size: Columns that share a scale.
        packed_out: uint8 (N, K).
        scale_out: (N, G) in any float dtype.

    Returns:
        Whether all weights are finite; None where the loop does not take this weight, or there is no compiler.
    """
    return _run("qlazy_quantize_int8", weight_NK, group_size, packed_out, scale_out)


def codebook4(weight: Tensor, *, boundaries: Tensor, least: int, packed_out: Tensor, absmax_out: Tensor) -> bool | None:
    """Quantize elements as `qlazy.quantizing.codebook.quantize_blocks` does.

    Args:
        weight: Any shape, on any device.
        boundaries: float32 (30,): the 15 boundaries between codes, ascending, then the change of code at each.
        least: The code of the least value.
        packed_out: uint8 (ceil(n/2),).
        absmax_out: float32 (ceil(n/64),).

    Returns:
        Whether all weights are finite; None where the loop does not take this weight, or there is no compiler.
    """
    return _run("qlazy_quantize_codebook4", weight.view(1, -1), 64, packed_out, absmax_out, None, boundaries, least)


def is_finite(values: Tensor) -> bool | None:
    """Whether there is neither NaN nor infinity.

    Args:
        values: Any tensor.

    Returns:
        The answer; None where the loop does not take this tensor, or there is no compiler.
    """
    loops = native.library()
    if loops is None or values.dtype not in native.DTYPES or not native.on_cpu(values):
        return None
    return bool(loops.qlazy_is_finite(values.data_ptr(), values.numel(), native.DTYPES[values.dtype]))


def _run(
    loop: str,
    weight_NK: Tensor,
    group_size: int,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    factors: Tensor | None = None,
    count: int = 0,
) -> bool | None:
    loops = native.library()
    taken = weight_NK.dtype in native.DTYPES and scale.dtype in native.DTYPES and native.on_cpu(weight_NK, packed, scale, zero)
    if loops is None or not taken:
        return None
    rows, columns = weight_NK.shape
    if not rows or not columns:
        return True
    task = _Quantize(
        weight_NK.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if factors is None else factors.data_ptr(),
        native.DTYPES[weight_NK.dtype],
        native.DTYPES[scale.dtype],
        rows,
        columns,
        group_size,
        count,
    )
    first_bad: int = getattr(loops, loop)(ctypes.addressof(task))
    return first_bad < 0
