"""Rows of a packed table: what an embedding looks up, dequantized and nothing else.

qlazy::gather_int4, qlazy::gather_int8, qlazy::gather_codebook4     y_IK = W_NK[index_I]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlazy import gpu
from qlazy.formats import BNB_NESTED_BLOCK
from qlazy.products import ops
from qlazy.products.native_product import CODEBOOK4, INT4, INT8, Weight
from qlazy.quantizing import codebook
from qlazy.quantizing.packing import unpack_int4

_library = torch.library.Library("qlazy", "FRAGMENT")
_library.define(
    "gather_int4(Tensor index, Tensor packed, Tensor scale, Tensor? zero, int in_features, ScalarType dtype) -> Tensor"
)
_library.define("gather_int8(Tensor index, Tensor packed, Tensor scale, ScalarType dtype) -> Tensor")
_library.define(
    "gather_codebook4(Tensor index, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "int out_features, int in_features, str kind, ScalarType dtype) -> Tensor"
)


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

    Memory: the result and nine bytes for each of its elements; of NF4 and FP4 whose rows end within a block the whole table,
        dequantized.
    """
    made: Tensor
    if weight.kind == INT4:
        made = torch.ops.qlazy.gather_int4(index, weight.packed, weight.scale, weight.zero, weight.shape[1], dtype)
    elif weight.kind == INT8:
        made = torch.ops.qlazy.gather_int8(index, weight.packed, weight.scale, dtype)
    else:
        nested = (None, None) if weight.nested is None else weight.nested[:2]
        kind = "nf4" if weight.code is codebook.CODES["nf4"] else "fp4"
        made = torch.ops.qlazy.gather_codebook4(index, weight.packed, weight.scale, *nested, *weight.shape, kind, dtype)
    return made


def _gather(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor:
    if index.is_cpu and index.numel() and int(index.min()) < 0:
        raise IndexError(f"index {int(index.min())} is out of bounds: rows are counted from 0")
    if weight.kind == CODEBOOK4:
        return _gather_blocks(weight, index, dtype)
    if gpu.has_kernels(index):
        from qlazy.products import triton_products

        gathered = triton_products.gather(weight, index, dtype)
        if gathered is not None:
            return gathered
    count, columns, groups = index.shape[0], weight.shape[1], weight.scale.shape[1]
    scale = weight.scale[index].unsqueeze(2)
    if weight.kind == INT8:
        # As in `ops`: codes of 8 bits are exact in every float dtype, and a product of two is rounded once.
        centred = weight.packed[index].view(count, groups, columns // groups).to(scale.dtype).sub_(128)
        return centred.mul_(scale).view(count, columns).to(dtype)
    centred = unpack_int4(weight.packed[index], columns).view(count, groups, columns // groups).to(torch.float32)
    if weight.zero is None:
        centred.sub_(8)
    else:
        centred.sub_((weight.zero[index // 8] >> (index % 8 * 4).unsqueeze(1) & 15).unsqueeze(2))
    return centred.mul_(scale).view(count, columns).to(dtype)


def _gather_blocks(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a codebook: the rows' blocks become a small weight of their own, whose absmax is not nested."""
    rows, columns = weight.shape
    if columns % weight.group_size:
        whole = torch.empty(weight.shape, dtype=dtype, device=index.device)
        for start, stop in ops.row_ranges(weight):
            ops.dequantize_rows(weight, start, stop, whole[start:stop])
        return whole[index]
    packed = weight.packed.view(rows, columns // 2)[index].view(-1)
    count = columns // weight.group_size
    blocks = (index.long().unsqueeze(1) * count + torch.arange(count, device=index.device)).view(-1)
    absmax = weight.scale[blocks]
    if weight.nested is not None:
        nested_absmax, offset, values = weight.nested
        scales = nested_absmax[blocks // BNB_NESTED_BLOCK]
        absmax = gpu.on_device(values, index.device)[absmax.int()].mul_(scales).add_(offset)
    made = torch.empty(len(index), columns, dtype=dtype, device=index.device)
    if not len(index):
        return made
    taken = weight._replace(shape=(len(index), columns), packed=packed, scale=absmax, nested=None)
    return ops.dequantize_rows(taken, 0, len(index), made)


def _gather_int4(
    index: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, dtype: torch.dtype
) -> Tensor:
    return _gather(ops.int4_weight(packed, scale, zero, in_features), index, dtype)


def _gather_int8(index: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _gather(ops.int8_weight(packed, scale), index, dtype)


def _gather_codebook4(
    index: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    in_features: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    shape = out_features, in_features
    return _gather(ops.codebook4_weight(packed, absmax, nested_absmax, nested_offset, shape, kind), index, dtype)


for _device in ("CPU", "CUDA"):
    _library.impl("gather_int4", _gather_int4, _device)
    _library.impl("gather_int8", _gather_int8, _device)
    _library.impl("gather_codebook4", _gather_codebook4, _device)


@torch.library.register_fake("qlazy::gather_int4")
def _(index, packed, scale, zero, in_features, dtype):  # type: ignore[no-untyped-def]
    return scale.new_empty((index.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("qlazy::gather_int8")
def _(index, packed, scale, dtype):  # type: ignore[no-untyped-def]
    return scale.new_empty((index.shape[0], packed.shape[1]), dtype=dtype)


@torch.library.register_fake("qlazy::gather_codebook4")
def _(index, packed, absmax, nested_absmax, nested_offset, out_features, in_features, kind, dtype):  # type: ignore[no-untyped-def]
    return absmax.new_empty((index.shape[0], in_features), dtype=dtype)
