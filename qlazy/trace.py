"""What a load did and when, thread by thread, as a file for ui.perfetto.dev or chrome://tracing. No torch here.

The file is JSON in Chrome's trace format: a complete event (`ph` X) for each stage, each read and each placement, on the thread
that did it, counters (`ph` C) for memory and bytes over time, and names (`ph` M); times are in microseconds since the start.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qlazy import __version__
from qlazy.outfile import replacing, require_writable

if TYPE_CHECKING:
    from torch import Tensor

    from qlazy.planning.plan import Plan
    from qlazy.reading.chunks import Chunk
    from qlazy.stream import Place


class Trace:
    """A trace that is being taken. Events may come from any thread.

    Args:
        path: The file that `write` makes.
    Raises:
        UsageError: it could not be written.

    Memory: about 1.3 KiB for each chunk that is read and placed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = require_writable(path)
        self._start = time.perf_counter()
        self._threads: dict[int, str] = {}
        self._events: list[dict[str, Any]] = []

    def add(self, name: str, began: float, **what: Any) -> None:
        """Note what this thread has just done.

        Args:
            name: Of the event.
            began: When it did, as `time.perf_counter` had it.
            **what: All that the viewer shall show of it.
        """
        ts, end = self._since(began), self._since(time.perf_counter())
        number = threading.get_native_id()
        self._threads[number] = threading.current_thread().name
        self._events.append({"ph": "X", "name": name, "ts": ts, "dur": round(end - ts, 3), "tid": number, "args": what})

    def count(self, name: str, started: float, samples: Iterable[tuple[float, int]]) -> None:
        """Note a number over time.

        Args:
            name: What it counts.
            started: The zero of its seconds, as `time.perf_counter` had it.
            samples: (seconds, bytes).
        """
        for seconds, nbytes in samples:
            self._events.append({"ph": "C", "name": name, "ts": self._since(started + seconds), "args": {"bytes": nbytes}})

    def placing(self, place: Place, plan: Plan) -> Place:
        """A function that places a chunk and notes it.

        Args:
            place: Places a chunk.
            plan: Says which tensors it quantizes, and to what.
        Returns:
            The same with an event each: `quantize`, or `place` where the tensor is only copied.
        """
        formats = {tensor.name: tensor.format for tensor in plan.tensors}

        def traced(chunk: Chunk, tensors: list[Tensor]) -> None:
            began = time.perf_counter()
            place(chunk, tensors)
            targets = chunk.fill.targets
            chosen = next((made for made in map(formats.get, targets) if made is not None), None)
            rows = f"{chunk.start}:{chunk.stop}"
            what = {"tensor": ", ".join(targets), "rows": rows, "bytes": chunk.nbytes, "format": chosen and chosen.name}
            self.add("place" if chosen is None else "quantize", began, **what)

        return traced

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        names: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {"name": "qlazy"}}]
        names += [{"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": n}} for tid, n in self._threads.items()]
        with replacing(self._path) as path, path.open("w", encoding="utf-8") as file:
            file.write(f'{{"otherData": {{"qlazy": "{__version__}"}}, "displayTimeUnit": "ms", "traceEvents": [')
            for number, event in enumerate([*names, *self._events]):
                file.write((",\n" if number else "\n") + json.dumps({"pid": os.getpid(), "tid": 0} | event))
            file.write("\n]}\n")

    def _since(self, moment: float) -> float:
        return round(1e6 * (moment - self._start), 3)


@contextlib.contextmanager
def span(trace: Trace | None, name: str) -> Iterator[None]:
    """Note a block of code as one event.

    Args:
        trace: None notes nothing.
        name: Of the event.
    Yields:
        Nothing.
    """
    began = time.perf_counter()
    yield
    if trace is not None:
        trace.add(name, began)


class Clock:
    """Seconds by stage, and in all; each stage is an event of the trace.

    Args:
        trace: None notes nothing.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self._trace = trace
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """End a stage, or a part of one; the next begins.

        Args:
            stage: Its name.
        """
        if self._trace is not None:
            self._trace.add(stage, self._last)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self.seconds["total"] = now - self._start
        self._last = now
