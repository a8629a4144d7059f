"""Where each stored row goes when transformers merges, splits or reorders tensors: learnt by giving its converter row numbers.

Mixtral's checkpoints have a tensor for each matrix of each expert, its model one for all. As transformers does it, all of a
layer are read, stacked and concatenated. Knowing that rows r to s of expert e come from this stored tensor, they go straight
into their place, and nothing is stacked::

    experts.0.w1  ──> gate_up_proj rows     0 .. I        fills without `convert`, in chunks
    experts.0.w3  ──> gate_up_proj rows     I .. 2I
    experts.1.w1  ──> gate_up_proj rows    2I .. 3I
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlazy.layers.quant_linear import ROW_BLOCK
from qlazy.matching.fill import Fill, row_count
from qlazy.sources.source import TensorInfo

PROBE_COLUMNS = 4
"""Columns that stand for all of a row: enough to see that an operation moves columns too."""

Rows = dict[str, Tensor]
"""int32 by name in the model: the number of the stored row, counted through all sources, that each of its rows is."""


def rows_by_target(
    shapes: Sequence[tuple[int, ...]], convert: Callable[[list[Tensor]], dict[str, Tensor]], wanted: dict[str, tuple[int, ...]]
) -> Rows | None:
    """Learn which stored rows become which rows of the model.

    Args:
        shapes: Of the stored tensors.
        convert: What transformers does to them.
        wanted: Shapes of the model's tensors by name.
    Returns:
        The rows; None where `convert` does more than move whole rows, or makes other shapes than the model has.

    Memory: sixteen bytes for each stored row, and what `convert` makes of them.
    """
    probes, base = [], 0
    for shape in shapes:
        rows = row_count(shape)
        numbers = torch.arange(base, base + rows, dtype=torch.int32)
        if len(shape) > 1:
            columns = torch.arange(PROBE_COLUMNS, dtype=torch.int32)
            numbers = (numbers.unsqueeze(1) * PROBE_COLUMNS + columns).view(*shape[:-1], PROBE_COLUMNS)
        probes.append(numbers)
        base += rows
    if base * PROBE_COLUMNS >= 1 << 31 or len({(len(shape) > 1) and shape[-1] for shape in shapes}) != 1:
        return None
    try:
        made = convert(probes)
    except Exception:  # an operation that needs all columns
        return None
    found: Rows = {}
    for name, values in made.items():
        if name not in wanted:
            return None
        shape = wanted[name]
        if (len(shape) > 1) != (len(shapes[0]) > 1) or row_count(shape) != row_count(tuple(values.shape)):
            return None
        if len(shape) > 1:
            if tuple(values.shape) != (*shape[:-1], PROBE_COLUMNS) or shape[-1] != shapes[0][-1]:
                return None
            flat = values.reshape(-1, PROBE_COLUMNS)
            if not torch.equal(flat, flat[:, :1] + torch.arange(PROBE_COLUMNS, dtype=torch.int32)):
                return None
            values = flat[:, 0] // PROBE_COLUMNS
        elif tuple(values.shape) != shape:
            return None
        found[name] = values
    used = torch.cat(list(found.values()))
    complete = used.numel() == base and torch.equal(used.sort().values, torch.arange(base, dtype=torch.int32))
    return found if complete else None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of one or more stored tensors that become rows of one of the model's, whatever their names."""

    target: int
    """Which of the model's tensors, in the order of the rows' map."""
    owners: tuple[int, ...]
    """Which stored tensors, in the order of the group."""
    spans: tuple[tuple[int, int], ...]
    """First row of each, and one past the last."""
    target_row: int
    """Row of the target at which they go."""
    order: Tensor | None = None
    """None: they go straight to their place. Else int64: the row of all spans, one after the other, that each target row is."""

    def fill(self, targets: Sequence[str], sources: Sequence[TensorInfo]) -> Fill:
        """The piece with names.

        Args:
            targets: Names in the model.
            sources: The stored tensors of the group.
        Returns:
            A fill.
        """
        target = targets[self.target]
        convert = None if self.order is None else functools.partial(_gather, target, self.order)
        infos = tuple(sources[owner] for owner in self.owners)
        return Fill(sources=infos, targets=(target,), convert=convert, spans=self.spans, target_row=self.target_row)


def _gather(target: str, order: Tensor, tensors: list[Tensor]) -> dict[str, Tensor]:
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return {target: whole if torch.equal(order, torch.arange(len(order))) else whole[order]}


def pieces_of(rows: Rows, shapes: Sequence[tuple[int, ...]], matrices: dict[str, tuple[int, bool]]) -> list[Piece] | None:
    """Cut a map of rows into pieces that can be read.

    Args:
        rows: From `rows_by_target`.
        shapes: Of the stored tensors.
        matrices: Rows of one matrix of each target (of a tensor that is one matrix, all its rows), and whether they must come
            together.
    Returns:
        Pieces that go straight to their place where rows come in order and in whole blocks, else one for each matrix; None
        where the rows of a matrix are not whole spans of stored tensors.
    """
    bounds = torch.tensor([0, *itertools.accumulate(row_count(shape) for shape in shapes)])
    pieces: list[Piece] = []
    for target, (name, numbers) in enumerate(rows.items()):
        each, together = matrices[name]
        for first in range(0, len(numbers), each):
            made = _matrix_pieces(target, numbers[first : first + each].long(), first, bounds, together)
            if made is None:
                return None
            pieces.extend(made)
    return pieces


def _matrix_pieces(target: int, numbers: Tensor, first: int, bounds: Tensor, together: bool) -> list[Piece] | None:
    count = len(numbers)
    owners = torch.searchsorted(bounds, numbers, right=True) - 1
    within = numbers - bounds[owners]
    is_new = (numbers.diff() != 1) | (owners.diff() != 0)
    cuts = [0, *(is_new.nonzero().squeeze(1) + 1).tolist(), count]
    if not together and all(cut % ROW_BLOCK == 0 for cut in cuts[:-1]):
        return [
            Piece(
                target=target,
                owners=(int(owners[start]),),
                spans=((int(within[start]), int(within[start]) + stop - start),),
                target_row=first + start,
            )
            for start, stop in itertools.pairwise(cuts)
        ]
    order, spans, at = torch.empty_like(numbers), [], 0
    used = owners.unique().tolist()
    for owner in used:
        mine = owners == owner
        low, high = int(within[mine].min()), int(within[mine].max()) + 1
        if high - low != int(mine.sum()):
            return None
        order[mine] = within[mine] - low + at
        spans.append((low, high))
        at += high - low
    return [Piece(target=target, owners=tuple(used), spans=tuple(spans), target_row=first, order=order)]
