"""Weights to integer codes, scales and zero points, and straight into the storage that holds them.

`store_int4` and `store_int8` are what fills layers, by the compiled loops, or on a GPU the kernels, where there are any. Every
path gives the same bytes: what a group becomes depends on that group alone, never on the chunk, the thread count, the vector
width or the device, because only operations with one IEEE-754 answer are used (see `qlazy/quantizing/search.py`).

Nothing checks for NaN or infinity on the way (it would cost a pass): a group that holds one comes out with a scale that is NaN
or infinite and with codes that mean nothing, so the scales tell whether the weight was sound. On a GPU nothing looks at them
either, as the host would wait there: what fills a whole weight looks once, at its end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlazy import gpu
from qlazy.errors import UsageError
from qlazy.quantizing import native_quantize
from qlazy.quantizing.packing import pack_int4, pack_zero_points, unpack_int4, unpack_zero_points
from qlazy.quantizing.search import ASYMMETRIC_FACTORS, SYMMETRIC_FACTORS, block_rows, round_scale, search_int4


def quantize_int4(
    weight_NK: Tensor, *, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Four-bit codes with the scale, and where asymmetric the integer zero, of least squared error among the candidates.

    The first candidate is plain rounding (the scale that spans minimum and maximum); the others shrink or stretch that scale
    about the middle of the range. The best is refitted to its codes by least squares. Scales are rounded to `scale_dtype`
    before codes are chosen, so what is stored is what was judged.

    Args:
        weight_NK: Shape (N, K), bfloat16, float16 or float32, any device.
        group_size: Columns that share a scale, a divisor of K; -1 = the whole row.
        symmetric: True: the zero is code 8 everywhere and is not returned.
        scale_dtype: Dtype of the scales: bfloat16, float16 or float32.

    Returns:
        codes uint8 (N, K) in 0..15; scale `scale_dtype` (N, G), positive; zero uint8 (N, G) in 0..15, None where symmetric.
        w is about (code - zero) * scale. A group of zeros has scale 1 and codes equal to the zero.
        A group with NaN or infinity has a scale that is NaN or infinite, and codes that mean nothing.

    Raises:
        UsageError: The group size does not divide the columns.

    Memory: the results and three float32 buffers of one block (1.5 MiB on a CPU, 96 MiB elsewhere; more if one row is longer).
    """
    rows, columns = weight_NK.shape
    group = _group_columns(group_size, columns)
    if group in native_quantize.GROUPS and weight_NK.is_cpu:
        packed = torch.empty((rows, columns // 8), dtype=torch.int32)
        scale_NG = torch.empty((rows, columns // group), dtype=scale_dtype)
        zeros = None if symmetric else torch.empty((-(-rows // 8), columns // group), dtype=torch.int32)
        if _compiled_int4(weight_NK, group, packed, scale_NG, zeros) is not None:
            return unpack_int4(packed, columns), scale_NG, None if zeros is None else unpack_zero_points(zeros, rows)
    return search_int4(weight_NK, group, symmetric, scale_dtype)


def quantize_int8(weight_NK: Tensor, *, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eight-bit symmetric codes, the scale spanning the largest magnitude of each group.

    Args:
        weight_NK: Shape (N, K), bfloat16, float16 or float32, any device.
        group_size: Columns that share a scale, a divisor of K; -1 = the whole row.
        scale_dtype: Dtype of the scales: bfloat16, float16 or float32.

    Returns:
        codes uint8 (N, K) in 1..255; scale `scale_dtype` (N, G), positive. w is about (code - 128) * scale.
        A group of zeros has scale 1. One with NaN or infinity has a scale that is NaN or infinite, and codes that mean nothing.

    Raises:
        UsageError: The group size does not divide the columns.

    Memory: the results, and as `store_int8`.
    """
    rows, columns = weight_NK.shape
    group = _group_columns(group_size, columns)
    codes_NK = torch.empty((rows, columns), dtype=torch.uint8, device=weight_NK.device)
    scale_NG = torch.empty((rows, columns // group), dtype=scale_dtype, device=weight_NK.device)
    store_int8(weight_NK, group_size=group, packed_out=codes_NK, scale_out=scale_NG)
    return codes_NK, scale_NG


def store_int4(weight_NK: Tensor, *, group_size: int, packed_out: Tensor, scale_out: Tensor, zero_out: Tensor | None) -> bool:
    """Quantizes rows of a weight straight into their storage, to what `quantize_int4` makes of them.

    Args:
        weight_NK: Shape (N, K), bfloat16, float16 or float32.
        group_size: Columns that share a scale, a divisor of K; -1 = the whole row.
        packed_out: int32 (N, ceil(K/8)).
        scale_out: (N, G) in bfloat16, float16 or float32; its dtype is that of the scales.
        zero_out: int32 (ceil(N/8), G), eight rows to a word; None: symmetric.

    Returns:
        Whether all weights are finite; on a GPU True, as nothing looks.

    Raises:
        UsageError: The group size does not divide the columns.

    Memory: none where the compiled loop or the kernel runs; else as `quantize_int4`.
    """
    group = _group_columns(group_size, weight_NK.shape[1])
    finite = _compiled_int4(weight_NK, group, packed_out, scale_out, zero_out)
    if finite is not None:
        return finite
    if gpu.has_kernels(weight_NK):
        from qlazy.quantizing import triton_quantize

        if triton_quantize.int4(
            weight_NK,
            group_size=group,
            factors=SYMMETRIC_FACTORS if zero_out is None else ASYMMETRIC_FACTORS,
            packed_out=packed_out,
            scale_out=scale_out,
            zero_out=zero_out,
        ):
            return True
    codes, scale, zero = search_int4(weight_NK, group, zero_out is None, scale_out.dtype)
    packed_out.copy_(pack_int4(codes))
    scale_out.copy_(scale)
    if zero is not None and zero_out is not None:
        zero_out.copy_(pack_zero_points(zero))
    return scale.is_cuda or is_finite(scale)


def store_int8(weight_NK: Tensor, *, group_size: int, packed_out: Tensor, scale_out: Tensor) -> bool:
    """Quantizes rows of a weight straight into their storage, to what `quantize_int8` makes of them.

    Args:
        weight_NK: Shape (N, K), bfloat16, float16 or float32.
        group_size: Columns that share a scale, a divisor of K; -1 = the whole row.
        packed_out: uint8 (N, K).
        scale_out: (N, G) in bfloat16, float16 or float32; its dtype is that of the scales.

    Returns:
        Whether all weights are finite; on a GPU True, as nothing looks.

    Raises:
        UsageError: The group size does not divide the columns.

    Memory: none where the compiled loop or the kernel runs; else one float32 buffer of one block (512 KiB on a CPU, 32 MiB
    elsewhere; more if one row is longer).
    """
    rows, columns = weight_NK.shape
    group = _group_columns(group_size, columns)
    finite = native_quantize.int8(weight_NK, group_size=group, packed_out=packed_out, scale_out=scale_out)
    if finite is not None:
        return finite
    if gpu.has_kernels(weight_NK):
        from qlazy.quantizing import triton_quantize

        if triton_quantize.int8(weight_NK, group_size=group, packed_out=packed_out, scale_out=scale_out):
            return True
    groups, device = columns // group, weight_NK.device
    step = block_rows(rows, columns, device)
    buffer = torch.empty(step * columns, dtype=torch.float32, device=device)
    steps = torch.full((), 127.0, device=device)  # no Python number, by whose inverse PyTorch would multiply on a GPU
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        count = (block.stop - block.start) * groups
        work = buffer[: count * group].view(count, group)
        work.copy_(weight_NK[block].reshape(count, group))
        span = torch.maximum(work.amax(1), work.amin(1).neg_())
        scale = round_scale(span / steps, span, scale_out.dtype)
        work.mul_(scale.reciprocal().unsqueeze(1)).round_().clamp_(-127, 127).add_(128)
        packed_out[block].view(count, group).copy_(work)
        scale_out[block].view(count).copy_(scale)
    return scale_out.is_cuda or is_finite(scale_out)


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity.

    Args:
        values: Any float tensor: weights, or scales, which are not finite where a weight is not.

    Returns:
        True for an empty tensor.

    Memory: one number: NaN and infinities survive the difference that is looked at.
    """
    known = native_quantize.is_finite(values)
    if known is not None:
        return known
    # The difference can overflow where all is well, so a suspicion is looked into.
    suspect = values.numel() > 0 and not math.isfinite(float(values.amax() - values.amin()))
    return not suspect or bool(torch.isfinite(values).all())


def dequantize_int4(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights that the codes stand for: (code - zero) * scale in float32, then rounded to `dtype`.

    Args:
        codes_NK: uint8 (N, K).
        scale_NG: Floating, (N, G).
        zero_NG: uint8 (N, G); None = 8 everywhere.
        dtype: Dtype of the result.

    Returns:
        Weights of shape (N, K) in `dtype`.

    Memory: the result and one float32 tensor of its shape; call it on blocks of rows to bound that.
    """
    rows, groups = scale_NG.shape
    work = codes_NK.to(torch.float32).view(rows, groups, -1)
    work.sub_(8.0 if zero_NG is None else zero_NG.to(torch.float32).unsqueeze(2))
    return work.mul_(scale_NG.to(torch.float32).unsqueeze(2)).view(codes_NK.shape).to(dtype)


def dequantize_int8(codes_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that the codes stand for: (code - 128) * scale in float32, then rounded to `dtype`.

    Args:
        codes_NK: uint8 (N, K).
        scale_NG: Floating, (N, G).
        dtype: Dtype of the result.

    Returns:
        Weights of shape (N, K) in `dtype`.

    Memory: the result and one float32 tensor of its shape; call it on blocks of rows to bound that.
    """
    rows, groups = scale_NG.shape
    work = codes_NK.to(torch.float32).view(rows, groups, -1).sub_(128.0)
    return work.mul_(scale_NG.to(torch.float32).unsqueeze(2)).view(codes_NK.shape).to(dtype)


def _compiled_int4(weight_NK: Tensor, group: int, packed: Tensor, scale: Tensor, zero: Tensor | None) -> bool | None:
    factors = SYMMETRIC_FACTORS if zero is None else ASYMMETRIC_FACTORS
    return native_quantize.int4(weight_NK, group_size=group, factors=factors, packed_out=packed, scale_out=scale, zero_out=zero)


def _group_columns(group_size: int, columns: int) -> int:
    group = columns if group_size == -1 else group_size
    if group <= 0 or columns % group:
        raise UsageError(
            f"Group size {group_size} does not divide the {columns} columns of the weight.",
            hint="Use a group size that divides them, or -1 for one scale per row.",
        )
    return group
