"""Writes to tensors without memory when no recorder is open: they must not be lost in silence.

Torch counts how often a tensor was written to, which tells of most. But `tensor.data` has a counter of its own, so that a write
through it leaves no trace on `tensor`. That is what people want it for where there is memory; where there is none, nothing can
come of the write. So for as long as there are tensors without memory, their `.data` counts with them, as `.detach()` does.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from qlazy.errors import UsageError
from qlazy.lazy.log import pending, record_of
from qlazy.lazy.replay import plain

_DATA: Any = torch._C.TensorBase.data


def edited(what: str) -> UsageError:
    """The error for a tensor that was written to when no recorder was open.

    Args:
        what: Which tensor.
    Returns:
        An error to raise.
    """
    return UsageError(
        f"{what} was written to after lazy_build() had ended, while it had no memory: what was written is lost.",
        hint="Write to it inside lazy_build(), which can be entered again, or materialize first.",
    )


def count_writes_to_data() -> None:
    """From now on, and until no tensor is left without memory, `.data` of such a tensor counts writes with it."""
    if "data" not in vars(torch.Tensor):
        setattr(torch.Tensor, "data", COUNTED_DATA)  # noqa: B010


def _data(tensor: Tensor) -> Any:
    if not pending:
        with contextlib.suppress(AttributeError):  # another thread was faster
            del torch.Tensor.data
    # Within a build `is_meta` is False: its recorder sees what is written.
    elif tensor.is_meta and (record := record_of(tensor)) is not None and record.real is None:
        with plain():
            return tensor.detach()
    return _DATA.__get__(tensor)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    _DATA.__set__(tensor, value)


COUNTED_DATA = property(_data, _set_data, None, _DATA.__doc__)
"""What `torch.Tensor.data` is meanwhile."""
SETTERS_OF_DATA = (_DATA.__set__, COUNTED_DATA.__set__)
"""What torch may tell a function mode that was called."""
