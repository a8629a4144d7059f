"""Safetensors headers, read and checked by our own parser before anything is allocated from what they say.

A file is `u64 n | n bytes of JSON | data`; the JSON maps each tensor to its dtype, shape and byte range of the data::

    {"lm_head.weight": {"dtype": "BF16", "shape": [32000, 2048], "data_offsets": [0, 131072000]}, ..., "__metadata__": {...}}

The ranges must tile the data exactly: no overlap, no hole, nothing left over. No torch, numpy or safetensors package here.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read, as the safetensors library has it: a flipped length must not allocate the machine away."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}
"""Safetensors' dtype names: torch's name and bytes of an element."""

SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Names that safetensors knows and torch has no whole-byte dtype for."""

MAX_DIMS = 64
"""Most dimensions of a tensor, as torch has it."""

MAX_EXTENT = 2**63 - 1
"""Largest dimension or offset: beyond it, it is no torch shape and no file size."""

MAX_KEY = 10_000
"""Longest key of a JSON object in characters, so that messages stay readable."""

FETCH_AGAIN = "The file is damaged or its download was cut short; fetch it again (hub cache: hf cache verify ORG/NAME)."
"""Hint of most errors here."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor of a checkpoint lies and what it is."""

    name: str
    """Key in the checkpoint."""
    shape: tuple[int, ...]
    """Logical shape in torch's order, for GGUF too: rows first."""
    dtype: str
    """Torch's name without `torch.`; for GGUF's quantized types ggml's name, e.g. `Q4_1`."""
    path: Path
    """File that holds the bytes; for a remote header the file's name in the repository."""
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int
    """Bytes in the file."""

    @property
    def end(self) -> int:
        """One past the last byte, counted from the start of the file."""
        return self.offset + self.nbytes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Args:
        path: The file; a symbolic link, as in the hub's cache, will do.

    Returns:
        Its tensors in file order.

    Raises:
        CorruptCheckpoint: If the header contradicts itself or the file.
        IncompleteCheckpoint: If the file ends before its header or one of its tensors does.
        UnsupportedModel: If a tensor has a sub-byte dtype.

    Memory: the header, a few megabytes at most for real models; no weights.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            # Else the kernel reads ahead, megabytes of weights that nobody has asked for.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        prefix = file.read(8)
        length = header_nbytes(prefix, file=path.name, file_size=file_size)
        return parse_header(prefix + file.read(length - 8), file=path.name, file_size=file_size, path=path)


