"""Read stored tensors from their files, and leave the page cache as it was found.

What the page cache holds is looked at where it lies, through a map that lasts as long as somebody looks, or copied from there.
What it does not hold comes from the disk past the cache (O_DIRECT) where the file system takes that, so that nothing has to be
dropped; elsewhere through the cache, and the pages are given back right after.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlazy.errors import IncompleteCheckpoint
from qlazy.sources.source import TensorInfo
from qlazy.trace import Trace

PAGE = mmap.PAGESIZE

MARGIN = 2 * PAGE
"""Bytes that a buffer needs beyond what is read into it: reads past the cache take whole pages."""

_PIECE = 8 << 20
"""Bytes read at once: more than a chunk only where a tensor is read as a whole."""

_MADV_POPULATE_READ = 22
"""Python has no name for it yet."""

_LOOK = 1 << 30
"""Bytes of a file whose pages are looked at in one go."""


class Slot(NamedTuple):
    """A buffer to read into, on a page boundary and with the margin."""

    data: Tensor
    """uint8."""
    view: memoryview
    """The same bytes."""


def make_ring(slots: int, slot_bytes: int) -> list[Slot]:
    """Buffers to read into, on page boundaries and on huge pages where there are some.

    Args:
        slots: How many.
        slot_bytes: Bytes that each must take, without the margin.
    Returns:
        The slots. The memory goes back to the kernel with the last of them.

    Memory: `slots` times `slot_bytes`, up to whole pages, with the margin.
    """
    room = -(-slot_bytes // PAGE) * PAGE + MARGIN
    ring = mmap.mmap(-1, slots * room)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            ring.madvise(mmap.MADV_HUGEPAGE)
    data, view = torch.frombuffer(ring, dtype=torch.uint8), memoryview(ring)
    return [Slot(data[start : start + room], view[start : start + room]) for start in range(0, slots * room, room)]


class Files:
    """Open files of a read.

    Args:
        drop_page_cache: Give back to the kernel the pages that the read brings in; those that were there before stay.
        trace: Takes every read.
        mapped: Whether what the page cache holds may be mapped instead of copied.
    """

    def __init__(self, drop_page_cache: bool, trace: Trace | None = None, *, mapped: bool = False) -> None:
        self._trace = trace
        self._mapped = mapped
        self._drop = drop_page_cache and hasattr(os, "posix_fadvise")
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def read(self, tensors: Sequence[TensorInfo], begin: int, nbytes: int, slot: Slot) -> Tensor:
        """Read neighbouring bytes of a file. Safe to call from several threads.

        Args:
            tensors: What they are, all of one file, in its order.
            begin: Of the bytes in the file.
            nbytes: How many.
            slot: Where to; it has room for them.
        Returns:
            uint8 (nbytes,), a view of `slot`, or of the page cache; writing to it never changes the file.
        Raises:
            IncompleteCheckpoint: the file ends before, as when it is cut short while it is read, or cannot be read.
        """
        began = time.perf_counter()
        file = self._open(tensors[0])
        head, view = begin % PAGE, slot.view
        data, done = slot.data, 0
        try:
            if self._mapped and not file.absent(begin, nbytes) and begin + nbytes <= file.size():
                data, done = file.map(begin, nbytes), nbytes
            while done < nbytes:
                size = min(nbytes - done, _PIECE - (head + done) % PAGE)
                absent = file.absent(begin + done, size)
                got = 0
                if absent == [_pages(begin + done, size)]:
                    got = file.read_past_cache(view[(head + done) // PAGE * PAGE :], begin + done, size)
                got = got or file.read_cached(view[head + done :], begin + done, size, absent)
                if not got:
                    raise self._cut_short(tensors, begin + done)
                done += got
        except OSError as error:
            raise IncompleteCheckpoint(
                f"{file.path.name}: reading tensor {_at(tensors, begin + done).name!r} at byte {begin + done:,} failed: "
                f"{error.strerror}.",
                hint="Check the disk, then download the model again.",
            ) from error
        if self._trace is not None:
            self._trace.add("read", began, file=file.path.name, offset=begin, bytes=nbytes)
        return data[head : head + nbytes]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, info: TensorInfo) -> _File:
        found = self._files.get(info.path)
        if found is None:
            with self._lock:
                found = self._files.get(info.path)
                if found is None:
                    found = self._files[info.path] = _File(info.path, self._drop)
        return found

    def _cut_short(self, tensors: Sequence[TensorInfo], size: int) -> IncompleteCheckpoint:
        info = _at(tensors, size)
        return IncompleteCheckpoint(
            f"{info.path.name}: tensor {info.name!r} ends at byte {info.end:,}, but the file has {size:,}.",
            hint="The file changed while it was read, or the download is cut short; download it again.",
        )


class _File:
    """One open file.

    Memory: a bit for each of its pages.
    """

    def __init__(self, path: Path, drop: bool) -> None:
        self.path = path
        self._direct: int | None = None
        self._refused = False
        self._to_drop: list[tuple[int, int]] = []
        try:
            self._cached = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise IncompleteCheckpoint(f"{path}: cannot be opened: {error.strerror}.") from error
        self._all_held = True  # or taken for it
        if not drop:
            return
        # Without it the kernel reads ahead, and pages of others would come in.
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
        self._held, self._all_held = _held_pages(self._cached)
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def absent(self, begin: int, nbytes: int) -> list[tuple[int, int]]:
        """Runs of pages, as (start, bytes), that the cache did not hold at the start, among those that these bytes lie on."""
        if self._all_held:
            return []
        start, size = _pages(begin, nbytes)
        first, last = start // PAGE, (start + size) // PAGE
        held = np.unpackbits(self._held[first // 8 : -(-last // 8)])[first % 8 :][: last - first]
        if held.all():
            return []
        edges = np.flatnonzero(np.diff(held, prepend=1, append=1)).reshape(-1, 2).tolist()
        return [(start + a * PAGE, (b - a) * PAGE) for a, b in edges]

    def size(self) -> int:
        """Bytes of the file as it is now, 0 of what is no file."""
        found = os.fstat(self._cached)
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    def map(self, begin: int, nbytes: int) -> Tensor:
        """The pages that these bytes lie on, as the page cache has them; the map goes with the tensor."""
        start, _ = _pages(begin, nbytes)
        # Private and writable, so that who writes gets a page of his own; only read, pages are those of the cache.
        seen = mmap.mmap(self._cached, begin + nbytes - start, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        try:
            seen.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 5.14 each page is mapped when it is touched
                raise
        return torch.frombuffer(seen, dtype=torch.uint8)

    def read_past_cache(self, into: memoryview, begin: int, nbytes: int) -> int:
        """Read the whole pages that the bytes lie on to the start of a page-aligned buffer.

        Returns how many of the bytes came, 0 where the file system takes no such reads.
        """
        if self._direct is None or self._refused:
            return 0
        start, size = _pages(begin, nbytes)
        try:
            got = os.preadv(self._direct, [into[:size]], start)
        except OSError:
            # tmpfs, FUSE and network file systems refuse, some of them only now.
            self._refused = True
            return 0
        return min(nbytes, max(0, got - (begin - start)))

    def read_cached(self, into: memoryview, begin: int, nbytes: int, absent: list[tuple[int, int]]) -> int:
        """Read through the page cache, and give back what was `absent` from it. Returns how many bytes came."""
        got = os.preadv(self._cached, [into[:nbytes]], begin)
        for start, length in absent:
            os.posix_fadvise(self._cached, start, length, os.POSIX_FADV_DONTNEED)
        self._to_drop += absent
        return got

    def close(self) -> None:
        # Dropped once more: what other threads had in hand just then stayed.
        for start, length in self._to_drop:
            os.posix_fadvise(self._cached, start, length, os.POSIX_FADV_DONTNEED)
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)


def _pages(begin: int, nbytes: int) -> tuple[int, int]:
    """The pages that these bytes lie on, as (start, bytes)."""
    start = begin // PAGE * PAGE
    return start, -(-(begin + nbytes - start) // PAGE) * PAGE


def _at(tensors: Sequence[TensorInfo], position: int) -> TensorInfo:
    """The tensor that holds a byte of the file, or the next one."""
    return next((info for info in tensors if info.end > position), tensors[-1])


def _held_pages(descriptor: int) -> tuple[np.ndarray, bool]:
    """A bit for each page of a file, 1 where the page cache holds it; and whether it holds them all.

    By `mincore`, which looks and touches nothing; a read that only takes what is cached would start to fetch the rest. Where
    the kernel does not tell, everything counts as held, so that nothing of others is dropped.
    """
    size = os.fstat(descriptor).st_size
    found, all_held, unknown = [], True, (np.empty(0, dtype=np.uint8), True)
    try:
        for start in range(0, size, _LOOK):
            length = min(_LOOK, size - start)
            held = np.zeros(-(-length // PAGE), dtype=np.uint8)
            with mmap.mmap(descriptor, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=start) as mapped:
                pages = np.frombuffer(mapped, dtype=np.uint8)
                failed = ctypes.CDLL(None).mincore(
                    ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(length), ctypes.c_void_p(held.ctypes.data)
                )
                del pages  # the map cannot be closed while something looks at it
            if failed:
                return unknown
            held &= 1
            all_held = all_held and bool(held.all())
            found.append(np.packbits(held))
    except (OSError, ValueError, AttributeError):
        return unknown
    return (np.concatenate(found), all_held) if found else unknown
