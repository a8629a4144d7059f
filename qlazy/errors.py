"""Every error that qlazy raises on purpose, with the exit code that the command line turns it into.

    QlazyError                          1
    ├── UsageError(ValueError)          2   an argument or option that cannot be meant
    ├── ModelNotFound(FileNotFoundError) 3  no such alias, folder, hub id, revision or file in it
    │   ├── GatedModel                  3   the hub knows it and wants a token
    │   └── HubUnreachable              3   offline, no route, or the connection broke
    ├── UnsupportedModel                3   found, but not something that qlazy can read
    ├── DoesNotFit(MemoryError)         4   the plan needs more bytes than are free
    ├── CorruptCheckpoint(ValueError)   5   bytes that contradict themselves or the model
    │   └── IncompleteCheckpoint        5   a file or tensor is missing or cut short
    ├── DeviceUnavailable(RuntimeError) 6   no such device, or no kernel for it
    └── OutOfSpace(OSError)             1   the disk is full

A message says what is wrong, where (file, tensor, device) and the two numbers that disagree; `hint` says what to type next.
"""

from __future__ import annotations


class QlazyError(Exception):
    """Base of all errors raised by qlazy.

    Args:
        message: What is wrong and where, in one or two sentences.
        hint: What the user can type or change next; empty where there is nothing to suggest.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(QlazyError, ValueError):
    """An argument that cannot be meant: an unknown name, a size without a unit, two options that exclude each other."""

    exit_code = 2


class ModelNotFound(QlazyError, FileNotFoundError):
    """No alias, folder, file, hub repository or revision of that name."""

    exit_code = 3


class GatedModel(ModelNotFound):
    """The hub answered that this repository needs an accepted licence or a token."""


class HubUnreachable(ModelNotFound):
    """The hub did not answer, or `HF_HUB_OFFLINE` / `local_files_only` forbids asking it."""


class UnsupportedModel(QlazyError):
    """The files are there, but hold something qlazy does not read: a pickle, an unknown architecture or data type."""

    exit_code = 3


class DoesNotFit(QlazyError, MemoryError):
    """The plan needs more bytes than a device has free.

    Args:
        message: Which device is short and by how much.
        hint: A setting that would fit.
        needed_bytes: Bytes that the plan puts on the devices that are short.
        free_bytes: Bytes free there after the reserve.
    """

    exit_code = 4

    def __init__(self, message: str, *, hint: str = "", needed_bytes: int = 0, free_bytes: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class CorruptCheckpoint(QlazyError, ValueError):
    """Bytes of a checkpoint contradict themselves (header, offsets, NaN) or the model (shape, dtype, unknown tensor)."""

    exit_code = 5


class IncompleteCheckpoint(CorruptCheckpoint):
    """A shard is missing or cut short, or a tensor that the model needs is in none of them."""


class DeviceUnavailable(QlazyError, RuntimeError):
    """The device asked for does not exist on this machine, or has no kernel for what was asked."""

    exit_code = 6


class OutOfSpace(QlazyError, OSError):
    """The disk that a file should be written to is full."""
