"""Stored bytes to tensors: a view where torch has the dtype, new values where it is one of GGUF's block types.

The `gguf` package dequantizes every type, with numpy and some 24 bytes of work for each element. The types that most files are
of (Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, and gpt-oss's MXFP4) are decoded here, in pieces that stay in the cache, to the same
values bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qlazy.errors import CorruptCheckpoint
from qlazy.reading.unpack import E2M1
from qlazy.sources.source import TensorInfo

_PIECE = 1 << 17
"""Elements decoded at a time."""

_E2M1 = 2 * torch.tensor(E2M1) + 0.0
"""Twice what four bits of MXFP4 stand for; adding zero takes the sign off the negative one, which ggml does not have."""


def decode(data: Tensor, info: TensorInfo, rows: int) -> Tensor:
    """Stored bytes to a tensor.

    Args:
        data: uint8 (bytes,).
        info: What the bytes are.
        rows: How many rows of `info` they hold; of more than two dimensions all but the last count as rows.
    Returns:
        A view of `data` in the stored dtype; for GGUF's block types a new float32 tensor.
    Raises:
        CorruptCheckpoint: a GGUF block type that cannot be decoded.

    Memory: a view, or what `decoded_bytes` says.
    """
    shape = (rows, *info.shape[-1:]) if len(info.shape) > 1 else (rows,) * len(info.shape)
    dtype = getattr(torch, info.dtype, None)
    if isinstance(dtype, torch.dtype):
        # Nothing obliges a file to begin its tensors on a multiple of their element.
        aligned = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
        return aligned.view(dtype).view(shape)
    if info.dtype in _BLOCKS:
        return _by_blocks(data, info.dtype, math.prod(shape)).view(shape)
    import gguf

    try:
        values = gguf.dequantize(data.numpy().reshape(rows if len(shape) > 1 else 1, -1), gguf.GGMLQuantizationType[info.dtype])
    except (KeyError, NotImplementedError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{info.path.name}: tensor {info.name!r} has type {info.dtype}, which cannot be decoded."
        ) from error
    return torch.from_numpy(values).view(shape)


def decoded_bytes(dtype: str) -> int:
    """Bytes that an element takes while it is decoded, work included.

    Args:
        dtype: As a `TensorInfo` has it.
    Returns:
        0 where nothing is decoded.
    """
    if isinstance(getattr(torch, dtype, None), torch.dtype):
        return 0
    return 6 if dtype in _BLOCKS else 24


def _by_blocks(data: Tensor, dtype: str, count: int) -> Tensor:
    size, nbytes, values_of = _BLOCKS[dtype]
    blocks, values = data.view(-1, nbytes), torch.empty(count // size, size)
    step = _PIECE // size
    for start in range(0, blocks.shape[0], step):
        values_of(blocks[start : start + step], values[start : start + step])
    return values


def _halves(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.float16).float()


def _bits(packed: Tensor, groups: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """The same bits of all bytes of a group, then the next ones: (n, bytes) to uint8 (n, groups, shifts, bytes of a group).

    Eight bytes at a time: what is shifted in from the next byte the mask takes away.
    """
    words = packed.clone(memory_format=torch.contiguous_format).view(torch.int64).view(packed.shape[0], groups, -1)
    each = int.from_bytes(bytes([mask] * 8), "little", signed=True)
    found = torch.empty(words.shape[0], groups, len(shifts), words.shape[2], dtype=torch.int64)
    for number, shift in enumerate(shifts):
        torch.bitwise_and(words >> shift if shift else words, each, out=found[:, :, number])
    return found.view(torch.uint8)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_bits(blocks[:, 2:], 1, (0, 4), 15).view(-1, 32)).sub_(8).mul_(_halves(blocks[:, :2]))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_bits(blocks[:, 4:], 1, (0, 4), 15).view(-1, 32)).mul_(_halves(blocks[:, :2])).add_(_halves(blocks[:, 2:4]))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks[:, :2]))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_bits(blocks[:, 16:], 4, (0, 4), 15).view(-1, 256))
    _scale_and_shift(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    high = _bits(blocks[:, 16:48], 1, tuple(range(8)), 1).view(torch.int64) << 4
    low = _bits(blocks[:, 48:], 4, (0, 4), 15).view(torch.int64)
    out.copy_((low.view(-1, 32) | high.view(-1, 32)).view(torch.uint8).view(-1, 256))
    _scale_and_shift(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low = _bits(blocks[:, :128], 2, (0, 4), 15).view(torch.int64)
    high = _bits(blocks[:, 128:192], 2, (0, 2, 4, 6), 3).view(torch.int64) << 4
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_halves(blocks[:, 208:]))
    out.copy_((low.view(-1, 32) | high.view(-1, 32)).view(torch.uint8).view(-1, 256)).sub_(32)
    out.view(-1, 16, 16).mul_(scale[:, :, None])


def _mxfp4(blocks: Tensor, out: Tensor) -> None:
    """Sixteen values by number, times half a power of two of which the block's first byte is the exponent."""
    numbers = _bits(blocks[:, 1:], 1, (0, 4), 15).view(-1).int()
    torch.index_select(_E2M1, 0, numbers, out=out.view(-1))
    exponent = blocks[:, :1].int()
    out.mul_(torch.where(exponent < 2, (1 << 21) << exponent, (exponent - 1) << 23).view(torch.float32))


def _scale_and_shift(blocks: Tensor, out: Tensor) -> None:
    """Eight six-bit scales and minima in twelve bytes: the last two bits of the last four stand in the first eight."""
    low, minima, both = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scale = torch.cat((low & 63, both & 15 | low >> 2 & 48), dim=1) * _halves(blocks[:, :2])
    shift = torch.cat((minima & 63, both >> 4 | minima >> 2 & 48), dim=1) * _halves(blocks[:, 2:4])
    out.view(-1, 8, 32).mul_(scale[:, :, None]).sub_(shift[:, :, None])


_BLOCKS: dict[str, tuple[int, int, Callable[[Tensor, Tensor], None]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q8_0": (32, 34, _q8_0),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
    "MXFP4": (32, 17, _mxfp4),
}
"""Elements and bytes of a block, and what decodes blocks: uint8 (n, bytes) into float32 (n, elements)."""
