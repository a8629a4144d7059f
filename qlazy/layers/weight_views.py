"""How code sees packed matrices: as (N, K) or turned, alone or all experts, multiplied from either side without being unpacked.

`call` answers for torch functions that get one: products and lookups are done on packed rows, all else on a dequantized copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import QuantLinear

_MATMULS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}


class Values:
    """Operators, which Python looks for in the class: those of a dequantized copy."""

    def dequantize(self) -> Tensor:
        """The values as they are seen."""
        raise NotImplementedError


def _operator(name: str) -> Callable[..., Any]:
    def of_copy(self: Values, *args: Any) -> Any:
        return getattr(self.dequantize(), name)(*_plain(args))

    return of_copy


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    for _side in ("", "r"):
        setattr(Values, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
setattr(Values, "__neg__", _operator("__neg__"))  # noqa: B010


class Matrix(Values):
    """One matrix of a packed weight, as code sees it: (N, K), or (K, N) where turned."""

    def __init__(self, weight: PackedStack, number: int, is_turned: bool) -> None:
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
        refuse_in_place(name)
        return getattr(self.dequantize(), name)

    def __getitem__(self, index: Any) -> Tensor:
        """Of a dequantized copy."""
        return self.dequantize()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over products; see `call`."""
        return call(func, args, kwargs or {})


class Stacked(Values):
    """All matrices of a packed weight, as code sees them: (E, N, K), or (E, K, N) where turned."""

    def __init__(self, weight: PackedStack, is_turned: bool) -> None:
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
        if is_number(index):
            return Matrix(self.weight, matrix_number(index, self.weight.stack.experts), self.is_turned)
        return self.dequantize()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over products; see `call`."""
        return call(func, args, kwargs or {})


def seen(weight: PackedStack) -> Matrix | Stacked:
    """A weight as code sees it.

    Args:
        weight: Of experts, or one matrix.
    Returns:
        A view of it.
    """
    turned = weight.stack.transposed
    return Stacked(weight, turned) if len(weight.shape) == 3 else Matrix(weight, 0, turned)


def is_number(index: Any) -> bool:
    """Whether an index is one integer, or a tensor of one.

    Args:
        index: What stood in brackets.
    Returns:
        False for slices, masks and lists.
    """
    return (isinstance(index, int) and not isinstance(index, bool)) or (
        isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
    )


def matrix_number(index: Any, count: int) -> int:
    """Which matrix an index means.

    Args:
        index: One integer; below 0 it counts from the end.
        count: How many matrices there are.
    Returns:
        From 0 on.
    Raises:
        IndexError: there is no such matrix, by which a loop over them ends.
    """
    number = int(index)
    if not -count <= number < count:
        raise IndexError(f"index {number} is out of bounds: there are {count} matrices")
    return number % count


def refuse_in_place(name: str) -> None:
    """Refuse what would change a copy that nobody keeps.

    Args:
        name: Of a function or method.
    Raises:
        TypeError: by its name it changes its tensor in place.
    """
    if name.endswith("_") and not name.endswith("__"):
        raise TypeError(f"A packed weight cannot be changed in place ({name}); dequantize() gives a copy.")


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function of packed weights is: a product, a lookup, or the function of dequantized copies.

    Args:
        func: The function.
        args: Its arguments, packed weights among them.
        kwargs: The same by name.
    Returns:
        Its result.
    Raises:
        TypeError: it would change a packed weight in place.

    Memory: the result; for functions other than products and lookups also a dequantized copy.
    """
    if func is functional.linear:
        return _linear(*args, **kwargs)
    if func is functional.embedding:
        return _embedding(func, *args, **kwargs)
    if func in _MATMULS and len(args) == 2 and isinstance(args[0], Tensor) and not kwargs:
        x, other = args[0], seen(args[1]) if isinstance(args[1], PackedStack) and _is_matrices(args[1]) else args[1]
        if isinstance(other, Matrix) or (isinstance(other, Stacked) and x.dim() == 3 and x.shape[0] == other.shape[0]):
            return other.multiply(x)
    if isinstance(next(iter((*args, *kwargs.values())), None), PackedStack | Matrix | Stacked):
        refuse_in_place(getattr(func, "__name__", ""))
    return func(*_plain(args), **_plain(kwargs))


def _is_matrices(weight: PackedStack) -> bool:
    return len(weight.shape) == 3 or not weight.stack.experts


def _linear(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    packed = seen(weight) if isinstance(weight, PackedStack) and _is_matrices(weight) else weight
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
    if isinstance(weight, PackedStack) and not weight.stack.experts and max_norm is None:
        return weight.gather(input)  # what the others say is for gradients of the table
    made: Tensor = func(input, _plain(weight), padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return made


def _plain(value: Any) -> Any:
    """The same with dequantized copies."""
    if isinstance(value, PackedStack | Matrix | Stacked):
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
