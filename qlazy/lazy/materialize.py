"""Give recorded tensors their memory: exactly the values that eager construction gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils import swap_tensors

from qlazy.errors import UsageError
from qlazy.lazy.edits import count_writes_to_data, edited
from qlazy.lazy.log import (
    Record,
    Version,
    geometry_of,
    is_meant_for_meta,
    pending,
    record_of,
    set_record,
    tensor_on,
    writes_to,
)
from qlazy.lazy.replay import plain, replay
from qlazy.lazy.scan import Place, places

Only = str | Callable[[str, Tensor], bool]
_Held = TypeVar("_Held", nn.Module, Tensor)
_ORIGIN = "_qlazy_origin"


def materialize(
    held: _Held,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    only: Only | None = None,
) -> _Held:
    """Give a module's tensors, or one tensor, the values that eager construction would have given.

    Tensors keep their identity: every old reference, tie and view of one storage sees the values. Parameters, buffers,
    attributes and tensors in lists, dicts and plain objects are all found.

    While an operation is replayed, torch's default dtype is what it was when that was written down. Threads that materialize
    wait for each other; any other thread must not make tensors of the default dtype meanwhile.

    Args:
        held: A module or a tensor built under `lazy_build`. What is real already is left as it is.
        device: Where to; None takes the device that was asked for while building.
        dtype: For floating-point tensors; None keeps theirs, which is what is equal to eager construction. A cast is the eager
            value cast.
        only: A regular expression searched in names (as in `state_dict`), or a function of name and tensor. What shares a
            storage with a chosen tensor comes along; it is no error if nothing is chosen.
    Returns:
        The same object. Only a tensor that something in C++ holds on to (an autograd graph, a weak reference) cannot be changed
        in place: then a new one is returned, and put in its place where a module holds it.
    Raises:
        UsageError: a tensor was changed after the build, where no recorder saw it, so that its values are not known; or the
            arguments cannot be meant.

    Memory: the result, plus the largest set of storages that one tensor's operations need at the same time.
    """
    if device is not None and torch.device(device).type == "meta":
        raise UsageError("Nothing has values on the meta device.", hint="release() takes memory away again.")
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"dtype={dtype} is for floating-point tensors, and not a floating-point dtype.", hint="Leave it out.")
    with plain():
        found = _places_of(held)
        groups = _groups(found, only)
        for group in groups:
            _materialize_group(group, device, dtype)
    if isinstance(held, Tensor):
        return found[0].tensor if not groups else groups[0].result
    return held


def _places_of(held: Any) -> list[Place]:
    if isinstance(held, Tensor):
        return [Place("tensor", held, None, None)]
    if isinstance(held, nn.Module):
        return list(places([held]))
    raise UsageError(f"Expected a module or a tensor, not {type(held).__name__}.", hint="Pass several one after the other.")


class _Group:
    """The tensors that lie on one storage.

    Args:
        record: Of that storage.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.places: list[Place] = []
        self.result = torch.empty(0)


def _groups(found: list[Place], only: Only | None) -> list[_Group]:
    """Tensors to materialize by storage.

    Those that hold autograd graphs come first, as they keep others from being swapped; the rest in the order in which
    generators drew for them.
    """
    chosen: set[int] = set()
    groups: dict[int, _Group] = {}
    for place in found:
        tensor = place.tensor
        if not tensor.is_meta:
            continue
        record = record_of(tensor)
        wanted = only is None or _is_wanted(only, place)
        if record is None:
            if wanted and not is_meant_for_meta(tensor):
                raise UsageError(
                    f"{place.name} {list(tensor.shape)} was made or replaced on the meta device after lazy_build() had ended: "
                    "its values are not known.",
                    hint="Do it inside lazy_build(), which can be entered again, or materialize first.",
                )
            continue
        if wanted:
            chosen.add(id(record))
        groups.setdefault(id(record), _Group(record)).places.append(place)
    ordered = [group for key, group in groups.items() if key in chosen]
    return sorted(
        ordered, key=lambda group: (all(place.tensor.is_leaf for place in group.places), group.record.version.op.order)
    )


def _is_wanted(only: Only, place: Place) -> bool:
    if not isinstance(only, str):
        return only(place.name, place.tensor)
    try:
        return re.search(only, place.name) is not None
    except re.error as error:
        raise UsageError(f"only={only!r} is not a regular expression: {error}.") from None


