"""Find the tensors of a module: parameters, buffers, and what lies in attributes, lists, dicts and plain objects."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_CLOSED = (
    str,
    bytes,
    int,
    float,
    complex,
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    types.BuiltinFunctionType,
)
_REGISTERED = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Place:
    """Where a tensor was found."""

    name: str
    """As in `state_dict` for parameters and buffers; attributes and items are joined by dots too."""
    tensor: Tensor
    """The tensor."""
    owner: Any
    """The dict, list or object that holds it."""
    key: Any
    """Where in it."""

    def rebind(self, tensor: Tensor) -> bool:
        """Put another tensor in this place.

        Args:
            tensor: The other one.
        Returns:
            False where the owner cannot be changed.
        """
        if not hasattr(self.owner, "__setitem__"):
            return False
        self.owner[self.key] = tensor
        return True


def places(roots: Iterable[nn.Module]) -> Iterator[Place]:
    """Every place in which a module, or one inside it, holds a tensor.

    Args:
        roots: Modules; what they share is visited once.
    Yields:
        Places; a tensor that lies in several comes several times.
    """
    seen: set[int] = set()
    for root in roots:
        yield from _inside(root, "", seen)


def _inside(holder: Any, prefix: str, seen: set[int]) -> Iterator[Place]:
    left: list[tuple[str, Any]] = [(prefix, holder)]
    while left:
        name, holder = left.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        deeper: list[tuple[str, Any]] = []
        for path, owner, key, value in _items(name, holder):
            if isinstance(value, Tensor):
                yield Place(path, value, owner, key)
            elif not isinstance(value, _CLOSED) and value is not None:
                deeper.append((path, value))
        left.extend(reversed(deeper))


def _items(name: str, holder: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    dot = f"{name}." if name else ""
    if isinstance(holder, nn.Module):
        attributes = vars(holder)
        for kind in _REGISTERED:
            for key, value in attributes.get(kind, {}).items():
                yield f"{dot}{key}", attributes[kind], key, value
        for key, value in attributes.items():
            if key not in _REGISTERED:
                yield f"{dot}{key}", attributes, key, value
    elif isinstance(holder, dict):
        for key, value in holder.items():
            yield f"{dot}{key}", holder, key, value
    elif isinstance(holder, (list, tuple, set, frozenset)):
        for key, value in enumerate(holder):
            yield f"{dot}{key}", holder, key, value
    elif isinstance(holder, functools.partial):
        yield f"{dot}args", None, None, holder.args
        yield f"{dot}keywords", None, None, holder.keywords
    elif not _is_foreign(type(holder)):
        attributes = getattr(holder, "__dict__", None) or {}
        for key, value in attributes.items():
            yield f"{dot}{key}", attributes, key, value


def _is_foreign(kind: type) -> bool:
    """Objects of Python and of torch itself: none holds a module's tensors, and some lead everywhere."""
    package = kind.__module__.partition(".")[0]
    return package in sys.stdlib_module_names or package in ("torch", "numpy")
