"""The packed matrices of a stack of experts, of files that hold each expert's by itself: one view where they lie in a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlazy.errors import CorruptCheckpoint
from qlazy.layers.packed_stack import PackedStack
from qlazy.matching.fill import Fill, row_count
from qlazy.reopening.mapped import MappedFiles
from qlazy.saving.layouts import from_stored
from qlazy.sources.packed import PackedTensor


def lie_in_order(fills: Sequence[Fill]) -> bool:
    """Whether packed weights, whole and one after the other, are a stack of the model.

    Args:
        fills: What fills it.
    Returns:
        False where rows must be unpacked and go elsewhere.
    """
    row = 0
    for fill in sorted(fills, key=lambda fill: fill.target_row):
        counts = [row_count(info.shape) for info in fill.sources]
        whole = all(isinstance(info, PackedTensor) for info in fill.sources) and fill.all_spans == tuple((0, n) for n in counts)
        # Zeros of eight rows share a word.
        if not whole or fill.target_row != row or any(n % 8 for n in counts[:-1]) or not _in_order(fill, counts):
            return False
        row += sum(counts)
    return True


def stacked(stack: PackedStack, fills: Sequence[Fill], files: MappedFiles) -> dict[str, Tensor]:
    """The storage of a stack.

    Args:
        stack: The module that it is for.
        fills: What fills it, in order: whole matrices, or rows of them, each from whole packed weights.
        files: The maps.
    Returns:
        Tensors by the names of its storage.
    Raises:
        CorruptCheckpoint: rows that are missing.

    Memory: none where the files hold the matrices one after the other, as our own do, in the layout that they have in memory;
    else the storage.
    """
    ordered = sorted(fills, key=lambda fill: fill.target_row)
    columns, pieces, row = stack.stack.columns, [], 0
    for info in (info for fill in ordered for info in fill.sources):
        assert isinstance(info, PackedTensor)
        row += info.shape[0]
        parts = {part.role: files.tensor(part.stored) for part in info.parts}
        pieces.append(from_stored(stack.format, info, parts, columns, stack.dtype))
    if row != stack.stack.count * stack.stack.rows:
        raise CorruptCheckpoint(f"{ordered[0].targets[0]}: {row} rows are stored, of {stack.stack.count * stack.stack.rows}.")
    made = {}
    for name in stack.storage:
        held: Tensor = getattr(stack, name)
        tensors = [piece[name] for piece in pieces]
        in_row = in_a_row(tensors)
        made[name] = (torch.cat(tensors) if in_row is None else in_row).view(held.shape)
    return made


def _in_order(fill: Fill, counts: Sequence[int]) -> bool:
    """Whether the conversion of stored tensors leaves their rows where they are, one tensor after the other."""
    if fill.convert is None:
        return fill.row_order is None
    rows = torch.arange(sum(counts)).view(-1, 1)
    try:
        (made,) = fill.convert(list(rows.split(list(counts)))).values()
    except Exception:  # a conversion that needs all columns
        return False
    return made.shape[-2:] == rows.shape and torch.equal(made.flatten(), rows.flatten())


def in_a_row(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view of tensors that lie one after the other in memory.

    Args:
        tensors: Contiguous ones of one dtype.
    Returns:
        All of them, flat; None where they do not lie so.
    """
    first, end = tensors[0], tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.flatten().as_strided((sum(tensor.numel() for tensor in tensors),), (1,))
