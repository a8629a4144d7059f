"""Files and folders that are on the disk when a call returns. No torch here."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_PIECE = 16 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def hash_file(path: Path) -> str:
    """The sha256 of a file.

    Args:
        path: The file.
    Returns:
        Hexadecimal digits.

    Memory: 16 MiB.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_file(path: Path, pieces: Iterable[memoryview | bytes]) -> tuple[str, int]:
    """Write a file to the disk.

    Args:
        path: The file; what it held is lost.
        pieces: Its bytes.
    Returns:
        Its sha256 in hexadecimal digits, and its size.

    Memory: nothing beside the pieces.
    """
    digest, nbytes = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, view.nbytes, _PIECE):
                part = view[start : start + _PIECE]
                digest.update(part)
                write_all(file, part)
            nbytes += view.nbytes
        os.fsync(file)
    finally:
        os.close(file)
    return digest.hexdigest(), nbytes


def write_all(file: int, view: memoryview) -> None:
    """Write all of some bytes, in as many calls as that takes."""
    while view.nbytes:
        view = view[os.write(file, view) :]


def ends_line(path: Path, size: int) -> bool:
    """Whether the last of a file's bytes ends a line."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), 1, size - 1) == b"\n"


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk, as fsync of a file says nothing of its name."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places: in one step where the kernel can, else with a moment in which `other` is absent."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = [ctypes.c_char_p(os.fsencode(path)) for path in (one, other)]
        if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    old = other.with_name(f".{other.name}.qlazy-old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(other, old)
    os.rename(one, other)
    os.rename(old, one)
