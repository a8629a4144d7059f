"""Products with low-bit weights: one torch op a format, with what each device does best behind it.

    qlazy::linear_int4, qlazy::linear_int8, qlazy::linear_codebook4     y_MN = x_MK @ W_NK.T + bias_N
    the same with `_backward`                                           grad_MK = grad_MN @ W_NK

Registered with `torch.library`, so that `torch.compile` sees one opaque op and the choice by number of tokens never recompiles.
On a CPU a few tokens go to compiled loops, which read each packed weight once and unpack nothing to memory; many tokens go
through blocks of rows that are dequantized into a small scratch and multiplied in the dtype of `x` by torch's own product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from qlazy import codebook, native_product
from qlazy.formats import BNB_BLOCK
from qlazy.native_product import CODEBOOK4, INT4, INT8, Weight
from qlazy.packing import unpack_int4, unpack_zero_points

BLOCK_ELEMENTS = 1 << 21
"""Elements dequantized at a time: few enough to stay in a cache, enough for torch's product to be at its best."""

ROW_BLOCK = 64
"""Blocks begin at multiples of this, so that they begin on a block of every format."""

FEW_TOKENS = {INT4: 8, INT8: 8, CODEBOOK4: 8}
"""Up to this many tokens the compiled products are faster than dequantizing (measured, see docs/decisions/0005)."""

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


def dequantize_rows(weight: Weight, start: int, stop: int, out: Tensor) -> Tensor:
    """Rows of a weight as the model computes with them: the product of code and scale, rounded once.

    Args:
        weight: On any device.
        start: First row, a multiple of 64.
        stop: One past the last row.
        out: Contiguous (at least stop - start, K), any float dtype, on the same device, to write to.

    Returns:
        The first rows of `out`.

    Memory: without the compiled loops nine bytes for each element.
    """
    rows = out[: stop - start]
    if not native_product.dequantize(weight, start, stop, rows):
        plain = {INT4: _plain_int4, INT8: _plain_int8, CODEBOOK4: _plain_codebook4}[weight.kind]
        rows.copy_(plain(weight, out.dtype, start, stop))
    return rows


def row_ranges(weight: Weight) -> list[tuple[int, int]]:
    """The blocks of rows in which a weight is dequantized.

    Args:
        weight: The weight.

    Returns:
        First row and one past the last: BLOCK_ELEMENTS at a time, or 64 rows where these are more.
    """
    rows, columns = weight.shape
    step = max(ROW_BLOCK, BLOCK_ELEMENTS // columns // ROW_BLOCK * ROW_BLOCK)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def row_blocks(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """A whole weight, dequantized block by block into one scratch.

    Args:
        weight: On any device.
        dtype: Of the values.

    Yields:
        First row, one past the last, and their values, which hold until the next block.

    Memory: the scratch of one block.
    """
    ranges = row_ranges(weight)
    scratch = torch.empty(ranges[0][1], weight.shape[1], dtype=dtype, device=weight.packed.device)
    for start, stop in ranges:
        yield start, stop, dequantize_rows(weight, start, stop, scratch)


def _plain_int4(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    rows, columns, groups = stop - start, weight.shape[1], weight.scale.shape[1]
    codes = unpack_int4(weight.packed[start:stop], columns)
    zeros = 8 if weight.zero is None else unpack_zero_points(weight.zero[start // 8 : -(-stop // 8)], rows).unsqueeze(2)
    centred = codes.view(rows, groups, columns // groups).to(torch.float32).sub_(zeros)
    return centred.mul_(weight.scale[start:stop].unsqueeze(2)).view(rows, columns).to(dtype)


def _plain_int8(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    block, factors = weight.packed[start:stop], weight.scale[start:stop]
    grouped = block.view(stop - start, factors.shape[1], -1)
    # Codes of 8 bits are exact in every float dtype, and a product of two elements of one dtype is rounded once.
    return (grouped.to(factors.dtype) * factors.unsqueeze(2)).view(block.shape).to(dtype)


def _plain_codebook4(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    columns, absmax = weight.shape[1], weight.scale
    if weight.nested is not None:
        absmax = codebook.unnest_absmax(absmax, weight.nested[0], weight.nested[1])
    kind = "nf4" if weight.code is codebook.CODES["nf4"] else "fp4"
    flat = codebook.dequantize_blocks(weight.packed, absmax, kind, dtype, start * columns, (stop - start) * columns)
    return flat.view(stop - start, columns)


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
        packed: int8 (N, K).
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
        nested = (nested_absmax, nested_offset, codebook.nested_code())
    return Weight(CODEBOOK4, shape, BNB_BLOCK, packed, absmax, None, nested, codebook.CODES[kind])


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """What the ops do on a CPU, and where a GPU has nothing better.

    Args:
        x: (..., K).
        weight: On the same device.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`.

    Memory: the result, and for many tokens a scratch of BLOCK_ELEMENTS.
    """
    rows, columns = weight.shape
    tokens = x.numel() // columns
    if 0 < tokens <= FEW_TOKENS[weight.kind]:
        few = native_product.linear(x, weight, bias)
        if few is not None:
            return few
    x_MK = x.reshape(-1, columns)
    y_MN = x.new_empty(tokens, rows)
    for start, stop, block in row_blocks(weight, x.dtype):
        y_MN[:, start:stop] = linear(x_MK, block)
    if bias is not None:
        y_MN += bias
    return y_MN.view(*x.shape[:-1], rows)


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


assert ROW_BLOCK % BNB_BLOCK == 0
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
