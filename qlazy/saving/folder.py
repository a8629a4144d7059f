"""Folders that appear as a whole or not at all, and whose writing goes on where it was cut off. No torch here.

    .NAME.qlazy-partial/     beside NAME, on the same file system; not a model, as it has no config.json
        journal              the key of what is being written, then a line for each file that is complete and on the disk
        model-00001-of-...   written under another name, fsync, rename, fsync of the folder, a line in the journal
        qlazy.json           the manifest: instead of the journal, once all files are there
        config.json          last
    rename to NAME           where NAME is replaced, the two change places in one step, and the old one is removed

Whatever happens in between, NAME is what it was before, or absent, or complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlazy.errors import OutOfSpace, QlazyError, UsageError
from qlazy.saving.durable import ends_line, exchange, sync_folder, write_all, write_file

MANIFEST = "qlazy.json"
"""File that says what a saved folder holds, where it came from and the hash of every file."""

LAST = "config.json"
"""Without it a folder is not a model; it is written when all else is there."""

_JOURNAL = "journal"
_ATTEMPTS = 10
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file that is complete and on the disk."""

    name: str
    """Its name in the folder."""
    nbytes: int
    """Its size."""
    sha256: str
    """Its hash, in hexadecimal digits."""


class PartialFolder:
    """A folder in the making; see `writing`.

    Args:
        folder: The folder that is meant.
        key: What identifies its content; a partial one with another key is not gone on with.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.path = folder.with_name(f".{folder.name}.qlazy-partial")
        self.key = key
        self.done: dict[str, FileRecord] = {}
        """Files that an earlier attempt, or this one, has completed, by name."""

    def write(self, name: str, pieces: Iterable[memoryview | bytes], *, journal: bool = True) -> FileRecord:
        """Write one file to the disk, unless an earlier attempt has.

        Args:
            name: Its name in the folder.
            pieces: Its bytes; not asked for where the file is there.
            journal: Whether a later attempt may rely on it; False for what depends on more than the key.
        Returns:
            Its record.
        Raises:
            OutOfSpace: the disk is full; the message names the file.
            QlazyError: any other failure to write.

        Memory: nothing beside the pieces.
        """
        if journal and name in self.done:
            return self.done[name]
        made = self.path / f".{name.replace('/', '.')}.writing"
        with _reported(self.folder / name):
            try:
                (self.path / name).parent.mkdir(exist_ok=True)
                digest, nbytes = write_file(made, pieces)
                os.rename(made, self.path / name)
                for place in {(self.path / name).parent, self.path}:
                    sync_folder(place)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
            record = FileRecord(name=name, nbytes=nbytes, sha256=digest)
            if journal:
                self._note(asdict(record))
        self.done[name] = record
        return record

    def commit(self, manifest: dict[str, Any], last: bytes) -> None:
        """Complete the folder and give it its name.

        Args:
            manifest: What the manifest says, beside the key and the files.
            last: Content of `config.json`.
        Raises:
            OutOfSpace: the disk is full.
        """
        files = {record.name: {"bytes": record.nbytes, "sha256": record.sha256} for record in self.done.values()}
        files[LAST] = {"bytes": len(last), "sha256": hashlib.sha256(last).hexdigest()}
        told = json.dumps(manifest | {"key": self.key, "files": dict(sorted(files.items()))}, indent=2).encode()
        self.write(MANIFEST, [told], journal=False)
        self.write(LAST, [last], journal=False)
        with _reported(self.folder):
            (self.path / _JOURNAL).unlink(missing_ok=True)
            sync_folder(self.path)
            if self.folder.is_dir() and any(self.folder.iterdir()):
                exchange(self.path, self.folder)
                sync_folder(self.folder.parent)
                # The old one. Who has taken it for a folder in the making meanwhile clears it himself.
                with contextlib.suppress(BlockingIOError, FileNotFoundError):
                    lock = _lock(self.path)
                    try:
                        shutil.rmtree(self.path)
                    finally:
                        os.close(lock)
            else:
                os.rename(self.path, self.folder)
            sync_folder(self.folder.parent)

    def take_up(self) -> None:
        """Go on with what an earlier attempt of the same content has left, or begin anew."""
        told = self._told()
        if not told or told[0].get("key") != self.key:
            self._clear()
            with _reported(self.folder):
                self._note({"key": self.key})
                sync_folder(self.path)
            return
        for line in told[1:]:
            record = FileRecord(**line)
            file = self.path / record.name
            if file.is_file() and file.stat().st_size == record.nbytes:
                self.done[record.name] = record

    def _told(self) -> list[dict[str, Any]]:
        """Lines of the journal; of a manifest, where the journal has made room for it."""
        try:
            lines = (self.path / _JOURNAL).read_bytes().split(b"\n")
        except OSError:
            lines = []
        told = []
        for line in lines:
            # A line that was cut off while it was written tells of a file that is there, but not of which.
            with contextlib.suppress(ValueError):
                told.append(json.loads(line))
        if told:
            return told
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            files = [{"name": name, "nbytes": f["bytes"], "sha256": f["sha256"]} for name, f in manifest["files"].items()]
            return [{"key": manifest["key"]}, *(file for file in files if file["name"] != LAST)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def _note(self, line: dict[str, Any]) -> None:
        journal = os.open(self.path / _JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(journal).st_size
            if size and not ends_line(self.path / _JOURNAL, size):
                os.write(journal, b"\n")
            write_all(journal, memoryview(json.dumps(line).encode() + b"\n"))
            os.fsync(journal)
        finally:
            os.close(journal)

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def writing(
    folder: str | os.PathLike[str], key: str, *, force: bool = False, sources: Sequence[Path] = ()
) -> Iterator[PartialFolder]:
    """Write a folder beside the one that is meant; `PartialFolder.commit` puts it in its place.

    Args:
        folder: The folder that is meant.
        key: What identifies its content. What an earlier attempt with the same key has completed is there already.
        force: Replace a folder that holds something.
        sources: What is read; a folder that is or holds one of these is not replaced.
    Yields:
        The folder in the making. It stays for a later attempt unless it is committed.
    Raises:
        UsageError: the folder holds something and `force` is not given, cannot be written to, or is being written.
        OutOfSpace: the disk is full.
    """
    target = require_replaceable(folder, force=force, sources=sources)
    partial = PartialFolder(target, key)
    with _reported(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _reported(partial.path):
        lock = _made_and_locked(partial.path, target)
    try:
        require_replaceable(folder, force=force, sources=sources)  # another process may have written it meanwhile
        partial.take_up()
        yield partial
    finally:
        os.close(lock)


def _made_and_locked(path: Path, target: Path) -> int:
    for attempt in range(_ATTEMPTS):
        try:
            path.mkdir(exist_ok=True)
            return _lock(path)
        except BlockingIOError:
            raise UsageError(
                f"{target} is being written by another process.", hint="Wait for it, or choose another folder."
            ) from None
        except FileNotFoundError:  # another process has renamed it between the two
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _lock(path: Path) -> int:
    """Lock a folder, which is no link and still has its name then; gives its descriptor."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.lstat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(lock)
        raise
    return lock


