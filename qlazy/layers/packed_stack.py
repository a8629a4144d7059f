"""Packed matrices: one, or those of all experts of a layer stacked along a first dimension; filled row by row.

The layout of each is that of `qlazy/formats.py`, and each can be seen as one of `qlazy/layers/linear.py`'s linear layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlazy.formats import Format
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import QUANTIZED_ELEMENTS, ROW_BLOCK, QuantLinear
from qlazy.layers.stacks import Stack
from qlazy.layers.storage import allocate
from qlazy.products.gather import gather_rows


class PackedStack(nn.Module):
    """What a parameter was, in low bits.

    Args:
        shape: The parameter's own.
        stack: The matrices in it.
        format: How each is stored.
        dtype: Dtype of scales, and of what a dequantized copy has.
    """

    weight_packed: Tensor

    def __init__(self, shape: tuple[int, ...], *, stack: Stack, format: Format, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.shape = torch.Size(shape)
        self.stack = stack
        self.format = format
        self.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        self.storage = format.storage(stack.rows, stack.columns, name)
        """What each matrix is stored as."""
        for key, stored in self.storage.items():
            self.register_buffer(
                key, torch.empty(self._stacked(stored.shape), dtype=getattr(torch, stored.dtype), device="meta")
            )
        self._open: dict[int, QuantLinear] = {}
        self._lock = threading.Lock()
        self.__dict__["_template"] = None  # no submodule: it has no storage of its own

    def _stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.stack.experts, *shape) if self.stack.experts else shape

    def allocate(self, device: torch.device | str) -> None:
        """Take storage; pages that are not filled stay untouched.

        Args:
            device: Where.

        Memory: what the format's `storage` adds up to, for each matrix.
        """
        for key, stored in self.storage.items():
            setattr(self, key, allocate(self._stacked(stored.shape), getattr(torch, stored.dtype), device))
        self._open.clear()

    def fill(self, values: Tensor, start: int = 0) -> None:
        """Quantize rows into their place. Safe to call from several threads for different rows.

        Args:
            values: Rows as the parameter holds them, any float dtype, on any device; of a transposed matrix all rows.
            start: First row, counted through all matrices; within a matrix a multiple of 64.
        Raises:
            NonFiniteError: as `QuantLinear.fill`.

        Memory: as `QuantLinear.fill`.
        """
        for begin, rows in self.by_matrix(values, start):
            step = max(ROW_BLOCK, QUANTIZED_ELEMENTS // self.stack.columns // ROW_BLOCK * ROW_BLOCK)
            for first in range(0, rows.shape[0], step):
                self.fill_rows(begin + first, rows[first : first + step].to(self.device).contiguous())

    def by_matrix(self, values: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
        """Cut rows where a matrix ends, and turn those of transposed ones.

        Args:
            values: Rows as the parameter holds them.
            start: First row, as the parameter counts.
        Yields:
            The first of N rows, counted through all matrices, and these rows, (rows, K).
        """
        stack = self.stack
        values = values.detach().reshape(-1, values.shape[-1])
        while values.shape[0]:
            number, row = divmod(start, stack.held_rows)
            count = min(values.shape[0], stack.held_rows - row)
            assert not stack.transposed or count == stack.held_rows
            yield number * stack.rows + row, values[:count].t() if stack.transposed else values[:count]
            values, start = values[count:], start + count

    def fill_rows(self, start: int, rows: Tensor) -> None:
        """Quantize rows of one matrix into their place. Safe to call from several threads for different rows.

        Args:
            start: First of N rows, counted through all matrices; within a matrix a multiple of 64.
            rows: (rows, K) on this weight's device.
        Raises:
            NonFiniteError: as `QuantLinear.fill_rows`.

        Memory: as `QuantLinear.fill_rows`.
        """
        number, row = divmod(start, self.stack.rows)
        with self._lock:
            layer = self._open.get(number)
            if layer is None:
                layer = self._open[number] = self.layer(number)
        if not layer.fill_rows(row, rows):
            return
        with self._lock:
            del self._open[number]
        for key in self.storage:  # a nested codebook makes its scales when the last row has come, as new tensors
            made, kept = layer._buffers[key], self._of(key, number)
            if made is not None and made.data_ptr() != kept.data_ptr():
                kept.copy_(made)

    def layer(self, number: int = 0) -> QuantLinear:
        """One matrix as a linear layer that shares its storage with this.

        Args:
            number: Which.
        Returns:
            A new layer of the format's class, without bias.

        Memory: none; the storage is this one's.
        """
        template: QuantLinear | None = self.__dict__["_template"]
        if template is None:
            stack, kind = self.stack, LAYERS[type(self.format)]
            template = kind(stack.columns, stack.rows, format=self.format, dtype=self.dtype, bias=None)
            self.__dict__["_template"] = template
        made: QuantLinear = object.__new__(type(template))
        # A layer is made at every use of an expert, and to construct a module takes longer than a small product.
        made.__setstate__(template.__getstate__())
        made.__dict__["_buffers"] = {key: self._of(key, number) for key in self.storage}
        made.__dict__["_rows_filled"] = [0]
        return made

    def _of(self, key: str, number: int) -> Tensor:
        held: Tensor = getattr(self, key)
        return held[number] if self.stack.experts else held

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter as the model computes with it.

        Args:
            dtype: Of the result; default that of the scales.
        Returns:
            A new tensor of the parameter's shape.

        Memory: the result, and one matrix more where it is transposed.
        """
        stack, dtype = self.stack, dtype or self.dtype
        if self.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        held = (stack.columns, stack.rows) if stack.transposed else (stack.rows, stack.columns)
        whole = torch.empty(stack.count, *held, dtype=dtype, device=self.device)
        for number in range(stack.count):
            matrix = self.layer(number).dequantize(dtype)
            whole[number] = matrix.t() if stack.transposed else matrix
        return whole.view(self.shape)

    def gather(self, indices: Tensor) -> Tensor:
        """Rows of a table.

        Args:
            indices: Integers of any shape.
        Returns:
            (..., K) in the dtype of the scales.

        Memory: the result, and nine bytes for each of its elements.
        """
        rows = gather_rows(self.layer()._packed(), indices.reshape(-1), self.dtype)
        return rows.view(*indices.shape, self.stack.columns)

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.weight_packed.device

    @property
    def is_meta(self) -> bool:
        """Whether there is no storage yet."""
        return self.device.type == "meta"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedStack:
        """Follow `model.to(...)` to another device, never to another dtype."""
        for key in self.storage:
            held: Tensor = getattr(self, key)
            self._buffers[key] = fn(held.reshape(-1).view(torch.uint8)).view(held.dtype).view(held.shape)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Can be pickled and copied; the lock is made anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        self._lock = threading.Lock()
