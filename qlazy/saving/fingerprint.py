"""What identifies the weights of a source without reading them all, and the key of what is made of them. No torch here."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from qlazy import __version__
from qlazy.planning.recipe import Recipe
from qlazy.saving.companions import companions
from qlazy.sources.packed import PackedTensor
from qlazy.sources.source import Source

_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10


def fingerprint(source: Source) -> dict[str, dict[str, Any]]:
    """What is known of every weight file: the hub's hash where its cache has it, else size, time of change and a sample.

    Args:
        source: An opened local source.
    Returns:
        By file name: `bytes`, and `sha256`, or `changed_ns` and `sample_sha256`.

    Memory: a mebibyte.
    """
    return {path.name: _fingerprint(path) for path in weight_files(source)}


def weight_files(source: Source) -> list[Path]:
    """The files that hold a source's weights; those of all parts of a weight in low bits.

    Args:
        source: An opened source.
    Returns:
        Their paths, in order.
    """
    tensors = source.tensors.values()
    parts = {part.stored.path for tensor in tensors if isinstance(tensor, PackedTensor) for part in tensor.parts}
    return sorted(parts | {tensor.path for tensor in tensors})


def content_key(source: Source, recipe: Recipe, **settings: Any) -> str:
    """One key for all that decides which bytes are made: source, recipe, settings, and the version that makes them.

    Args:
        source: An opened local source.
        recipe: What to quantize and how.
        **settings: Layout, dtype and the like.
    Returns:
        32 hexadecimal digits.
    """
    # A GGUF file holds what belongs to it; the folder that it lies in may be any.
    beside = companions(source.folder) if source.folder is not None and source.kind == "safetensors" else ()
    told = {
        "version": __version__,
        "files": fingerprint(source),
        "config": source.config,
        "beside": {name: hashlib.sha256(content).hexdigest() for name, content in beside},
        "recipe": repr(recipe),
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(path: Path) -> dict[str, Any]:
    status = path.stat()
    # The hub's cache holds links to files that have their sha256 for a name.
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return {"bytes": status.st_size, "sha256": blob}
    sample = _sample(path, status.st_size, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns, "sample_sha256": sample}


@functools.lru_cache(maxsize=1024)
def _sample(path: Path, nbytes: int, unchanged: tuple[int, ...]) -> str:
    """Hash of parts of a file, read once though a load that keeps what it makes asks three times."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, nbytes * number // _SAMPLES))
    return digest.hexdigest()
