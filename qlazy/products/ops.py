"""Products with low-bit weights: one torch op a format, with what each device does best behind it.

    qlazy::linear_int4, qlazy::linear_int8, qlazy::linear_codebook4     y_MN = x_MK @ W_NK.T + bias_N
    the same with `_backward`                                           grad_MK = grad_MN @ W_NK

Registered with `torch.library`, so that `torch.compile` sees one opaque op and the choice by number of tokens never recompiles.
A few tokens go to compiled loops, on a GPU to Triton kernels, which read each packed weight once and unpack nothing to memory;
many tokens go through blocks of rows that are dequantized into a small scratch and multiplied in the dtype of `x` by torch's
own product, as do few where there are neither.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from qlazy import gpu
from qlazy.formats import BNB_BLOCK
from qlazy.products import native_product
from qlazy.products.blocks import dequantize_rows as dequantize_rows
from qlazy.products.blocks import row_blocks
from qlazy.products.blocks import row_ranges as row_ranges
from qlazy.products.native_product import CODEBOOK4, INT4, INT8, Weight
from qlazy.quantizing import codebook

FEW_TOKENS = {INT4: 8, INT8: 8, CODEBOOK4: 8}
"""Up to this many tokens the compiled products are faster than dequantizing (measured, see docs/decisions/0005)."""

_NESTED_CODE = codebook.nested_code()
"""Held here: the compiler looks through a cached function, and would make the table anew at every product."""

_library = torch.library.Library("qlazy", "DEF")
_INT4 = "Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int in_features"
_INT8 = "Tensor packed, Tensor scale, Tensor? bias"
_CODEBOOK4 = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? bias, int out_features, str kind"
)
_library.define(f"linear_int4(Tensor x, {_INT4}) -> Tensor")
_library.define(f"linear_int8(Tensor x, {_INT8}) -> Tensor")
_library.define(f"linear_codebook4(Tensor x, {_CODEBOOK4}) -> Tensor")
_library.define(f"linear_int4_backward(Tensor grad, {_INT4}) -> Tensor")
_library.define(f"linear_int8_backward(Tensor grad, {_INT8}) -> Tensor")
_library.define(f"linear_codebook4_backward(Tensor grad, {_CODEBOOK4}, int in_features) -> Tensor")


def int4_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, in_features: int) -> Weight:
    """An int4 weight from its stored tensors.

    Args:
        packed: int32 (N, ceil(K/8)).
        scale: (N, G).
        zero: int32 (ceil(N/8), G), or None where symmetric.
        in_features: K.

    Returns:
        The weight.
    """
    return Weight(INT4, (packed.shape[0], in_features), in_features // scale.shape[1], packed, scale, zero)


def int8_weight(packed: Tensor, scale: Tensor) -> Weight:
    """An int8 weight from its stored tensors.

    Args:
        packed: uint8 (N, K).
        scale: (N, G).

    Returns:
        The weight.
    """
    rows, columns = packed.shape
    return Weight(INT8, (rows, columns), columns // scale.shape[1], packed, scale)


def codebook4_weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: tuple[int, int],
    kind: str,
) -> Weight:
    """An NF4 or FP4 weight from its stored tensors.

    Args:
        packed: uint8 (ceil(N*K/2),).
        absmax: float32 (B,), or uint8 where nested.
        nested_absmax: float32 (ceil(B/256),), or None.
        nested_offset: float32 (), or None.
        shape: N and K.
        kind: `nf4` or `fp4`.

    Returns:
        The weight.
    """
    nested = None
    if nested_absmax is not None and nested_offset is not None:
        nested = (nested_absmax, nested_offset, _NESTED_CODE)
    return Weight(CODEBOOK4, shape, BNB_BLOCK, packed, absmax, None, nested, codebook.CODES[kind])


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """What the ops do.

    Args:
        x: (..., K).
        weight: On the same device.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`.

    Memory: the result, and for many tokens a scratch of 4 MiB, on a GPU 64 MiB.
    """
    few = _few_tokens(x, weight, bias)
    return product_by_blocks(x, weight, bias) if few is None else few


def product_by_blocks(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product with blocks of dequantized rows, as `product` has it for many tokens.

    Args:
        x: (..., K).
        weight: On the same device.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`.

    Memory: the result, and a scratch of 4 MiB, on a GPU 64 MiB.
    """
    rows, columns = weight.shape
    x_MK = x.reshape(-1, columns)
    y_MN = x.new_empty(x_MK.shape[0], rows)
    for start, stop, block in row_blocks(weight, x.dtype):
        if x.is_cuda:
            torch.mm(x_MK, block.t(), out=y_MN[:, start:stop])
        else:
            y_MN[:, start:stop] = linear(x_MK, block)
    if bias is not None:
        y_MN += bias
    return y_MN.view(*x.shape[:-1], rows)


def _few_tokens(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """The product by kernels that unpack nothing to memory; None where there is none, or blocks of rows are faster."""
    if gpu.has_kernels(x):
        from qlazy.products import triton_products

        return triton_products.linear(x, weight, bias)
    tokens = x.numel() // weight.shape[1]
    return native_product.linear(x, weight, bias) if 0 < tokens <= FEW_TOKENS[weight.kind] else None


def _product_backward(grad: Tensor, weight: Weight) -> Tensor:
    rows, columns = weight.shape
    grad_MN = grad.reshape(-1, rows)
    # Summed in float32: the blocks are parts of one sum.
    total = torch.zeros(grad_MN.shape[0], columns, dtype=torch.float32, device=grad.device)
    for start, stop, block in row_blocks(weight, grad.dtype):
        total += grad_MN[:, start:stop] @ block
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)


def _linear_int4(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, in_features: int
) -> Tensor:
    return product(x, int4_weight(packed, scale, zero, in_features), bias)


def _linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, int8_weight(packed, scale), bias)


def _linear_codebook4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    kind: str,
) -> Tensor:
    shape = out_features, x.shape[-1]
    return product(x, codebook4_weight(packed, absmax, nested_absmax, nested_offset, shape, kind), bias)


def _linear_int4_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, in_features: int
) -> Tensor:
    return _product_backward(grad, int4_weight(packed, scale, zero, in_features))


def _linear_int8_backward(grad: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return _product_backward(grad, int8_weight(packed, scale))


def _linear_codebook4_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    kind: str,
    in_features: int,
) -> Tensor:
    shape = out_features, in_features
    return _product_backward(grad, codebook4_weight(packed, absmax, nested_absmax, nested_offset, shape, kind))


for _device in ("CPU", "CUDA"):
    _library.impl("linear_int4", _linear_int4, _device)
    _library.impl("linear_int8", _linear_int8, _device)
    _library.impl("linear_codebook4", _linear_codebook4, _device)
    _library.impl("linear_int4_backward", _linear_int4_backward, _device)
    _library.impl("linear_int8_backward", _linear_int8_backward, _device)
    _library.impl("linear_codebook4_backward", _linear_codebook4_backward, _device)


@torch.library.register_fake("qlazy::linear_int4")
def _(x, packed, scale, zero, bias, in_features):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("qlazy::linear_int8")
def _(x, packed, scale, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("qlazy::linear_codebook4")
def _(x, packed, absmax, nested_absmax, nested_offset, bias, out_features, kind):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("qlazy::linear_int4_backward")
def _(grad, packed, scale, zero, bias, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], in_features)


@torch.library.register_fake("qlazy::linear_int8_backward")
def _(grad, packed, scale, bias):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], packed.shape[1])


@torch.library.register_fake("qlazy::linear_codebook4_backward")
def _(grad, packed, absmax, nested_absmax, nested_offset, bias, out_features, kind, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], in_features)
