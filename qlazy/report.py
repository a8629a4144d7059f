"""What a load tells: its progress while it runs, and its report afterwards. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlazy.memory import anonymous_bytes
from qlazy.planning.plan import Plan, TensorPlan, to_json
from qlazy.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a load has come, a few times a second."""

    stage: str
    """`download`, `measure` (for a target), `read`, or `calibrate`, which reads too."""
    done_bytes: int
    """Bytes of this stage that are done."""
    total_bytes: int
    """Bytes of this stage in all."""
    host_bytes: int = field(default_factory=anonymous_bytes)
    """Anonymous host memory of the process now."""


def downloading(on_progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """What `open_source` calls with bytes downloaded and bytes to download.

    Args:
        on_progress: What the user gave.
    Returns:
        A function that tells it.
    """
    if on_progress is None:
        return None
    return lambda done, total: on_progress(Progress(stage="download", done_bytes=done, total_bytes=total))


@dataclass(kw_only=True)
class LoadReport:
    """What a load did, in bytes and seconds, against its plan."""

    plan: Plan
    """The plan it followed, made from the model itself."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: plan, measure (for a target), build, stream, finish, total."""
    bytes_read: int = 0
    """Bytes read from the checkpoint."""
    device_bytes: dict[str, int] = field(default_factory=dict)
    """Measured bytes of weights and buffers by device."""
    host_peak_bytes: int = 0
    """Peak of anonymous host memory above the start of the load."""
    device_peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak of memory allocated on each GPU."""
    unexpected: list[str] = field(default_factory=list)
    """Checkpoint keys that the model has no place for and transformers ignores too."""
    initialized: list[str] = field(default_factory=list)
    """Parameters that no checkpoint holds and transformers initializes."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Anonymous host memory over time: seconds since the start, bytes."""
    read_samples: list[tuple[float, int]] = field(default_factory=list)
    """Bytes read and placed over time, at the same seconds."""
    tensors_loaded: int = 0
    """Tensors of the model that were filled."""

    def __str__(self) -> str:
        """The report as a person reads it: what is quantized and what not and why, planned against measured bytes, seconds."""
        return f"{plan_summary(self.plan)}\n{measured_table(self)}\n{timings(self)}"


def plan_table(plan: Plan, names: Mapping[str, str] | None = None) -> str:
    """A plan as a table with one column a device.

    Args:
        plan: Any plan, whether or not it fits.
        names: What to write beside a device, e.g. the product name of a GPU.
    Returns:
        Lines of text without a final newline.
    """
    heads = [f"{d.device} ({names[d.device]})" if names and d.device in names else d.device for d in plan.devices]
    rows: list[list[str]] = [["", *heads]]

    def add(label: str, values: Iterable[int], *, always: bool = False) -> None:
        cells = list(values)
        if always or any(cells):
            rows.append([label, *(format_bytes(v) if v or always else "-" for v in cells)])

    add("free now", (d.free_bytes for d in plan.devices), always=True)
    for (name, reason), held in quantized(plan).items():
        label = f"{name} {reason or 'weights'} with scales"
        add(label, (sum(t.nbytes for t in held if t.device == d.device) for d in plan.devices))
    for (reason, dtype), kept in unquantized(plan).items():
        add(f"{dtype} {reason.partition(',')[0]}", (sum(t.nbytes for t in kept if t.device == d.device) for d in plan.devices))
    add(f"KV cache, {plan.budget.max_model_len} tokens", (d.kv_cache_bytes for d in plan.devices))
    add("activations", (d.activation_bytes for d in plan.devices))
    add("staging while loading", (d.staging_bytes for d in plan.devices))
    add("runtime", (d.runtime_bytes for d in plan.devices))
    add("kept free (--reserve)", (d.reserve_bytes for d in plan.devices))
    add("left", (d.left_bytes for d in plan.devices), always=True)
    return align(rows)


def plan_summary(plan: Plan) -> str:
    """What a plan quantizes and what not and why, its bits per weight, and whether it fits.

    Args:
        plan: Any plan.
    Returns:
        Lines of text without a final newline.
    """
    chosen = [t for t in plan.tensors if t.format is not None]
    lines = [f"Quantized: {_tensors(len(chosen))}, {plan.bits_per_weight():.2f} bits per weight with scales."]
    for (name, reason), held in quantized(plan).items():
        if reason:
            lines.append(f"Of these in {name}: {_tensors(len(held))}, {format_bytes(sum(t.nbytes for t in held))} ({reason}).")
    for (reason, dtype), kept in unquantized(plan).items():
        lines.append(f"Kept in {dtype}: {_tensors(len(kept))}, {format_bytes(sum(t.nbytes for t in kept))} ({reason}).")
    target, usual = plan.recipe.target, "by what layers like these usually lose"
    if not plan.meets_target:
        lines.append(f"More than a target of {target}, by names in the headers alone; the load asks the model itself.")
    elif target is not None and not plan.exact:
        lines.append(f"For a target of {target}, {usual}; a load measures it.")
    elif target is not None and (guessed := sum(name not in target.errors for name, _ in plan.recipe.chosen)):
        lines.append(f"For a target of {target}; {_tensors(guessed)} could not be measured and went {usual}.")
    verdict = "Fits." if plan.fits else "Does not fit."
    lines.append(
        f"{verdict} Reads {format_bytes(plan.source_bytes)} once and keeps {format_bytes(plan.weight_bytes)} of weights."
    )
    return "\n".join(lines)


def quantized(plan: Plan) -> dict[tuple[str, str], list[TensorPlan]]:
    """The tensors that are quantized, by format and the reason for it, in the plan's order of formats, the recipe's own first.

    Args:
        plan: Any plan.
    Returns:
        (name of the format, reason or an empty string) to tensors.
    """
    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if tensor.format is not None:
            groups.setdefault((tensor.format.name, tensor.reason), []).append(tensor)
    return dict(sorted(groups.items(), key=lambda item: item[0][1] != ""))


def unquantized(plan: Plan) -> dict[tuple[str, str], list[TensorPlan]]:
    """The tensors that stay as they are, by reason and dtype, largest first.

    Args:
        plan: Any plan.
    Returns:
        (reason, dtype) to tensors.
    """
    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if tensor.format is None:
            groups.setdefault((tensor.reason, tensor.dtype), []).append(tensor)
    return dict(sorted(groups.items(), key=lambda item: -sum(t.nbytes for t in item[1])))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One planned number and what was measured."""

    what: str
    """`weights`, or `peak while loading`."""
    device: str
    """`cpu` or `cuda:N`."""
    planned_bytes: int
    """Bytes in the plan."""
    measured_bytes: int
    """Bytes that were there."""


def comparisons(report: LoadReport) -> list[Comparison]:
    """Planned against measured bytes of every device that holds something.

    Args:
        report: The report of a finished load.
    Returns:
        Weights of each device, then the peak of each while loading.
    """
    found = []
    peaks = {"cpu": report.host_peak_bytes, **report.device_peak_bytes}
    for d in report.plan.devices:
        if d.weight_bytes:
            weights = report.device_bytes.get(d.device, 0)
            found.append(Comparison(what="weights", device=d.device, planned_bytes=d.weight_bytes, measured_bytes=weights))
    for d in report.plan.devices:
        if d.device in peaks:
            planned = d.weight_bytes + d.staging_bytes + d.runtime_bytes
            found.append(
                Comparison(what="peak while loading", device=d.device, planned_bytes=planned, measured_bytes=peaks[d.device])
            )
    return found


def measured_table(report: LoadReport) -> str:
    """Planned against measured bytes.

    Args:
        report: The report of a finished load.
    Returns:
        Lines of text without a final newline.
    """
    rows = [["", "planned", "measured", "difference"]]
    for c in comparisons(report):
        difference = f"{100 * (c.measured_bytes - c.planned_bytes) / max(1, c.planned_bytes):+.1f} %"
        rows.append([f"{c.what}, {c.device}", format_bytes(c.planned_bytes), format_bytes(c.measured_bytes), difference])
    return align(rows)


def timings(report: LoadReport) -> str:
    """Seconds by stage and the rate of reading, in one line.

    Args:
        report: The report of a finished load.
    Returns:
        E.g. `resolve 0.1 s, plan 0.0 s, ..., total 5.1 s; read 2.0 GiB at 0.9 GiB/s`.
    """
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.seconds.items())
    streaming = report.seconds.get("stream", 0.0)
    rate = f" at {format_bytes(int(report.bytes_read / streaming))}/s" if streaming > 0 else ""
    return f"{stages}; read {format_bytes(report.bytes_read)}{rate}"


def report_to_json(report: LoadReport) -> dict[str, Any]:
    """A report as plain data: bytes are ints, `schema` is the version of this layout.

    Args:
        report: The report of a finished load.
    Returns:
        A JSON-ready dict.
    """
    return {
        "schema": 1,
        "plan": to_json(report.plan),
        "seconds": report.seconds,
        "bytes_read": report.bytes_read,
        "tensors_loaded": report.tensors_loaded,
        "comparisons": [dataclasses.asdict(c) for c in comparisons(report)],
        "device_bytes": report.device_bytes,
        "host_peak_bytes": report.host_peak_bytes,
        "device_peak_bytes": report.device_peak_bytes,
        "unexpected": report.unexpected,
        "initialized": report.initialized,
        "samples": [list(sample) for sample in report.samples],
        "read_samples": [list(sample) for sample in report.read_samples],
    }


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column to the left, the others to the right.

    Args:
        rows: Rows of equally many cells.
    Returns:
        Lines of text without a final newline.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(["", *cells]).rstrip())
    return "\n".join(lines)


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"
