"""Stored low-bit weights back to values, a few rows at a time, exactly as the library that made them does.

`qlazy/sources/packed.py` says which stored tensors make up a weight. Every scheme has one function here, from the bytes of
those tensors for some rows to the values of these rows. Operations, their order and their dtypes are those of the library, so
that values are equal to its own bit for bit, wherever the cut between rows falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlazy.errors import CorruptCheckpoint
from qlazy.quantizing.codebook import CODES
from qlazy.sources.packed import Awq, BitsAndBytes4, BitsAndBytes8, Float4, Float8, Gptq, Integers, PackedTensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The four-bit floats by code."""

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of its eight columns stands."""

_E8M0_BIAS = 127


def unpack_rows(info: PackedTensor, data: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Rows of a weight as the library that packed it has them.

    Args:
        info: The weight.
        data: For each part by its role the bytes, uint8 (n,), of `Part.span(start, stop)`.
        start: First row, a multiple of `info.row_block`; all dimensions but the last count as rows.
        stop: One past the last; a multiple too, or the number of rows.
    Returns:
        (stop - start, K), new, in the dtype that `info` names.
    Raises:
        CorruptCheckpoint: a group index that no group has.

    Memory: a small multiple of the result.
    """
    views = {part.role: _view(data[part.role], part.stored.dtype) for part in info.parts}
    unpack = _UNPACK[type(info.scheme)]
    values = unpack(info.scheme, info, views, start, stop)
    assert values.shape == (stop - start, info.shape[-1])
    return values.to(getattr(torch, info.dtype)).contiguous()


def _view(data: Tensor, dtype: str) -> Tensor:
    """Bytes as flat elements of a dtype. Nothing obliges a file to begin its tensors on a multiple of their element."""
    wanted: torch.dtype = getattr(torch, dtype)
    aligned = data if data.storage_offset() % wanted.itemsize == 0 and data.data_ptr() % wanted.itemsize == 0 else data.clone()
    return aligned.view(wanted)


