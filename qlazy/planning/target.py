"""The size that a model should have. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlazy.errors import UsageError
from qlazy.formats import Format
from qlazy.sizes import format_bytes, parse_bytes

Errors = Mapping[str, Mapping[Format, float]]
"""By name of a weight and format: squared error over squared weights."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """How large a model may become; one of the two."""

    nbytes: int | None = None
    """Bytes of all weights and buffers, quantized or not."""
    bpw: float | None = None
    """Bits per quantized weight, scales and zeros included."""
    errors: Errors = field(default_factory=dict, repr=False, compare=False)
    """What formats cost the weights, as far as it was measured."""

    def __str__(self) -> str:
        """As it was asked for."""
        return f"{self.bpw:g} bits per weight" if self.nbytes is None else format_bytes(self.nbytes)


def make_target(target_size: str | int | None, target_bpw: float | None) -> Target | None:
    """The target of the options of the command line and of `load_quantized`.

    Args:
        target_size: Bytes, or a size such as `5GiB`.
        target_bpw: Bits per quantized weight.
    Returns:
        The target; None where there is none.
    Raises:
        UsageError: both are given, or one that no model can have.
    """
    if target_size is not None and target_bpw is not None:
        raise UsageError(
            "target_size and target_bpw are two ways to say one thing.", hint="Give one of them; a recipe file counts too."
        )
    if target_size is not None:
        if isinstance(target_size, bool) or not isinstance(target_size, str | int):
            raise UsageError(f"target_size is {target_size!r}; it is bytes or a size.", hint="E.g. --target-size 5GiB.")
        nbytes = parse_bytes(target_size) if isinstance(target_size, str) else target_size
        if nbytes <= 0:
            raise UsageError(f"target_size is {target_size}; a model takes more.", hint="E.g. --target-size 5GiB.")
        return Target(nbytes=nbytes)
    if target_bpw is not None:
        if isinstance(target_bpw, bool) or not isinstance(target_bpw, int | float):
            raise UsageError(f"target_bpw is {target_bpw!r}; it is a number.", hint="E.g. --target-bpw 4.3.")
        if not 4 <= target_bpw <= 16:
            raise UsageError(f"target_bpw is {target_bpw:g}; it can be from 4 to 16.", hint="E.g. --target-bpw 4.3.")
        return Target(bpw=float(target_bpw))
    return None
