"""The op `qlazy::few_tokens`: a product of up to eight tokens with any kind of weight, which on a CPU calls no Python.

A model of 200 layers would spend a tenth of a token's time on the way through Python to its products (docs/decisions/0005).
Where there are compilers, `csrc/op.cpp` registers the op for the CPU when `qlazy.native` opens the loops; without them, and on
other devices, it is `ops.product`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlazy import native
from qlazy.products import native_product, ops
from qlazy.products.native_product import Weight

_library = torch.library.Library("qlazy", "FRAGMENT")
_library.define(
    "few_tokens(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? nested_absmax, Tensor? nested_offset, "
    "Tensor? nested_code, Tensor? code, Tensor? bias, int kind, int out_features, int group_size) -> Tensor"
)


def most_elements(weight: Weight, dtype: torch.dtype) -> int:
    """Elements of x up to which the op takes it.

    Args:
        weight: The weight, on any device.
        dtype: Of x.

    Returns:
        0 where the compiled products do not know this kind of weight or dtype.
    """
    taken = native_product.takes(weight) and dtype in native.DTYPES
    return ops.FEW_TOKENS[weight.kind] * weight.shape[1] if taken else 0


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product of few tokens through the op.

    Args:
        x: (..., K), at most `most_elements` of them.
        weight: On the same device.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`.

    Memory: as `native_product.linear`.
    """
    kind, (rows, _), group, packed, scale, zero, nested, code = weight
    y: Tensor = torch.ops.qlazy.few_tokens(
        x, packed, scale, zero, *(nested or (None, None, None)), code, bias, kind, rows, group
    )
    return y


def _in_python(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    code: Tensor | None,
    bias: Tensor | None,
    kind: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    nested = None
    if nested_absmax is not None and nested_offset is not None and nested_code is not None:
        nested = nested_absmax, nested_offset, nested_code
    return ops.product(x, Weight(kind, (out_features, x.shape[-1]), group_size, packed, scale, zero, nested, code), bias)


# For all devices, so that what a compiled library has for the CPU stands before it, whenever that is opened.
_library.impl("few_tokens", _in_python, "CompositeExplicitAutograd")


@torch.library.register_fake("qlazy::few_tokens")
def _(x, packed, scale, zero, n_absmax, n_offset, n_code, code, bias, kind, out_features, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)
