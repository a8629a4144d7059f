"""A text as windows of tokens, each read on its own, and the tokens in them that are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlazy.errors import UsageError
from qlazy.measuring.estimate import blocks_of

TEXT = Path(__file__).with_name("prose.txt")
"""Everyday prose in English, about 1,500 tokens, written for this project and given to the public domain (CC0 1.0)."""
CONTEXT_LENGTH = 512
"""Tokens of a window, as in llama.cpp."""
BLOCK_TOKENS = 32
"""Tokens of a block, for standard errors."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A text cut into pieces that are read one by one."""

    ids: tuple[Tensor, ...]
    """Token ids of each window; what the tokenizer puts before every text, such as a BOS token, stands before each."""
    prefix: int
    """Tokens of that beginning."""

    @property
    def targets(self) -> list[Tensor]:
        """The predicted tokens of each window: all but the beginning, or but the first where there is none."""
        return [ids[max(self.prefix, 1) :] for ids in self.ids]

    @property
    def tokens(self) -> int:
        """Predicted tokens in all."""
        return sum(len(targets) for targets in self.targets)

    @property
    def blocks(self) -> Tensor:
        """The block of each predicted token."""
        return blocks_of([len(targets) for targets in self.targets], BLOCK_TOKENS)


def cut(
    tokenizer: PreTrainedTokenizerBase, text: str, context_length: int = CONTEXT_LENGTH, max_tokens: int | None = None
) -> Windows:
    """Cut a text into windows.

    Args:
        tokenizer: Makes tokens of it.
        text: The text.
        context_length: Tokens of a window, its beginning included.
        max_tokens: Tokens of the text that are used at most.
    Returns:
        The windows; the last may be shorter.
    Raises:
        UsageError: fewer tokens than two blocks have, or windows in which nothing can be predicted.

    Memory: the text and its tokens.
    """
    call: Any = tokenizer
    ids = torch.tensor(call(text, add_special_tokens=False)["input_ids"][:max_tokens], dtype=torch.int64)
    prefix = _prefix(call)
    if context_length < len(prefix) + 2:
        raise UsageError(
            f"A context of {context_length} tokens leaves nothing to predict.",
            hint="Use --context-length 512, or leave it out.",
        )
    pieces = [torch.cat([prefix, piece]) for piece in ids.split(context_length - len(prefix))] if len(ids) else []
    windows = Windows(ids=tuple(piece for piece in pieces if len(piece) > max(len(prefix), 1)), prefix=len(prefix))
    if not windows.ids or int(windows.blocks.max()) < 1:
        raise UsageError(
            f"The text has {len(ids)} tokens; a standard error needs more than {BLOCK_TOKENS + 1}.",
            hint="Use a longer text, or more of it.",
        )
    return windows


def _prefix(tokenizer: Any) -> Tensor:
    """What the tokenizer puts before a text: a BOS token, several tokens, or nothing."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return torch.tensor(whole[: places[0]] if places else [], dtype=torch.int64)
