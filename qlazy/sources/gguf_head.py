"""A GGUF file with another's metadata and names of tensors, but without its vocabulary and values.

transformers turns each word of a vocabulary and each merge into an array of its own to come to the config, which takes seconds
(ten for Llama 3), and uses none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlazy.sources.gguf import Vocabulary


def write_head(path: Path, metadata: Mapping[str, Any], names: Iterable[str], *, vocab_size: int | None) -> None:
    """Write such a file.

    Args:
        path: The file to make.
        metadata: As `parse_gguf` reads it.
        names: Of the tensors; each gets one number.
        vocab_size: Words of the vocabulary that is left out; None where they are not known.

    Memory: the metadata.
    """
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    architecture = metadata["general.architecture"]
    writer = GGUFWriter(path, architecture)  # which it writes itself
    told = {"general.architecture", f"{architecture}.vocab_size"}
    if (words := metadata.get(f"{architecture}.vocab_size", vocab_size)) is not None:
        writer.add_vocab_size(words)
    for key, value in metadata.items():
        if key in told or isinstance(value, Vocabulary) or value == []:
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=_kind(value[0]))
        else:
            writer.add_key_value(key, value, _kind(value))
    for name in names:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(value: Any) -> Any:
    """A type that holds a value without loss, whichever it was stored in."""
    from gguf import GGUFValueType

    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT64 if value >= 0 else GGUFValueType.INT64
    return GGUFValueType.FLOAT64 if isinstance(value, float) else GGUFValueType.STRING
