"""Quantizers on a GPU, by the Triton kernels: the bytes that the plain definition gives on a CPU, straight into storage.

As in `native_quantize`, each stands aside for what it does not take. None waits for the device, so none can say whether all
weights were finite: a scale is NaN where a weight of its group is NaN or infinite, and whoever fills a layer looks at the end.
"""

from __future__ import annotations

import torch
from qlazy_kernels.checks import FLOATS
from qlazy_kernels.codebook4 import quantize_codebook4
from qlazy_kernels.quantize import INT4_GROUPS, quantize_int4, quantize_int8
from torch import Tensor

from qlazy import gpu


def int4(
    weight_NK: Tensor, *, group_size: int, factors: Tensor, packed_out: Tensor, scale_out: Tensor, zero_out: Tensor | None
) -> bool:
    """Quantize rows as `qlazy.quantizing.quantize.store_int4` does.

    Args:
        weight_NK: (N, K) in bfloat16, float16, float32 or float8_e4m3fn.
        group_size: Columns that share a scale.
        factors: float32, the candidates, on the host.
        packed_out: int32 (N, K/8).
        scale_out: (N, G) in any float dtype.
        zero_out: int32 (ceil(N/8), G); None: symmetric.

    Returns:
        False where no kernel takes this weight.

    Memory: none.
    """
    weight = _taken(weight_NK, packed_out, scale_out, zero_out)
    if weight is None or group_size not in INT4_GROUPS or scale_out.dtype not in FLOATS:
        return False
    quantize_int4(
        weight,
        gpu.on_device(factors, weight.device),
        group_size=group_size,
        symmetric=zero_out is None,
        scale_dtype=scale_out.dtype,
        out=(packed_out, scale_out, zero_out),
    )
    return True


def int8(weight_NK: Tensor, *, group_size: int, packed_out: Tensor, scale_out: Tensor) -> bool:
    """Quantize rows as `qlazy.quantizing.quantize.store_int8` does.

    Args:
        weight_NK: (N, K) in bfloat16, float16, float32 or float8_e4m3fn.
        group_size: Columns that share a scale.
        packed_out: uint8 (N, K).
        scale_out: (N, G) in any float dtype.

    Returns:
        False where no kernel takes this weight.

    Memory: none.
    """
    weight = _taken(weight_NK, packed_out, scale_out)
    if weight is None or scale_out.dtype not in FLOATS:
        return False
    quantize_int8(weight, group_size=group_size, scale_dtype=scale_out.dtype, out=(packed_out, scale_out))
    return True


def codebook4(weight: Tensor, *, bounds: Tensor, order: Tensor, packed_out: Tensor, absmax_out: Tensor) -> bool:
    """Quantize elements as `qlazy.quantizing.codebook.quantize_blocks` does.

    Args:
        weight: Flat, in bfloat16, float16, float32 or float8_e4m3fn.
        bounds: float32 (15,), the boundaries between codes, ascending; on the host.
        order: int32 (16,), the codes by ascending value; on the host.
        packed_out: uint8 (ceil(n/2),).
        absmax_out: float32 (ceil(n/64),).

    Returns:
        False where no kernel takes this weight.

    Memory: none.
    """
    flat = _taken(weight, packed_out, absmax_out)
    if flat is None:
        return False
    device = flat.device
    quantize_codebook4(flat, gpu.on_device(bounds, device), gpu.on_device(order, device), out=(packed_out, absmax_out))
    return True


def _taken(weight: Tensor, *stored: Tensor | None) -> Tensor | None:
    """The weight as the kernels take it: float8 as its bytes; None where they do not."""
    if weight.numel() == 0 or any(tensor is not None and not tensor.is_contiguous() for tensor in stored):
        return None
    if weight.dtype == torch.float8_e4m3fn:
        weight = weight.view(torch.uint8)
    elif weight.dtype not in FLOATS:
        return None
    return weight.contiguous()