def require_replaceable(folder: str | os.PathLike[str], *, force: bool, sources: Sequence[Path] = ()) -> Path:
    """Refuse a folder that must not be written before any work is done.

    Args:
        folder: The folder that is meant.
        force: Whether a folder that holds something may be replaced.
        sources: What is read.
    Returns:
        Its absolute path.
    Raises:
        UsageError: it holds something, is a file or a mount point, or holds the folder that this process works in, or a source.
    """
    target = Path(os.path.abspath(Path(folder).expanduser()))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is there already, and is not a folder.", hint="Give the name of a new folder.")
    if os.path.ismount(target):  # it cannot be renamed
        raise UsageError(
            f"{target} is a mount point, which cannot be replaced.", hint=f"Name a folder in it: {target / 'NAME'}"
        )
    held = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if not held:
        return target
    real, places = target.resolve(), [place.resolve() for place in (Path.cwd(), Path.home(), *sources)]
    inside = [place for place in places if real == place or real in place.parents]
    if inside:
        raise UsageError(
            f"{target} would be replaced as a whole, and {inside[0]} is in it.", hint="Give the name of a new folder."
        )
    if not force:
        some = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        raise UsageError(f"{target} is not empty: it holds {some}.", hint="Choose another folder, or replace it with --force.")
    return target


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn a failure to write into an error that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, QlazyError):
            raise
        if error.errno in _FULL:
            raise OutOfSpace(
                f"{path} cannot be written: {error.strerror}.",
                hint="Free some space and run it again: it goes on with the file that is missing.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.EEXIST):
            raise UsageError(f"{path} cannot be written: {error.strerror}.", hint="Choose another folder.") from error
        raise QlazyError(f"{path} cannot be written: {error.strerror or error}.", hint="Check the disk.") from error
