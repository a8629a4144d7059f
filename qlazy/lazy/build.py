"""Build a module whose parameters have no storage and whose buffers hold their real values.

A parameter becomes a plain `nn.Parameter` on the meta device at the moment it is registered. Everything else in a constructor
runs for real, so that buffers (persistent or not), plain tensor attributes and values read with `.item()` are what eager
building gives. The memory that a constructor asks for before registering is never written where it uses `torch.empty`, and is
given back at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_lock = threading.Lock()
_local = threading.local()
_eager_register = nn.Module.register_parameter


@contextlib.contextmanager
def lazy_build() -> Iterator[None]:
    """Within this context, in this thread, parameters that modules register get no storage.

    Nests; other threads build eagerly meanwhile. Parameters shared between modules stay one object.

    Yields:
        Nothing.

    Memory: buffers, plus transiently what one constructor writes before it registers a parameter.
    """
    with _lock:
        if nn.Module.register_parameter is _eager_register:
            nn.Module.register_parameter = _register  # type: ignore[method-assign, assignment]
    outer = getattr(_local, "placeholders", None)
    # Keyed by the eager parameter, weakly: its storage goes with it, and one that is registered twice gets one placeholder.
    _local.placeholders = WeakTensorKeyDictionary() if outer is None else outer
    try:
        yield
    finally:
        _local.placeholders = outer


def _register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """`nn.Module.register_parameter`, with the parameter replaced by one without storage where a `lazy_build` is open here."""
    placeholders = getattr(_local, "placeholders", None)
    if placeholders is not None and param is not None and param.device.type != "meta":
        if param not in placeholders:
            placeholders[param] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        param = placeholders[param]
    _eager_register(module, name, param)
