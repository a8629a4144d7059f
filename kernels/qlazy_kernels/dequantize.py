"""Unpack four-bit weights: one program a tile, each packed word read once, fp32 arithmetic, one rounding at the end.

Shape legend: N = out_features (rows), K = in_features (columns), G = groups along K, P = K / 8 packed words along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 8
BLOCK_K = 256
NUM_WARPS = 4

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dequantize_int4(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Turn packed four-bit codes into a weight: `w = (code - zero) * scale`.

    Bits of the word p in a row of `weight_packed` (codes of one row), and of the word i in a column of `weight_zero_point`
    (zeros of one group), lowest bit on the right::

        bit   31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        code  k=8p+7   k=8p+6   k=8p+5   k=8p+4   k=8p+3   k=8p+2   k=8p+1   k=8p
        zero  n=8i+7   n=8i+6   n=8i+5   n=8i+4   n=8i+3   n=8i+2   n=8i+1   n=8i

    Args:
        weight_packed: (N, P) int32, contiguous, on a CUDA device; any N.
        weight_scale: (N, G) float16, bfloat16 or float32, contiguous, same device. K = 8 P is a multiple of 8 G, so that a
            group is a whole number of words: groups of 32, 64 or 128 columns, or G = 1 for the whole row.
        weight_zero_point: (ceil(N / 8), G) int32, contiguous, same device; None = 8 everywhere (symmetric).
        dtype: float16, bfloat16 or float32; None = the dtype of the scales.

    Returns:
        (N, K) weight in `dtype`, contiguous, same device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and nothing beside it.
    """
    dtype = weight_scale.dtype if dtype is None else dtype
    rows, columns, groups = _check(weight_packed, weight_scale, weight_zero_point, dtype)
    weight = torch.empty((rows, columns), dtype=dtype, device=weight_packed.device)
    grid = (triton.cdiv(rows, BLOCK_N), triton.cdiv(columns, BLOCK_K))
    with torch.cuda.device_of(weight):
        dequantize_int4_kernel[grid](
            weight_packed,
            weight_scale,
            weight_packed if weight_zero_point is None else weight_zero_point,
            weight,
            rows,
            columns,
            groups,
            columns // groups,
            HAS_ZERO=weight_zero_point is not None,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
        )
    return weight


@triton.jit
def dequantize_int4_kernel(
    packed_NP,
    scale_NG,
    zero_NG,
    weight_NK,
    rows,
    columns,
    groups,
    group_size,
    HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of BLOCK_N rows and BLOCK_K columns. Eight neighbouring lanes read the same word in one transaction."""
    # 64 bits: N * K passes 2^31 in the output heads of large models.
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (n < rows) & (k < columns)
    group = k // group_size

    words = tl.load(packed_NP + n * (columns // 8) + k // 8, mask=inside, other=0)
    # Casts come right after the loads: Triton's interpreter computes in bfloat16 wrongly, and fp32 is what the result is
    # defined in.
    scale = tl.load(scale_NG + n * groups + group, mask=inside, other=0.0).to(tl.float32)
    code = (words >> ((k % 8) * 4)) & 0xF
    if HAS_ZERO:
        zeros = tl.load(zero_NG + (n // 8) * groups + group, mask=inside, other=0)
        zero = (zeros >> ((n % 8) * 4).to(tl.int32)) & 0xF
    else:
        zero = 8
    weight = (code - zero).to(tl.float32) * scale
    tl.store(weight_NK + n * columns + k, weight.to(weight_NK.dtype.element_ty), mask=inside)


def _check(packed: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> tuple[int, int, int]:
    """Refuse what the kernel would read out of bounds or out of step."""
    given = {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zero_point}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs two dimensions, none of them 0.")
        if tensor.device != packed.device:
            raise ValueError(f"{name} is on {tensor.device}, weight_packed on {packed.device}; they need one device.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()} at shape {tuple(tensor.shape)}; it must be contiguous.")
        if name != "weight_scale" and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; it must be torch.int32, eight codes to a word.")
    if scale.dtype not in OUT_DTYPES or dtype not in OUT_DTYPES:
        raise ValueError(f"scales are {scale.dtype} and the result {dtype}; both must be float16, bfloat16 or float32.")
    rows, columns, groups = packed.shape[0], packed.shape[1] * 8, scale.shape[1]
    if scale.shape[0] != rows:
        raise ValueError(f"weight_scale has {scale.shape[0]} rows, weight_packed {rows}.")
    if columns % (8 * groups):
        raise ValueError(f"{columns} columns do not divide into {groups} groups of whole words (8 columns each).")
    if zero_point is not None and tuple(zero_point.shape) != (-(-rows // 8), groups):
        raise ValueError(
            f"weight_zero_point has shape {tuple(zero_point.shape)}; {rows} rows in "
            f"{groups} groups need {(-(-rows // 8), groups)}."
        )
    return rows, columns, groups
