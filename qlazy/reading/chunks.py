"""Cut what is to be read into chunks, and say in which order and how many at once."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlazy.matching.fill import Fill, bytes_of_rows, row_count
from qlazy.planning.plan import CHUNK_BYTES, RING_BYTES
from qlazy.reading.decode import decoded_bytes
from qlazy.reading.files import MARGIN
from qlazy.reading.packed import sliced_bytes
from qlazy.sources.packed import PackedTensor
from qlazy.sources.source import TensorInfo

T = TypeVar("T")

CACHED_BYTES = 2 << 20
"""Chunk of a load to the host, at least: with what it becomes it stays in a second-level cache of 2 MiB."""

MERGED_BYTES = 128 << 10
"""Room of a slot beyond its chunk, for small neighbours that are read with it."""

GAP_BYTES = 64 << 10
"""Bytes that nobody wants, between two tensors, that are read through."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of work: some rows of one stored tensor, or a group of tensors that is converted as a whole."""

    fill: Fill
    """What it is part of."""
    start: int = 0
    """First row (first element, of a one-dimensional tensor)."""
    stop: int = 0
    """One past the last."""

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return self.fill.nbytes if self.fill.convert else bytes_of_rows(self.fill.sources[0], self.start, self.stop)

    @functools.cached_property
    def begin(self) -> int:
        """Where they begin in the file; of a group those of its first tensor."""
        return self.fill.sources[0].offset + self._per_row * self.start

    @property
    def _per_row(self) -> int:
        info = self.fill.sources[0]
        return info.nbytes // max(1, row_count(info.shape))


