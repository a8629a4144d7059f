"""What is lazy and what is not, and why: as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor, nn

from qlazy.lazy.log import is_meant_for_meta, record_of
from qlazy.lazy.replay import plain, slice_of
from qlazy.lazy.scan import places
from qlazy.lazy.schema import UNWRITTEN
from qlazy.lazy.tally import Tally

State = Literal["lazy", "real", "meta", "edited"]
_MEANING: dict[State, str] = {
    "lazy": "without memory; materialize gives eager construction's values",
    "real": "has memory: made from memory of others (numpy, a file, a real tensor), or materialized",
    "meta": "on meta in eager construction as well",
    "edited": "made on meta where no recorder saw it: its values are not known",
}


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor of a module."""

    name: str
    """As `materialize(only=...)` sees it."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Its dtype."""
    state: State
    """Whether it has memory."""
    nbytes: int
    """Bytes of its elements."""
    ops: int
    """Operations that are run for its values."""
    random: bool
    """Whether one of them draws from a generator."""
    unwritten: bool
    """Whether they start from memory of which something may never be written, such as `torch.empty` gives."""


@dataclass(frozen=True, kw_only=True)
class Concretised:
    """Values that a constructor asked for."""

    reason: str
    """What asked: an aten operation, or a method of `Tensor`."""
    times: int
    """How often."""
    nbytes: int
    """Bytes of storage that were worked out for it in all, and given back."""


@dataclass(frozen=True, kw_only=True)
class LazyReport:
    """What a build wrote down, and what it left."""

    tensors: tuple[TensorReport, ...]
    """Of the module that was asked about; one that lies in several places comes once."""
    concretised: tuple[Concretised, ...]
    """What was worked out while building."""
    real: tuple[Concretised, ...]
    """What was made real at once, as torch has no meta kernel for it."""
    ops: int
    """Operations written down in all."""
    recorded_bytes: int
    """Bytes that these operations would have asked for, temporaries included."""
    constant_bytes: int
    """Bytes that are held: values that came from Python, and copies of real tensors."""

    def to_json(self) -> str:
        """The report as JSON.

        Returns:
            One object.
        """
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [
            f"{self.ops} operations recorded, which would have asked for {self.recorded_bytes} bytes; "
            f"{self.constant_bytes} bytes held"
        ]
        for state, meaning in _MEANING.items():
            found = [tensor for tensor in self.tensors if tensor.state == state]
            if found:
                lines.append(f"{len(found)} tensors, {sum(tensor.nbytes for tensor in found)} bytes: {state} ({meaning})")
                if state != "lazy":
                    lines.extend(f"  {tensor.name} {list(tensor.shape)} {tensor.dtype}" for tensor in found)
        for title, entries in (("values asked for", self.concretised), ("made real at once", self.real)):
            if entries:
                lines.append(f"{title}:")
                lines.extend(f"  {entry.reason}: {entry.times} times, {entry.nbytes} bytes" for entry in entries)
        return "\n".join(lines)


def make_report(tally: Tally, module: nn.Module | None) -> LazyReport:
    """Say what a build wrote down and left.

    Args:
        tally: The build's.
        module: What to list tensors of; None for none.
    Returns:
        The report.

    Memory: a line for each tensor.
    """
    found: dict[int, TensorReport] = {}
    with plain():
        for place in () if module is None else places([module]):
            found.setdefault(id(place.tensor), _tensor_report(place.name, place.tensor))
    return LazyReport(
        tensors=tuple(found.values()),
        concretised=tuple(
            Concretised(reason=reason, times=times, nbytes=tally.concretised_bytes[reason])
            for reason, times in tally.concretised.most_common()
        ),
        real=tuple(Concretised(reason=reason, times=times, nbytes=0) for reason, times in tally.real.most_common()),
        ops=tally.ops,
        recorded_bytes=tally.lazy_bytes,
        constant_bytes=tally.constant_bytes,
    )


def _tensor_report(name: str, tensor: Tensor) -> TensorReport:
    record = record_of(tensor)
    ops = [] if record is None else slice_of([record.version])
    state: State = "lazy"
    if record is None:
        state = "real" if not tensor.is_meta else "meta" if is_meant_for_meta(tensor) else "edited"
    return TensorReport(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        state=state,
        nbytes=tensor.numel() * tensor.element_size(),
        ops=len(ops),
        random=any(op.position is not None for op in ops),
        unwritten=any(op.func in UNWRITTEN for op in ops),
    )
