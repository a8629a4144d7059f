"""What all low-bit layers share: a linear layer whose weight is packed, and which knows how to be filled row by row.

A layer is made without storage (meta), gets it from `allocate`, and is filled by `fill_rows` from any thread, in any order,
every row once. It is no `nn.Linear`: nothing may take its bytes for a weight. `weight` reads as a dequantized copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qlazy import native
from qlazy.formats import Format
from qlazy.layers.storage import allocate
from qlazy.products import few_tokens, ops
from qlazy.products.native_product import Weight
from qlazy.quantizing.quantize import is_finite

ROW_BLOCK = 64
"""Rows that every packed layout keeps together."""

QUANTIZED_ELEMENTS = 1 << 20
"""Elements that go to a quantizer at a time, so that what it holds beside its result stays small."""


class QuantLinear(nn.Module):
    """A linear layer with a packed weight: y = x @ W.T + bias.

    Args:
        in_features: K.
        out_features: N.
        format: How the weight is stored.
        dtype: Dtype of scales and bias, and of what `weight` reads as.
        bias: The bias parameter, if there is one.
        transposed: Whether checkpoints hold the weight as (K, N), as those of transformers' Conv1D do.
    """

    format: Format
    weight_packed: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: Format,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.dtype = dtype
        self.transposed = transposed
        name = str(dtype).removeprefix("torch.")
        self.storage = format.storage(out_features, in_features, name)
        for key, stored in self.storage.items():
            self.register_buffer(key, torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta"))
        self.register_parameter("bias", bias)
        self._few_elements = few_tokens.most_elements(self._packed(), dtype)
        self._rows_filled = [0]  # in a list, as a module's own attributes are slow to set
        self._lock = threading.Lock()

    def allocate(self, device: torch.device | str) -> None:
        """Take storage for the packed weight; pages that are not filled stay untouched.

        Args:
            device: Where.

        Memory: what the format's `storage` adds up to.
        """
        for key, stored in self.storage.items():
            setattr(self, key, allocate(stored.shape, getattr(torch, stored.dtype), device))
        self._rows_filled[0] = 0

    def fill_rows(self, start: int, weight: Tensor) -> bool:
        """Quantize rows of the weight into their place. Safe to call from several threads for different rows.

        Args:
            start: First row, a multiple of 64.
            weight: (rows, K), any float dtype, on the layer's device; the number of rows is a multiple of 64 but for the last.
        Returns:
            True when this call completed the layer.
        Raises:
            NonFiniteError: a scale came out as NaN or infinite, so one of these weights is.

        Memory: a plain quantizer's work buffers, about 3 MiB, and none of a compiled one; for double quantization one float32
        for every 64 weights until complete.
        """
        raise NotImplementedError

    def fill(self, weight: Tensor, start: int = 0) -> None:
        """Quantize a whole weight, or rows from `start` on, about a million elements at a time.

        Args:
            weight: (rows, K), or (K, rows) where `transposed`; any float dtype, on any device.
            start: First row, a multiple of 64.
        Raises:
            NonFiniteError: as `fill_rows`.

        Memory: as `fill_rows`, plus a piece of a million elements where device or order differ.
        """
        rows_first = (weight.t() if self.transposed else weight).detach()
        step = max(ROW_BLOCK, QUANTIZED_ELEMENTS // self.in_features // ROW_BLOCK * ROW_BLOCK)
        for first in range(0, rows_first.shape[0], step):
            piece = rows_first[first : first + step].to(self.weight_packed.device).contiguous()
            self.fill_rows(start + first, piece)
        if (
            self.weight_packed.is_cuda and self.complete
        ):  # there rows are filled without a look, see `qlazy/quantizing/quantize.py`
            for held in (getattr(self, key) for key in self.storage):
                if held.is_floating_point():
                    require_finite(held)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the layer computes with it.

        Args:
            dtype: Of the result; default the layer's.
        Returns:
            (N, K), a new tensor.

        Memory: the result, and without the compiled loops some 20 MiB.
        """
        dtype = dtype or self.dtype
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight_packed.device)
        weight = self._packed()
        for start, stop in ops.row_ranges(weight):
            ops.dequantize_rows(weight, start, stop, whole[start:stop])
        return whole

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized: a new tensor at every read, for code that wants values, dtype or shape."""
        stand_in = self._parameters.get("weight")  # while transformers loads, see qlazy/hf.py
        if stand_in is not None:
            return stand_in
        if self.weight_packed.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: (..., K).
        Returns:
            (..., N) in the dtype of `x`.
        Raises:
            ValueError: another number of features, or a layer without storage.

        Memory: the result, and where many tokens come at once a scratch of about 4 MiB.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{type(self).__name__} takes {self.in_features} features, and got {x.shape[-1]}.")
        # From the dictionaries: a module looks in three places for an attribute, which counts with 200 layers a token.
        bias = self._parameters["bias"]
        if self._buffers["weight_packed"].is_meta and not x.is_meta:  # type: ignore[union-attr]
            raise ValueError(f"{type(self).__name__}({self.extra_repr()}) has no storage for its weight yet.")
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return product if bias is None else product + bias
        return few_tokens.linear(x, self._packed(), bias) if self._few(x) else self.product(x, bias)

    def _few(self, x: Tensor) -> bool:
        """Whether x goes through the op for few tokens; compiled code must know for good, no second graph is made for it."""
        if x.dtype is not self.dtype or not x.is_cpu:
            return False  # a codebook's tables, which lie on the host, stay out of graphs for a GPU
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting() and statically_known_true(x.numel() <= self._few_elements)
        return x.numel() <= self._few_elements and native.available()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` without gradients, through the op of the format.

        Args:
            x: (..., K).
            bias: (N,), or None.
        Returns:
            (..., N) in the dtype of `x`.
        """
        raise NotImplementedError

    def product_backward(self, grad: Tensor) -> Tensor:
        """The gradient for x.

        Args:
            grad: (..., N).
        Returns:
            (..., K) in the dtype of `grad`.

        Memory: the result in float32, and a scratch of about 4 MiB.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, format={self.format.name}, bias={self.bias is not None}"

    def _packed(self) -> Weight:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Follow `model.to(...)` to another device, never to another dtype: packed bytes and scales mean nothing in one."""
        moved = {}
        for key in self.storage:
            held: Tensor = getattr(self, key)
            # Seen as bytes, as whatever casts a module leaves integers alone.
            moved[key] = fn(held.reshape(-1).view(torch.uint8)).view(held.dtype).view(held.shape)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(moved)
        return self

    @property
    def complete(self) -> bool:
        """Whether every row has been filled."""
        return self._rows_filled[0] == self.out_features

    def _filled(self, rows: int) -> bool:
        """Count rows; True for the call that completes the layer."""
        with self._lock:
            self._rows_filled[0] += rows
            return self._rows_filled[0] == self.out_features

    def __getstate__(self) -> dict[str, Any]:
        """A layer can be pickled and copied; its lock is made anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        self._lock = threading.Lock()


class NonFiniteError(ValueError):
    """A weight is NaN or infinite; whoever knows the tensor's name turns this into `CorruptCheckpoint`."""


def require_finite(values: Tensor) -> None:
    """Raise where a value is NaN or infinite.

    Args:
        values: Any float tensor: scales, which are not finite where a weight is not, or weights themselves.
    Raises:
        NonFiniteError: one is not finite.

    Memory: one number.
    """
    if not is_finite(values):
        raise NonFiniteError


class _Product(torch.autograd.Function):
    """The product with a gradient for x, so that adapters train through a frozen low-bit layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (ctx.layer.product_backward(grad) if ctx.needs_input_grad[0] else None), None
