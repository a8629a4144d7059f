"""Which tensors make up weights in eight- and four-bit floats: FP8 (DeepSeek, fbgemm), MXFP4 (gpt-oss), modelopt. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from qlazy.sources.packed import Float4, Float8, PackedTensor, Part
from qlazy.sources.parts import FLOAT8, SCALES, Settings, by_rows, corrupt, pack, require, require_matrix, take, whole_number
from qlazy.sources.safetensors import TensorInfo

MXFP4_GROUP = 32
"""Columns that share a scale in MXFP4."""

NVFP4_GROUP = 16
"""Columns that share a scale in NVFP4."""

_EXPONENTS = ("float8_e8m0fnu", "uint8")
_ACTIVATIONS = (".activation_scale", ".input_scale", ".input_scale_ub", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
_ACTIVATION_ENDS = ("_activation_scale", "_input_scale")


def join_float8(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`fp8` and `fbgemm_fp8`: weights in float8, or as DeepSeek-V4's experts in four bits, with a scale for each block or row.

    Args:
        tensors: Stored tensors; those that make up a weight, and scales of activations, are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    drop_activation_scales(tensors)
    block = _block_size(settings)
    for info in [info for info in tensors.values() if info.dtype in (*FLOAT8, "int8")]:
        scale = _scale_of(tensors, info)
        if scale is None:
            if info.dtype == "int8":
                continue
            scale = take(tensors, f"{info.name}_scale_inv", of=info)
        del tensors[info.name]
        if info.dtype == "int8":
            yield _float4_bytes(info, scale, settings)
        else:
            yield float8(info, scale, block=block, product="float32", dtype=settings.dtype)


def float8(info: TensorInfo, scale: TensorInfo, *, block: tuple[int, int] | None, product: str, dtype: str) -> PackedTensor:
    """A weight in float8 with its scales.

    Args:
        info: The weight, (N, K) or (E, N, K).
        scale: One for the tensor, each row, or each block.
        block: Rows and columns of a block, where the config says it.
        product: Dtype in which both are multiplied.
        dtype: Of the values.

    Returns:
        The weight.

    Raises:
        CorruptCheckpoint: If there are more or fewer scales than blocks.
    """
    require(info, dtypes=FLOAT8)
    require(scale, dtypes=(*SCALES, *_EXPONENTS))
    if len(info.shape) not in (2, 3) or 0 in info.shape:
        corrupt(info, f"has shape {list(info.shape)} instead of rows and columns")
    *experts, rows, columns = info.shape
    grid = scale.shape
    if math.prod(grid) == 1:
        block = (rows, columns) if not experts or experts == [1] else None
    elif grid in ((rows,), (rows, 1)) and not experts:
        block = (1, columns)
    elif not (block and grid == (*experts, -(-rows // block[0]), -(-columns // block[1]))):
        even = len(grid) == len(info.shape) and list(grid[:-2]) == experts and 0 not in grid
        even = even and not rows % grid[-2] and not columns % grid[-1]
        block = (rows // grid[-2], columns // grid[-1]) if even else None
    if block is None:
        corrupt(scale, f"has shape {list(grid)}, which is no grid of blocks for {info.name!r} of shape {list(info.shape)}")
    return pack(
        info.name,
        info.shape,
        dtype,
        Float8(block=block, product=product),
        Part(role="weight", stored=info, rows=1, slice_nbytes=columns),
        Part(role="scale", stored=scale),
    )


def join_mxfp4(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`mxfp4`: gpt-oss' experts, `X_blocks` (E, N, K/32, 16) with `X_scales` (E, N, K/32), which stand for `X` (E, K, N).

    Args:
        tensors: Stored tensors; those that make up a weight are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    for blocks in [info for name, info in tensors.items() if name.endswith("_blocks")]:
        name = blocks.name.removesuffix("_blocks")
        scales = take(tensors, f"{name}_scales", of=blocks)
        del tensors[blocks.name]
        if len(blocks.shape) != 4 or blocks.shape[3] != MXFP4_GROUP // 2 or 0 in blocks.shape:
            corrupt(blocks, f"has shape {list(blocks.shape)} instead of experts, rows, groups and {MXFP4_GROUP // 2} bytes")
        require(blocks, dtypes=("uint8",))
        require(scales, dtypes=_EXPONENTS, shapes=(blocks.shape[:3],))
        experts, rows, groups, _ = blocks.shape
        columns = groups * MXFP4_GROUP
        yield pack(
            name,
            (experts, columns, rows),
            "bfloat16",
            Float4(group_size=MXFP4_GROUP, scale="e8m0", transposed=True),
            by_rows("weight", blocks, columns),
            by_rows("scale", scales, columns),
            row_block=columns,
        )


def as_stored(info: PackedTensor) -> PackedTensor:
    """gpt-oss' experts by rows as they are stored, (E, N, K) in place of (E, K, N): what a low-bit layer wants.

    Args:
        info: A weight that stands for its transpose.

    Returns:
        The weight whose rows are those of the stored one; one that is not transposed as it is.
    """
    scheme = info.scheme
    if not isinstance(scheme, Float4) or not scheme.transposed:
        return info
    experts, columns, rows = info.shape
    parts = tuple(
        dataclasses.replace(part, rows=1, slice_nbytes=part.stored.nbytes // (experts * rows)) if part.rows else part
        for part in info.parts
    )
    straight = dataclasses.replace(scheme, transposed=False)
    return dataclasses.replace(info, shape=(experts, rows, columns), scheme=straight, parts=parts, row_block=1)


def join_modelopt(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`modelopt`: FP8 with `weight_scale`, and NVFP4 with `weight_scale` and `weight_scale_2`.

    Args:
        tensors: Stored tensors; those that make up a weight, and scales of activations, are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    drop_activation_scales(tensors)
    for info in [info for info in tensors.values() if f"{info.name}_scale" in tensors]:
        scale = tensors[f"{info.name}_scale"]
        if info.dtype == "uint8":
            if scale.dtype != "float8_e4m3fn":
                settings.unsupported(f"{info.name!r} is in four bits with scales in {scale.dtype}; of modelopt NVFP4 is read")
            number = take(tensors, f"{info.name}_scale_2", of=info)
            packed = nvfp4(info.name, info, scale, number, multiplies=True, dtype=settings.dtype)
        elif info.dtype in FLOAT8:
            packed = float8(info, scale, block=None, product="float32", dtype=settings.dtype)
        else:
            settings.unsupported(f"{info.name!r} is stored as {info.dtype}; of modelopt FP8 and NVFP4 are read")
        del tensors[info.name], tensors[scale.name]
        yield packed


def nvfp4(name: str, info: TensorInfo, scale: TensorInfo, number: TensorInfo, *, multiplies: bool, dtype: str) -> PackedTensor:
    """A weight in NVFP4.

    Args:
        name: What the weight is called.
        info: uint8 (N, K/2).
        scale: float8 (N, K/16).
        number: The scale of the whole tensor.
        multiplies: Whether that multiplies the scales, as modelopt has it, or divides them.
        dtype: Of the values.

    Returns:
        The weight.
    """
    rows, half = require_matrix(info)
    require(info, dtypes=("uint8",))
    require(scale, dtypes=("float8_e4m3fn",), shapes=((rows, half * 2 // NVFP4_GROUP),))
    require(number, dtypes=("float32",), shapes=((), (1,)) if multiplies else ((1,),))
    if half * 2 % NVFP4_GROUP:
        corrupt(info, f"has {half * 2:,} columns, which do not divide into groups of {NVFP4_GROUP}")
    scheme = Float4(
        group_size=NVFP4_GROUP,
        scale="e4m3",
        global_scale="multiplies" if multiplies else "divides",
    )
    parts = (by_rows("weight", info), by_rows("scale", scale), Part(role="global_scale", stored=number))
    return pack(name, (rows, half * 2), dtype, scheme, *parts)


def mxfp4(name: str, info: TensorInfo, scale: TensorInfo, *, dtype: str) -> PackedTensor:
    """A matrix in MXFP4: uint8 (N, K/2) with a power of two for every 32 columns.

    Args:
        name: What the weight is called.
        info: The weight.
        scale: Its exponents, (N, K/32).
        dtype: Of the values.

    Returns:
        The weight.
    """
    rows, half = require_matrix(info)
    require(info, dtypes=("uint8", "int8"))
    if half * 2 % MXFP4_GROUP:
        corrupt(info, f"has {half * 2:,} columns, which do not divide into groups of {MXFP4_GROUP}")
    require(scale, dtypes=_EXPONENTS, shapes=((rows, half * 2 // MXFP4_GROUP),))
    scheme = Float4(group_size=MXFP4_GROUP, scale="e8m0")
    return pack(name, (rows, half * 2), dtype, scheme, by_rows("weight", info), by_rows("scale", scale))


def drop_activation_scales(tensors: dict[str, TensorInfo]) -> None:
    """Leave out what belongs to activations and the KV cache: here only weights are in low bits.

    Args:
        tensors: Stored tensors; loses them.
    """
    for name in [n for n in tensors if n.endswith((*_ACTIVATIONS, *_ACTIVATION_ENDS))]:
        del tensors[name]


def _float4_bytes(info: TensorInfo, scale: TensorInfo, settings: Settings) -> PackedTensor:
    """DeepSeek-V4's experts: two four-bit floats in an int8, with a power of two for every 32 columns."""
    return mxfp4(info.name, info, scale, dtype=settings.dtype)


def _scale_of(tensors: dict[str, TensorInfo], info: TensorInfo) -> TensorInfo | None:
    base = info.name.removesuffix(".weight")
    names = [f"{info.name}_scale_inv", f"{info.name}_scale"]
    names += [f"{base}.scale", f"{base}.qscale_weight"] if base != info.name else []
    return next((tensors.pop(name) for name in names if name in tensors), None)


def _block_size(settings: Settings) -> tuple[int, int] | None:
    said = settings.config.get("weight_block_size")
    if said is None:
        return None
    what = f"{settings.where}: weight_block_size of quantization_config"
    pair = said if isinstance(said, list) and len(said) == 2 else [said, said]
    rows, columns = (whole_number(number, what, least=1, most=1 << 20) for number in pair)
    return rows, columns
