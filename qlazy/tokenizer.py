"""Opens the tokenizer of a model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlazy.errors import UnsupportedModel
from qlazy.sources.source import Source


def load_tokenizer(source: Source, *, without: str, trust_remote_code: bool | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights, or for GGUF in them; beside them where it cannot be read there.

    Args:
        source: An opened source with a folder.
        without: What to do without one, for the hint of the error.
        trust_remote_code: As in transformers.
    Returns:
        The tokenizer.
    Raises:
        UnsupportedModel: there is none, or transformers cannot read it.
    """
    places: list[dict[str, Any]] = [{"gguf_file": source.gguf_file}, {}] if source.gguf_file else [{}]
    failures: list[Exception] = []
    for within in places:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=trust_remote_code, **within
            )
        # Over the metadata of gpt-oss transformers 5.23 fails with a TypeError.
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            failures.append(error)
        else:
            return tokenizer
    why = next(iter(str(failures[0]).splitlines()), type(failures[0]).__name__)
    raise UnsupportedModel(
        f"{source.folder} has no tokenizer that transformers can read: {why}",
        hint=f"Copy the tokenizer's files beside the weights, or {without}.",
    ) from failures[0]
