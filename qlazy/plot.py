"""Pictures of a load and of a benchmark. matplotlib is imported when one is drawn; it is an extra. No torch here."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qlazy.errors import UsageError
from qlazy.outfile import replacing, require_writable
from qlazy.report import LoadReport, comparisons
from qlazy.sizes import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qlazy.bench import Benchmark

KINDS = (".png", ".svg", ".pdf")
"""Endings of files that can be drawn."""

NARROW = 0.08
"""Share of the time below which a stage has no room for its name."""

BLUE, ORANGE, GREY = "#3465a4", "#ce5c00", "#555753"


def require_plot(path: str | os.PathLike[str]) -> Path:
    """Refuse a plot that could not be drawn after all the work is done.

    Args:
        path: The file to draw.
    Returns:
        The same.
    Raises:
        UsageError: matplotlib is not installed, the file has another ending than `KINDS`, or cannot be written.
    """
    file = Path(path)
    if file.suffix.lower() not in KINDS:
        raise UsageError(f"{file} is no kind of picture that can be drawn.", hint=f"End its name in {', '.join(KINDS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("A plot needs matplotlib, which is not installed.", hint="pip install matplotlib")
    return require_writable(file)


def draw_load(report: LoadReport) -> Figure:
    """Memory and bytes read over time, with the planned peak and the stages.

    Args:
        report: The report of a finished load.
    Returns:
        The figure.
    """
    figure = _figure(f"Loading {report.plan.model_id} to {report.plan.recipe.name}")
    memory, read = figure.subplots(2, 1, sharex=True)

    above = [(seconds, nbytes - report.samples[0][1]) for seconds, nbytes in report.samples]
    planned = sum(c.planned_bytes for c in comparisons(report) if (c.what, c.device) == ("peak while loading", "cpu"))
    top = max(1, planned, report.host_peak_bytes)
    unit, scale = _unit(top)
    memory.plot(*_scaled(above, scale), color=BLUE, label=f"measured, peak {format_bytes(report.host_peak_bytes)}")
    if planned:
        memory.axhline(planned / scale, color=GREY, linestyle="--", label=f"planned peak {format_bytes(planned)}")
    memory.set_ylabel(f"host memory, {unit}")
    memory.set_title("anonymous host memory above the start of the load", fontsize="small", color=GREY)
    memory.set_ylim(0, 1.3 * top / scale)

    unit, scale = _unit(report.bytes_read)
    read.plot(*_scaled(report.read_samples, scale), color=ORANGE, label=f"{format_bytes(report.bytes_read)} in all")
    read.set_ylabel(f"bytes read, {unit}")
    read.set_xlabel("seconds")
    read.set_ylim(0, 1.3 * max(1, report.bytes_read) / scale)

    laps = [(stage, seconds) for stage, seconds in report.seconds.items() if stage != "total"]
    ends = list(itertools.accumulate(seconds for _, seconds in laps))
    for axes in (memory, read):
        for end in ends[:-1]:
            axes.axvline(end, color=GREY, linewidth=0.5)
        axes.set_xlim(0, ends[-1])
        axes.legend(loc="upper left", frameon=False, ncols=2)
    for (stage, seconds), end in zip(laps, ends, strict=True):
        if seconds > NARROW * ends[-1]:
            read.annotate(stage, (end - seconds / 2, 0.03), xycoords=("data", "axes fraction"), ha="center", color=GREY)
    return figure


def draw_benchmark(benchmark: Benchmark) -> Figure:
    """Tokens per second by test, with their deviation: prompts on the left, generation on the right.

    Args:
        benchmark: What was measured.
    Returns:
        The figure.
    """
    figure = _figure(f"{benchmark.model}, {benchmark.format}, {benchmark.device}, {benchmark.threads} threads")
    groups = [("prompt processing", "prompt", BLUE), ("generation", "generation", ORANGE)]
    drawn = [(title, [t for t in benchmark.timings if t.kind == kind], colour) for title, kind, colour in groups]
    drawn = [group for group in drawn if group[1]]
    for axes, (title, timings, colour) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        bars = axes.bar(
            [timing.test for timing in timings],
            [timing.tokens_per_s for timing in timings],
            yerr=[timing.deviation for timing in timings],
            color=colour,
            capsize=6,
            width=0.6,
        )
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.margins(x=0.3 / len(timings), y=0.12)
        axes.set_title(title, fontsize="small", color=GREY)
        axes.set_ylabel("tokens per second")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: Any.
        path: The file, with one of `KINDS` as its ending.
    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as made:
        figure.savefig(made, format=path.suffix[1:].lower(), dpi=150)


def _figure(title: str) -> Figure:
    """An empty figure that belongs to no window, and changes no setting of matplotlib's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    figure.suptitle(title)
    return figure


def _scaled(samples: list[tuple[float, int]], scale: int) -> tuple[list[float], list[float]]:
    """Seconds, and bytes in a unit."""
    return [seconds for seconds, _ in samples], [nbytes / scale for _, nbytes in samples]


def _unit(nbytes: int) -> tuple[str, int]:
    return ("GiB", 1 << 30) if nbytes >= 1 << 30 else ("MiB", 1 << 20)
