"""The definition of int4: which scale and zero a group of weights gets, in plain PyTorch. The compiled loop has the same bytes.

What a group becomes depends on that group alone, never on the chunk, the thread count, the vector width or the device,
because only operations with one IEEE-754 answer are used: float32 add, subtract, multiply, divide and round-half-to-even,
each rounded by itself (no fused multiply-add), minimum and maximum (order does not matter), and for the sum of squared errors
an explicit pairwise tree (`tree_sum`) in place of a library reduction. A C or Triton version has to keep that: division
rounded to nearest, contraction off, the same tree, the same order of candidates, a later one taken only if strictly less.

Inside, a block of rows lies as *planes*, float32 (group, rows * G): element k of every group is one contiguous row. A reduction
over the group is then a few additions of long rows, and a scale broadcasts along the contiguous axis. On a CPU a block has
about 131,072 elements: float32 buffers of that size stay in a second-level cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlazy import gpu

CPU_BLOCK_ELEMENTS = 1 << 17
"""Weights quantized at a time on a CPU: float32 buffers of this length (512 KiB each) stay in the second-level cache."""

GPU_BLOCK_ELEMENTS = 1 << 23
"""Weights quantized at a time elsewhere: enough to hide the launches, 96 MiB of buffers."""

ASYMMETRIC_FACTORS = torch.tensor((1.0, 0.92, 0.96, 1.06))
SYMMETRIC_FACTORS = torch.tensor((1.0, 0.8, 0.88, 0.96))
"""Candidates, tried in this order, as factors on the scale that spans the group; the first of each is plain rounding."""


def search_int4(
    weight_NK: Tensor, group: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero of every group, as `qlazy.quantizing.quantize.quantize_int4` documents them.

    Args:
        weight_NK: Shape (N, K).
        group: Columns that share a scale, a divisor of K.
        symmetric: True: no zeros.
        scale_dtype: Dtype of the scales.

    Returns:
        codes uint8 (N, K), scale (N, G), zero uint8 (N, G) or None.

    Memory: the results and three float32 buffers of one block (1.5 MiB on a CPU, 96 MiB elsewhere; more if one row is longer).
    """
    rows, columns = weight_NK.shape
    groups, device = columns // group, weight_NK.device
    codes_NK = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    scale_NG = torch.empty((rows, groups), dtype=scale_dtype, device=device)
    zero_NG = None if symmetric else torch.empty((rows, groups), dtype=torch.uint8, device=device)
    step = block_rows(rows, columns, device)
    buffers = torch.empty((3, step * columns), dtype=torch.float32, device=device)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        count = (block.stop - block.start) * groups
        weight, rounded, error = buffers[:, : group * count].view(3, group, count)
        weight.copy_(weight_NK[block].reshape(count, group).t())
        scale, zero = _search(weight, rounded, error, symmetric=symmetric, scale_dtype=scale_dtype)
        torch.mul(weight, scale.reciprocal(), out=rounded).round_().add_(zero).clamp_(0, 15)
        codes_NK[block].view(count, group).copy_(rounded.to(torch.uint8).t())
        scale_NG[block].view(count).copy_(scale)
        if zero_NG is not None:
            zero_NG[block].view(count).copy_(zero)
    return codes_NK, scale_NG, zero_NG


def _search(
    weight: Tensor, rounded: Tensor, error: Tensor, *, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero, float32 (count,), of least squared error over the planes of `weight`; the other two are working space."""
    scales, zeros = _candidates(weight, symmetric=symmetric, scale_dtype=scale_dtype)
    inverses, lows, highs = scales.reciprocal(), -zeros, 15.0 - zeros
    scale, zero = scales[0], zeros[0]
    least = loss = torch.empty(0)
    for index in range(scales.shape[0]):
        # The error in units of the scale: clamp(round(w/s), -zero, 15 - zero) - w/s.
        torch.mul(weight, inverses[index], out=rounded)
        torch.round(rounded, out=error)
        error.clamp_(lows[index], highs[index]).sub_(rounded).square_()
        loss = tree_sum(error).mul(scales[index]).mul_(scales[index])
        if index == 0:
            least = loss
            continue
        better = loss < least
        scale = torch.where(better, scales[index], scale)
        zero = torch.where(better, zeros[index], zero)
        least = torch.where(better, loss, least)
    return _refit(weight, rounded, error, scale, zero, scale_dtype), zero


def _candidates(weight: Tensor, *, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as they would be stored and zeros to try, float32 (candidates, count)."""
    high, low = weight.amax(0), weight.amin(0)
    if symmetric:
        span = torch.maximum(high, low.neg_())
        factors = gpu.on_device(SYMMETRIC_FACTORS, weight.device).unsqueeze(1)
        scales = round_scale(span / _number(7.0, span) * factors, span, scale_dtype)
        return scales, torch.full_like(scales, 8.0)
    # Zero has to be a code, so the range always takes in 0.
    low.clamp_(max=0.0)
    high.clamp_(min=0.0)
    span = high - low
    factors = gpu.on_device(ASYMMETRIC_FACTORS, weight.device).unsqueeze(1)
    scales = round_scale(span / _number(15.0, span) * factors, span, scale_dtype)
    # Plain rounding puts the lowest weight on code 0; the others put the middle of the range on the middle of the codes.
    zeros = (high + low).mul_(0.5).div(scales).neg_().add_(7.5)
    torch.div(low, scales[0], out=zeros[0]).neg_()
    return scales, zeros.round_().clamp_(0, 15)


def _number(value: float, like: Tensor) -> Tensor:
    """A divisor as a tensor: on a GPU PyTorch multiplies by the inverse of a Python number, which rounds otherwise."""
    return torch.full((), value, device=like.device)


def _refit(weight: Tensor, q: Tensor, product: Tensor, scale: Tensor, zero: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale that fits the codes best, sum(w * q) / sum(q * q): no worse with them, better still with codes chosen anew."""
    torch.mul(weight, scale.reciprocal(), out=q)
    q.round_().clamp_(-zero, 15.0 - zero)
    torch.mul(weight, q, out=product)
    along = tree_sum(product).clone()
    square = tree_sum(q.square_())
    # Where every code is the zero, or one is NaN, there is nothing to fit.
    return torch.where(square > 0, round_scale(along / square, square, scale_dtype), scale)


def tree_sum(planes: Tensor) -> Tensor:
    """Sum over the first axis in place, always the same tree: fold the upper half onto the lower, an odd middle one waits.

    Args:
        planes: Any shape with at least one plane; overwritten.

    Returns:
        The first plane, which holds the sum.
    """
    count = planes.shape[0]
    while count > 1:
        half = count // 2
        planes[:half].add_(planes[count - half : count])
        count -= half
    return planes[0]


def round_scale(scale: Tensor, span: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be stored: never 0, and 1 for a group of zeros.

    Args:
        scale: float32.
        span: 0 for a group of zeros; of the same shape.
        dtype: That of the scales.

    Returns:
        float32.
    """
    # The least half is subnormal, 2**-24; below the least normal number the inverse of the others would overflow.
    least = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
    stored = scale.to(dtype).to(torch.float32).clamp_(min=least)
    return stored.masked_fill_(span == 0, 1.0)


def block_rows(rows: int, columns: int, device: torch.device) -> int:
    """Rows to quantize at a time.

    Args:
        rows: How many there are.
        columns: Of each.
        device: Where they are.

    Returns:
        At least 1.
    """
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, min(rows, elements // max(columns, 1)))
