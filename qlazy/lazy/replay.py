"""Run what was written down: only the operations that a storage depends on, in their order."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import _disable_current_modes

from qlazy.lazy.draw import draw_of
from qlazy.lazy.draw_model import generate_in_threads
from qlazy.lazy.log import Geometry, Op, Ref, Slot, Version, geometry_of, map_leaves, tensor_on
from qlazy.lazy.schema import FILLS, with_generator

Memory = dict[Slot, UntypedStorage]
_default_generator = threading.RLock()
_default_dtype = threading.RLock()
"""Torch has one default dtype for all threads: what one replays under its own, another must not run under."""
_TRIM_BYTES = 16 << 20
"""After so many bytes were given back, the C library is told to give them back as well: it keeps holes."""
_freed = Slot(0)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within this context torch does what it is told: no modes, no gradients, no inference tensors.

    Yields:
        Nothing.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


def replay(versions: Iterable[Version]) -> Memory:
    """Bring storages to the contents that they had at the given versions, each at most once.

    Args:
        versions: The latest that is wanted of each storage.
    Returns:
        Memory by slot; it belongs to the caller.

    Memory: the results, plus the largest set of other storages that are needed at the same time.
    """
    wanted = list(versions)
    ops = slice_of(wanted)
    last_use: dict[Slot, int] = {}
    for place, op in enumerate(ops):
        for ref in op.refs():
            last_use[ref.slot] = place
        for _, slot, _ in op.outputs:
            last_use[slot] = place
    for version in wanted:
        last_use[version.slot] = len(ops)
    leaving: dict[int, list[Slot]] = {}
    for slot, place in last_use.items():
        leaving.setdefault(place, []).append(slot)
    memory: Memory = {}
    with plain():
        for place, op in enumerate(ops):
            execute(op, memory)
            for slot in leaving.get(place, ()):
                memory.pop(slot, None)
                _freed.nbytes += slot.nbytes
    if _freed.nbytes >= _TRIM_BYTES:
        _freed.nbytes = 0
        _trim_heap()
    return memory


def execute(op: Op, memory: Memory, generator: torch.Generator | None = None) -> Any:
    """Run one operation, within `plain()`.

    Args:
        op: The operation.
        memory: What it reads is here, and what it makes is put here.
        generator: What a random one draws from; None makes one that stands where it stood.
    Returns:
        Its results, real.
    """
    if op.payload is not None:
        ((_, slot, _),) = op.outputs
        memory[slot] = op.payload.clone()
        return None
    args, kwargs = map_leaves(lambda leaf: _real(leaf, memory), (op.args, op.kwargs))
    with _default_dtype:
        default_dtype = torch.get_default_dtype()
        if op.default_dtype is not default_dtype:
            torch.set_default_dtype(op.default_dtype)
        try:
            result = _draw(op, args, kwargs, generator) if op.position is not None else op.func(*args, **kwargs)
        finally:
            if op.default_dtype is not default_dtype:
                torch.set_default_dtype(default_dtype)
    results = result if isinstance(result, (list, tuple)) else (result,)
    taken = {storage._cdata for storage in memory.values()} if op.outputs else set()
    for index, slot, geometry in op.outputs:
        memory[slot] = _as_recorded(results[index], slot, geometry, taken)
    return result


def _trim_heap() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def slice_of(wanted: list[Version]) -> list[Op]:
    """The operations that storages depend on.

    Args:
        wanted: What is wanted of each storage.
    Returns:
        The operations, in the order in which they were recorded.
    """
    seen: set[int] = set()
    ops: dict[int, Op] = {}
    left = list(wanted)
    while left:
        version = left.pop()
        if id(version) in seen:
            continue
        seen.add(id(version))
        if version.before is not None:
            left.append(version.before)
        if version.op.order not in ops:
            ops[version.op.order] = version.op
            left.extend(ref.version for ref in version.op.refs() if ref.version is not None)
    return [ops[order] for order in sorted(ops)]


def _real(leaf: Any, memory: Memory) -> Any:
    if not isinstance(leaf, Ref):
        return leaf
    if leaf.slot not in memory:
        assert leaf.version is None, "an operation was replayed before what it reads"
        memory[leaf.slot] = UntypedStorage(leaf.slot.nbytes)
    return tensor_on(memory[leaf.slot], leaf.geometry)


def _as_recorded(result: Tensor, slot: Slot, geometry: Geometry, taken: set[int]) -> UntypedStorage:
    """The storage of a result, laid out as the meta device said that it would be."""
    storage = result.untyped_storage()
    if geometry_of(result) == geometry and storage._cdata not in taken and storage.nbytes() >= slot.nbytes:
        return storage
    storage = UntypedStorage(slot.nbytes)
    # For statistics that only a gradient needs, batch norm's real kernel gives nothing, where that of meta gives their shape.
    if result.numel():
        tensor_on(storage, geometry).copy_(result)
    return storage


def _draw(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator | None) -> Any:
    if generator is None and op.func in FILLS:
        draw = draw_of(op.func, args, kwargs, args[0])
        if draw is not None and generate_in_threads(args[0], op.position, draw):
            return args[0]
    generator = generator or op.position.generator()
    func = with_generator(op.func)
    if func is None:
        result = _draw_from_default(op.func, args, kwargs, generator)
    else:
        result = func(*args, **kwargs | {"generator": generator})
    if op.following is not None and op.following.stream is op.position.stream:
        # Most often the next operation that is replayed goes on from here.
        op.following.stream.remember(op.following.words, generator.get_state())
    return result


def _draw_from_default(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> Any:
    """For operations that only know the default generator, e.g. `native_dropout`."""
    default = torch.default_generator
    with _default_generator:
        kept = default.get_state()
        default.set_state(generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            generator.set_state(default.get_state())
            default.set_state(kept)
