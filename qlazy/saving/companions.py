"""What lies beside the weights of a model and belongs to it: tokenizer, generation config, chat template, code, licence.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlazy.saving.folder import LAST, MANIFEST
from qlazy.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_LEFT = (LAST, MANIFEST, "*.index.json", "README.md", "params.json", "quantize_config.json", "quant_config.json")
_FOLDERS = ("additional_chat_templates",)
_MOST_BYTES = 64 << 20
_QUANTIZED = ("quantization_config", "compression_config", "quantization")


def companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Small files of a model's folder that go with its weights wherever they go.

    Args:
        folder: Of a model.
    Yields:
        Name in the folder, and content.

    Memory: one file.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and _goes_along(file.name) and file.stat().st_size <= _MOST_BYTES:
            yield file.name, file.read_bytes()
    for inner in _FOLDERS:
        for file in sorted((folder / inner).glob("*.jinja")):
            yield f"{inner}/{file.name}", file.read_bytes()


def gguf_companions(source: Source, model: PreTrainedModel) -> Iterator[tuple[str, bytes]]:
    """The same for a GGUF file, which holds its tokenizer.

    Args:
        source: An opened source of that kind.
        model: Its placeholder.
    Yields:
        Name and content.
    Raises:
        UnsupportedModel: there is no tokenizer that transformers can read.

    Memory: the tokenizer, twice.
    """
    from transformers import GenerationConfig

    from qlazy.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source, without="save the model from its safetensors files")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if model.can_generate():
            generation = copy.deepcopy(model.generation_config or GenerationConfig())
            generation.eos_token_id = tokenizer.eos_token_id
            generation.save_pretrained(folder)
        yield from companions(Path(folder))


def config_json(config: Mapping[str, Any], quantization: Mapping[str, Any], dtype: str) -> bytes:
    """The `config.json` of a saved folder.

    Args:
        config: That of the source.
        quantization: Its new `quantization_config`.
        dtype: Of what is not quantized.
    Returns:
        The file's content.
    """
    made = {key: value for key, value in config.items() if key not in (*_QUANTIZED, "torch_dtype")}
    for key, inner in made.items():
        if isinstance(inner, Mapping) and key.endswith("_config"):
            kept = {name: value for name, value in inner.items() if name not in _QUANTIZED}
            told = {name: dtype for name in ("dtype", "torch_dtype") if kept.get(name) is not None}
            made[key] = kept | told
    return json.dumps(made | {"dtype": dtype, "quantization_config": dict(quantization)}, indent=2).encode()


def _goes_along(name: str) -> bool:
    return any(fnmatch.fnmatch(name, kept) for kept in _KEPT) and not any(fnmatch.fnmatch(name, left) for left in _LEFT)
