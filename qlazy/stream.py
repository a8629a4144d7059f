"""Read a checkpoint in bounded pieces and hand each to a worker that puts it in its place.

Every worker owns one slot of the ring: it takes the next run of chunks in file order, reads it into its slot and quantizes it
from there, so that while some workers read others compute, and nothing waits in between. On a CPU a slot is small enough for
what was read to be still in the processor's cache when it is quantized. The host never holds more than the ring, whatever the
largest tensor is. Tensors that must be converted as a whole are read one group at a time.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlazy.matching.fill import Fill, bytes_of_rows, row_count
from qlazy.memory import trim_heap
from qlazy.planning.plan import CHUNK_BYTES, RING_BYTES
from qlazy.reading.chunks import MERGED_BYTES, Chunk, by_device, is_matrix, merge, plan_chunks, slot_bytes, take_turns
from qlazy.reading.decode import decode
from qlazy.reading.files import Files, Slot, make_ring
from qlazy.reading.packed import read_whole, unpack_pieces
from qlazy.reading.staging import page_locked
from qlazy.sources.packed import PackedTensor, read_whole_at_once
from qlazy.sources.source import TensorInfo
from qlazy.trace import Trace

PROGRESS_INTERVAL_S = 0.1
"""Seconds between two looks at the progress."""

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
        block = chunk.fill.row_block if is_matrix(chunk.fill) else 1
        for start, stop, values in unpack_pieces(self._files, info, chunk.start, chunk.stop, block=block, slot=slot):
            self.place(Chunk(fill=chunk.fill, start=start, stop=stop), [values])

    def _read_span(self, info: TensorInfo, span: tuple[int, int]) -> Tensor:
        """Rows of a tensor that is read to be converted: in its own shape where these are all."""
        if isinstance(info, PackedTensor):
            values = read_whole(self._files, info, *span)
            return values.view(info.shape) if values.shape[0] == row_count(info.shape) else values
        # In bytes of all rows, not of one: those of a vector in GGUF's block types are less than a byte.
        rows, skipped, nbytes = span[1] - span[0], bytes_of_rows(info, 0, span[0]), bytes_of_rows(info, *span)
        (slot,) = make_ring(1, nbytes)
        values = decode(self._files.read([info], info.offset + skipped, nbytes, slot), info, rows)
        return values.view(info.shape) if rows == row_count(info.shape) else values
