"""Where tests of kernels run: on a GPU, or with TRITON_INTERPRET=1 interpreted on the CPU, with smaller shapes."""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"


def there(given: Any) -> Any:
    """A tensor, or a tuple of them and of None, on the device."""
    if isinstance(given, tuple):
        return tuple(there(one) for one in given)
    return None if given is None else given.to(DEVICE)
