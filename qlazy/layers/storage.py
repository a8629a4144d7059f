"""Final storage: on huge pages, and on the host with its pages found ahead while the model is built.

The first write to a page makes the kernel find and clear one, which is half of the work of a load to 8 bits from a warm page
cache. Building the model is Python and keeps one processor busy; meanwhile another thread has the kernel do it for what the
plan names.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from qlazy import native
from qlazy.memory import use_huge_pages
from qlazy.planning.data import Plan


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor that is not filled yet, on large pages of the host's memory where there are some.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        device: Where.
    Returns:
        The tensor; within `taken_ahead` one of those where there is one left.

    Memory: its bytes, taken as they are filled.
    """
    ahead = _ahead.get()
    found = ahead.take(tuple(shape), dtype) if ahead is not None and torch.device(device).type == "cpu" else None
    return _make(tuple(shape), dtype, device) if found is None else found


@contextlib.contextmanager
def taken_ahead(plan: Plan) -> Iterator[None]:
    """Have the pages found for host storage of a plan, on a thread of its own, until the first of it is asked for.

    Args:
        plan: What will be stored. Where it turns out otherwise, what was taken is given back at the end.

    Memory: no more than the plan gives the host.
    """
    with _Ahead(plan) as ahead:
        token = _ahead.set(ahead)
        try:
            yield
        finally:
            _ahead.reset(token)


class _Ahead:
    def __init__(self, plan: Plan) -> None:
        self._wanted = [
            (stored.shape, getattr(torch, stored.dtype))
            for tensor in plan.tensors
            if tensor.device == "cpu" and tensor.format is not None and len(tensor.shape) == 2
            for stored in tensor.format.storage(*tensor.shape, tensor.dtype).values()
        ]
        self.taken: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        self._stop = ctypes.c_int32(0)
        self.thread = threading.Thread(target=self._run, name="qlazy-storage", daemon=True)

    def __enter__(self) -> _Ahead:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()
        self.taken.clear()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """One of what was taken; no pages are found for any more of it from now on."""
        self._end()
        held = self.taken.get((shape, dtype))
        return held.pop(0) if held else None

    def _end(self) -> None:
        self._stop.value = 1
        self.thread.join()

    def _run(self) -> None:
        loops = native.library()
        if loops is None:
            return
        made = [_make(shape, dtype, "cpu") for shape, dtype in self._wanted]
        for tensor in made:
            self.taken[tuple(tensor.shape), tensor.dtype].append(tensor)
        addresses = (ctypes.c_void_p * len(made))(*(tensor.data_ptr() for tensor in made))
        sizes = (ctypes.c_int64 * len(made))(*(tensor.nbytes for tensor in made))
        # All in one call: between two of them this would wait for Python's lock, which building a model hardly ever frees.
        loops.qlazy_populate(ctypes.addressof(addresses), ctypes.addressof(sizes), len(made), ctypes.addressof(self._stop))


_ahead: ContextVar[_Ahead | None] = ContextVar("ahead", default=None)


def _make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device=device)
    if made.device.type == "cpu":
        use_huge_pages(made.data_ptr(), made.nbytes)
    return made
