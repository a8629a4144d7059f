"""Low-bit layers: a linear layer whose weight is packed, and which knows how to be filled row by row.

A layer is made without storage (meta), gets it from `allocate`, and is filled by `fill_rows` from any thread, in any order,
every row once. It is no `nn.Linear`: nothing may take its bytes for a weight. `weight` reads as a dequantized copy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlazy import codebook, ops
from qlazy.formats import BNB_BLOCK, BNB_NESTED_BLOCK, Codebook4, Format, Int4, Int8, Layout
from qlazy.packing import pack_int4, pack_zero_points
from qlazy.quantize import quantize_int4, quantize_int8

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
        device: Where it will live; it decides the layout. No storage is taken yet.
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
        device: str,
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
        self.layout = format.layout(out_features, in_features, name, device)
        self.storage = format.storage(out_features, in_features, name, self.layout)
        for key, stored in self.storage.items():
            self.register_buffer(key, torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta"))
        self.register_parameter("bias", bias)
        self._rows_filled = 0
        self._lock = threading.Lock()

    def allocate(self, device: torch.device | str) -> None:
        """Take storage for the packed weight; pages that are not filled stay untouched.

        Args:
            device: Where.

        Memory: what the format's `storage` adds up to.
        """
        for key, stored in self.storage.items():
            setattr(self, key, torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device=device))
        self._rows_filled = 0

    def fill_rows(self, start: int, weight: Tensor) -> bool:
        """Quantize rows of the weight into their place. Safe to call from several threads for different rows.

        Args:
            start: First row, a multiple of 64.
            weight: (rows, K), any float dtype, on the layer's device; the number of rows is a multiple of 64 but for the last.
        Returns:
            True when this call completed the layer.
        Raises:
            NonFiniteError: a scale came out as NaN or infinite, so one of these weights is.

        Memory: the quantizer's work buffers, about 3 MiB; for double quantization one float32 for every 64 weights until
        complete.
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

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the layer computes with it.

        Args:
            dtype: Of the result; default the layer's.
        Returns:
            (N, K), a new tensor.

        Memory: the result and one block of 256 rows.
        """
        dtype = dtype or self.dtype
        step = ops.BLOCK_ROWS
        blocks = [self._rows(i, min(i + step, self.out_features), dtype) for i in range(0, self.out_features, step)]
        return torch.cat(blocks)

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized: a new tensor at every read, for code that wants values, dtype or shape."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: (..., K).
        Returns:
            (..., N) in the dtype of `x`.

        Memory: the result, and where many tokens come at once the scratch for 256 rows.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without gradients, through the op of the format.

        Args:
            x: (..., K).
        Returns:
            (..., N) in the dtype of `x`.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, format={self.format.name}, bias={self.bias is not None}"

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
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

    def _filled(self, rows: int) -> bool:
        """Count rows; True for the call that completes the layer."""
        with self._lock:
            self._rows_filled += rows
            return self._rows_filled == self.out_features

    def __getstate__(self) -> dict[str, Any]:
        """A layer can be pickled and copied; its lock is made anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        self._lock = threading.Lock()


