"""Write safetensors files whose tensors lie where a map of the file can be computed with. No torch here.

The format wants tensors without holes, so that none can be moved to a boundary by padding. The header is padded instead, and
what keeps to the boundary goes first::

    u64 n | JSON, spaces up to a multiple of 64 | sizes that are multiples of 64 ... | of 32, 16, 8, 4, 2 | odd sizes
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qlazy.sources.safetensors import DTYPES

ALIGNMENT = 64
"""Boundary that tensors lie on: a cache line, and the longest vector of a CPU."""

_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_ITEMSIZE = dict(DTYPES.values())


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor to be written."""

    name: str
    """Key in the file."""
    dtype: str
    """Torch's name, without `torch.`."""
    shape: tuple[int, ...]
    """Its shape."""
    data: memoryview
    """Its bytes."""


def shard_pieces(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, piece by piece.

    Args:
        tensors: What it holds, in any order.
        metadata: What `__metadata__` says.
    Yields:
        The header, then every tensor's bytes.

    Memory: the header.
    """
    ordered = sorted(tensors, key=lambda tensor: -_boundary(tensor.data.nbytes))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for tensor in ordered:
        nbytes = tensor.data.nbytes
        assert nbytes == math.prod(tensor.shape) * _ITEMSIZE[tensor.dtype], tensor.name
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + nbytes],
        }
        begin += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        if tensor.data.nbytes:
            yield tensor.data.cast("B")


def shard_names(count: int) -> list[str]:
    """Names of the files of a checkpoint, as transformers has them.

    Args:
        count: How many files.
    Returns:
        `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_json(files: Mapping[str, Iterable[str]], total_nbytes: int) -> bytes:
    """The index of a checkpoint of several files.

    Args:
        files: Names of the tensors of each file.
        total_nbytes: Bytes of all tensors.
    Returns:
        The content of `model.safetensors.index.json`.
    """
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    return json.dumps({"metadata": {"total_size": total_nbytes}, "weight_map": weight_map}, indent=2, sort_keys=True).encode()


def _boundary(nbytes: int) -> int:
    """The largest power of two up to 64 that divides a size."""
    return math.gcd(nbytes, ALIGNMENT) if nbytes else ALIGNMENT
