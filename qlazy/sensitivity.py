"""What each format costs each layer, measured on rows of the checkpoint: without data, and before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.formats import Format, Int4
from qlazy.layers.stacks import stack_of
from qlazy.match import Match
from qlazy.matching.fill import Fill
from qlazy.model_entries import entries_of
from qlazy.planning.aim import is_free, offered
from qlazy.planning.data import Entry
from qlazy.planning.recipe import Recipe
from qlazy.quantizing.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from qlazy.reading.chunks import Chunk, worker_count
from qlazy.report import Progress
from qlazy.sources.packed import PackedTensor
from qlazy.stream import Stream

_T = TypeVar("_T")

RUNS = 8
"""Runs of rows that are looked at of each matrix, and fills of each stack of experts; they lie evenly over it."""

RUN_ROWS = 64
"""Rows of a run: those that belong together wherever weights are read in parts."""


def measured(
    model: PreTrainedModel,
    recipe: Recipe,
    dtype: str,
    match: Match,
    *,
    drop_page_cache: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Recipe:
    """Tell the target of a recipe what formats cost each layer.

    Of every matrix up to 512 rows are read, 8 runs of 64 that lie evenly over it (of a stack of experts those of 8 fills), and
    quantized in each format that the layer could have.

    Args:
        model: A placeholder, its layers not swapped yet.
        recipe: What is asked for.
        dtype: Dtype of scales.
        match: What fills the model.
        drop_page_cache: As in a load.
        on_progress: Called a few times a second.
    Returns:
        The recipe, whose target has errors; as it is where it has no target. The same checkpoint gives the same.

    Memory: the ring of a load, and the largest tensors that are read as a whole.
    """
    if recipe.target is None:
        return recipe
    read = {target: fill.nbytes for fill in match.fills for target in fill.targets}
    free = {entry.name: entry for entry in entries_of(model, read) if is_free(entry, recipe)}
    meter = _Meter(model, free, offered(free.values(), recipe), getattr(torch, dtype))
    fills = tuple(_sample(match.fills, free))
    total = sum(fill.nbytes for fill in fills)
    with Stream(fills, meter.place, worker_count(fills), drop_page_cache) as stream:
        for done in stream:
            if on_progress is not None:
                on_progress(Progress(stage="measure", done_bytes=done, total_bytes=total))
    return dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, errors=meter.errors()))


def _sample(fills: tuple[Fill, ...], free: dict[str, Entry]) -> Iterator[Fill]:
    """Fills that read a part of each weight; those that are converted are read whole."""
    by_target: dict[str, list[Fill]] = {}
    for fill in fills:
        if len(fill.targets) == 1 and fill.targets[0] in free:
            by_target.setdefault(fill.targets[0], []).append(fill)
    sampled = []
    for group in by_target.values():
        for fill in _evenly(group):
            info = fill.sources[0]
            if fill.convert is not None or (isinstance(info, PackedTensor) and info.whole):
                sampled.append(fill)
                continue
            first, last = fill.all_spans[0]
            step = math.lcm(RUN_ROWS, fill.row_block, info.row_block if isinstance(info, PackedTensor) else 1)
            for start in _evenly(list(range(first, last, step))):
                sampled.append(dataclasses.replace(fill, spans=((start, min(last, start + step)),)))
    yield from sorted(sampled, key=lambda fill: (str(fill.sources[0].path), fill.sources[0].offset, fill.all_spans[0]))


def _evenly(items: list[_T]) -> list[_T]:
    """Up to `RUNS` of a list, the first and the last among them."""
    if len(items) <= RUNS:
        return items
    return [items[round(i * (len(items) - 1) / (RUNS - 1))] for i in range(RUNS)]


class _Meter:
    """Takes rows from the workers of a stream, and adds up what formats make of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        free: dict[str, Entry],
        formats: dict[str, list[Format | None]],
        scale_dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._free = free
        self._formats = formats
        self._scale_dtype = scale_dtype
        self._lock = threading.Lock()
        self._found: dict[str, list[tuple[float, dict[Format, float]]]] = {}

    def place(self, chunk: Chunk, tensors: list[Tensor]) -> None:
        """Quantize rows of one weight in every format that it could have.

        Args:
            chunk: What it is.
            tensors: Its values, only used during the call.
        """
        fill = chunk.fill
        made = {fill.targets[0]: tensors[0]} if fill.convert is None else fill.convert(tensors)
        for target, values in made.items():
            entry = self._free[target]
            rows = self._rows(target, values)
            assert rows.shape[1] == entry.matrix[1], (target, rows.shape, entry.matrix)
            squares = float(rows.square().sum(dtype=torch.float64))
            errors: dict[Format, float] = {}
            for fmt in self._formats[target]:
                if fmt is not None:
                    errors[fmt] = float((_roundtrip(rows, fmt, self._scale_dtype) - rows).square_().sum(dtype=torch.float64))
            with self._lock:
                self._found.setdefault(target, []).append((squares, errors))

    def errors(self) -> dict[str, dict[Format, float]]:
        """Squared error over squared weights, by name and format, 0 of zeros; fsum is exact, whatever the order of threads."""
        found = {}
        for name, pieces in self._found.items():
            squares = math.fsum(square for square, _ in pieces) or 1.0
            found[name] = {fmt: math.fsum(errors[fmt] for _, errors in pieces) / squares for fmt in self._formats[name] if fmt}
        return found

    def _rows(self, target: str, values: Tensor) -> Tensor:
        """Some rows of a weight (N, K), or of one of its experts, in float32."""
        path, _, leaf = target.rpartition(".")
        owner = self._model.get_submodule(path)
        stack = stack_of(owner, leaf)
        if isinstance(owner, Conv1D) or (stack is not None and stack.transposed):
            values = values.transpose(-1, -2)
        rows = values.reshape(-1, values.shape[-1])
        # What is converted was read whole; evenly spread rows, as of what is read in runs.
        step = max(1, -(-rows.shape[0] // (RUNS * RUN_ROWS)))
        return rows[::step].to(torch.float32)


def _roundtrip(rows: Tensor, fmt: Format, scale_dtype: torch.dtype) -> Tensor:
    """What is left of weights after a format."""
    if isinstance(fmt, Int4):
        packed = quantize_int4(rows, group_size=fmt.group_size, symmetric=fmt.symmetric, scale_dtype=scale_dtype)
        return dequantize_int4(*packed, torch.float32)
    return dequantize_int8(*quantize_int8(rows, group_size=fmt.group_size, scale_dtype=scale_dtype), torch.float32)