def slot_bytes(fills: tuple[Fill, ...], workers: int, chunk_bytes: int = CHUNK_BYTES, ring_bytes: int = RING_BYTES) -> int:
    """Bytes of a chunk in one slot: a part of the ring up to `chunk_bytes`, but never less than 64 rows of the widest tensor.

    Args:
        fills: What will be read.
        workers: Number of slots.
        chunk_bytes: As much as is wanted.
        ring_bytes: Of all slots.
    Returns:
        Bytes.
    """
    widest = max((_stripe(fill) for fill in fills if fill.convert is None), default=0)
    return max(min(chunk_bytes, ring_bytes // workers - MERGED_BYTES - 2 * MARGIN), widest)


def worker_count(fills: tuple[Fill, ...], chunk_bytes: int = CACHED_BYTES, ring_bytes: int = RING_BYTES) -> int:
    """Workers that the ring has room for: two more than there are processors, so that two can read while all others compute.

    Args:
        fills: What will be read.
        chunk_bytes: Bytes that a worker's slot should have.
        ring_bytes: Of all slots.
    Returns:
        At least 2.
    """
    widest = max((_stripe(fill) for fill in fills if fill.convert is None), default=1)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(processors + 2, 16, ring_bytes // max(1, chunk_bytes, widest)))


def host_chunk_bytes(workers: int, *, compiled: bool) -> int:
    """Bytes of a chunk of a load to the host.

    Whatever its size, a chunk costs a third of a millisecond of Python. Compiled quantizers go through it row by row, so that a
    large one does them no harm; others make several copies of it.

    Args:
        workers: How many there are.
        compiled: Whether quantizers are.
    Returns:
        2 MiB or more: up to half the ring together, as what GGUF's block types become lies beside it.
    """
    return max(CACHED_BYTES, min(CHUNK_BYTES, RING_BYTES // 2 // workers)) if compiled else CACHED_BYTES


def plan_chunks(fills: tuple[Fill, ...], limit: int) -> Iterator[Chunk]:
    """Cut fills into chunks of at most `limit` bytes, in file order.

    Args:
        fills: What to read.
        limit: Bytes of one slot.
    Yields:
        Chunks that cover every fill exactly once.
    """
    for fill in fills:
        info = fill.sources[0]
        first, last = fill.all_spans[0]
        if fill.convert is not None or first == last:
            yield Chunk(fill=fill, start=first, stop=last)
            continue
        step = max(1, limit // max(1, _row_cost(info)))
        if isinstance(info, PackedTensor) and info.whole:
            step = last - first
        elif is_matrix(fill):
            block = _block(fill)
            step = max(block, step - step % block)
        for start in range(first, last, step):
            yield Chunk(fill=fill, start=start, stop=min(last, start + step))


def merge(chunks: Iterator[Chunk], limit: int) -> Iterator[tuple[Chunk, ...]]:
    """Put chunks that lie next to each other in a file together, to be read at once.

    Args:
        chunks: In file order.
        limit: Most bytes of one read.
    Yields:
        Runs of chunks; one that is converted as a whole, or of a weight with several parts, comes alone.
    """
    run: list[Chunk] = []
    for chunk in chunks:
        if run and (_comes_alone(run[0].fill) or _comes_alone(chunk.fill) or not _adjoins(run, chunk, limit)):
            yield tuple(run)
            run = []
        run.append(chunk)
    if run:
        yield tuple(run)


def by_device(fills: tuple[Fill, ...], devices: Mapping[str, str]) -> list[tuple[Fill, ...]]:
    """Sort fills by the device that they go to.

    Args:
        fills: What to read, in file order.
        devices: Where each tensor of the model lies; empty: all on the host.
    Returns:
        The fills of each device, in file order.
    """
    lanes: dict[str, list[Fill]] = {}
    for fill in fills:
        lanes.setdefault(devices.get(fill.targets[0], "cpu"), []).append(fill)
    return [tuple(lane) for lane in lanes.values()]


def take_turns(lanes: Sequence[Iterator[T]]) -> Iterator[T]:
    """Go through several sequences side by side.

    Args:
        lanes: Of any lengths.
    Yields:
        One of each in turn, until all have ended.
    """
    left = list(lanes)
    while left:
        for lane in tuple(left):
            try:
                yield next(lane)
            except StopIteration:
                left.remove(lane)


def _adjoins(run: list[Chunk], chunk: Chunk, limit: int) -> bool:
    """Whether a chunk follows closely on a run of them, and all fit in one read."""
    last = run[-1]
    if chunk.begin + chunk.nbytes - run[0].begin > limit or not 0 <= chunk.begin - last.begin - last.nbytes <= GAP_BYTES:
        return False
    return last.fill.sources[0].path == chunk.fill.sources[0].path


def _row_cost(info: TensorInfo) -> int:
    """Bytes that one row takes while it is read: as stored, or while a GGUF block type is decoded."""
    if isinstance(info, PackedTensor):
        return sliced_bytes(info, row_count(info.shape)) // max(1, row_count(info.shape)) + 1
    return max(info.nbytes, decoded_bytes(info.dtype) * math.prod(info.shape)) // max(1, row_count(info.shape))


def _stripe(fill: Fill) -> int:
    """Least bytes that a chunk of this tensor holds: a block of rows of a matrix, one element of a vector."""
    info = fill.sources[0]
    rows = row_count(info.shape)
    if isinstance(info, PackedTensor):
        return sliced_bytes(info, min(rows, _block(fill)))
    return info.nbytes // max(1, rows) * (min(rows, fill.row_block) if is_matrix(fill) else 1)


def _block(fill: Fill) -> int:
    """Rows that come together: for the layer that takes them, and as they are stored."""
    info = fill.sources[0]
    return math.lcm(fill.row_block, info.row_block) if isinstance(info, PackedTensor) else fill.row_block


def _comes_alone(fill: Fill) -> bool:
    return fill.convert is not None or isinstance(fill.sources[0], PackedTensor)


def is_matrix(fill: Fill) -> bool:
    """Whether rows may be quantized, and so must come in blocks: those of a matrix, or of one of several.

    Args:
        fill: What is read.
    Returns:
        True where it has rows.
    """
    return len(fill.sources[0].shape) == 2 or (bool(fill.spans) and len(fill.sources[0].shape) > 1)
