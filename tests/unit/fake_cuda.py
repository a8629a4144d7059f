"""Stands in for `torch.cuda`: streams that run their work as late, and in as odd an order, as events allow.

Copies issued within `stream(s)` are put off, and everything given to `defer`. When the host waits for something, pending work
runs in an order drawn at random: each stream's own order, and waits for events, are all that is kept. So what reads or writes
memory without an event in between comes out wrong sooner or later.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

VIEWS = {"view", "slice", "select", "alias", "detach", "t", "transpose", "unsqueeze", "is_pinned"}


class FakeCuda:
    """One device."""

    def __init__(self, seed: int = 0, ignored: str = "") -> None:
        self.ignored = ignored
        """Name of a call that does nothing here: `wait_event`, `record` or `synchronize`."""
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.streams: list[FakeStream] = []
        self.here = threading.local()
        self.ran = 0
        self.emptied = 0
        self.default = self.Stream()

    def Stream(self, device: Any = None) -> FakeStream:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def Event(self, blocking: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, device: Any = None) -> FakeStream:
        return getattr(self.here, "stream", self.default)

    def empty_cache(self) -> None:
        self.emptied += 1

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream
        try:
            with _Deferring(self):
                yield
        finally:
            self.here.stream = before

    def defer(self, work: Callable[[], object]) -> None:
        self.current_stream().push(work)

    def step(self) -> bool:
        """Run one piece of work that may run now; False where there is none."""
        ready = [stream for stream in self.streams if stream.ready]
        if not ready:
            return False
        with _disable_current_modes():
            self.random.choice(ready).pending.popleft()[0]()
        self.ran += 1
        return True

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            while not done():
                assert self.step(), "the streams wait for each other"


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.pending: deque[tuple[Callable[[], object], Callable[[], bool]]] = deque()

    @property
    def ready(self) -> bool:
        return bool(self.pending) and self.pending[0][1]()

    def push(self, work: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        with self.cuda.lock:
            self.pending.append((work, ready))
            while self.cuda.random.random() < 0.3 and self.cuda.step():
                pass

    def wait_event(self, event: FakeEvent) -> None:
        if self.cuda.ignored != "wait_event":
            with self.cuda.lock:
                awaited = event.recorded
                self.push(int, lambda: event.happened >= awaited)

    def wait_stream(self, other: FakeStream) -> None:
        event = self.cuda.Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.cuda.run_until(lambda: not self.pending)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.recorded = self.happened = 0

    def record(self, stream: FakeStream) -> None:
        if self.cuda.ignored == "record":
            return
        with self.cuda.lock:
            self.recorded += 1
            number = self.recorded

            def happen() -> None:
                self.happened = max(self.happened, number)

            stream.push(happen)

    def synchronize(self) -> None:
        if self.cuda.ignored != "synchronize":
            awaited = self.recorded
            self.cuda.run_until(lambda: self.happened >= awaited)


class _Deferring(TorchDispatchMode):
    """Puts copies off; anything else that computes is an error, as it would run too early to mean anything."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "copy_":
            target, source = args[:2]
            self.cuda.defer(lambda: target.copy_(source))
            return target
        assert name in VIEWS, f"{name} would run before what it waits for"
        return func(*args, **(kwargs or {}))
