"""What every kernel must compute, in plain torch: slow, short, and on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_int4(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    columns: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same as `qlazy_kernels.dequantize.dequantize_int4` for all rows.

    Args:
        weight_packed: (N, P) int32.
        weight_scale: (N, G) float16, bfloat16 or float32.
        weight_zero_point: (ceil(N / 8), G) int32; None = 8 everywhere.
        columns: K; None = 8 P.
        dtype: Dtype of the result; None = the dtype of the scales. float64 gives the weights exactly.

    Returns:
        (N, K) weight.

    Memory: three copies of the result in fp32 (float64 where that is the dtype).
    """
    rows, groups = weight_scale.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight_packed.device)
    codes_NK = (weight_packed.unsqueeze(-1) >> shifts & 0xF).reshape(rows, -1)[:, :columns]
    if weight_zero_point is None:
        zero_NG = torch.full((rows, groups), 8, dtype=torch.int32, device=weight_packed.device)
    else:
        zero_NG = (weight_zero_point.unsqueeze(1) >> shifts[:, None] & 0xF).reshape(-1, groups)[:rows]
    steps = codes_NK.reshape(rows, groups, -1) - zero_NG.unsqueeze(-1)
    return _scaled(steps, weight_scale, dtype)


def dequantize_int8(weight_packed: Tensor, weight_scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The same as `qlazy_kernels.dequantize.dequantize_int8` for all rows.

    Args:
        weight_packed: (N, K) uint8, codes 128 too large.
        weight_scale: (N, G) float16, bfloat16 or float32.
        dtype: Dtype of the result; None = the dtype of the scales. float64 gives the weights exactly.

    Returns:
        (N, K) weight.

    Memory: two copies of the result in fp32 (float64 where that is the dtype).
    """
    rows, groups = weight_scale.shape
    return _scaled(weight_packed.reshape(rows, groups, -1).to(torch.int16) - 128, weight_scale, dtype)


def dequantize_codebook4(
    weight_packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same as `qlazy_kernels.codebook4.dequantize_codebook4` for all rows.

    Args:
        weight_packed: (ceil(N K / 2),) uint8.
        absmax: (B,) float32; with `nested` uint8.
        code: (16,) float32.
        nested: Values of the 8-bit codes of absmax, its own absmax, its offset; or None.
        rows: N.
        columns: K.
        dtype: Dtype of the result. float64 gives the weights exactly.

    Returns:
        (N, K) weight.

    Memory: about five copies of the result in fp32.
    """
    if nested is not None:
        values, nested_absmax, offset = nested
        scales = nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = values[absmax.int()] * scales + offset
    work = torch.float64 if dtype is torch.float64 else torch.float32
    nibbles = torch.stack([weight_packed >> 4, weight_packed & 0xF], 1).reshape(-1)[: rows * columns]
    weight = code.to(work)[nibbles.int()] * absmax.to(work).repeat_interleave(64)[: rows * columns]
    return weight.view(rows, columns).to(dtype)


def product(x: Tensor, weight_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """What every GEMV and GEMM computes from the unpacked weight, exactly as float64 can.

    Args:
        x: (..., K).
        weight_NK: float64, as the functions above give it.
        bias: (N,) or None.

    Returns:
        (..., N) float64.

    Memory: float64 copies of `x` and the result.
    """
    y = x.double() @ weight_NK.T
    return y if bias is None else y + bias.double()


def gate_up(x: Tensor, gate_NK: Tensor, up_NK: Tensor, activation: str = "silu") -> Tensor:
    """The same as `qlazy_kernels.gate_up.gemv_gate_up_int4` from the unpacked weights.

    Args:
        x: (..., K).
        gate_NK: float64.
        up_NK: float64.
        activation: `silu` or `gelu_tanh`.

    Returns:
        (..., N) float64.

    Memory: float64 copies of `x` and three of the result.
    """
    gate = product(x, gate_NK)
    act = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    return act * product(x, up_NK)


def grouped(x: Tensor, weight_ENK: Tensor, counts: Tensor) -> Tensor:
    """The same as the products of `qlazy_kernels.grouped` from the unpacked weights: one expert after the other.

    Args:
        x: (T, K), sorted by expert.
        weight_ENK: float64.
        counts: (E,) tokens of each expert.

    Returns:
        (T, N) float64.

    Memory: float64 copies of `x` and two of the result.
    """
    parts = x.split(counts.tolist())
    return torch.cat([product(part, weight) for part, weight in zip(parts, weight_ENK, strict=True)])


def _scaled(steps_NGk: Tensor, scale_NG: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Steps times their scale: one product in fp32 (float64 where that is the dtype), rounded once."""
    work = torch.float64 if dtype is torch.float64 else torch.float32
    weight = steps_NGk.to(work) * scale_NG.to(work).unsqueeze(-1)
    return weight.reshape(scale_NG.shape[0], -1).to(scale_NG.dtype if dtype is None else dtype)
