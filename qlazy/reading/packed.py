"""Read rows of a weight that several stored tensors make up, and unpack them a few at a time.

Where its parts lie by rows, only those of the rows asked for are read, each part into its place in the slot. Where the layout
is the other way round (GPTQ and AWQ pack along N) all of the weight is read, still packed, and unpacked a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qlazy.matching.fill import row_count
from qlazy.reading.files import MARGIN, PAGE, Files, Slot, make_ring
from qlazy.reading.unpack import unpack_rows
from qlazy.sources.packed import PackedTensor, Part

UNPACKED_ELEMENTS = 1 << 18
"""Elements that are unpacked at a time, so that values and what they are made with stay small beside the ring."""


def unpack_pieces(
    files: Files, info: PackedTensor, start: int, stop: int, *, block: int = 1, slot: Slot | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Read rows of a weight and unpack them.

    Args:
        files: Open files.
        info: The weight.
        start: First row; all dimensions but the last count as rows.
        stop: One past the last.
        block: Rows that must come together, counted from row 0.
        slot: Where to read to, with room for `sliced_bytes` of these rows; None makes one.
    Yields:
        First row, one past the last, and the values (rows, K), new.
    Raises:
        IncompleteCheckpoint: a file ends before.
        CorruptCheckpoint: the parts contradict each other.

    Memory: a small multiple of a quarter million elements, or of `block` rows where those are more; without a slot the stored
    bytes of the rows; and of parts that cannot be read by rows all bytes.
    """
    rows = row_count(info.shape)
    first, last = start // info.row_block * info.row_block, min(rows, -(-stop // info.row_block) * info.row_block)
    data = _read(files, info, first, last, slot)
    together = math.lcm(info.row_block, block)
    step = max(together, UNPACKED_ELEMENTS // max(1, info.shape[-1]) // together * together)
    begin = start
    while begin < stop:
        end = min(stop, begin // together * together + step)
        low, high = begin // info.row_block * info.row_block, min(rows, -(-end // info.row_block) * info.row_block)
        parts = {part.role: _of_rows(part, data[part.role], first, last, low, high) for part in info.parts}
        yield begin, end, unpack_rows(info, parts, low, high)[begin - low : end - low]
        begin = end


def sliced_bytes(info: PackedTensor, rows: int) -> int:
    """Room that so many rows take in a slot.

    Args:
        info: The weight.
        rows: How many.
    Returns:
        Bytes of the parts that are read by rows; 0 where the weight is read as a whole, not into a slot.
    """
    if info.whole:
        return 0
    return sum(-(-rows // part.rows) * part.slice_nbytes + MARGIN + PAGE for part in info.parts if part.rows)


def read_whole(files: Files, info: PackedTensor, start: int, stop: int) -> Tensor:
    """Rows of a weight in one tensor, for what is converted as a whole.

    Args:
        files: Open files.
        info: The weight.
        start: First row.
        stop: One past the last.
    Returns:
        (rows, K), new.

    Memory: the result, and the stored bytes of the rows.
    """
    values = torch.empty((stop - start, info.shape[-1]), dtype=getattr(torch, info.dtype))
    for first, last, piece in unpack_pieces(files, info, start, stop):
        values[first - start : last - start] = piece
    return values


def _read(files: Files, info: PackedTensor, start: int, stop: int, slot: Slot | None) -> dict[str, Tensor]:
    """The bytes of every part for these rows, those by rows one after the other in the slot."""
    found, room = {}, 0
    for part in info.parts:
        begin, nbytes = part.span(start, stop)
        if slot is None or info.whole or not part.rows:
            (own,) = make_ring(1, nbytes)
        else:
            own = Slot(slot.data[room:], slot.view[room:])
            room += -(-nbytes // PAGE) * PAGE + MARGIN
        found[part.role] = files.read([part.stored], begin, nbytes, own)
    return found


def _of_rows(part: Part, data: Tensor, start: int, stop: int, low: int, high: int) -> Tensor:
    """Of the bytes for rows `start` to `stop` those for rows `low` to `high`."""
    first = part.span(start, stop)[0]
    begin, nbytes = part.span(low, high)
    return data[begin - first : begin - first + nbytes]
