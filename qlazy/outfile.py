"""Files that are asked for by name: checked before the work begins, and there as a whole or not at all. No torch here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qlazy.errors import UsageError


def require_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse a file that could not be written after all the work is done.

    Args:
        path: A file that may or may not exist.
    Returns:
        The same.
    Raises:
        UsageError: its folder does not exist or cannot be written to, or a folder has its name.
    """
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{file} is a folder.", hint="Give the name of a file.")
    if not file.parent.is_dir():
        raise UsageError(f"{file} cannot be written: there is no folder {file.parent}.", hint=f"mkdir -p {file.parent}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{file} cannot be written: {file.parent} is not yours to write in.", hint="Choose another folder.")
    return file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside the one that is meant, and put it in its place when the block has ended well.

    Args:
        path: The file that is meant. What it held stays if the block raises.
    Yields:
        The file to write, in the same folder.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield made
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
