"""What every kernel must compute, in plain torch: slow, short, and on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_int4(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The same as `qlazy_kernels.dequantize.dequantize_int4`, arguments and result alike.

    Args:
        weight_packed: (N, P) int32.
        weight_scale: (N, G) float16, bfloat16 or float32.
        weight_zero_point: (ceil(N / 8), G) int32; None = 8 everywhere.
        dtype: Dtype of the result; None = the dtype of the scales.

    Returns:
        (N, 8 P) weight.

    Memory: three fp32 or int32 copies of the result.
    """
    rows, groups = weight_scale.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight_packed.device)
    codes_NK = (weight_packed.unsqueeze(-1) >> shifts & 0xF).reshape(rows, -1)
    if weight_zero_point is None:
        zero_NG = torch.full((rows, groups), 8, dtype=torch.int32, device=weight_packed.device)
    else:
        zero_NG = (weight_zero_point.unsqueeze(1) >> shifts[:, None] & 0xF).reshape(-1, groups)[:rows]
    steps = (codes_NK.reshape(rows, groups, -1) - zero_NG.unsqueeze(-1)).float()
    weight = (steps * weight_scale.float().unsqueeze(-1)).reshape(rows, -1)
    return weight.to(weight_scale.dtype if dtype is None else dtype)
