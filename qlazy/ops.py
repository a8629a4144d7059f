"""Products with low-bit weights: one torch op a format, with what each device does best behind it.

    qlazy::linear_int4, qlazy::linear_int8, qlazy::linear_codebook4     y_MN = x_MK @ W_NK.T + bias_N

Registered with `torch.library`, so that `torch.compile` sees one opaque op and the choice by number of tokens never recompiles.
On a CPU a few tokens go to torch's packed int4 and int8 products, which read each weight once; many tokens go through blocks of
rows that are dequantized into a small scratch and multiplied in the dtype of `x`.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from qlazy import codebook, native, native_product, native_quantize
from qlazy.formats import BNB_BLOCK
from qlazy.packing import unpack_int4, unpack_zero_points

BLOCK_ROWS = 256
"""Rows dequantized at a time: a multiple of 64, so that a block starts on a block of every layout."""

INT4_PACKED_TOKENS = 24
"""Up to this many tokens torch's int4 product is faster than dequantizing (measured on AVX-512, see docs/decisions)."""

INT4_PACKED_TOKENS_PLAIN = 96
"""The same where no compiled loop dequantizes."""

INT8_PACKED_TOKENS = 24
"""The same for the int8 product, which falls behind sooner as it has no blocking over tokens."""

CODEBOOK4_PACKED_TOKENS = 32
"""Up to this many tokens the compiled NF4 and FP4 product is faster, which unpacks anew for every token."""

_library = torch.library.Library("qlazy", "DEF")
_library.define(
    "linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int in_features, bool cpu_layout) -> Tensor"
)
_library.define("linear_int8(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor")
_library.define(
    "linear_codebook4(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? bias, "
    "int out_features, str kind) -> Tensor"
)


