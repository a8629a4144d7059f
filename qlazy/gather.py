"""Rows of a packed table: what an embedding looks up, dequantized and nothing else.

qlazy::gather_int4, qlazy::gather_int8     y_IK = W_NK[index_I]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlazy import gpu, ops
from qlazy.native_product import INT4, INT8, Weight
from qlazy.packing import unpack_int4

_library = torch.library.Library("qlazy", "FRAGMENT")
_library.define(
    "gather_int4(Tensor index, Tensor packed, Tensor scale, Tensor? zero, int in_features, ScalarType dtype) -> Tensor"
)
_library.define("gather_int8(Tensor index, Tensor packed, Tensor scale, ScalarType dtype) -> Tensor")


def gather_rows(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a weight, as the model computes with them.

    Args:
        weight: On any device.
        index: Integers (I,) from 0 on, same device.
        dtype: Of the result.
    Returns:
        (I, K), the same values as `ops.dequantize_rows` gives.
    Raises:
        IndexError: an index that is no row; by the kernels of a GPU, where nothing waits to see it, the row is NaN instead.

    Memory: the result and nine bytes for each of its elements; of NF4 and FP4 the whole table, dequantized.
    """
    made: Tensor
    if weight.kind == INT4:
        made = torch.ops.qlazy.gather_int4(index, weight.packed, weight.scale, weight.zero, weight.shape[1], dtype)
    elif weight.kind == INT8:
        made = torch.ops.qlazy.gather_int8(index, weight.packed, weight.scale, dtype)
    else:
        whole = torch.empty(weight.shape, dtype=dtype, device=index.device)
        for start, stop in ops.row_ranges(weight):
            ops.dequantize_rows(weight, start, stop, whole[start:stop])
        made = whole[index]
    return made


def _gather(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor:
    if gpu.has_kernels(index):
        from qlazy import triton_products

        gathered = triton_products.gather(weight, index, dtype)
        if gathered is not None:
            return gathered
    count, columns, groups = index.shape[0], weight.shape[1], weight.scale.shape[1]
    scale = weight.scale[index].unsqueeze(2)
    if weight.kind == INT8:
        # As in `ops`: codes of 8 bits are exact in every float dtype, and a product of two is rounded once.
        codes = weight.packed[index].view(count, groups, -1).to(scale.dtype)
        return (codes * scale).view(count, columns).to(dtype)
    centred = unpack_int4(weight.packed[index], columns).view(count, groups, -1).to(torch.float32)
    if weight.zero is None:
        centred.sub_(8)
    else:
        centred.sub_((weight.zero[index // 8] >> (index % 8 * 4).unsqueeze(1) & 15).unsqueeze(2))
    return centred.mul_(scale).view(count, columns).to(dtype)


def _gather_int4(
    index: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, dtype: torch.dtype
) -> Tensor:
    return _gather(ops.int4_weight(packed, scale, zero, in_features), index, dtype)


def _gather_int8(index: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _gather(ops.int8_weight(packed, scale), index, dtype)


for _device in ("CPU", "CUDA"):
    _library.impl("gather_int4", _gather_int4, _device)
    _library.impl("gather_int8", _gather_int8, _device)


@torch.library.register_fake("qlazy::gather_int4")
def _(index, packed, scale, zero, in_features, dtype):  # type: ignore[no-untyped-def]
    return scale.new_empty((index.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("qlazy::gather_int8")
def _(index, packed, scale, dtype):  # type: ignore[no-untyped-def]
    return scale.new_empty((index.shape[0], packed.shape[1]), dtype=dtype)
