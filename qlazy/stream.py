"""Read a checkpoint in bounded pieces and hand each to a worker that puts it in its place.

Every worker owns one slot of the ring: it takes the next run of chunks in file order, reads it into its slot and quantizes it
from there, so that while some workers read others compute, and nothing waits in between. On a CPU a slot is small enough for
what was read to be still in the processor's cache when it is quantized. The host never holds more than the ring, whatever the
largest tensor is. Tensors that must be converted as a whole are read one group at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from qlazy.decode import decode, decoded_bytes
from qlazy.files import MARGIN, Files, Slot, make_ring
from qlazy.fill import Fill, bytes_of_rows, row_count
from qlazy.memory import trim_heap
from qlazy.plan import CHUNK_BYTES, RING_BYTES
from qlazy.read_packed import read_whole, sliced_bytes, unpack_pieces
from qlazy.source import TensorInfo
from qlazy.source_packed import PackedTensor, read_whole_at_once
from qlazy.staging import page_locked
from qlazy.trace import Trace

T = TypeVar("T")

PROGRESS_INTERVAL_S = 0.1
"""Seconds between two looks at the progress."""

CACHED_BYTES = 2 << 20
"""Chunk of a load to the host: with what it becomes it stays in a second-level cache of 2 MiB."""

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


Place = Callable[[Chunk, list[Tensor]], None]
"""Puts the tensors of a chunk into the model. The tensors are only valid during the call."""


@dataclass
class Stream:
    """A running read: iterate over it to wait for its end, with the bytes done so far now and then.

    Args:
        fills: What to read, in file order.
        place: What to do with each chunk, on a worker thread.
        workers: Number of threads, each with one slot.
        drop_page_cache: Give back to the kernel the file pages that this read brought in, and only those.
        trace: Takes every read.
        chunk_bytes: Most bytes of a chunk, unless 64 rows have more.
        ring_bytes: Bytes of all slots together, likewise.
        devices: Where a load to GPUs puts each tensor of the model; they are filled side by side, and the ring is page-locked.
    """

    fills: tuple[Fill, ...]
    place: Place
    workers: int
    drop_page_cache: bool = True
    trace: Trace | None = None
    chunk_bytes: int = CHUNK_BYTES
    ring_bytes: int = RING_BYTES
    devices: Mapping[str, str] = field(default_factory=dict)
    bytes_done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _whole: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Stream:
        """Start the workers."""
        self._stop = threading.Event()
        room = slot_bytes(self.fills, self.workers, self.chunk_bytes, self.ring_bytes)
        lanes = by_device(self.fills, self.devices)
        self._reads = take_turns([merge(plan_chunks(lane, room), room + MERGED_BYTES) for lane in lanes])
        self._ring = make_ring(self.workers, room + MERGED_BYTES)
        self._held = threading.Semaphore(read_whole_at_once(fill.sources[0] for fill in self.fills)[0])
        self._locked = contextlib.ExitStack()
        if self.devices:
            self._locked.enter_context(page_locked(self._ring))
        self._files = Files(self.drop_page_cache, self.trace, mapped=not self.devices)
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="qlazy-load")
        self._running = {self._pool.submit(self._work, number) for number in range(self.workers)}
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the workers and close the files, whether or not all was read."""
        self._stop.set()
        self._pool.shutdown()
        self._locked.close()
        self._files.close()
        self._ring.clear()
        torch.set_num_threads(self._torch_threads)
        trim_heap()

    def __iter__(self) -> Iterator[int]:
        """Wait for the workers to end.

        Yields:
            Bytes done so far, a few times a second, and once more at the end.
        Raises:
            BaseException: what the worker raised that failed first.
        """
        while self._running:
            ended, self._running = wait(self._running, PROGRESS_INTERVAL_S, FIRST_COMPLETED)
            for worker in ended:
                worker.result()
            yield self.bytes_done

    def _work(self, number: int) -> None:
        # One thread an op: the workers are the parallelism, and their chunks are too small to share out further.
        torch.set_num_threads(1)
        try:
            slot = self._ring[number]
            with torch.no_grad():
                while not self._stop.is_set():
                    with self._lock:
                        chunks = next(self._reads, None)
                    if chunks is None:
                        return
                    self._run(chunks, slot)
        except BaseException as error:
            self._stop.set()
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error must not keep what was read
            raise

    def _run(self, chunks: tuple[Chunk, ...], slot: Slot) -> None:
        info = chunks[0].fill.sources[0]
        if chunks[0].fill.convert is None and isinstance(info, PackedTensor):
            with self._held if info.whole else contextlib.nullcontext():
                self._run_packed(chunks[0], info, slot)
        elif chunks[0].fill.convert is None:
            begin, end = chunks[0].begin, chunks[-1].begin + chunks[-1].nbytes
            infos = [chunk.fill.sources[0] for chunk in chunks]
            data = self._files.read(infos, begin, end - begin, slot)
            for chunk, info in zip(chunks, infos, strict=True):
                part = data[chunk.begin - begin : chunk.begin - begin + chunk.nbytes]
                self.place(chunk, [decode(part, info, chunk.stop - chunk.start)])
        else:
            with self._whole:
                fill = chunks[0].fill
                self.place(chunks[0], [self._read_span(*read) for read in zip(fill.sources, fill.all_spans, strict=True)])
        with self._lock:
            self.bytes_done += sum(chunk.nbytes for chunk in chunks)

    def _run_packed(self, chunk: Chunk, info: PackedTensor, slot: Slot) -> None:
        block = chunk.fill.row_block if _is_matrix(chunk.fill) else 1
        for start, stop, values in unpack_pieces(self._files, info, chunk.start, chunk.stop, block=block, slot=slot):
            self.place(Chunk(fill=chunk.fill, start=start, stop=stop), [values])

    def _read_span(self, info: TensorInfo, span: tuple[int, int]) -> Tensor:
        """Rows of a tensor that is read to be converted: in its own shape where these are all."""
        if isinstance(info, PackedTensor):
            values = read_whole(self._files, info, *span)
            return values.view(info.shape) if values.shape[0] == row_count(info.shape) else values
        per_row, rows = info.nbytes // max(1, row_count(info.shape)), span[1] - span[0]
        (slot,) = make_ring(1, per_row * rows)
        values = decode(self._files.read([info], info.offset + per_row * span[0], per_row * rows, slot), info, rows)
        return values.view(info.shape) if rows == row_count(info.shape) else values


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
        elif _is_matrix(fill):
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
    return info.nbytes // max(1, rows) * (min(rows, fill.row_block) if _is_matrix(fill) else 1)


def _block(fill: Fill) -> int:
    """Rows that come together: for the layer that takes them, and as they are stored."""
    info = fill.sources[0]
    return math.lcm(fill.row_block, info.row_block) if isinstance(info, PackedTensor) else fill.row_block


def _comes_alone(fill: Fill) -> bool:
    return fill.convert is not None or isinstance(fill.sources[0], PackedTensor)


def _is_matrix(fill: Fill) -> bool:
    """Whether rows may be quantized, and so must come in blocks: those of a matrix, or of one of several."""
    return len(fill.sources[0].shape) == 2 or (bool(fill.spans) and len(fill.sources[0].shape) > 1)