def _float8(scheme: Float8, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    *_, rows, columns = info.shape
    high, wide = scheme.block
    across = -(-columns // wide)
    product: torch.dtype = getattr(torch, scheme.product)
    scale = _exponents(parts["scale"]).to(product).view(-1, across)
    row = torch.arange(start, stop)
    scale = scale[row // rows * -(-rows // high) + row % rows // high]
    values = parts["weight"].view(stop - start, columns).to(product)
    if columns % wide == 0:
        return values.view(-1, across, wide).mul_(scale[:, :, None]).view(-1, columns)
    return values.mul_(scale.repeat_interleave(wide, dim=1)[:, :columns])


def _float4(scheme: Float4, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    columns = info.shape[-2] if scheme.transposed else info.shape[-1]
    groups = columns // scheme.group_size
    scale = _exponents(parts["scale"]) if scheme.scale == "e8m0" else parts["scale"].float()
    if scheme.global_scale != "none":
        whole = parts["global_scale"]
        scale = scale * whole if scheme.global_scale == "multiplies" else scale / whole
    values = _pairs(parts["weight"].view(torch.uint8), torch.tensor(E2M1)).view(-1, groups, scheme.group_size)
    values = values.mul_(scale.view(-1, groups, 1)).view(-1, columns)
    if not scheme.transposed:
        return values
    turned = values.to(getattr(torch, info.dtype)).view(-1, info.shape[-1], columns).transpose(1, 2)
    return turned.reshape(stop - start, info.shape[-1])


def _integers(scheme: Integers, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    rows, columns = stop - start, info.shape[1]
    offset = 1 << (scheme.bits - 1)
    scale = parts["scale"]
    dtype = scale.dtype
    per_row = info.parts[1].rows == 1
    scale = scale.view(rows, -1) if per_row else scale.view(1, -1).expand(rows, -1)
    groups = scale.shape[1]
    if scheme.packed:
        values = _unpack_bits(parts["weight"].view(rows, -1), scheme.bits, columns).to(dtype).sub_(offset)
    else:
        values = parts["weight"].view(rows, columns).to(dtype)
    zero = None
    if not scheme.symmetric:
        held = next(part for part in info.parts if part.role == "zero")
        if held.stored.dtype == "int32":
            # Packed along rows. Where whole words hold the rows only those were read.
            count = rows if held.rows else info.shape[0]
            zero = _unpack_bits(parts["zero"].view(-1, groups).t(), scheme.bits, count).t().to(dtype).sub_(offset)
            zero = zero if held.rows else zero[start:stop]
        else:
            zero = parts["zero"].view(-1, groups).to(dtype).expand(rows, -1)
    order = parts.get("g_idx")
    if order is not None and not bool((order == -1).any()):
        group = _checked(order, groups, info)
        scale, zero = scale[:, group], None if zero is None else zero[:, group]
    size = columns // scale.shape[1]
    values = values.view(rows, -1, size)
    if zero is not None:
        values = values.sub_(zero[:, :, None])
    return values.mul_(scale[:, :, None]).view(rows, columns)


def _gptq(scheme: Gptq, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    (rows, columns), bits = info.shape, scheme.bits
    scale = parts["scale"].view(-1, rows)[:, start:stop]
    groups = scale.shape[0]
    words = parts["weight"].view(-1, rows)[:, start:stop]
    codes = _unpack_bits(words.t(), bits, columns)
    packed = parts["zero"].view(groups, -1)[:, start * bits // 32 : -(-stop * bits // 32)]
    if scheme.zero_offset and 32 % bits == 0:
        # To whole words, with the carry from one zero to the next: so the library undoes what it did on writing.
        ones = sum(1 << at for at in range(0, 32, bits))
        packed = packed + (ones - (1 << 32) if ones >> 31 else ones)
    zero = _unpack_bits(packed, bits, stop - start)
    if scheme.zero_offset and 32 % bits:
        zero = (zero + 1) & ((1 << bits) - 1)
    size = scheme.group_size if scheme.group_size > 0 else columns
    in_order, order = torch.arange(columns) // size, parts.get("g_idx")
    scale, zero, codes = scale.t(), zero.t().view(torch.int8), codes.view(torch.int8)
    if bits == 8:
        codes, zero = codes.view(torch.uint8).to(torch.int16), zero.view(torch.uint8).to(torch.int16)
    if columns == groups * size and (order is None or torch.equal(order.long(), in_order)):
        difference = codes.view(-1, groups, size) - zero[:, :, None]
        return difference.to(scale.dtype).mul_(scale[:, :, None]).view(-1, columns)
    group = _checked(in_order if order is None else order, groups, info)
    return (codes - zero[:, group]).to(scale.dtype).mul_(scale[:, group])


def _awq(scheme: Awq, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    rows, columns = info.shape
    scale = parts["scale"].view(-1, rows)[:, start:stop]
    first, last = start // 8, -(-stop // 8)
    shifts = torch.tensor(AWQ_NIBBLES, dtype=torch.int32) * 4
    codes, zero = (
        (parts[role].view(-1, rows // 8)[:, first:last, None] >> shifts).bitwise_and_(15).to(torch.int8).flatten(1)
        for role in ("weight", "zero")
    )
    difference = codes.view(-1, scheme.group_size, stop - start) - zero[:, None]
    return difference.to(scale.dtype).mul_(scale[:, None]).view(columns, -1).t()


def _bitsandbytes4(scheme: BitsAndBytes4, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    count = (stop - start) * info.shape[1]
    absmax = parts["absmax"]
    if scheme.nested_blocksize:
        first = start * info.shape[1] // scheme.blocksize
        block = torch.arange(first, first + absmax.shape[0]) // scheme.nested_blocksize
        absmax = parts["nested_quant_map"][absmax.int()] * parts["nested_absmax"][block] + scheme.nested_offset
    values = _pairs(parts["weight"].view(torch.uint8), CODES[scheme.kind], high_first=True).view(-1)
    short = -values.shape[0] % scheme.blocksize
    values = torch.nn.functional.pad(values, (0, short)) if short else values
    values = values.view(-1, scheme.blocksize).mul_(absmax[:, None])
    return values.view(-1)[:count].view(stop - start, -1)


def _bitsandbytes8(scheme: BitsAndBytes8, info: PackedTensor, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    return parts["weight"].view(stop - start, -1) * parts["scale"][:, None] * 7.874015718698502e-3


_UNPACK: dict[type, Callable[[Any, PackedTensor, Mapping[str, Tensor], int, int], Tensor]] = {
    Float8: _float8,
    Float4: _float4,
    Integers: _integers,
    Gptq: _gptq,
    Awq: _awq,
    BitsAndBytes4: _bitsandbytes4,
    BitsAndBytes8: _bitsandbytes8,
}


def _exponents(scale: Tensor) -> Tensor:
    """Scales as floats: bytes are powers of two, as `float8_e8m0fnu` are; everything else is a float already."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - _E8M0_BIAS)
    return scale.float() if scale.dtype.itemsize == 1 else scale


def _pairs(data: Tensor, values: Tensor, *, high_first: bool = False) -> Tensor:
    """Two four-bit codes of each byte to their values, by a table of all bytes. float32 (n, 2)."""
    byte = torch.arange(256)
    low, high = values[byte & 15], values[byte >> 4]
    table = torch.stack((high, low) if high_first else (low, high), dim=1)
    return torch.nn.functional.embedding(data.reshape(-1).int(), table)


def _unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Integers that stand bit to bit along the rows of a matrix of words, the first in the lowest bits. uint8 (rows, count)."""
    rows = words.shape[0]
    data = words.contiguous().view(-1).view(torch.uint8).view(rows, -1)
    if bits == 8:
        return data[:, :count].contiguous()
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (data[:, :, None] >> shifts).bitwise_and_((1 << bits) - 1).view(rows, -1)[:, :count]
    # Eight of them in `bits` bytes: each lies in two bytes at most.
    groups = -(-count // 8)
    data = torch.nn.functional.pad(data, (0, max(0, groups * bits - data.shape[1])))[:, : groups * bits]
    data = torch.nn.functional.pad(data.reshape(rows, groups, bits), (0, 1)).to(torch.int16)
    at = [i * bits for i in range(8)]
    both = data[:, :, [a // 8 for a in at]] | (data[:, :, [a // 8 + 1 for a in at]] << 8)
    shifted = (both.to(torch.int32) & 0xFFFF) >> torch.tensor([a % 8 for a in at], dtype=torch.int32)
    return shifted.bitwise_and_((1 << bits) - 1).to(torch.uint8).view(rows, -1)[:, :count]


def _checked(order: Tensor, groups: int, info: PackedTensor) -> Tensor:
    """Group indices as they can be used: a file may hold anything."""
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise CorruptCheckpoint(
            f"{info.path.name}: {info.name!r} names group {int(order.max())} of a column, but there are {groups}.",
            hint="The file is damaged; download it again.",
        )
    return order.long()
