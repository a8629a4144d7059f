"""Read a checkpoint in bounded pieces and hand each to a worker that puts it in its place.

Every worker owns one slot of the ring: it takes the next chunk in file order, reads it into its slot and quantizes it from
there, so that while some workers read others compute, and nothing waits in between. The host never holds more than the ring,
whatever the largest tensor is. Tensors that must be converted as a whole are read one group at a time.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlazy.errors import CorruptCheckpoint
from qlazy.files import Files
from qlazy.fill import Fill, row_count
from qlazy.memory import trim_heap
from qlazy.plan import CHUNK_BYTES, RING_BYTES
from qlazy.source import TensorInfo
from qlazy.trace import Trace

PROGRESS_INTERVAL_S = 0.1
"""Seconds between two looks at the progress."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of work: some rows of one stored tensor, or a group of tensors that is converted as a whole."""

    fill: Fill
    """What it is part of."""
    start: int = 0
    """First row (first element, of a one-dimensional tensor)."""
    stop: int = 0
    """One past the last."""

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        info = self.fill.sources[0]
        return (
            self.fill.nbytes if self.fill.convert else info.nbytes // max(1, row_count(info.shape)) * (self.stop - self.start)
        )


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
    """

    fills: tuple[Fill, ...]
    place: Place
    workers: int
    drop_page_cache: bool = True
    trace: Trace | None = None
    bytes_done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _whole: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Stream:
        """Start the workers."""
        self._stop = threading.Event()
        self._slot_bytes = slot_bytes(self.fills, self.workers)
        self._chunks = iter(plan_chunks(self.fills, self._slot_bytes))
        self._files = Files(self.drop_page_cache, self.trace)
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="qlazy-load")
        self._running = {self._pool.submit(self._work) for _ in range(self.workers)}
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the workers and close the files, whether or not all was read."""
        self._stop.set()
        self._pool.shutdown()
        self._files.close()
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

    def _work(self) -> None:
        # One thread an op: the workers are the parallelism, and their chunks are too small to share out further.
        torch.set_num_threads(1)
        try:
            slot = torch.empty(self._slot_bytes, dtype=torch.uint8)
            while not self._stop.is_set():
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                with torch.no_grad():
                    self._run(chunk, slot)
        except BaseException:
            self._stop.set()
            raise

    def _run(self, chunk: Chunk, slot: Tensor) -> None:
        if chunk.fill.convert is None:
            info = chunk.fill.sources[0]
            per_row = info.nbytes // max(1, row_count(info.shape))
            data = self._files.read(info, chunk.start * per_row, slot[: chunk.nbytes])
            self.place(chunk, [decode(data, info, chunk.stop - chunk.start)])
        else:
            with self._whole:
                tensors = [
                    decode(self._files.read(i, 0, torch.empty(i.nbytes, dtype=torch.uint8)), i, row_count(i.shape)).view(
                        i.shape
                    )
                    for i in chunk.fill.sources
                ]
                self.place(chunk, tensors)
        with self._lock:
            self.bytes_done += chunk.nbytes


def slot_bytes(fills: tuple[Fill, ...], workers: int) -> int:
    """Bytes of one slot: an equal part of the ring up to 8 MiB, but never less than 64 rows of the widest tensor.

    Args:
        fills: What will be read.
        workers: Number of slots.
    Returns:
        Bytes.
    """
    widest = max((_stripe(fill) for fill in fills if fill.convert is None), default=0)
    return max(min(CHUNK_BYTES, RING_BYTES // workers), widest)


def worker_count(fills: tuple[Fill, ...]) -> int:
    """Workers that the ring has room for: one more than there are processors, so that one can read while all others compute.

    Args:
        fills: What will be read.
    Returns:
        At least 2.
    """
    widest = max((_stripe(fill) for fill in fills if fill.convert is None), default=1)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(processors + 1, 16, RING_BYTES // max(1, widest)))


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
        extent = row_count(info.shape)
        if fill.convert is not None or extent == 0:
            yield Chunk(fill=fill, start=0, stop=extent)
            continue
        step = max(1, limit // max(1, _row_cost(info)))
        if len(info.shape) == 2:
            step = max(fill.row_block, step - step % fill.row_block)
        for start in range(0, extent, step):
            yield Chunk(fill=fill, start=start, stop=min(extent, start + step))


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

    Memory: a view, or four bytes for each element.
    """
    shape = (rows, *info.shape[-1:]) if len(info.shape) > 1 else (rows,) * len(info.shape)
    dtype = getattr(torch, info.dtype, None)
    if isinstance(dtype, torch.dtype):
        return data.view(dtype).view(shape)
    import gguf

    try:
        values = gguf.dequantize(data.numpy().reshape(rows, -1), gguf.GGMLQuantizationType[info.dtype])
    except (KeyError, NotImplementedError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{info.path.name}: tensor {info.name!r} has type {info.dtype}, which cannot be decoded."
        ) from error
    return torch.from_numpy(values).view(shape)


def _row_cost(info: TensorInfo) -> int:
    """Bytes that one row takes while it is read: as stored, or about 24 an element while a GGUF block type is decoded."""
    decoded = 0 if isinstance(getattr(torch, info.dtype, None), torch.dtype) else 24
    return max(info.nbytes, decoded * math.prod(info.shape)) // max(1, row_count(info.shape))


def _stripe(fill: Fill) -> int:
    """Least bytes that a chunk of this tensor holds: a block of rows of a matrix, one element of a vector."""
    info = fill.sources[0]
    rows = row_count(info.shape)
    return info.nbytes // max(1, rows) * (min(rows, fill.row_block) if len(info.shape) == 2 else 1)
