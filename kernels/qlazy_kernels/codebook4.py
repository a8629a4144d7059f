"""NF4 and FP4, the codebooks of bitsandbytes: packed on the device with its bytes, and unpacked by row ranges.

Equal bytes as in `quantize.py`: division rounded to nearest, no fused multiply-add. A block with a NaN or an infinity gets
an absmax that is NaN; its codes mean nothing.

Shape legend: N = out_features (rows), K = in_features (columns), B = blocks of 64 elements of the flat weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import check_codebook4, check_nested, check_tensors, check_weight, float_dtype, result, row_range
from qlazy_kernels.rounding import load_weight
from qlazy_kernels.tiles import Tile

DEQUANTIZE_TILE = Tile(block_n=8, block_k=256)
QUANTIZE_TILE = Tile(block_n=32, block_k=64)
"""Defaults: 2,048 weights a program, sixteen a thread."""


def dequantize_codebook4(
    weight_packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    rows: int,
    columns: int,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype,
    tile: Tile = DEQUANTIZE_TILE,
    out: Tensor | None = None,
) -> Tensor:
    """Turn NF4 or FP4 codes into a weight: `w = code[nibble] * absmax` of its block of 64 elements of the flat weight.

    Bits of the byte j of `weight_packed`::

        bit      7..4     3..0
        element  2j       2j+1      of the weight, row after row

    Args:
        weight_packed: (ceil(N K / 2),) uint8, contiguous, on a CUDA device.
        absmax: (B,) float32; with `nested` uint8.
        code: (16,) float32, the value of each code.
        nested: Where absmax is stored in 8 bits: the 256 values of its codes, (ceil(B / 256),) its own absmax, () its
            offset, all float32: `absmax = values[absmax] * nested_absmax + offset`.
        rows: N.
        columns: K.
        start: First row; even where K is odd.
        stop: One past the last row; None = N.
        dtype: float16, bfloat16 or float32.
        tile: How to cut the work; its rows and columns are taken together, as the weight is flat.
        out: (stop - start, K) of `dtype` to write into; None = new.

    Returns:
        Rows `start` to `stop` of the weight, contiguous, same device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and nothing beside it.
    """
    check_codebook4(weight_packed, absmax, code, rows, columns, nested=nested is not None)
    check_nested(nested, absmax)
    stop = row_range(start, stop, rows)
    weight = result(out, (stop - start, columns), float_dtype(dtype), weight_packed.device)
    first, count = start * columns, (stop - start) * columns
    if first % 2:
        raise ValueError(
            f"Row {start} of {columns} columns starts at element {first}, in the middle of a byte; take an even row."
        )
    size = tile.block_n * tile.block_k
    values, nested_absmax, offset = (code, code, code) if nested is None else nested
    with torch.cuda.device_of(weight):
        dequantize_codebook4_kernel[(triton.cdiv(count, size),)](
            weight_packed,
            absmax,
            code,
            values,
            nested_absmax,
            offset,
            weight,
            first // 2,
            -(-count // 2),
            count,
            NESTED=nested is not None,
            SIZE=size,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # absmax is a product and a sum, each rounded, as it is everywhere else
        )
    return weight


def quantize_codebook4(
    weight: Tensor,
    bounds: Tensor,
    order: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    tile: Tile = QUANTIZE_TILE,
) -> tuple[Tensor, Tensor]:
    """NF4 or FP4 codes of consecutive elements of a weight, and the absmax of each block of 64, with bitsandbytes' bytes.

    Bits of a packed byte j::

        bit      7..4     3..0
        element  2j       2j+1      (after the last of an odd number: the code of 0)

    Args:
        weight: Any shape, floating, or uint8 for the bytes of float8_e4m3fn; contiguous, on a CUDA device. Starts on a multiple
            of 64 in the flat weight; only the last run may end inside a block.
        bounds: (15,) float32, same device: halfway between neighbouring values of the codebook, ascending.
        order: (16,) int32, same device: the codes by ascending value.
        out: Storage to write: packed (ceil(count / 2),) uint8, absmax (ceil(count / 64),) float32; None = new.
        tile: Blocks and elements of a block.

    Returns:
        Packed codes and absmax.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message has both numbers.

    Memory: the results.
    """
    flat = weight.reshape(-1)
    check_weight(flat.view(1, -1))
    check_tensors(1, weight=flat, bounds=bounds, order=order)
    for name, tensor, dtype, size in (("bounds", bounds, torch.float32, 15), ("order", order, torch.int32, 16)):
        if tensor.dtype != dtype or tensor.shape[0] != size:
            raise ValueError(f"{name} is {tensor.dtype} with {tensor.shape[0]} elements; it must be {dtype} with {size}.")
    count = flat.numel()
    packed_out, absmax_out = (None, None) if out is None else out
    packed = result(packed_out, (-(-count // 2),), torch.uint8, flat.device)
    absmax = result(absmax_out, (-(-count // 64),), torch.float32, flat.device)
    with torch.cuda.device_of(flat):
        quantize_codebook4_kernel[(triton.cdiv(absmax.numel(), tile.block_n),)](
            flat,
            bounds,
            order,
            packed,
            absmax,
            count,
            packed.numel(),
            FP8=flat.dtype == torch.uint8,
            BLOCK_B=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return packed, absmax


@triton.jit
def dequantize_codebook4_kernel(
    packed,
    absmax_B,
    code,
    nested_code,
    nested_absmax,
    offset,
    weight,
    first_byte,
    packed_count,
    count,
    NESTED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """SIZE elements, the first of them in byte `first_byte`."""
    begin = tl.program_id(0).to(tl.int64) * (SIZE // 2)
    byte = begin + tl.arange(0, SIZE // 2)
    ok = byte < packed_count
    pair = tl.load(packed + first_byte + byte, mask=ok, other=0).to(tl.int32)
    nibble = (pair[:, None] >> (4 - tl.arange(0, 2) * 4)[None, :]) & 0xF
    # Both elements of a byte lie in one block.
    scale = load_absmax(absmax_B, nested_code, nested_absmax, offset, (first_byte + byte) // 32, ok, NESTED)
    values = tl.reshape(tl.load(code + nibble) * scale[:, None], (SIZE,))
    at = begin * 2 + tl.arange(0, SIZE)
    tl.store(weight + at, values.to(weight.dtype.element_ty), mask=at < count)


@triton.jit
def load_absmax(absmax_B, nested_code, nested_absmax, offset, block, ok, NESTED: tl.constexpr):
    """The fp32 absmax of blocks, unpacked from its 8 bits where it is nested."""
    if NESTED:
        place = tl.load(absmax_B + block, mask=ok, other=0).to(tl.int32)
        scale = tl.load(nested_absmax + block // 256, mask=ok, other=0.0)
        absmax = tl.load(nested_code + place) * scale + tl.load(offset)
    else:
        absmax = tl.load(absmax_B + block, mask=ok, other=0.0)
    return absmax


@triton.jit
def quantize_codebook4_kernel(
    weight, bounds, order, packed, absmax_B, count, packed_count, FP8: tl.constexpr, BLOCK_B: tl.constexpr
):
    """BLOCK_B blocks of 64 consecutive elements."""
    block = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    w = load_weight(weight + element, element < count, FP8)
    poison = tl.sum(w * 0.0, axis=1)
    absmax = tl.max(tl.abs(w), axis=1)
    # As fp32: Triton takes a number below the least normal one for float64.
    divisor = tl.maximum(absmax, tl.full((BLOCK_B,), 1e-38, tl.float32))
    # A block is multiplied by the inverse, a last one that is not full is divided.
    full = block * 64 + 64 <= count
    scaled = tl.where(full[:, None], w * tl.div_rn(1.0, divisor)[:, None], tl.div_rn(w, divisor[:, None]))
    place = tl.full((BLOCK_B, 64), 0, tl.int32)
    for index in tl.static_range(15):
        # On a boundary the smaller value wins.
        place += (scaled > tl.load(bounds + index)).to(tl.int32)
    code = tl.load(order + place)
    absmax = tl.where(full, absmax, divisor)
    absmax = tl.where(poison == poison, absmax, float("nan"))
    tl.store(absmax_B + block, absmax, mask=block * 64 < count)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.sum(tl.reshape(code, (BLOCK_B, 32, 2)) << (4 - tl.arange(0, 2) * 4)[None, None, :], axis=2)
    tl.store(packed + byte, pair.to(tl.uint8), mask=byte < packed_count)
