"""Logits of a text: computed when they are asked for, or kept in a file so that two models need not be in memory at once."""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlazy.errors import OutOfSpace, UnsupportedModel, UsageError
from qlazy.measuring.windows import Windows
from qlazy.sizes import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RecordedLogits:
    """Logits of a text, window by window, bit for bit as a model computes them.

    The file has no name and vanishes with the object, or with the process. It lies where temporary files do (`TMPDIR`).

    Args:
        tokens: Rows that will be recorded.

    Memory: one window's logits while they are written or read; `tokens` rows of the vocabulary on disk.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._file = tempfile.TemporaryFile(prefix="qlazy-logits-")  # noqa: SIM115 -- closed by `close`
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def __enter__(self) -> RecordedLogits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; twice does no harm."""
        self._file.close()

    def append(self, logits: Tensor) -> None:
        """Write the next window's logits. The first one tells the size of all, for which there has to be room.

        Args:
            logits: Rows of the vocabulary.
        Raises:
            OutOfSpace: the disk is full, or will be.
        """
        if not self._places:
            require_space(self.tokens * logits.shape[-1] * logits.dtype.itemsize)
        offset = self._file.seek(0, 2)
        self._places.append((offset, logits.shape, logits.dtype))
        try:
            self._file.write(logits.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            if error.errno in _FULL:
                raise _out_of_space(self.tokens * logits.shape[-1] * logits.dtype.itemsize) from error
            raise

    def __len__(self) -> int:
        """Windows recorded."""
        return len(self._places)

    def __getitem__(self, window: int) -> Tensor:
        """The logits of a window.

        Args:
            window: Its number.
        Returns:
            What was appended, on the host.
        """
        offset, shape, dtype = self._places[window]
        held = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        self._file.seek(offset)
        read = self._file.readinto(held.numpy().data)
        assert read == held.numel(), f"window {window}: {read} of {held.numel()} bytes"
        return held.view(dtype).view(shape)


class Logits(Protocol):
    """Logits by the number of a window."""

    def __getitem__(self, window: int) -> Tensor:
        """The logits of one window: a row for each predicted token."""


class ComputedLogits:
    """Logits that a model computes when they are asked for.

    Args:
        model: A causal language model.
        windows: What it reads.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        require_causal(model, max(len(ids) for ids in windows.ids))
        self._model, self._windows = cast(Any, model), windows

    def __getitem__(self, window: int) -> Tensor:
        """The logits of one window.

        Args:
            window: Its number.
        Returns:
            A row for each predicted token, on the model's device and in its dtype.
        """
        ids = self._windows.ids[window].unsqueeze(0).to(self._model.device)
        with torch.inference_mode():
            rows: Tensor = self._model(input_ids=ids, use_cache=False).logits[0, max(self._windows.prefix, 1) - 1 : -1]
        return rows


def record_logits(
    model: PreTrainedModel, windows: Windows, *, on_window: Callable[[int], None] | None = None
) -> RecordedLogits:
    """Keep the logits of a model in a temporary file, for a comparison after the model is gone.

    Args:
        model: The model to compare with.
        windows: The windows of the text.
        on_window: Called with the number of windows read.
    Returns:
        The logits, to be closed or used in a `with`.
    Raises:
        UnsupportedModel: the model does not predict the next token.
        OutOfSpace: the file does not fit in the folder of temporary files; nothing is written then.

    Memory: activations and logits of one window. On disk, tokens x vocabulary x bytes of the logits' dtype.
    """
    computed, recorded = ComputedLogits(model, windows), RecordedLogits(windows.tokens)
    try:
        for number in range(len(windows.ids)):
            recorded.append(computed[number])
            if on_window is not None:
                on_window(number + 1)
    except BaseException:
        recorded.close()
        raise
    return recorded


def require_causal(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a model that does not predict the next token, or has too few positions.

    Args:
        model: The model.
        tokens: Tokens of the longest window.
    Raises:
        UnsupportedModel: no causal head.
        UsageError: fewer positions than tokens.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(model).__name__} does not predict the next token, so that a text has no perplexity under it.",
            hint="Perplexity needs a causal language model.",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UsageError(
            f"A window has {tokens} tokens; {type(model).__name__} has {positions} positions.",
            hint=f"Use --context-length {positions}.",
        )


def require_space(nbytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        nbytes: Bytes that will be written to the folder of temporary files.
    Raises:
        OutOfSpace: fewer are free.
    """
    if nbytes > shutil.disk_usage(tempfile.gettempdir()).free:
        raise _out_of_space(nbytes)


def _out_of_space(nbytes: int) -> OutOfSpace:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    return OutOfSpace(
        f"The reference's logits take {format_bytes(nbytes)} in {folder}; {format_bytes(free)} are free there.",
        hint="Set TMPDIR to a folder with more room, or use fewer tokens (--max-tokens), or --no-reference.",
    )
