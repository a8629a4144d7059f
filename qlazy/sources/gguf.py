"""GGUF headers: metadata and tensor index of one file, checked before anything is allocated from what they say.

A file is `magic | version | counts | metadata | tensor index | padding | data`, little-endian. The parser is ours because the
`gguf` package takes 2.6 s for a vocabulary of 49k words (each word becomes an array); this one walks over it in 0.04 s.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.sources.safetensors import TensorInfo

Buffer = bytes | mmap.mmap

GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""ggml's types by number: name, elements in a block, bytes of a block."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
}  # fmt: skip
"""Types that torch has too; the others keep ggml's name."""

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""struct formats of metadata values by type number; 8 is a string, 9 an array."""

MAX_DIMS = 4
"""Most dimensions of a ggml tensor."""

KEPT_ITEMS = 4096
"""Arrays up to this length are kept (one entry a layer); of longer ones, which are vocabularies, only the length."""

_CUT = "The file is damaged or its download was cut short; fetch it again."


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Stands for a long array of the metadata, of which only the length is kept."""

    length: int
    """Number of items."""


class EndOfBuffer(Exception):
    """The header goes on after the bytes at hand; internal, for a caller that can get more."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What stands before the data of one file."""

    metadata: dict[str, Any]
    """By key; long arrays as `Vocabulary`."""
    tensors: dict[str, TensorInfo]
    """In file order."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the metadata and tensor index of one GGUF file, which may be a part of a model.

    Args:
        path: The file.

    Returns:
        Its header.

    Raises:
        CorruptCheckpoint: If the file is no GGUF file or contradicts itself.
        IncompleteCheckpoint: If it ends before its header or one of its tensors does.
        UnsupportedModel: If it is of an old or big-endian version, or of a type that is not known.

    Memory: the metadata without its vocabulary; the file is mapped, not read.
    """
    if path.stat().st_size == 0:
        raise IncompleteCheckpoint(f"{path.name}: the file is empty", hint=_CUT)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        return parse_gguf_header(buffer, file=path.name, file_size=len(buffer), path=path)


def parse_gguf_header(buffer: Buffer, *, file: str, file_size: int, path: Path) -> GgufHeader:
    """Check the head of a GGUF file, whether mapped from disk or fetched by range request.

    Args:
        buffer: The file, or its first bytes.
        file: Name for messages.
        file_size: Bytes of the whole file.
        path: What `TensorInfo.path` shall be.

    Returns:
        The header.

    Raises:
        EndOfBuffer: If the header goes on after the buffer.
        CorruptCheckpoint: If the header contradicts itself or the file.
        UnsupportedModel: As `read_gguf_header`.

    Memory: the metadata without its vocabulary.
    """
    metadata, tensors = _Head(buffer, file=file, file_size=file_size).read(path)
    return GgufHeader(metadata=metadata, tensors=tensors)


