"""How far a load has come: one total bar on a terminal, a line every 10 % or 30 s elsewhere, always on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qlazy.report import Progress
from qlazy.sizes import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_VERBS = {
    "download": "Downloading",
    "measure": "Measuring",
    "read": "Reading",
    "write": "Writing text",
    "calibrate": "Calibrating",
}

STEP = 10
"""Per cent between two lines."""

PATIENCE_S = 30.0
"""Seconds after which a line comes all the same."""


class Display:
    """Shows every `Progress` that it is called with, while its `with` block runs.

    Args:
        silent: Show nothing.
        clock: Seconds, for the rate.
    """

    def __init__(self, *, silent: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent = silent or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self._clock = clock
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._begun = (0.0, 0)
        self._said = (0.0, 0)

    def __enter__(self) -> Display:
        """Start the bar where there is a terminal."""
        if not self._silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            columns = (TextColumn("{task.percentage:>3.0f} %"), BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show how far a stage has come.

        Args:
            progress: Bytes of the stage.
        """
        if self._silent:
            return
        now = self._clock()
        if progress.stage != self._stage:
            self._stage, self._begun, self._said = progress.stage, (now, progress.done_bytes), (now, 0)
            if self._bar is not None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task("", total=progress.total_bytes)
        text = line(progress, now - self._begun[0], progress.done_bytes - self._begun[1])
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress.done_bytes, total=progress.total_bytes, description=text)
            return
        percent = 100 * progress.done_bytes // max(1, progress.total_bytes)
        if percent // STEP > self._said[1] // STEP or now - self._said[0] >= PATIENCE_S:
            self._said = (now, percent)
            print(f"{percent:3d} %  {text}", file=sys.stderr, flush=True)


def line(progress: Progress, seconds: float, done_bytes: int) -> str:
    """A stage in words: bytes, rate, seconds to go, host memory.

    Args:
        progress: Bytes of the stage.
        seconds: Since it began.
        done_bytes: Bytes done in these seconds.
    Returns:
        E.g. `Reading 21.4 GiB of 131.4 GiB  3.1 GiB/s  ETA 36 s  RAM 1.9 GiB`.
    """
    verb = _VERBS.get(progress.stage, progress.stage)
    parts = [f"{verb} {format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}"]
    if seconds > 0 and done_bytes > 0:
        rate = done_bytes / seconds
        parts += [f"{format_bytes(int(rate))}/s", f"ETA {duration((progress.total_bytes - progress.done_bytes) / rate)}"]
    return "  ".join([*parts, f"RAM {format_bytes(progress.host_bytes)}"])


def duration(seconds: float) -> str:
    """Seconds as people read them.

    Args:
        seconds: Any number that is not negative.
    Returns:
        E.g. `36 s`, `4 min 10 s`, `2 h 5 min`.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
