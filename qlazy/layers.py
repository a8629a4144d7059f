"""The low-bit layers, one a format: how each quantizes rows into its storage, and which product it calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlazy import codebook, ops
from qlazy.formats import BNB_BLOCK, BNB_NESTED_BLOCK, Codebook4, Format, Int4, Int8, Layout
from qlazy.packing import pack_int4, pack_zero_points
from qlazy.quant_linear import QuantLinear, require_finite
from qlazy.quantize import quantize_int4, quantize_int8


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


LAYERS: dict[type[Format], type[QuantLinear]] = {Int4: Int4Linear, Int8: Int8Linear, Codebook4: Codebook4Linear}
"""The layer of each format."""
