"""What is written down: for each storage, the operations that made its values.

A meta storage that the recorder knows carries a `Record` on its Python object, which torch keeps for as long as any tensor,
view or alias of that storage lives. So nothing is keyed by an address that could be used again, and what nobody can reach any
more is collected. A `Version` is what a storage holds after one write; an operation refers to the versions that it read.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage

_order = itertools.count()
_ATTRIBUTE = "_qlazy_record"
_MEANT = "_qlazy_meant_for_meta"


class Slot:
    """The identity of one storage, apart from its contents.

    Args:
        nbytes: Its size.
    """

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Version:
    """What a storage holds after `op`.

    Args:
        slot: The storage.
        op: The write.
        before: What it held before, where the write left some of it or read it.
    """

    __slots__ = ("before", "op", "slot")

    def __init__(self, slot: Slot, op: Op, before: Version | None = None) -> None:
        self.slot = slot
        self.op = op
        self.before = before


class Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conj: bool
    neg: bool


class Ref(NamedTuple):
    """A tensor among the arguments of an operation."""

    slot: Slot
    version: Version | None
    """None: the operation overwrites all of it and reads nothing."""
    geometry: Geometry


class Op:
    """One operation, as it will be run again.

    Args:
        func: The aten operation; None for `payload`.
        args: Arguments, with `Ref` for tensors and the CPU for devices.
        kwargs: The same.
        position: Where the generator stood, for a random one.
        payload: For a constant: the storage itself, never changed.
    """

    __slots__ = ("args", "default_dtype", "following", "func", "kwargs", "order", "outputs", "payload", "position")

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        position: Any = None,
        payload: UntypedStorage | None = None,
    ) -> None:
        self.func = func
        self.args = args
        self.kwargs: dict[str, Any] = kwargs or {}
        self.position = position
        self.following: Any = None
        """Where it leaves the generator."""
        self.payload = payload
        self.default_dtype = torch.get_default_dtype()
        self.outputs: list[tuple[int, Slot, Geometry]] = []
        """Results that are storages of their own: place among the results, slot, geometry."""
        self.order = next(_order)

    @classmethod
    def constant(cls, payload: UntypedStorage, slot: Slot, geometry: Geometry) -> Op:
        """The operation that puts known values into a storage.

        Args:
            payload: The values; nobody changes them.
            slot: The storage.
            geometry: A tensor that lies on it.
        Returns:
            The operation.
        """
        op = cls(None, payload=payload)
        op.outputs.append((0, slot, geometry))
        return op

    def refs(self) -> Iterator[Ref]:
        """Tensors among the arguments."""
        return (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref))


@dataclass(eq=False)
class Record:
    """What is known of one storage that has no memory."""

    slot: Slot
    version: Version
    device: torch.device
    """Where it would lie if it had been built eagerly."""
    real: UntypedStorage | None = None
    """The memory that took its place, for aliases that were not at hand at that time."""
    counters: set[int] = field(default_factory=set)
    """Version counters of the tensors on it when recording ended; empty where no module holds one."""
    writes: int | None = 0
    """In place of `counters`: the highest that recorded writes account for; None where a tensor was moved to this storage."""
    name: str = ""
    """Where a module held a tensor on it when recording ended."""

    def is_edited(self, tensor: Tensor) -> bool:
        """Whether a tensor on it was written to when no recorder was open.

        Args:
            tensor: A tensor on this storage. One that was never written to, such as a new view, has 0 for its counter.
        Returns:
            False as well where nothing is known.
        """
        if self.counters:
            return writes_to(tensor) not in {0, *self.counters}
        return self.writes is not None and writes_to(tensor) > self.writes

    def describe(self, tensor: Tensor) -> str:
        """What to call a tensor on it in an error: by its name, where a module held it, and its shape."""
        return f"{self.name or 'A tensor'} {list(tensor.shape)}"


pending: weakref.WeakSet[Record] = weakref.WeakSet()
"""Records of storages that somebody still has and that have no memory."""


def record_of(tensor: Tensor) -> Record | None:
    """The record of a tensor's storage.

    Args:
        tensor: Any tensor; called where no mode hides its device.
    Returns:
        None for a tensor that is real, or on meta but unknown.
    """
    if not tensor.is_meta or tensor.layout is not torch.strided:
        return None
    try:
        found: Record | None = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    except NotImplementedError:  # a wrapper, such as `torch.func` makes
        return None
    return found


def set_record(storage: UntypedStorage, record: Record) -> None:
    """Write the record on a storage.

    Args:
        storage: A meta storage.
        record: What is known of it.
    """
    setattr(storage, _ATTRIBUTE, record)
    pending.add(record)


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written to, as torch counts it.

    Args:
        tensor: Any tensor.
    Returns:
        Its version counter; 0 for inference tensors, which have none.
    """
    return 0 if tensor.is_inference() else int(tensor._version)


def meant_for_meta(result: Any) -> Any:
    """Mark tensors that eager construction would leave on meta as well.

    Args:
        result: Results of an operation.
    Returns:
        The same.
    """
    for leaf in leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_meta and record_of(leaf) is None:
            setattr(leaf.untyped_storage(), _MEANT, True)
    return result


def is_meant_for_meta(tensor: Tensor) -> bool:
    """Whether eager construction would have left a tensor on meta.

    Args:
        tensor: A meta tensor without a record.
    Returns:
        True where `meant_for_meta` saw its storage.
    """
    return tensor.layout is not torch.strided or getattr(tensor.untyped_storage(), _MEANT, False)


def geometry_of(tensor: Tensor) -> Geometry:
    """How a tensor lies in its storage.

    Args:
        tensor: A strided tensor.
    Returns:
        Its geometry.
    """
    return Geometry(
        int(tensor.storage_offset()),
        tuple(tensor.size()),
        tuple(tensor.stride()),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def tensor_on(storage: UntypedStorage, geometry: Geometry) -> Tensor:
    """A tensor of a geometry on a storage.

    Args:
        storage: Memory.
        geometry: How the tensor lies in it.
    Returns:
        The tensor.
    """
    found = torch.empty(0, dtype=geometry.dtype, device=storage.device)
    found.set_(storage, geometry.offset, geometry.size, geometry.stride)
    if geometry.conj:
        found = torch._conj(found)
    return torch._neg_view(found) if geometry.neg else found


def leaves(tree: Any) -> Iterator[Any]:
    """Everything in nested lists, tuples and dicts.

    Args:
        tree: Arguments or results.
    Yields:
        The leaves.
    """
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)) or isinstance(tree, Ref):
        yield tree
        return
    for item in tree:
        yield from leaves(item)


def map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with every leaf changed.

    Args:
        change: From a leaf to what takes its place.
        tree: Arguments or results.
    Returns:
        The new tree; lists stay lists.
    """
    if isinstance(tree, (list, tuple)) and not isinstance(tree, Ref):
        changed = [map_leaves(change, item) for item in tree]
        return changed if isinstance(tree, list) else tuple(changed)
    if isinstance(tree, dict):
        return {key: map_leaves(change, item) for key, item in tree.items()}
    return change(tree)
