"""Which files of a folder or repository hold the weights, and how shards and index belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.sources.safetensors import FETCH_AGAIN, TensorInfo, load_json, short

SINGLE_FILE = "model.safetensors"
"""Weights in one file, as transformers names it."""

INDEX_FILE = "model.safetensors.index.json"
"""Shard of each tensor, as transformers names it."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that torch unpickles, which runs whatever they say."""

CONVERT = (
    "Convert it where you trust its origin: "
    "python -c \"from transformers import AutoModel as A; A.from_pretrained('SRC').save_pretrained('DST')\""
)


def read_index(raw: bytes, *, file: str) -> dict[str, str]:
    """Check a `model.safetensors.index.json`.

    Args:
        raw: Its bytes.
        file: Name for messages.

    Returns:
        Name of the shard of each tensor; every shard's name is that of a file right in the folder.

    Raises:
        CorruptCheckpoint: If it is no such map, or names a file outside of the folder.
        UnsupportedModel: If it names pickles.

    Memory: a small multiple of `raw`.
    """
    weight_map = load_json(raw, file=file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{file}: no 'weight_map' that names the shard of each tensor", hint=FETCH_AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CorruptCheckpoint(
                f"{file}: tensor {name!r} is mapped to {short(shard)}, which is no file name", hint=FETCH_AGAIN
            )
        if not _is_plain_name(shard):
            raise CorruptCheckpoint(
                f"{file}: tensor {name!r} is mapped to {shard!r}, which is not a file right in this folder",
                hint="An index must not point elsewhere; do not trust this checkpoint.",
            )
        if not shard.endswith(".safetensors"):
            raise UnsupportedModel(f"{file}: tensor {name!r} is mapped to {shard!r}, which is not safetensors", hint=CONVERT)
    return weight_map


def join_shards(
    headers: Mapping[str, Mapping[str, TensorInfo]], weight_map: Mapping[str, str], *, index: str
) -> dict[str, TensorInfo]:
    """Put the headers of all shards together and hold them against the index.

    Args:
        headers: The tensors of each shard, by shard name.
        weight_map: The index: shard of each tensor.
        index: Name of the index for messages.

    Returns:
        All tensors, shard after shard, in file order; those that only the index forgot too.

    Raises:
        CorruptCheckpoint: If a tensor lies in two shards or in another one than the index says.
        IncompleteCheckpoint: If a tensor of the index lies in no shard.

    Memory: one entry a tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(headers):
        for name, tensor in headers[shard].items():
            if name in tensors:
                raise CorruptCheckpoint(
                    f"tensor {name!r} lies in two shards: {tensors[name].path.name} and {shard}",
                    hint="Remove the shard that is left over from another save.",
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise IncompleteCheckpoint(
                f"{index}: tensor {name!r} should be in {shard}, which does not hold it", hint=FETCH_AGAIN
            )
        if name not in headers[shard]:
            raise CorruptCheckpoint(
                f"{index}: tensor {name!r} should be in {shard} but lies in {tensors[name].path.name}", hint=FETCH_AGAIN
            )
    return tensors


def pick_weights(names: Iterable[str], *, where: str) -> str | None:
    """Choose the file that the weights are read from, in the order in which transformers looks for them.

    Args:
        names: Names of the files right in a folder or repository.
        where: The folder or repository, for messages.

    Returns:
        The name of a safetensors file or index (`*.index.json`), or None where there are no weights at all.

    Raises:
        UnsupportedModel: If all weights are pickles.
        IncompleteCheckpoint: If there are several safetensors files and no index.

    Memory: none.
    """
    present = sorted(names)
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in present:
            return name
    # Mistral ships the same weights a second time under this name, with other tensor names.
    files = [name for name in present if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if len(files) > 1:
        raise IncompleteCheckpoint(
            f"{where}: {len(files)} safetensors files ({listing(files)}) and no {INDEX_FILE} that says what belongs together",
            hint=f"Fetch {INDEX_FILE} too.",
        )
    if files:
        return files[0]
    pickles = [name for name in present if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".gguf") for name in present):
        raise UnsupportedModel(
            f"{where}: the weights are pickles ({listing(pickles)}); only safetensors and GGUF are read, never pickles",
            hint=CONVERT,
        )
    return None


def listing(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message: the first few and how many more.

    Args:
        names: The names.
        limit: How many to write out.

    Returns:
        A comma-separated text; "nothing" where there is none.

    Memory: none.
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more if ordered else "nothing"


def _is_plain_name(name: str) -> bool:
    return name.isprintable() and not any(mark in name for mark in "/\\:") and name.strip(". ") != "" and len(name) < 256