def header_nbytes(prefix: bytes, *, file: str, file_size: int) -> int:
    """Bytes from the start of the file to the data, after checking the length that the file begins with.

    Args:
        prefix: The first bytes of the file, eight at least where it has as many.
        file: Name for messages.
        file_size: Bytes of the whole file.

    Returns:
        Eight plus the bytes of JSON.

    Raises:
        CorruptCheckpoint: If the length cannot be that of a header.
        IncompleteCheckpoint: If the file is shorter than its header.

    Memory: none.
    """
    if file_size < 8 or len(prefix) < 8:
        raise IncompleteCheckpoint(
            f"{file}: a safetensors file begins with 8 bytes of length but the file has {file_size:,}", hint=FETCH_AGAIN
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptCheckpoint(
            f"{file}: the header claims {length:,} bytes; more than {MAX_HEADER_BYTES:,} are not a safetensors header",
            hint="Is it really a safetensors file? " + FETCH_AGAIN,
        )
    if 8 + length > file_size:
        raise IncompleteCheckpoint(
            f"{file}: the header ends at byte {8 + length:,} but the file has {file_size:,}", hint=FETCH_AGAIN
        )
    return 8 + length


def parse_header(raw: bytes, *, file: str, file_size: int, path: Path) -> dict[str, TensorInfo]:
    """Check a header, whether read from disk or fetched by range request.

    Args:
        raw: The first bytes of the file, up to the end of the header at least.
        file: Name for messages.
        file_size: Bytes of the whole file.
        path: What `TensorInfo.path` shall be.

    Returns:
        The tensors in file order.

    Raises:
        CorruptCheckpoint: If the header contradicts itself or the file.
        IncompleteCheckpoint: If `raw` or the file ends too early.
        UnsupportedModel: If a tensor has a sub-byte dtype.

    Memory: a small multiple of the header.
    """
    start = header_nbytes(raw, file=file, file_size=file_size)
    if len(raw) < start:
        raise IncompleteCheckpoint(f"{file}: the header ends at byte {start:,} but only {len(raw):,} came", hint=FETCH_AGAIN)
    if raw[8:9] != b"{":
        raise CorruptCheckpoint(f"{file}: the header begins with {raw[8:9]!r} instead of '{{'", hint=FETCH_AGAIN)
    header = load_json(raw[8:start], file=f"{file}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpoint(f"{file}: '__metadata__' is not a map of strings", hint=FETCH_AGAIN)
    tensors = [_tensor(name, entry, file=file, path=path, start=start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(tensors, file=file, start=start, file_size=file_size)
    return {tensor.name: tensor for tensor in tensors}


def load_json(raw: bytes, *, file: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate key, no NaN, no lone surrogate, nesting that Python can follow.

    Args:
        raw: The bytes.
        file: Name for messages.

    Returns:
        The object.

    Raises:
        CorruptCheckpoint: If it is anything else.

    Memory: a small multiple of `raw`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {short(name)} occurs twice")
        for name in entries:
            if len(name) > MAX_KEY:
                raise ValueError(f"key {short(name)} has {len(name):,} characters; names have at most {MAX_KEY:,}")
            name.encode()  # a lone surrogate can come from an escape only, and could not be printed later
        return entries

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_reject_constant)
    except RecursionError:
        raise CorruptCheckpoint(f"{file} is JSON nested too deeply to be one", hint=FETCH_AGAIN) from None
    except ValueError as error:
        raise CorruptCheckpoint(f"{file} is not valid JSON: {error}", hint=FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{file} is a JSON {type(value).__name__} instead of an object", hint=FETCH_AGAIN)
    return value


def short(value: Any) -> str:
    """A value out of a damaged file as text for a message: printable everywhere and not long.

    Args:
        value: What JSON gave.

    Returns:
        At most 80 ASCII characters.

    Memory: the text.
    """
    text = ascii(value) if not isinstance(value, int) else _big(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _tensor(name: str, entry: Any, *, file: str, path: Path, start: int) -> TensorInfo:
    def corrupt(message: str) -> NoReturn:
        raise CorruptCheckpoint(f"{file}: tensor {name!r}: {message}", hint=FETCH_AGAIN)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        corrupt("the entry is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in SUB_BYTE_DTYPES:
        raise UnsupportedModel(
            f"{file}: tensor {name!r} has dtype {dtype}, which packs elements into parts of bytes and is not read",
            hint="Use the 16-bit version of this model.",
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        corrupt(f"dtype {short(dtype)} is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_extent(extent) for extent in shape):
        corrupt(f"shape {short(shape)} is not a list of at most {MAX_DIMS} numbers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_extent(offset) for offset in offsets):
        corrupt(f"data_offsets {short(offsets)} are not two numbers >= 0")
    begin, end = offsets
    if begin > end:
        corrupt(f"it begins at {begin:,} and ends before, at {end:,}")
    torch_dtype, itemsize = DTYPES[dtype]
    wanted = math.prod(shape) * itemsize
    if end - begin != wanted:
        corrupt(f"{dtype} of shape {shape} takes {_big(wanted)} bytes but its offsets span {end - begin:,}")
    return TensorInfo(name=name, shape=tuple(shape), dtype=torch_dtype, path=path, offset=start + begin, nbytes=wanted)


def _check_tiling(tensors: list[TensorInfo], *, file: str, start: int, file_size: int) -> None:
    cursor, previous = start, "the header"
    for tensor in tensors:
        if tensor.offset < cursor:
            raise CorruptCheckpoint(
                f"{file}: tensor {tensor.name!r} overlaps {previous}: it begins at {tensor.offset:,}, that ends at {cursor:,}",
                hint=FETCH_AGAIN,
            )
        if tensor.offset > cursor:
            raise CorruptCheckpoint(
                f"{file}: tensor {tensor.name!r} begins at byte {tensor.offset:,} but {previous} ends at {cursor:,}, "
                "and nothing claims the bytes between",
                hint=FETCH_AGAIN,
            )
        cursor, previous = tensor.end, f"tensor {tensor.name!r}"
        if cursor > file_size:
            raise IncompleteCheckpoint(
                f"{file}: tensor {tensor.name!r} ends at byte {cursor:,} but the file has {file_size:,}", hint=FETCH_AGAIN
            )
    if cursor < file_size:
        raise CorruptCheckpoint(
            f"{file}: {previous} ends at byte {cursor:,} but the file has {file_size:,}: nothing claims the rest",
            hint=FETCH_AGAIN,
        )


def _is_extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXTENT  # not isinstance: a bool is an int


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _big(number: int) -> str:
    # Python refuses to print integers of thousands of digits, and nobody wants to read them.
    return f"{number:,}" if number < 10**30 else f"about 2**{number.bit_length()}"