def dequantize_int4_rows(
    packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int, dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """Rows `start` to `stop` of an int4 weight in the logical layout.

    Args:
        packed: int32 (N, ceil(K/8)).
        scale: (N, G).
        zero: int32 (ceil(N/8), G), or None where symmetric.
        columns: K.
        dtype: Of the result.
        start: First row, a multiple of 8.
        stop: One past the last row.
    Returns:
        (stop - start, K); the product (code - zero) * scale is rounded once.

    Memory: five bytes for each element of the block.
    """
    rows, groups = stop - start, scale.shape[1]
    codes = unpack_int4(packed[start:stop], columns)
    zeros = 8 if zero is None else unpack_zero_points(zero[start // 8 : -(-stop // 8)], rows).unsqueeze(2)
    centred = codes.view(rows, groups, columns // groups).to(torch.float32).sub_(zeros)
    return centred.mul_(scale[start:stop].unsqueeze(2)).view(rows, columns).to(dtype)


def dequantize_int4_cpu_rows(packed: Tensor, scale: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of an int4 weight in the CPU layout, transposed.

    Args:
        packed: uint8 (N, K/2).
        scale: bfloat16 (G, N, 2): scale, and (8 - zero) * scale.
        dtype: Of the result.
        start: First row, a multiple of 64.
        stop: One past the last row, likewise.
    Returns:
        (K, stop - start), the transpose of the rows.

    Memory: six bytes for each element of the block.
    """
    rows, columns = stop - start, packed.shape[1] * 2
    width, order = cpu_int4_order()
    if width == 64 and order == list(range(64)):
        compiled = native_product.unpack_int4_cpu(packed, scale, start, stop)
        if compiled is not None:
            return compiled.to(dtype)
    blocks, groups = rows // width, scale.shape[0]
    nibbles = packed[start:stop].view(blocks, columns, width // 2)
    centred = torch.empty(blocks, columns, width, dtype=torch.bfloat16)
    low, high = order[: width // 2], order[width // 2 :]
    if low[-1] == width // 2 - 1:
        centred[..., : width // 2] = nibbles & 15
        centred[..., width // 2 :] = nibbles >> 4
    else:
        centred[..., low] = (nibbles & 15).to(torch.bfloat16)
        centred[..., high] = (nibbles >> 4).to(torch.bfloat16)
    centred = centred.sub_(8).view(blocks, groups, columns // groups, width)
    both = scale.view(groups, -1, width, 2)[:, start // width : stop // width].permute(1, 0, 2, 3).unsqueeze(2)
    weight = torch.addcmul(both[..., 1], centred, both[..., 0])
    return weight.reshape(blocks, columns, width).permute(1, 0, 2).reshape(columns, rows).to(dtype)


def pack_int4_cpu(codes: Tensor) -> Tensor:
    """Pack 4-bit codes as this processor's int4 product wants them.

    Args:
        codes: uint8 (rows, K) in [0, 15]; rows a multiple of 64.
    Returns:
        uint8 (rows, K/2): blocks of rows, in each block all columns, in each column one byte for two rows.

    Memory: two bytes for each code.
    """
    rows, columns = codes.shape
    width, order = cpu_int4_order()
    if width == 64 and order == list(range(64)):
        compiled = native_quantize.pack_int4_cpu(codes)
        if compiled is not None:
            return compiled
    blocks = codes.view(rows // width, width, columns)
    low, high = order[: width // 2], order[width // 2 :]
    halves = (blocks[:, low] | (blocks[:, high] << 4)).transpose(1, 2)
    return halves.reshape(rows, columns // 2).contiguous()


def unpack_int4_cpu(packed: Tensor) -> Tensor:
    """Undo `pack_int4_cpu`.

    Args:
        packed: uint8 (rows, K/2); rows a multiple of 64.
    Returns:
        Codes, uint8 (rows, K).

    Memory: four bytes for each packed byte.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    width, order = cpu_int4_order()
    nibbles = packed.view(rows // width, columns, width // 2).transpose(1, 2)
    codes = torch.empty(rows // width, width, columns, dtype=torch.uint8)
    codes[:, order[: width // 2]] = nibbles & 15
    codes[:, order[width // 2 :]] = nibbles >> 4
    return codes.view(rows, columns)


@functools.cache
def cpu_int4_order() -> tuple[int, list[int]]:
    """How `aten::_convert_weight_to_int4pack_for_cpu` orders rows here: AVX-512, AVX2 and plain builds differ.

    Learned by packing known codes, so that packed bytes can be made by row blocks and given back exactly.

    Returns:
        Rows in a block, and the row of each nibble of one column: first all low nibbles, then all high ones.
    """
    rows, columns = 64, 32
    number = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, columns).contiguous()
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    low_digit, high_digit = pack(number % 16, 1), pack(number // 16, 1)
    for width in (64, 32, 16):
        digits = [p.view(rows // width, columns, width // 2) for p in (low_digit, high_digit)]
        found = torch.cat([(digits[0] & 15) + 16 * (digits[1] & 15), (digits[0] >> 4) + 16 * (digits[1] >> 4)], -1)
        order = found[0, 0].tolist()
        starts = torch.arange(0, rows, width)[:, None, None]
        if sorted(order) == list(range(width)) and bool((found == found[0, 0] + starts).all()):
            return width, order
    raise RuntimeError("torch orders int4 weights on this processor in a way that qlazy does not know; use --device-map cuda")


def _linear_int4(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, in_features: int, cpu_layout: bool
) -> Tensor:
    x_MK = x.reshape(-1, in_features)
    rows = packed.shape[0]
    few = INT4_PACKED_TOKENS if native.available() else INT4_PACKED_TOKENS_PLAIN
    if cpu_layout and x_MK.shape[0] <= few:
        # Only bfloat16 is vectorised, and the op reads x with aligned loads; a fresh cast or copy is both.
        group_size = in_features // scale.shape[0]
        y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(_aligned(x_MK), packed, group_size, scale)
        y_MN = y_MN.to(x.dtype)
    else:
        y_MN = x.new_empty(x_MK.shape[0], rows)
        for start in range(0, rows, BLOCK_ROWS):
            stop = min(rows, start + BLOCK_ROWS)
            if cpu_layout:
                y_MN[:, start:stop] = x_MK @ dequantize_int4_cpu_rows(packed, scale, x.dtype, start, stop)
            else:
                weight = dequantize_int4_rows(packed, scale, zero, in_features, x.dtype, start, stop)
                y_MN[:, start:stop] = linear(x_MK, weight)
    if bias is not None:
        y_MN += bias
    return y_MN.view(*x.shape[:-1], rows)


def _linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = packed.shape
    x_MK = x.reshape(-1, columns)
    # K % 16 != 0 gives garbage in the packed product, and grouped scales it does not know.
    packed_product = x.device.type == "cpu" and scale.shape[1] == 1 and columns % 16 == 0 and scale.dtype == torch.bfloat16
    if packed_product and x_MK.shape[0] <= INT8_PACKED_TOKENS:
        y_MN: Tensor = torch.ops.aten._weight_int8pack_mm(_aligned(x_MK), packed, scale.view(-1)).to(x.dtype)
    else:
        y_MN = x.new_empty(x_MK.shape[0], rows)
        for start in range(0, rows, BLOCK_ROWS):
            stop = min(rows, start + BLOCK_ROWS)
            y_MN[:, start:stop] = linear(x_MK, dequantize_int8_rows(packed, scale, x.dtype, start, stop))
    if bias is not None:
        y_MN += bias
    return y_MN.view(*x.shape[:-1], rows)


def dequantize_int8_rows(packed: Tensor, scale: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of an int8 weight.

    Args:
        packed: int8 (N, K).
        scale: (N, G).
        dtype: Of the result.
        start: First row.
        stop: One past the last row.
    Returns:
        (stop - start, K); q * scale, rounded once.

    Memory: six bytes for each element of the block.
    """
    block, factors = packed[start:stop], scale[start:stop]
    grouped = block.view(stop - start, factors.shape[1], -1)
    # Codes of 8 bits are exact in every float dtype, and a product of two elements of one dtype is rounded once.
    return (grouped.to(factors.dtype) * factors.unsqueeze(2)).view(block.shape).to(dtype)


def _linear_codebook4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    kind: str,
) -> Tensor:
    columns = x.shape[-1]
    x_MK = x.reshape(-1, columns)
    if 0 < x_MK.shape[0] <= CODEBOOK4_PACKED_TOKENS:
        nested = None if nested_absmax is None else (nested_absmax, cast(Tensor, nested_offset), codebook.nested_code())
        few = native_product.codebook4_product(x_MK, packed, absmax, nested, codebook.CODES[kind], out_features)
        if few is not None:
            return (few if bias is None else few.add_(bias)).view(*x.shape[:-1], out_features)
    if nested_absmax is not None and nested_offset is not None:
        absmax = codebook.unnest_absmax(absmax, nested_absmax, nested_offset)
    y_MN = x.new_empty(x_MK.shape[0], out_features)
    step = BLOCK_ROWS  # a multiple of 64 rows starts on a block of 64 elements whatever K is
    for start in range(0, out_features, step):
        rows = min(step, out_features - start)
        block = codebook.dequantize_blocks(packed, absmax, kind, x.dtype, start * columns, rows * columns)
        y_MN[:, start : start + rows] = linear(x_MK, block.view(rows, columns))
    if bias is not None:
        y_MN += bias
    return y_MN.view(*x.shape[:-1], out_features)


def _aligned(x: Tensor) -> Tensor:
    """`x` in bfloat16, contiguous and on a 64-byte boundary, as torch's packed products read it."""
    x = x.to(torch.bfloat16).contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


assert BLOCK_ROWS % BNB_BLOCK == 0
for _device in ("CPU", "CUDA"):
    _library.impl("linear_int4", _linear_int4, _device)
    _library.impl("linear_int8", _linear_int8, _device)
    _library.impl("linear_codebook4", _linear_codebook4, _device)


@torch.library.register_fake("qlazy::linear_int4")
def _(x, packed, scale, zero, bias, in_features, cpu_layout):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("qlazy::linear_int8")
def _(x, packed, scale, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("qlazy::linear_codebook4")
def _(x, packed, absmax, nested_absmax, nested_offset, bias, out_features, kind):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)
