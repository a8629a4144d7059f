"""Tensors in a temporary file: what goes through a model block by block is larger than memory should have to be."""

from __future__ import annotations

import errno
import math
import os
import tempfile

import torch
from torch import Tensor

from qlazy.errors import OutOfSpace
from qlazy.sizes import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def spilled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose bytes lie in a file without a name, which vanishes with it or with the process.

    Args:
        shape: Its shape.
        dtype: Its dtype.
    Returns:
        Zeros.
    Raises:
        OutOfSpace: the folder of temporary files (`TMPDIR`) has no room.

    Memory: pages that the kernel may write out and drop at any time; its bytes on the disk.
    """
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="qlazy-activations-") as file:
        try:
            # Now: a disk that is full when a mapped page is written ends the process.
            os.posix_fallocate(file.fileno(), 0, max(1, nbytes))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OutOfSpace(
                f"Activations take {format_bytes(nbytes)} in {tempfile.gettempdir()}, which has no room for them.",
                hint="Set TMPDIR to a folder with more room, or use fewer --samples.",
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
