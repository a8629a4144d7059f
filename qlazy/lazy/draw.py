"""Which values a random op draws, told from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One random op: which values it draws, and how many."""

    kind: str
    """Name of the in-place op, without the underscore: "normal"."""
    dtype: torch.dtype
    """Of the result."""
    numel: int
    """Of the result."""
    contiguous: bool = True
    """Whether the result is contiguous; `normal_` takes another path where it is not."""
    params: tuple[Any, ...] = ()
    """Arguments of the op: mean and standard deviation, bounds, ..."""

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Run the op itself on this tensor."""
        op: Callable[..., Tensor] = getattr(out, self.kind + "_")
        return op(*self.params, generator=generator)


_PARAMS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "uniform": ("uniform", (("from", 0.0), ("to", 1.0))),
    "normal": ("normal", (("mean", 0.0), ("std", 1.0))),
    "random": ("random", ()),
    "random.from": ("random", (("from", None), ("to", None))),
    "random.to": ("random", (("to", None),)),
    "bernoulli.float": ("bernoulli", (("p", 0.5),)),
    "bernoulli.p": ("bernoulli", (("p", 0.5),)),
    "exponential": ("exponential", (("lambd", 1.0),)),
    "cauchy": ("cauchy", (("median", 0.0), ("sigma", 1.0))),
    "geometric": ("geometric", (("p", None),)),
    "log_normal": ("log_normal", (("mean", 1.0), ("std", 2.0))),
    "rand": ("uniform", (("from", 0.0), ("to", 1.0))),
    "rand_like": ("uniform", (("from", 0.0), ("to", 1.0))),
    "randn": ("normal", (("mean", 0.0), ("std", 1.0))),
    "randn_like": ("normal", (("mean", 0.0), ("std", 1.0))),
    "normal.float_float": ("normal", (("mean", 0.0), ("std", 1.0))),
    "normal_functional": ("normal", (("mean", 0.0), ("std", 1.0))),
    "randint": ("random", (("low", 0), ("high", None))),
    "randint.low": ("random", (("low", 0), ("high", None))),
    "randint_like": ("random", (("low", 0), ("high", None))),
    "randint_like.low_dtype": ("random", (("low", 0), ("high", None))),
}
"""By aten op: the in-place op that its result is filled with, and the names and defaults of that op's arguments."""


def draw_of(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Draw | None:
    """What a call of an aten op draws.

    Args:
        func: The op, as a dispatch mode sees it.
        args: Its positional arguments; tensors may be on the meta device.
        kwargs: Its keyword arguments.
        result: What it returned (for an in-place op: the tensor it filled), also on the meta device.

    Returns:
        The draw; None for an op that none of the models cover, which `run_exactly` is for.
    """
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    overload = func._schema.overload_name.removesuffix("generator").removesuffix("_")
    known = _PARAMS.get(f"{name}.{overload}" if overload else name)
    if known is None or result.dtype.is_complex:
        return None
    kind, params = known
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return Draw(
        kind=kind,
        dtype=result.dtype,
        numel=result.numel(),
        contiguous=result.is_contiguous(),
        params=tuple(given.get(param, default) for param, default in params),
    )
