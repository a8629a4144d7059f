"""Read stored tensors from their files, and leave the page cache as it was found."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from qlazy.errors import IncompleteCheckpoint
from qlazy.source import TensorInfo
from qlazy.trace import Trace


class Files:
    """Open files of a read.

    Args:
        drop_page_cache: Give back to the kernel the pages that the read brings in; those that were there before stay.
        trace: Takes every read.
    """

    def __init__(self, drop_page_cache: bool, trace: Trace | None = None) -> None:
        self._trace = trace
        self._drop = drop_page_cache and hasattr(os, "posix_fadvise")
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, offset: int, into: Tensor) -> Tensor:
        """Fill a buffer with bytes of a tensor. Safe to call from several threads.

        Args:
            info: The tensor.
            offset: Where in it to begin, in bytes.
            into: uint8 (bytes,), all of which is filled.
        Returns:
            `into`.
        Raises:
            IncompleteCheckpoint: the file ends before, as when it is cut short while it is read, or cannot be read.

        Memory: a byte for each page that is read.
        """
        began = time.perf_counter()
        descriptor = self._open(info)
        begin, view = info.offset + offset, memoryview(into.numpy().data)
        absent = list(_absent(descriptor, begin, len(view))) if self._drop else []
        done = 0
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:]], begin + done)
            except OSError as error:
                raise IncompleteCheckpoint(
                    f"{info.path.name}: reading tensor {info.name!r} at byte {begin + done:,} failed: {error.strerror}.",
                    hint="Check the disk, then download the model again.",
                ) from error
            if got == 0:
                raise IncompleteCheckpoint(
                    f"{info.path.name}: tensor {info.name!r} ends at byte {begin + len(view):,}, but the file has "
                    f"{begin + done:,}.",
                    hint="The file changed while it was read, or the download is cut short; download it again.",
                )
            done += got
        for start, length in absent:
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
        if self._trace is not None:
            self._trace.add("read", began, file=info.path.name, offset=begin, bytes=len(view))
        return into

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, info: TensorInfo) -> int:
        with self._lock:
            if info.path not in self._descriptors:
                try:
                    self._descriptors[info.path] = os.open(info.path, os.O_RDONLY)
                except OSError as error:
                    raise IncompleteCheckpoint(f"{info.path}: cannot be opened: {error.strerror}.") from error
                if self._drop:
                    # Without it the kernel reads ahead, and pages of this load would look as if they had been there before.
                    os.posix_fadvise(self._descriptors[info.path], 0, 0, os.POSIX_FADV_RANDOM)
            return self._descriptors[info.path]


def _absent(descriptor: int, begin: int, length: int) -> Iterator[tuple[int, int]]:
    """Runs of pages, as (start, length), that the page cache does not hold, among those that these bytes lie on.

    By `mincore`, which looks and touches nothing; a read that only takes what is cached would start to fetch the rest.
    Where the kernel does not tell, everything counts as held, so that nothing of others is dropped.
    """
    first = begin - begin % mmap.PAGESIZE
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with mmap.mmap(descriptor, begin + length - first, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=first) as mapped:
            pages = np.frombuffer(mapped, dtype=np.uint8)
            held = np.zeros(-(-len(pages) // mmap.PAGESIZE), dtype=np.uint8)
            failed = ctypes.CDLL(None).mincore(
                ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(len(pages)), ctypes.c_void_p(held.ctypes.data)
            )
            del pages  # the map cannot be closed while something looks at it
        if failed:
            return
        edges = np.flatnonzero(np.diff(held & 1, prepend=1, append=1))
        for start, stop in edges.reshape(-1, 2).tolist():
            yield first + start * mmap.PAGESIZE, (stop - start) * mmap.PAGESIZE