class Int4Linear(QuantLinear):
    """Four-bit integers, in torch's CPU order where its product takes the shape, else in the logical layout."""

    format: Int4
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def fill_rows(self, start: int, weight: Tensor) -> bool:  # noqa: D102
        stop = start + weight.shape[0]
        codes, scale, zero = quantize_int4(
            weight, group_size=self.format.group_size, symmetric=self.format.symmetric, scale_dtype=self.dtype
        )
        require_finite(scale)
        if self.layout is Layout.CPU_INT4:
            self.weight_packed[start:stop] = ops.pack_int4_cpu(codes)
            self.weight_scale[:, start:stop, 0] = scale.T
            offset = torch.zeros_like(scale) if zero is None else (8.0 - zero.float()).mul_(scale).to(scale.dtype)
            self.weight_scale[:, start:stop, 1] = offset.T
        else:
            self.weight_packed[start:stop] = pack_int4(codes)
            self.weight_scale[start:stop] = scale
            if zero is not None:
                self.weight_zero_point[start // 8 : -(-stop // 8)] = pack_zero_points(zero)
        return self._filled(weight.shape[0])

    def logical(self) -> dict[str, Tensor]:
        """The tensors of the logical layout, whatever the layout in memory: exact, as both hold the same codes and scales.

        Returns:
            `weight_packed`, `weight_scale` and, where asymmetric, `weight_zero_point`.

        Memory: the result and a block of 256 rows.
        """
        if self.layout is Layout.LOGICAL:
            return {key: getattr(self, key) for key in self.storage}
        scale, offset = self.weight_scale[..., 0].T, self.weight_scale[..., 1].T
        packed = [pack_int4(ops.unpack_int4_cpu(self.weight_packed[i : i + 256])) for i in range(0, self.out_features, 256)]
        logical = {"weight_packed": torch.cat(packed), "weight_scale": scale.contiguous()}
        if not self.format.symmetric:
            zero = 8.0 - offset.float() / scale.float()
            logical["weight_zero_point"] = pack_zero_points(zero.round_().to(torch.uint8))
        return logical

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """As the base class; the CPU's own layout is left for the logical one on the way to a GPU."""
        device = fn(torch.empty(0, device=self.weight_packed.device)).device
        if self.layout is Layout.CPU_INT4 and device.type not in ("cpu", "meta"):
            stored = self.logical()
            self.layout = Layout.LOGICAL
            self.storage = self.format.storage(self.out_features, self.in_features, str(self.dtype).removeprefix("torch."))
            for key, tensor in stored.items():
                self.register_buffer(key, tensor)
        return super()._apply(fn, recurse)

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        cpu_layout = self.layout is Layout.CPU_INT4
        zero = getattr(self, "weight_zero_point", None)
        y: Tensor = torch.ops.qlazy.linear_int4(
            x, self.weight_packed, self.weight_scale, zero, self.bias, self.in_features, cpu_layout
        )
        return y

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self.layout is Layout.CPU_INT4:
            return ops.dequantize_int4_cpu_rows(self.weight_packed, self.weight_scale, dtype, start, stop).T
        zero = getattr(self, "weight_zero_point", None)
        return ops.dequantize_int4_rows(self.weight_packed, self.weight_scale, zero, self.in_features, dtype, start, stop)


class Int8Linear(QuantLinear):
    """Eight-bit integers, one scale a row or group."""

    format: Int8
    weight_packed: Tensor
    weight_scale: Tensor

    def fill_rows(self, start: int, weight: Tensor) -> bool:  # noqa: D102
        stop = start + weight.shape[0]
        codes, scale = quantize_int8(weight, group_size=self.format.group_size, scale_dtype=self.dtype)
        require_finite(scale)
        self.weight_packed[start:stop] = codes
        self.weight_scale[start:stop] = scale
        return self._filled(weight.shape[0])

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = torch.ops.qlazy.linear_int8(x, self.weight_packed, self.weight_scale, self.bias)
        return y

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_int8_rows(self.weight_packed, self.weight_scale, dtype, start, stop)


class Codebook4Linear(QuantLinear):
    """NF4 and FP4 with bitsandbytes' bytes; on a GPU multiplied by bitsandbytes' own kernels."""

    format: Codebook4
    absmax: Tensor
    absmax_packed: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    _absmax: Tensor | None = None
    _quant_state: Any = None

    def fill_rows(self, start: int, weight: Tensor) -> bool:  # noqa: D102
        with self._lock:
            if self._absmax is None:
                blocks = -(-self.in_features * self.out_features // BNB_BLOCK)
                double = self.format.double_quant
                # Nested scales need the mean of all of them, so they are made when the last row has come.
                self._absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device) if double else self.absmax
        begin, count = start * self.in_features, weight.numel()
        part = self._absmax[begin // BNB_BLOCK : -(-(begin + count) // BNB_BLOCK)]
        packed = self.weight_packed[begin // 2 : -(-(begin + count) // 2)]
        codebook.quantize_blocks(weight, self.format.kind, packed_out=packed, absmax_out=part)
        require_finite(part)
        if not self._filled(weight.shape[0]):
            return False
        if self.format.double_quant:
            self.absmax_packed, self.nested_absmax, self.nested_offset = codebook.nest_absmax(self._absmax)
        self._absmax = None
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """As the base class; what bitsandbytes was told of the storage before holds no longer."""
        self._quant_state = None
        return super()._apply(fn, recurse)

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        if x.device.type == "cuda":
            return self._bitsandbytes_product(x)
        nested = self.format.double_quant
        y: Tensor = torch.ops.qlazy.linear_codebook4(
            x,
            self.weight_packed,
            self.absmax_packed if nested else self.absmax,
            self.nested_absmax if nested else None,
            self.nested_offset if nested else None,
            self.bias,
            self.out_features,
            self.format.kind,
        )
        return y

    def _bitsandbytes_product(self, x: Tensor) -> Tensor:
        import bitsandbytes as bnb

        if self._quant_state is None:
            nested = None
            if self.format.double_quant:
                code = codebook.nested_code().to(x.device)
                nested = bnb.functional.QuantState(
                    absmax=self.nested_absmax, code=code, blocksize=BNB_NESTED_BLOCK, dtype=torch.float32
                )
            self._quant_state = bnb.functional.QuantState(
                absmax=self.absmax_packed if nested else self.absmax,
                shape=torch.Size((self.out_features, self.in_features)),
                code=codebook.CODES[self.format.kind].to(x.device),
                blocksize=BNB_BLOCK,
                quant_type=self.format.kind,
                dtype=self.dtype,
                offset=self.nested_offset if nested else None,
                state2=nested,
            )
        y: Tensor = bnb.matmul_4bit(  # type: ignore[attr-defined]
            x, self.weight_packed.view(-1, 1).t(), quant_state=self._quant_state, bias=self.bias
        )
        return y

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self.format.double_quant:
            absmax = codebook.unnest_absmax(self.absmax_packed, self.nested_absmax, self.nested_offset)
        else:
            absmax = self.absmax
        count = (stop - start) * self.in_features
        flat = codebook.dequantize_blocks(self.weight_packed, absmax, self.format.kind, dtype, start * self.in_features, count)
        return flat.view(stop - start, self.in_features)


class NonFiniteError(ValueError):
    """A weight is NaN or infinite; whoever knows the tensor's name turns this into `CorruptCheckpoint`."""


LAYERS: dict[type[Format], type[QuantLinear]] = {Int4: Int4Linear, Int8: Int8Linear, Codebook4: Codebook4Linear}
"""The layer of each format."""


def require_finite(values: Tensor) -> None:
    """Raise where a value is NaN or infinite.

    Args:
        values: Any float tensor: scales, which are not finite where a weight is not, or weights themselves.
    Raises:
        NonFiniteError: one is not finite.

    Memory: one number: NaN and infinities survive the difference that is looked at.
    """
    # The difference can overflow where all is well, so a suspicion is looked into.
    suspect = values.numel() > 0 and not math.isfinite(float(values.amax() - values.amin()))
    if suspect and not bool(torch.isfinite(values).all()):
        raise NonFiniteError


class _Product(torch.autograd.Function):
    """The product with a gradient for x, so that adapters train through a frozen low-bit layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None
