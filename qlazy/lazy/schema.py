"""What an aten operation does to its arguments, told from its schema and its tags."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlazy.lazy.log import leaves

aten = torch.ops.aten
OVERWRITES = {
    aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default, aten.copy_.default, aten.uniform_.default, aten.normal_.default,
    aten.bernoulli_.float, aten.exponential_.default, aten.cauchy_.default, aten.geometric_.default, aten.log_normal_.default,
    aten.random_.default, aten.random_.to, getattr(aten.random_, "from"),
}  # fmt: skip
"""They leave nothing of what was in their first argument, and do not look at it."""
FILLS = OVERWRITES - {aten.copy_.default, aten.fill_.Tensor}
"""Of these also: no other tensor is involved, so that nothing has to run on meta."""
UNWRITTEN = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
"""Their results hold whatever was in memory."""
REPOINTS = {
    aten.set_.source_Storage, aten.set_.source_Storage_storage_offset, aten.set_.source_Tensor,
    aten.set_.source_Tensor_storage_offset, aten.set_.default,
}  # fmt: skip
"""They change which storage a tensor lies on, and no values."""

_ALSO_WRITES = {aten.native_batch_norm.default: ("running_mean", "running_var")}
"""Arguments that are written to although the schema does not say so."""
_WRITES_IF = {aten.native_batch_norm.default: 5}
"""Of these only where that argument, `training`, is true."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the schema of an operation says."""

    random: bool
    """It draws from a generator."""
    asks_values: bool
    """Its result is a Python value, or its shape depends on values."""
    overwrites: bool
    """One of `OVERWRITES`."""
    has_device: bool
    """It can be told on which device to make its result."""
    writes: tuple[tuple[int, str], ...]
    """Arguments that are written to: place and name."""
    writes_if: int | None
    """The place of an argument that must be true for that; None where it always is."""

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that a call writes to."""
        if self.writes_if is not None and not args[self.writes_if]:
            return []
        found = [args[place] if place < len(args) else kwargs.get(name) for place, name in self.writes]
        return list(tensors((found,)))


@functools.cache
def facts_of(func: Any) -> Facts:
    """What the schema of an operation says.

    Args:
        func: An `OpOverload`.
    Returns:
        Its facts.
    """
    writes = [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _ALSO_WRITES.get(func, ())
    ]
    return Facts(
        random=torch.Tag.nondeterministic_seeded in func.tags,
        asks_values=torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags,
        overwrites=func in OVERWRITES,
        has_device=any(argument.name == "device" for argument in func._schema.arguments),
        writes=() if func in REPOINTS else tuple(writes),
        writes_if=_WRITES_IF.get(func),
    )


@functools.cache
def with_generator(func: Any) -> Callable[..., Any] | None:
    """The overload of a random operation that can be told which generator to draw from.

    Args:
        func: An `OpOverload`.
    Returns:
        That overload; None where there is none.
    """
    if any(argument.name == "generator" for argument in func._schema.arguments):
        found: Callable[..., Any] | None = func
        return found
    name = func._overloadname
    wanted = {"default": "generator", "low": "low_generator", "low_dtype": "low_generator_dtype"}.get(name, f"{name}_generator")
    return getattr(func.overloadpacket, wanted, None)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results.

    Args:
        tree: Nested lists, tuples and dicts.
    Returns:
        The tensors in their order.
    """
    return (leaf for leaf in leaves(tree) if isinstance(leaf, Tensor))
