"""A packed weight in the place of a parameter: the matrices of fused experts, or a table that embeds and is a tied head too.

The module that held the parameter stays as it is, with its own forward, activation, limits and scales. What it does with the
parameter (`weight[e]`, `linear`, `@`, `bmm`, `embedding`) this takes over through `__torch_function__`, see `weight_views.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.weight_views import Matrix, Stacked, Values, call, is_number, matrix_number, refuse_in_place, seen


class QuantWeight(PackedStack, Values):
    """A packed weight that answers to what code asks of a parameter."""

    def __getitem__(self, index: Any) -> Any:
        """One expert's matrix, still packed; anything else of a dequantized copy."""
        if self.stack.experts and len(self.shape) == 3 and is_number(index):
            return Matrix(self, matrix_number(index, self.stack.experts), self.stack.transposed)
        if not self.stack.experts and isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
            # Numbers from the end are legal here, as in a tensor; in a lookup of an embedding they are not.
            return self.gather(torch.where(index < 0, index + len(self), index))
        return self.dequantize()[index]

    def __len__(self) -> int:
        """Extent of the first dimension."""
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        """Buffers; else what a dequantized copy has of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        refuse_in_place(name)
        return getattr(self.dequantize(), name)

    @property
    def data(self) -> QuantWeight:
        """This."""
        return self

    @property
    def requires_grad(self) -> bool:
        """Never."""
        return False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one extent of it."""
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        """As its dequantized copy."""
        return True

    def detach(self) -> QuantWeight:
        """This."""
        return self

    def view(self, *shape: Any) -> Any:
        """As experts, one matrix after the other; in any other shape a dequantized copy."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int | torch.dtype) else shape
        stack = self.stack
        held = (stack.held_rows, stack.rows + stack.columns - stack.held_rows)
        if stack.experts and wanted in ((-1, *held), (stack.experts, *held)):
            return Stacked(self, stack.transposed)
        return self.dequantize().view(*shape)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """With each matrix turned, still packed."""
        is_flat = self.stack.experts and self.ndim == 2
        if is_flat or {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 1, self.ndim - 2}:
            return self.dequantize().transpose(dim0, dim1)
        return seen(self).turned()

    def t(self) -> Any:
        """Turned."""
        return self.transpose(0, 1)

    @property
    def T(self) -> Any:
        """Turned."""
        return self.transpose(0, 1) if self.ndim == 2 else self.dequantize().T

    @property
    def mT(self) -> Any:
        """With each matrix turned."""
        return self.transpose(-2, -1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over products and lookups; see `call`."""
        return call(func, args, kwargs or {})

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{', '.join(map(str, self.shape))}, format={self.format.name}"
