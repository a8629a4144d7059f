"""One constructor, one seed, built eagerly and lazily: is everything that can be read from the module the same?"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qlazy.lazy import lazy_build, materialize

_DEPTH = 5
_M_PERTURB = -6
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "config", "_hf_hook"}
_PLAIN = (int, float, complex, bool, str, bytes, torch.dtype, torch.Size, type(None))


@dataclass(kw_only=True)
class Comparison:
    """How the lazily built and materialised module differs from the eagerly built one."""

    status: Literal["equal", "unequal", "unbuildable"]
    """"unbuildable": eager construction itself fails."""
    reason: str = ""
    """The error of eager construction, or of lazy construction or materialisation."""
    differences: list[str] = field(default_factory=list)
    """Each as "where: what"."""
    undetermined: list[str] = field(default_factory=list)
    """Tensors with elements that eager construction leaves uninitialised, or draws without the seed; those are not compared."""
    tensors: int = 0
    """Parameters, buffers and plain tensor attributes compared."""
    elements: int = 0
    """In them."""
    real: list[str] = field(default_factory=list)
    """Parameters and buffers that had storage before they were materialised."""


def compare(build: Callable[[], nn.Module], seed: int = 0) -> Comparison:
    """Build eagerly and lazily under one seed, materialise, and compare.

    Args:
        build: Constructs the module; called twice, a third time where something differs.
        seed: For torch, numpy and random.

    Returns:
        What differs in parameters, buffers, plain tensors and numbers on modules, ties, and generator states afterwards.
        Autograd graphs are not: a plain tensor attribute that has one when eager is a leaf when materialised.
    """
    try:
        with _fresh_memory_holds(0x11):
            eager, eager_states = _eager(build, seed)
    except Exception as error:
        return Comparison(status="unbuildable", reason=_said(error))
    try:
        with _fresh_memory_holds(0x22):
            _seed(seed)
            with lazy_build():
                lazy = build()
            lazy_states = _states()
            real = [name for name, tensor in _named_tensors(lazy) if not tensor.is_meta]
            materialize(lazy)
    except Exception as error:
        return Comparison(status="unequal", reason=_said(error), differences=["lazy: fails where eager does not"])

    one, two = dict(_contents(eager)), dict(_contents(lazy))
    tensors = [value for value in one.values() if isinstance(value, Tensor)]
    result = Comparison(status="equal", tensors=len(tensors), elements=sum(value.numel() for value in tensors), real=real)
    wrong = _differing(one, two)
    if wrong:
        # What a second eager build has otherwise is no fault of the lazy one.
        with _fresh_memory_holds(0x44):
            again = dict(_contents(_eager(build, seed)[0]))
        result.undetermined = [path for path in _differing(one, again) if path in again]
        wrong = _differing(one, two, again)
    result.differences += [f"{path}: {what}" for path, what in wrong.items()]
    result.differences += [f"{what}: not the same objects" for what, left, right in _ties(one, two) if left != right]
    result.differences += [
        f"generator of {name}: another state" for name in lazy_states if lazy_states[name] != eager_states[name]
    ]
    if result.differences:
        result.status = "unequal"
    return result


def _eager(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, bytes]]:
    _seed(seed)
    module = build()
    return module, _states()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _states() -> dict[str, bytes]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": repr(random.getstate()).encode(),
        "numpy": np.random.get_state()[1].tobytes(),  # type: ignore[union-attr, index]
    }


@contextlib.contextmanager
def _fresh_memory_holds(byte: int) -> Iterator[None]:
    """Have the C library fill what it hands out, so that what nobody writes differs from one build to the next."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_PERTURB, byte ^ 0xFF)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _contents(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything comparable by path: tensors, and the plain values that constructors leave on modules."""
    for name, inner in module.named_modules(remove_duplicate=False):
        yield f"{name}:type", type(inner).__qualname__
        yield f"{name}:not saved", sorted(inner._non_persistent_buffers_set)
        for key, value in [*inner._parameters.items(), *inner._buffers.items()]:
            if value is not None:
                yield f"{name}.{key}", value
        for key, value in vars(inner).items():
            if key not in _OWN and not key.endswith("_hooks") and not key.endswith("_hooks_with_kwargs"):
                yield from _values(f"{name}.{key}", value, 0)


def _values(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray)):
        yield path, value
    elif depth == _DEPTH or isinstance(value, (nn.Module, type)):
        return
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _values(f"{path}[{index}]", item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _values(f"{path}[{key!r}]", item, depth + 1)
    elif type(value).__module__.split(".")[0] not in ("torch", "builtins") and hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            if isinstance(item, Tensor):
                yield f"{path}.{key}", item


def _differing(one: dict[str, Any], two: dict[str, Any], again: dict[str, Any] | None = None) -> dict[str, str]:
    """Paths whose values differ, and how; elements in which `again` also differs from `one` are left out."""
    wrong = dict.fromkeys(one.keys() - two.keys(), "only there when eager")
    wrong |= dict.fromkeys(two.keys() - one.keys(), "only there when lazy")
    for path in one.keys() & two.keys():
        third = one[path] if again is None else again.get(path, one[path])
        if what := _unlike(one[path], two[path], third):
            wrong[path] = what
    return wrong


def _unlike(left: Any, right: Any, third: Any) -> str:
    """How two values differ; empty if they do not, or only where the third differs from the left one too."""
    if type(left) is not type(right):
        return f"{type(right).__name__}, not {type(left).__name__}"
    if not isinstance(left, Tensor):
        same = _bytes(left) == _bytes(right) or _bytes(left) != _bytes(third)
        return "" if same else f"{str(right)[:60]}, not {str(left)[:60]}"
    for what in ("shape", "dtype", "device", "requires_grad", "layout"):
        if getattr(left, what) != getattr(right, what):
            return f"{what} {getattr(right, what)}, not {getattr(left, what)}"
    if left.layout != torch.strided or left.is_meta:
        return ""
    if left.stride() != right.stride():
        return f"strides {right.stride()}, not {left.stride()}"
    here, there = _as_bytes(left), _as_bytes(right)
    if torch.equal(here, there):
        return ""
    unlike = (here != there).any(-1)
    if isinstance(third, Tensor) and third.shape == left.shape and third.dtype == left.dtype:
        unlike &= ~(here != _as_bytes(third)).any(-1)
    count = int(unlike.sum())
    if not count:
        return ""
    where = int(unlike.nonzero()[0])
    values = [tensor.detach().flatten()[where].item() for tensor in (right, left)]
    return f"{count} of {unlike.numel()} elements; the first, {where}, is {values[0]}, not {values[1]}"


def _as_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).view(flat.numel(), flat.element_size())


def _bytes(value: Any) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


def _ties(one: dict[str, Any], two: dict[str, Any]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Which paths hold the same object, and which the same storage, on either side."""
    paths = [path for path, value in one.items() if isinstance(value, Tensor) and isinstance(two.get(path), Tensor)]
    yield "tensors", _partition(one, paths, id), _partition(two, paths, id)
    yield "storages", _partition(one, paths, _storage), _partition(two, paths, _storage)


def _storage(tensor: Tensor) -> tuple[int, int]:
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return id(tensor), 0
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()


def _partition(contents: dict[str, Any], paths: list[str], key: Callable[[Any], Any]) -> list[str]:
    """For each path the first that is the same as it."""
    first: dict[Any, str] = {}
    return [first.setdefault(key(contents[path]), path) for path in paths]
