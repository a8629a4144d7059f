"""The low-bit layers, one a format: how each quantizes rows into its storage, and which product it calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlazy import gpu
from qlazy.formats import BNB_BLOCK, Codebook4, Format, Int4, Int8
from qlazy.layers.quant_linear import NonFiniteError, QuantLinear
from qlazy.products import ops
from qlazy.products.native_product import Weight
from qlazy.quantizing import codebook
from qlazy.quantizing.quantize import store_int4, store_int8


class Int4Linear(QuantLinear):
    """Four-bit integers, one scale and where asymmetric one zero a group."""

    format: Int4
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def fill_rows(self, start: int, weight: Tensor) -> bool:  # noqa: D102
        stop = start + weight.shape[0]
        finite = store_int4(
            weight,
            group_size=self.format.group_size,
            packed_out=self.weight_packed[start:stop],
            scale_out=self.weight_scale[start:stop],
            zero_out=None if self.format.symmetric else self.weight_zero_point[start // 8 : -(-stop // 8)],
        )
        if not finite:
            raise NonFiniteError
        return self._filled(weight.shape[0])

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        y: Tensor = torch.ops.qlazy.linear_int4(x, *self._stored(), bias, self.in_features)
        return y

    def product_backward(self, grad: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = torch.ops.qlazy.linear_int4_backward(grad, *self._stored(), None, self.in_features)
        return y

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        held: Any = self._buffers  # see `forward`
        return held["weight_packed"], held["weight_scale"], held.get("weight_zero_point")

    def _packed(self) -> Weight:
        return ops.int4_weight(*self._stored(), self.in_features)


class Int8Linear(QuantLinear):
    """Eight-bit integers, one scale a row or group."""

    format: Int8
    weight_packed: Tensor
    weight_scale: Tensor

    def fill_rows(self, start: int, weight: Tensor) -> bool:  # noqa: D102
        stop = start + weight.shape[0]
        finite = store_int8(
            weight,
            group_size=self.format.group_size,
            packed_out=self.weight_packed[start:stop],
            scale_out=self.weight_scale[start:stop],
        )
        if not finite:
            raise NonFiniteError
        return self._filled(weight.shape[0])

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        held = self._buffers  # see `forward`
        y: Tensor = torch.ops.qlazy.linear_int8(x, held["weight_packed"], held["weight_scale"], bias)
        return y

    def product_backward(self, grad: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = torch.ops.qlazy.linear_int8_backward(grad, self.weight_packed, self.weight_scale, None)
        return y

    def _packed(self) -> Weight:
        return ops.int8_weight(self.weight_packed, self.weight_scale)


class Codebook4Linear(QuantLinear):
    """NF4 and FP4 with bitsandbytes' bytes."""

    format: Codebook4
    absmax: Tensor
    absmax_packed: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    _absmax: Tensor | None = None

    def allocate(self, device: torch.device | str) -> None:  # noqa: D102
        super().allocate(device)
        # Now, as what is first copied in the warm-up of a CUDA graph lives in the memory of that graph.
        for constant in (codebook.CODES[self.format.kind], codebook.nested_code()):
            gpu.on_device(constant, self.weight_packed.device)

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
        if not codebook.quantize_blocks(weight, self.format.kind, packed_out=packed, absmax_out=part):
            raise NonFiniteError
        if not self._filled(weight.shape[0]):
            return False
        if self.format.double_quant:
            self.absmax_packed, self.nested_absmax, self.nested_offset = codebook.nest_absmax(self._absmax)
        self._absmax = None
        return True

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        y: Tensor = torch.ops.qlazy.linear_codebook4(x, *self._stored(), bias, self.out_features, self.format.kind)
        return y

    def product_backward(self, grad: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = torch.ops.qlazy.linear_codebook4_backward(
            grad, *self._stored(), None, self.out_features, self.format.kind, self.in_features
        )
        return y

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        held: Any = self._buffers  # see `forward`
        if self.format.double_quant:
            return held["weight_packed"], held["absmax_packed"], held["nested_absmax"], held["nested_offset"]
        return held["weight_packed"], held["absmax"], None, None

    def _packed(self) -> Weight:
        return ops.codebook4_weight(*self._stored(), (self.out_features, self.in_features), self.format.kind)


LAYERS: dict[type[Format], type[QuantLinear]] = {Int4: Int4Linear, Int8: Int8Linear, Codebook4: Codebook4Linear}
"""The layer of each format."""
