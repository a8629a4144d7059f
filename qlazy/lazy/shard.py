"""A part of a recorded tensor: what one rank owns, without the rest where the operations allow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qlazy.errors import UsageError
from qlazy.lazy.draw import Draw, draw_of
from qlazy.lazy.draw_model import generate, random_access
from qlazy.lazy.edits import edited
from qlazy.lazy.log import Geometry, Op, Record, Ref, geometry_of, leaves, map_leaves, record_of, tensor_on
from qlazy.lazy.replay import plain, replay, slice_of
from qlazy.lazy.schema import OVERWRITES, aten

CHUNK_BYTES = 16 << 20
"""Elements are made in pieces of at most this size where only some of each are wanted."""

_CONSTANTS = {aten.zeros.default: 0, aten.ones.default: 0, aten.full.default: 0}
"""Factories of one value; by the place of the argument that is the size."""
_EACH_ALONE = {
    aten.mul_.Tensor, aten.mul_.Scalar, aten.add_.Tensor, aten.add_.Scalar, aten.sub_.Tensor, aten.sub_.Scalar,
    aten.div_.Tensor, aten.div_.Scalar, aten.neg_.default, aten.abs_.default, aten.clamp_.default, aten.clamp_min_.default,
    aten.clamp_max_.default,
}  # fmt: skip
"""Each element alone decides what becomes of it, to the last bit, wherever it lies. Not `erfinv_`: vectors round otherwise."""
_Make = Callable[[int, int], Tensor]


def materialize_shard(
    tensor: Tensor, *index: slice, flat: slice | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The values of a part of a recorded tensor, which stays as it is.

    Args:
        tensor: A tensor built under `lazy_build`. A real one is cut as well.
        *index: A slice with step 1 for each of the first dimensions, as in `tensor[index]`: rows, columns, or both.
        flat: In place of `index`: a slice of the elements in their order, as in `tensor.flatten()[flat]`.
        device: Where to; None takes the device that was asked for while building.
    Returns:
        A new tensor, bit for bit that part of the tensor that eager construction makes.
    Raises:
        UsageError: the tensor has no values, or the slices cannot be meant.

    Memory: the result and 16 MiB, where the tensor is filled by one draw or one value, with arithmetic of numbers after it; the
    whole tensor otherwise.
    """
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in (*index, *([flat] if flat is not None else []))):
        raise UsageError("A shard is cut with slices whose step is 1.", hint="E.g. materialize_shard(tensor, slice(0, 100)).")
    if len(index) > tensor.dim() or (index and flat is not None):
        both = f"{len(index)} slices{' and flat=' if flat is not None else ''}"
        raise UsageError(
            f"A tensor of {tensor.dim()} dimensions cannot be cut by {both}.", hint="Give rows, columns, or flat=."
        )
    with plain():
        record = record_of(tensor)
        if record is None and tensor.is_meta:
            raise UsageError(
                f"A tensor {list(tensor.shape)} on the meta device has no values.", hint="Build it in lazy_build()."
            )
        if record is not None and record.is_edited(tensor):
            raise edited(record.describe(tensor))
        if record is None or record.real is not None:
            whole = tensor if record is None or record.real is None else tensor_on(record.real, geometry_of(tensor))
            return (whole[index] if flat is None else whole.flatten()[flat]).detach().clone()
        make = _maker(record, tensor)
        if make is None:
            whole = tensor_on(replay([record.version])[record.slot], geometry_of(tensor))
            found = (whole[index] if flat is None else whole.flatten()[flat]).clone()
        elif flat is not None:
            start, stop, _ = flat.indices(tensor.numel())
            found = make(start, max(start, stop))
        else:
            found = _cut(make, tensor, index)
        return found.to(device or record.device)


def _cut(make: _Make, tensor: Tensor, index: tuple[slice, ...]) -> Tensor:
    """Rows and columns of a contiguous tensor, made row by row."""
    if not index:
        return make(0, tensor.numel()).view(tensor.shape)
    first, others = index[0], index[1:]
    start, stop, _ = first.indices(tensor.shape[0])
    stop = max(start, stop)
    inner = tensor.shape[1:]
    row = math.prod(inner)
    if not others:
        return make(start * row, stop * row).view(stop - start, *inner)
    shape = torch.empty((stop - start, *inner), device="meta")[(slice(None), *others)].shape
    found = torch.empty(shape, dtype=tensor.dtype)
    step = max(1, CHUNK_BYTES // max(1, row * tensor.element_size()))
    for at in range(start, stop, step):
        end = min(at + step, stop)
        found[at - start : end - start] = make(at * row, end * row).view(end - at, *inner)[(slice(None), *others)]
    return found


def _maker(record: Record, tensor: Tensor) -> _Make | None:
    """How to make any elements of a tensor without the others; None where its operations do not allow it."""
    if not tensor.is_contiguous() or tensor.storage_offset() or tensor.is_conj() or tensor.is_neg():
        return None
    ops = slice_of([record.version])
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size() or not all(_is_on(op, tensor) for op in ops):
        return None
    first, after = ops[0], ops[1:]
    if any(op.func not in _EACH_ALONE or op.default_dtype is not first.default_dtype for op in after):
        return None
    draw = _draw_of(first, tensor)
    if draw is not None and random_access(draw):
        return lambda start, stop: _then(after, generate(first.position, draw, start, stop))
    value = _constant(first, tensor)
    if value is not None:
        return lambda start, stop: _then(after, value.expand(stop - start).clone())
    return None


def _is_on(op: Op, tensor: Tensor) -> bool:
    """Whether an operation works on the whole of this tensor, and on no other."""
    found: list[Geometry] = [ref.geometry for ref in op.refs()] + [geometry for _, _, geometry in op.outputs]
    return len(found) == 1 and found[0] == geometry_of(tensor) and op.payload is None


def _draw_of(op: Op, tensor: Tensor) -> Draw | None:
    if op.position is None:
        return None
    args, kwargs = map_leaves(lambda leaf: None if isinstance(leaf, Ref) else leaf, (op.args, op.kwargs))
    return draw_of(op.func, args, kwargs, tensor)


def _constant(op: Op, tensor: Tensor) -> Tensor | None:
    """The one value that an operation puts everywhere, as a vector of one element."""
    if op.func in _CONSTANTS:
        place = _CONSTANTS[op.func]
        args = [*op.args]
        args[place] = [1]
        value: Tensor = op.func(*args, **op.kwargs | {"dtype": tensor.dtype})
        return value
    if op.func in OVERWRITES and op.position is None and not list(_tensors(op.args[1:])):
        return _then([op], torch.empty(1, dtype=tensor.dtype))
    return None


def _tensors(args: Any) -> Iterator[Any]:
    return (leaf for leaf in leaves(args) if isinstance(leaf, (Ref, Tensor)))


def _then(ops: list[Op], values: Tensor) -> Tensor:
    """What operations that look at each element alone make of some elements."""
    for op in ops:
        args, kwargs = map_leaves(lambda leaf: values if isinstance(leaf, Ref) else leaf, (op.args, op.kwargs))
        op.func(*args, **kwargs)
    return values


def is_cuttable(tensor: Tensor) -> bool:
    """Whether `materialize_shard` makes a part of a tensor without the rest.

    Args:
        tensor: Any tensor.
    Returns:
        False where the whole has to be made, and for a tensor that has memory.
    """
    with plain():
        record = record_of(tensor)
        return record is not None and record.real is None and _maker(record, tensor) is not None
