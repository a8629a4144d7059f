"""The way of rows to a GPU: page-locked host memory, scratch memory on the device, two streams and the order between them.

    slot of the ring  --copy stream-->  scratch chunk  --compute stream-->  final storage

While one chunk is quantized the next is copied and others are read. Events keep the order and the host waits for one thing
only, that its slot may be overwritten:

- a slot is read into again once its copy has ended: `run` returns no sooner;
- a scratch chunk is copied to again once the work that reads it has ended: the copy stream waits for that work's event;
- work begins once its copy has ended: the compute stream waits for the copy's event.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlazy.errors import DeviceUnavailable
from qlazy.planning.plan import SCRATCH_CHUNKS
from qlazy.reading.files import Slot

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every GPU, not only the current one."""


class DeviceQueue:
    """What brings rows to one GPU and has work done with them there. Safe to use from several threads.

    Made after the final storage, and on the thread that made it: the storage may be memory that earlier work on that thread's
    stream still uses, and everything here waits for that work.

    Args:
        device: `cuda:N`.
        chunk_bytes: Size of a scratch chunk.
        cuda: `torch.cuda`, or what stands in for it.

    Memory: three chunks on the device.
    """

    def __init__(self, device: str, chunk_bytes: int, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._device = device
        self._lock = threading.Lock()
        self._copy, self._compute = cuda.Stream(device), cuda.Stream(device)
        self._read = [cuda.Event() for _ in range(SCRATCH_CHUNKS)]
        self._turn = 0
        self._take(chunk_bytes)

    def run(self, rows: Tensor, work: Callable[[Tensor], object]) -> None:
        """Copy rows to the device and have work done with them, after what came before.

        Args:
            rows: On the host, contiguous. They may be overwritten once this returns; nothing waits for the work.
            work: Takes the rows on the device, on the compute stream, and must not keep them. It must not make the host wait.

        Memory: none beyond the scratch chunks, unless the rows are larger than one.
        """
        data = rows.view(-1).view(torch.uint8)
        copied = self._cuda.Event(blocking=True)
        try:
            with self._lock:
                if data.numel() > self.chunk_bytes:
                    self._take(data.numel())
                turn, self._turn = self._turn, (self._turn + 1) % SCRATCH_CHUNKS
                there, read = self._scratch[turn][: data.numel()], self._read[turn]
                with self._cuda.stream(self._copy):
                    self._copy.wait_event(read)
                    there.copy_(data, non_blocking=data.is_pinned())
                    copied.record(self._copy)
                with self._cuda.stream(self._compute):
                    self._compute.wait_event(copied)
                    try:
                        work(there.view(rows.dtype).view(rows.shape))
                    finally:
                        read.record(self._compute)
        finally:
            copied.synchronize()

    def close(self) -> None:
        """Wait until all work is done, and give the scratch memory back. What failed there is raised here at the latest.

        Memory: what the compute stream's allocator kept is given back too, as nothing uses that stream again.
        """
        self._copy.synchronize()
        self._compute.synchronize()
        self._scratch.clear()
        self._cuda.empty_cache()

    def _take(self, chunk_bytes: int) -> None:
        """Take scratch chunks of this size, in the place of smaller ones that no work reads any more."""
        self._copy.synchronize()
        self._compute.synchronize()
        self.chunk_bytes = chunk_bytes
        self._scratch = [torch.empty(chunk_bytes, dtype=torch.uint8, device=self._device) for _ in range(SCRATCH_CHUNKS)]
        for stream in (self._copy, self._compute):
            stream.wait_stream(self._cuda.current_stream(self._device))


@contextlib.contextmanager
def page_locked(ring: Sequence[Slot]) -> Iterator[bool]:
    """Lock the pages of a ring, so that a GPU copies from them by itself while the host goes on.

    Where the driver refuses (a limit on locked memory, some containers) copies are right all the same, and slower: the host
    waits for each.

    Args:
        ring: From `make_ring`; nothing may be copied from it any more when the block ends.
    Yields:
        Whether it is locked.
    """
    address = ring[0].data.data_ptr()
    nbytes = ring[-1].data.data_ptr() + ring[-1].data.nbytes - address
    runtime = torch.cuda.cudart()
    # Not `pin_memory`: it rounds up to a power of two and keeps the memory for good.
    failed = int(runtime.cudaHostRegister(address, nbytes, _PORTABLE))
    if failed:
        logger.warning(
            "The driver does not lock %d MiB of host memory (CUDA error %d); copies to the GPU will be slower.",
            nbytes >> 20,
            failed,
        )
        # CUDA keeps the error for whoever asks next, which is the first kernel to be launched.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
    try:
        yield not failed
    finally:
        if not failed:
            runtime.cudaHostUnregister(address)


def open_gpus(devices: Iterable[str]) -> None:
    """Set up CUDA on devices, which takes host and device memory of its own, and begin to count each one's peak.

    Args:
        devices: `cuda:N` each.
    Raises:
        DeviceUnavailable: PyTorch cannot use one of them.

    Memory: CUDA's context, some 200 to 500 MiB on host and device.
    """
    for device in devices:
        try:
            torch.zeros(1, device=device)
        except (AssertionError, RuntimeError) as error:
            raise DeviceUnavailable(
                f"PyTorch {torch.__version__} cannot use {device}: {str(error).splitlines()[0]}",
                hint="Install a PyTorch with CUDA for this driver, or use --device-map cpu.",
            ) from error
        torch.cuda.reset_peak_memory_stats(device)