def _materialize_group(group: _Group, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    record = group.record
    for place in group.places:
        if record.is_edited(place.tensor):
            raise edited(record.describe(place.tensor) if place.owner is None else f"{place.name} {list(place.tensor.shape)}")
    tensors = {id(place.tensor): place.tensor for place in group.places}
    if record.real is None:
        storage = replay([record.version])[record.slot]
        record.real = _converted(storage, list(tensors.values()), torch.device(device or record.device), dtype)
        setattr(record.real, _ORIGIN, Record(record.slot, record.version, record.device, name=record.name))
        pending.discard(record)
    origin: Record | None = getattr(record.real, _ORIGIN, None)
    for tensor in tensors.values():
        result = _put(tensor, record.real, dtype)
        if origin is not None:
            origin.counters.add(writes_to(result))
        if result is not tensor:
            rebound = [place.rebind(result) for place in group.places if place.tensor is tensor and place.owner is not None]
            if not all(rebound):
                name = next(place.name for place in group.places if place.tensor is tensor)
                raise UsageError(
                    f"{name} {list(tensor.shape)} cannot be changed in place: something outside of Python holds on to it.",
                    hint="Detach it from what was computed with it, or keep it in an attribute, a list or a dict.",
                )
        group.result = result


def _converted(
    storage: UntypedStorage, tensors: list[Tensor], device: torch.device, dtype: torch.dtype | None
) -> UntypedStorage:
    """The storage on its device, and in another dtype where its tensors are floating-point numbers."""
    kinds = {tensor.dtype for tensor in tensors}
    if dtype is not None and kinds != {dtype} and any(kind.is_floating_point for kind in kinds):
        if len(kinds) > 1:
            raise UsageError(f"Tensors of {', '.join(map(str, kinds))} share one storage: it cannot be cast to {dtype}.")
        (kind,) = kinds
        whole = torch.empty(0, dtype=kind).set_(storage)
        storage = whole.to(device=device, dtype=dtype).untyped_storage()
    elif device.type != "cpu":
        storage = torch.empty(0, dtype=torch.uint8).set_(storage).to(device).untyped_storage()
    return storage


def _put(tensor: Tensor, storage: UntypedStorage, dtype: torch.dtype | None) -> Tensor:
    """Let a meta tensor lie on real memory."""
    geometry = geometry_of(tensor)
    if dtype is not None and geometry.dtype.is_floating_point:
        geometry = geometry._replace(dtype=dtype)
    return swapped(tensor, tensor_on(storage, geometry))


def swapped(tensor: Tensor, value: Tensor) -> Tensor:
    """Let a tensor be another one, for everybody who has a reference to it.

    Args:
        tensor: The tensor.
        value: What it becomes; of the same class and with the same attributes afterwards.
    Returns:
        The tensor; `value` where it cannot be swapped.
    """
    value = torch.Tensor._make_subclass(type(tensor), value, tensor.requires_grad)
    value.__dict__.update(tensor.__dict__)
    if tensor._backward_hooks:
        value._backward_hooks = tensor._backward_hooks
    try:
        swap_tensors(tensor, value)
    except RuntimeError:
        return value
    return tensor


def release(held: _Held, *, only: Only | None = None) -> _Held:
    """Take the memory of materialized tensors away again; `materialize` gives the same values anew.

    Args:
        held: A module or a tensor.
        only: As in `materialize`.
    Returns:
        The same object. What did not come from a lazy build stays real.
    Raises:
        UsageError: a tensor was written to since, which would be lost.

    Memory: none.
    """
    records: dict[int, tuple[Record, UntypedStorage]] = {}
    with plain():
        for place in _places_of(held):
            tensor = place.tensor
            if tensor.is_meta or tensor.layout is not torch.strided or (only is not None and not _is_wanted(only, place)):
                continue
            storage = tensor.untyped_storage()
            origin: Record | None = getattr(storage, _ORIGIN, None)
            if origin is None:
                continue
            if writes_to(tensor) not in origin.counters:
                raise UsageError(
                    f"{place.name} {list(tensor.shape)} was written to since it was materialized, which would be lost.",
                    hint="Keep it, or exclude it with only=.",
                )
            if storage._cdata not in records:
                empty = UntypedStorage(storage.nbytes(), device="meta")
                version = Version(origin.slot, origin.version.op, origin.version.before)
                record = Record(origin.slot, version, origin.device, name=origin.name)
                set_record(empty, record)
                records[storage._cdata] = (record, empty)
            record, empty = records[storage._cdata]
            record.counters.add(writes_to(swapped(tensor, tensor_on(empty, geometry_of(tensor)))))
        count_writes_to_data()
    return held
