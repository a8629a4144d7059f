"""GGUF models in several files, `name-00001-of-00003.gguf`: the first has the metadata, and each some of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.sources.gguf import GgufHeader, read_gguf_header
from qlazy.sources.gguf_config import config_of
from qlazy.sources.index import listing
from qlazy.sources.safetensors import FETCH_AGAIN, TensorInfo

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """The files of the model that a file belongs to, told from its name.

    Args:
        name: Of one of them.
    Returns:
        All names in order; its own alone where it is no part.
    """
    part = _PART.fullmatch(name)
    if part is None or not 1 <= int(part[2]) <= int(part[3]):
        return [name]
    return [f"{part[1]}-{number:05d}-of-{part[3]}.gguf" for number in range(1, int(part[3]) + 1)]


def models_among(names: Iterable[str]) -> list[str]:
    """One file for each model.

    Args:
        names: GGUF files, parts among them.
    Returns:
        Of every model its only file or, of those parts that are there, the first; in order.
    """
    first: dict[str, str] = {}
    for name in sorted(names):
        first.setdefault(part_names(name)[0], name)
    return list(first.values())


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Read the headers of a GGUF model, of all its parts if it has several.

    Args:
        path: Its file, or any of its parts.

    Returns:
        A configuration with the hub's names, as far as the metadata tells it, and the tensors, part after part in file order.

    Raises:
        CorruptCheckpoint: If a file is no GGUF file, contradicts itself or another part.
        IncompleteCheckpoint: If a part is missing, or ends before its header or one of its tensors does.
        UnsupportedModel: If a file is of an old or big-endian version, of a type that is not known, or a part that is not
            named as one.

    Memory: the metadata without its vocabulary; files are mapped, not read.
    """
    names = part_names(path.name)
    require_parts(names, [name for name in names if (path.parent / name).is_file()], where=str(path.parent))
    return join_gguf({name: read_gguf_header(path.parent / name) for name in names})


def require_parts(names: list[str], present: Iterable[str], *, where: str) -> None:
    """Refuse a model of which a part is not there.

    Args:
        names: All parts.
        present: Those that are there.
        where: Folder or repository, for messages.
    Raises:
        IncompleteCheckpoint: with the names of those that are missing.
    """
    missing = sorted({*names} - {*present})
    if missing:
        raise IncompleteCheckpoint(
            f"{where}: {len(missing)} of {len(names)} parts of this model are missing: {listing(missing)}",
            hint="Fetch the missing files into the same folder.",
        )


def join_gguf(headers: Mapping[str, GgufHeader]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Put the headers of all parts together and hold them against each other.

    Args:
        headers: By file name, in order; one alone for a model in one file.

    Returns:
        As `read_gguf`.

    Raises:
        CorruptCheckpoint: If they are parts of different models, or not as many tensors as they say.
        UnsupportedModel: If one alone is a part.

    Memory: one entry a tensor.
    """
    names, tensors = list(headers), dict[str, TensorInfo]()
    first = headers[names[0]]
    for number, (name, header) in enumerate(headers.items()):
        _require_place(name, header.metadata, number, len(names))
        for key in ("general.architecture", "split.tensors.count"):
            said, wanted = header.metadata.get(key), first.metadata.get(key)
            if said != wanted and (said is not None or key.startswith("split")):
                raise CorruptCheckpoint(
                    f"{name}: {key} is {said!r}, but {names[0]} says {wanted!r}", hint="These are parts of different models."
                )
        for key, tensor in header.tensors.items():
            if key in tensors:
                raise CorruptCheckpoint(
                    f"tensor {key!r} lies in two parts: {tensors[key].path.name} and {name}",
                    hint="These are parts of different models.",
                )
            tensors[key] = tensor
    total = first.metadata.get("split.tensors.count")
    if len(names) > 1 and total is not None and total != len(tensors):
        raise CorruptCheckpoint(
            f"{names[0]}: its {len(names)} parts should hold {total!r} tensors but hold {len(tensors):,}", hint=FETCH_AGAIN
        )
    return config_of(GgufHeader(metadata=first.metadata, tensors=tensors), file=names[0]), tensors


def _require_place(name: str, metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Hold what a header says of its place among the parts against the file's name."""
    parts, place = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if count == 1 and isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"{name} is part {place!r} of {parts}, counted from 0, and its name does not tell those of the others",
            hint="Give all parts the names that they were made with: NAME-00001-of-00003.gguf and so on.",
        )
    if count > 1 and (parts, place) != (count, number):
        raise CorruptCheckpoint(
            f"{name}: its header says part {place!r} of {parts!r}, counted from 0, where its name says {number} of {count}",
            hint="Rename it as it was, or fetch it again.",
        )