class _Head:
    """A cursor over the head of a file; every read is checked against what there is."""

    def __init__(self, buffer: Buffer, *, file: str, file_size: int) -> None:
        self.buffer, self.file, self.file_size = buffer, file, file_size
        self.have = len(buffer)
        self.at = 0

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if (magic := self.take(4)) != b"GGUF":
            self.corrupt(f"it begins with {magic!r} instead of b'GGUF'")
        version = self.number("<I")
        if version not in (2, 3):
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise UnsupportedModel(
                f"{self.file}: GGUF version {version}{' (big-endian)' if big_endian else ''}; versions 2 and 3 are read",
                hint="Convert the model again with a current llama.cpp.",
            )
        tensor_count, entry_count = self.number("<Q"), self.number("<Q")
        # The smallest metadata entry takes 8 + 4 + 1 bytes and the smallest tensor entry 8 + 4 + 4 + 8.
        self.need(entry_count * 13 + tensor_count * 24)
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.string("metadata key")
            if key in metadata:
                self.corrupt(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.number("<I"), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            self.corrupt(f"general.alignment {alignment!r} is not a power of two from 8 on")
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        start = _align(self.at, alignment)
        return metadata, self.place(entries, path=path, start=start, alignment=alignment)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self.string("tensor name")
        dims = self.number("<I")
        if dims > MAX_DIMS:
            self.corrupt(f"tensor {name!r} has {dims} dimensions; ggml has at most {MAX_DIMS}")
        extents = [self.number("<Q") for _ in range(dims)]
        number, offset = self.number("<I"), self.number("<Q")
        if number not in GGML_TYPES:
            raise UnsupportedModel(f"{self.file}: tensor {name!r} is of ggml type {number}, which is not known", hint=_CUT)
        dtype, block, block_bytes = GGML_TYPES[number]
        columns = extents[0] if extents else 1
        if columns % block:
            self.corrupt(f"tensor {name!r}: rows of {columns:,} elements do not divide into {dtype}'s blocks of {block}")
        return name, tuple(reversed(extents)), TORCH_NAMES.get(dtype, dtype), offset, math.prod(extents) // block * block_bytes

    def place(
        self, entries: list[tuple[str, tuple[int, ...], str, int, int]], *, path: Path, start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        cursor, previous = start, "the header"
        for name, shape, dtype, offset, nbytes in sorted(entries, key=lambda entry: (entry[3], entry[4])):
            if name in tensors:
                self.corrupt(f"tensor {name!r} occurs twice")
            # ggml writes tensors without gaps but for the padding; anything else is a wrong offset.
            if start + offset != cursor:
                self.corrupt(
                    f"tensor {name!r} begins at byte {start + offset:,} but should follow {previous} at byte {cursor:,}"
                )
            tensor = TensorInfo(name=name, shape=shape, dtype=dtype, path=path, offset=cursor, nbytes=nbytes)
            if tensor.end > self.file_size:
                raise IncompleteCheckpoint(
                    f"{self.file}: tensor {name!r} ends at byte {tensor.end:,} but the file has {self.file_size:,}", hint=_CUT
                )
            tensors[name] = tensor
            cursor, previous = _align(tensor.end, alignment), f"tensor {name!r}"
        if tensors and self.file_size > cursor:
            self.corrupt(f"{previous} ends at byte {cursor:,} but the file has {self.file_size:,}: nothing claims the rest")
        return tensors

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == 8:
            return self.string(f"value of {key!r}")
        if kind != 9:
            self.corrupt(f"metadata key {key!r} is of type {kind}, which does not exist")
        item, length = self.number("<I"), self.number("<Q")
        if item in SCALARS:
            form = SCALARS[item]
            raw = self.take(length * struct.calcsize(form), keep=length <= KEPT_ITEMS)
            return (
                [number for (number,) in struct.iter_unpack(form, raw)] if length <= KEPT_ITEMS else Vocabulary(length=length)
            )
        if item != 8:
            self.corrupt(f"metadata key {key!r} is an array of type {item}, which is not known")
        self.need(length * 8)
        if length <= KEPT_ITEMS:
            return [self.string(f"item of {key!r}") for _ in range(length)]
        self.skip_strings(length)
        return Vocabulary(length=length)

    def skip_strings(self, count: int) -> None:
        # The one hot loop: hundreds of thousands of words, so without a call for each.
        unpack, buffer, at = struct.Struct("<Q").unpack_from, self.buffer, self.at
        last = self.have - 8
        for _ in range(count):
            if at > last:
                self.short(at + 8)
            at += 8 + unpack(buffer, at)[0]
        if at > self.have:
            self.short(at)
        self.at = at

    def string(self, what: str) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.corrupt(f"{what} {raw[:40]!r} is not UTF-8: {error.reason}")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, count: int, *, keep: bool = True) -> bytes:
        self.need(count)
        raw = self.buffer[self.at : self.at + count] if keep else b""
        self.at += count
        return raw

    def need(self, count: int) -> None:
        if self.at + count > self.have:
            self.short(self.at + count)

    def short(self, end: int) -> NoReturn:
        if end > self.file_size:
            raise IncompleteCheckpoint(
                f"{self.file}: the header goes on to byte {end:,} but the file has {self.file_size:,}", hint=_CUT
            )
        raise EndOfBuffer

    def corrupt(self, message: str) -> NoReturn:
        raise CorruptCheckpoint(f"{self.file}: {message}", hint=_CUT)


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
