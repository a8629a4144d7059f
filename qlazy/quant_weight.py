"""A packed weight in the place of a parameter: the matrices of fused experts, or a table that embeds and is a tied head too.

The module that held the parameter stays as it is, with its own forward, activation, limits and scales. What it does with the
parameter (`weight[e]`, `linear`, `@`, `bmm`, `embedding`) this takes over through `__torch_function__`: products with packed
rows, and gathered rows of a table. Whatever else is asked of it, a dequantized copy answers.

Storage is the layout of one matrix (see `qlazy/formats.py`), for experts stacked along a first dimension.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlazy.formats import Format
from qlazy.gather import gather_rows
from qlazy.layers import LAYERS
from qlazy.quant_linear import QUANTIZED_ELEMENTS, ROW_BLOCK, QuantLinear, allocate
from qlazy.stacks import Stack

_MATMULS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}


class QuantWeight(nn.Module):
    """What a parameter was, in low bits.

    Args:
        shape: The parameter's own.
        stack: The matrices in it.
        format: How each is stored.
        dtype: Dtype of scales, and of what a dequantized copy has.
    """

    def __init__(self, shape: tuple[int, ...], *, stack: Stack, format: Format, dtype: torch.dtype) -> None:
        super().__init__()
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
        if self._template is None:
            stack = self.stack
            kind = LAYERS[type(self.format)]
            self.__dict__["_template"] = kind(stack.columns, stack.rows, format=self.format, dtype=self.dtype, bias=None)
        made: QuantLinear = object.__new__(type(self._template))
        # A layer is made at every use of an expert, and to construct a module takes longer than a small product.
        made.__setstate__(self._template.__getstate__())
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

    # What code asks of a parameter.

    def __getitem__(self, index: Any) -> Any:
        """One expert's matrix, still packed; anything else of a dequantized copy."""
        if self.stack.experts and len(self.shape) == 3 and _is_number(index):
            return Matrix(self, int(index) % self.stack.experts, self.stack.transposed)
        if not self.stack.experts and isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
            return self.gather(index)
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
        return getattr(self.dequantize(), name)

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        held: Tensor = self.weight_packed
        return held.device

    @property
    def is_meta(self) -> bool:
        """Whether there is no storage yet."""
        return self.device.type == "meta"

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
        if {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 1, self.ndim - 2}:
            return self.dequantize().transpose(dim0, dim1)
        return _whole(self).turned()

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
        """Take over products and lookups; see `_call`."""
        return _call(func, args, kwargs or {})

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{', '.join(map(str, self.shape))}, format={self.format.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantWeight:
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


class Matrix:
    """One matrix of a packed weight, as code sees it: (N, K), or (K, N) where turned."""

    def __init__(self, weight: QuantWeight, number: int, is_turned: bool) -> None:
        self.weight = weight
        self.number = number
        self.is_turned = is_turned

    @property
    def shape(self) -> torch.Size:
        """As it is seen."""
        stack = self.weight.stack
        return torch.Size((stack.columns, stack.rows) if self.is_turned else (stack.rows, stack.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of a dequantized copy."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.weight.device

    def turned(self) -> Matrix:
        """Seen the other way."""
        return Matrix(self.weight, self.number, not self.is_turned)

    def t(self) -> Matrix:
        """Seen the other way."""
        return self.turned()

    def transpose(self, dim0: int, dim1: int) -> Matrix:
        """Seen the other way."""
        return self.turned() if dim0 % 2 != dim1 % 2 else self

    T = mT = property(turned)

    def dequantize(self) -> Tensor:
        """The values as they are seen."""
        matrix = self.weight.layer(self.number).dequantize()
        return matrix.t() if self.is_turned else matrix

    def multiply(self, x: Tensor) -> Tensor:
        """The product `x @ this`."""
        layer = self.weight.layer(self.number)
        if self.is_turned:
            y: Tensor = layer(x)
            return y
        if x.requires_grad and torch.is_grad_enabled():
            made: Tensor = _Backward.apply(x, layer)  # type: ignore[no-untyped-call]
            return made
        return layer.product_backward(x)

    def __getattr__(self, name: str) -> Any:
        """What a dequantized copy has of that name."""
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    def __getitem__(self, index: Any) -> Tensor:
        """Of a dequantized copy."""
        return self.dequantize()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over products; see `_call`."""
        return _call(func, args, kwargs or {})


class Stacked:
    """All matrices of a packed weight, as code sees them: (E, N, K), or (E, K, N) where turned."""

    def __init__(self, weight: QuantWeight, is_turned: bool) -> None:
        self.weight = weight
        self.is_turned = is_turned
        self.dtype, self.device = weight.dtype, weight.device

    @property
    def shape(self) -> torch.Size:
        """As they are seen."""
        return torch.Size((self.weight.stack.experts, *Matrix(self.weight, 0, self.is_turned).shape))

    def turned(self) -> Stacked:
        """Each seen the other way."""
        return Stacked(self.weight, not self.is_turned)

    def dequantize(self) -> Tensor:
        """The values as they are seen."""
        whole = self.weight.dequantize().view(self.weight.stack.experts, self.weight.stack.held_rows, -1)
        return whole if self.is_turned == self.weight.stack.transposed else whole.transpose(1, 2)

    def multiply(self, x: Tensor) -> Tensor:
        """The product `x @ this` of all experts, (E, T, ...).

        Rows of zeros, which a dense mixture gives an expert for tokens that are not its own, are left out.
        """
        columns = self.shape[2]
        results = []
        for number in range(self.shape[0]):
            matrix = Matrix(self.weight, number, self.is_turned)
            taken = x[number].ne(0).any(-1).nonzero().squeeze(1)
            y = x.new_zeros(x.shape[1], columns)
            if taken.numel():
                y = y.index_copy(0, taken, matrix.multiply(x[number][taken]))
            results.append(y)
        return torch.stack(results)

    def __getitem__(self, index: Any) -> Any:
        """One matrix, still packed."""
        if _is_number(index):
            return Matrix(self.weight, int(index) % self.weight.stack.experts, self.is_turned)
        return self.dequantize()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over products; see `_call`."""
        return _call(func, args, kwargs or {})


_Packed = QuantWeight | Matrix | Stacked


def _whole(weight: QuantWeight) -> Matrix | Stacked:
    """A weight as code sees it."""
    turned = weight.stack.transposed
    return Stacked(weight, turned) if len(weight.shape) == 3 else Matrix(weight, 0, turned)


def _is_number(index: Any) -> bool:
    return (isinstance(index, int) and not isinstance(index, bool)) or (
        isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
    )


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function of packed weights is: a product, a lookup, or the function of dequantized copies."""
    if func is functional.linear:
        return _linear(*args, **kwargs)
    if func is functional.embedding:
        return _embedding(func, *args, **kwargs)
    if func in _MATMULS and len(args) == 2 and isinstance(args[0], Tensor) and not kwargs:
        x, other = args[0], _whole(args[1]) if isinstance(args[1], QuantWeight) and _is_matrices(args[1]) else args[1]
        if isinstance(other, Matrix) or (isinstance(other, Stacked) and x.dim() == 3 and x.shape[0] == other.shape[0]):
            return other.multiply(x)
    return func(*_plain(args), **_plain(kwargs))


def _is_matrices(weight: QuantWeight) -> bool:
    return len(weight.shape) == 3 or not weight.stack.experts


def _linear(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    packed = _whole(weight) if isinstance(weight, QuantWeight) and _is_matrices(weight) else weight
    if isinstance(input, Tensor) and isinstance(packed, Matrix):
        y = packed.turned().multiply(input)
        return y if bias is None else y + bias
    return functional.linear(*_plain((input, weight, bias)))


def _embedding(
    func: Any,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if isinstance(weight, QuantWeight) and not weight.stack.experts and max_norm is None:
        return weight.gather(input)  # what the others say is for gradients of the table
    made: Tensor = func(input, _plain(weight), padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return made


def _plain(value: Any) -> Any:
    """The same with dequantized copies."""
    if isinstance(value, _Packed):
        return value.dequantize()
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


class _Backward(torch.autograd.Function):
    """x @ W with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.layer.product(grad, None), None
