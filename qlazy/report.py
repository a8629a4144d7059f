"""What a load tells: its progress while it runs, and its report afterwards. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlazy.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a load has come, a few times a second."""

    stage: str
    """`download` or `read`."""
    done_bytes: int
    """Bytes of this stage that are done."""
    total_bytes: int
    """Bytes of this stage in all."""
    host_bytes: int
    """Anonymous host memory of the process now."""


@dataclass(kw_only=True)
class LoadReport:
    """What a load did, in bytes and seconds, against its plan."""

    plan: Plan
    """The plan it followed, made from the model itself."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: resolve, plan, build, stream, finish, total."""
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
    tensors_loaded: int = 0
    """Tensors of the model that were filled."""
