"""What all readers of quantized checkpoints share: taking parts of the checkpoint, and checking them. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.sources.packed import PackedTensor, Part, Scheme
from qlazy.sources.safetensors import FETCH_AGAIN, TensorInfo, short

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
"""Eight-bit floats that weights come in."""

SCALES = ("float32", "bfloat16", "float16")
"""What scales come in nearly everywhere."""

MAX_READ = 1 << 16
"""Most bytes that are read of a tensor that describes others."""

ROW_BLOCK = 64
"""Rows that a chunk holds a multiple of, as low-bit layers want them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is known of a quantized checkpoint beside its tensors."""

    where: str
    """What to call it in messages."""
    config: Mapping[str, Any]
    """Its `quantization_config`."""
    dtype: str
    """Dtype in which the model was trained."""

    def number(self, key: str, default: int, *, least: int, most: int) -> int:
        """A whole number of the config.

        Args:
            key: Its key.
            default: What it is where the config does not say.
            least: Least that it may be.
            most: Most that it may be.

        Returns:
            The number.

        Raises:
            CorruptCheckpoint: If it is anything else.
        """
        return whole_number(
            self.config.get(key, default), f"{self.where}: {key} of quantization_config", least=least, most=most
        )

    def unsupported(self, what: str) -> NoReturn:
        """Raise for something that is meant, and that nothing here reads."""
        raise UnsupportedModel(f"{self.where}: {what}", hint="Name the original model in 16 bits.")


def whole_number(value: Any, what: str, *, least: int, most: int) -> int:
    """A number out of a config, which may hold anything.

    Args:
        value: What JSON gave.
        what: Its name, for the message.
        least: Least that it may be.
        most: Most that it may be.

    Returns:
        The number.

    Raises:
        CorruptCheckpoint: If it is no whole number in that range.
    """
    if type(value) is not int or not least <= value <= most:
        raise CorruptCheckpoint(f"{what} is {short(value)} instead of a number from {least} to {most:,}", hint=FETCH_AGAIN)
    return value


def take(tensors: dict[str, TensorInfo], name: str, *, of: TensorInfo) -> TensorInfo:
    """Take a tensor that another one is of no use without.

    Args:
        tensors: What has not been taken; it loses the tensor.
        name: Its name.
        of: The other one.

    Returns:
        The tensor.

    Raises:
        IncompleteCheckpoint: If it is not there.
    """
    found = tensors.pop(name, None)
    if found is None:
        raise IncompleteCheckpoint(
            f"{of.path.name}: {of.name!r} is quantized, and the tensor {name!r} that it needs is in none of the files",
            hint="Download the model again.",
        )
    return found


def require(info: TensorInfo, *, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...] = ()) -> None:
    """Check a part against what the others say it must be.

    Args:
        info: The part.
        dtypes: What it may be stored in.
        shapes: Shapes that it may have; none given = any.

    Raises:
        CorruptCheckpoint: If it is of another.
    """
    if info.dtype not in dtypes:
        corrupt(info, f"is stored as {info.dtype} instead of {' or '.join(dtypes)}")
    if shapes and info.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        corrupt(info, f"has shape {list(info.shape)} instead of {wanted}")


def require_matrix(info: TensorInfo) -> tuple[int, int]:
    """Check that a part is a matrix that is not empty.

    Args:
        info: The part.

    Returns:
        Its rows and columns.

    Raises:
        CorruptCheckpoint: If it is not.
    """
    if len(info.shape) != 2 or 0 in info.shape:
        corrupt(info, f"has shape {list(info.shape)} instead of rows and columns")
    return info.shape[0], info.shape[1]


def corrupt(info: TensorInfo, what: str) -> NoReturn:
    """Raise for a part that contradicts the others.

    Args:
        info: The part.
        what: How, to go on after its name.

    Raises:
        CorruptCheckpoint: Always.
    """
    raise CorruptCheckpoint(f"{info.path.name}: tensor {info.name!r} {what}", hint=FETCH_AGAIN)


def by_rows(role: str, info: TensorInfo, rows: int = 1) -> Part:
    """A part of which `rows` rows of the weight need one row of its own.

    Args:
        role: What it is.
        info: Where it lies; of at least one dimension.
        rows: Rows of the weight for each of its rows.

    Returns:
        The part.
    """
    return Part(role=role, stored=info, rows=rows, slice_nbytes=info.nbytes // max(1, info.shape[0]))


def pack(
    name: str, shape: tuple[int, ...], dtype: str, scheme: Scheme, *parts: Part, row_block: int = ROW_BLOCK
) -> PackedTensor:
    """A weight of its parts.

    Args:
        name: Key that it would have in an unquantized checkpoint.
        shape: Its shape.
        dtype: Of its values.
        scheme: How they come of the parts.
        *parts: The parts, the weight itself first.
        row_block: Rows that belong together.

    Returns:
        The weight.
    """
    first = parts[0].stored
    nbytes = sum(part.stored.nbytes for part in parts)
    return PackedTensor(
        name=name,
        shape=shape,
        dtype=dtype,
        path=first.path,
        offset=first.offset,
        nbytes=nbytes,
        scheme=scheme,
        parts=parts,
        row_block=row_block,
    )


def read_small(info: TensorInfo) -> bytes | None:
    """The bytes of a tensor that describes others.

    Args:
        info: The tensor.

    Returns:
        Its bytes; None where only headers are here.

    Raises:
        CorruptCheckpoint: If it is too long to be one, or the file ends before it.

    Memory: 64 KiB at most.
    """
    if not info.path.is_absolute():
        return None
    if info.nbytes > MAX_READ:
        corrupt(info, f"has {info.nbytes:,} bytes; more than {MAX_READ:,} are not read as a description")
    with info.path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        raw = os.pread(file.fileno(), info.nbytes, info.offset)
    if len(raw) < info.nbytes:
        corrupt(info, f"has {info.nbytes:,} bytes, but only {len(raw):,} could be read")
    return raw
