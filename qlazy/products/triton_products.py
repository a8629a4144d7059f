"""Products with low-bit weights on a GPU, by the Triton kernels and for NF4 and FP4 by bitsandbytes' where it is installed.

As in `native_product`, each stands aside for what it does not take. Which kernel, and how it cuts its work, says the table of
the GPU (`tuned.py`) by format, number of tokens and shape, never a measurement on the way: so everything here can be captured
in a CUDA graph once it has run, and nothing waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from qlazy_kernels.checks import FLOATS
from qlazy_kernels.codebook4 import dequantize_codebook4
from qlazy_kernels.dequantize import dequantize_int4, dequantize_int8
from qlazy_kernels.gather import gather_int4, gather_int8
from qlazy_kernels.gemm import default_tile, gemm_int4, gemm_int8
from qlazy_kernels.gemv import gemv_int4, gemv_int8
from qlazy_kernels.gemv_codebook4 import gemv_codebook4
from qlazy_kernels.grouped import group_blocks, grouped_gemm_int4, grouped_gemm_int8
from qlazy_kernels.tiles import Tile
from torch import Tensor

from qlazy import gpu
from qlazy.formats import BNB_BLOCK
from qlazy.products import tuned
from qlazy.products.native_product import CODEBOOK4, INT4, INT8, Weight
from qlazy.quantizing import codebook

NAMES = {INT4: "int4", INT8: "int8", CODEBOOK4: "codebook4"}
"""What tables call each kind of weight."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """Multiply tokens by a low-bit weight that is unpacked nowhere.

    Args:
        x: (..., K) in any float dtype.
        weight: On the same device.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`; None where the table has many tokens go through blocks of dequantized rows, or no kernel
        takes this weight.

    Memory: the result; where K is split among programs as many float32 parts of it; bitsandbytes may unpack the whole weight.
    """
    rows, columns = weight.shape
    tokens = x.numel() // columns
    if tokens == 0 or x.dtype not in FLOATS:
        return None
    kernel, tile = _choice(_device_name(x.device), weight.kind, tokens, rows, columns)
    return run(kernel, tile, x, weight, bias)


def run(kernel: str, tile: Tile | None, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """The product by one kernel.

    Args:
        kernel: As a table names it.
        tile: How it cuts its work; None = by number of tokens.
        x: (..., K) in float16, bfloat16 or float32, at least one token.
        weight: On the same device.
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of `x`; None where that kernel does not take this weight.

    Memory: as `linear`.
    """
    rows, columns = weight.shape
    aligned = weight.packed.data_ptr() % 4 == 0
    if kernel == "bitsandbytes":
        return _by_bitsandbytes(x, weight, bias) if _has_bitsandbytes() else None
    if kernel == "gemv" and weight.kind == INT4:
        return gemv_int4(x, weight.packed, weight.scale, weight.zero, bias, tile=tile)
    if kernel == "gemv" and weight.kind == INT8 and weight.group_size % 4 == 0 and aligned:
        return gemv_int8(x, weight.packed, weight.scale, bias, tile=tile)
    if kernel == "gemv" and weight.kind == CODEBOOK4 and columns % BNB_BLOCK == 0 and aligned:
        return gemv_codebook4(x, *_codebook4(weight), bias, rows=rows, tile=tile)
    if kernel == "gemm" and weight.kind != CODEBOOK4 and x.dtype != torch.float32:  # whose tiles take too much shared memory
        if weight.kind == INT4:
            return gemm_int4(x, weight.packed, weight.scale, weight.zero, bias, tile=tile)
        return gemm_int8(x, weight.packed, weight.scale, bias, tile=tile)
    return None


def dequantize(weight: Weight, start: int, stop: int, out: Tensor) -> bool:
    """Rows of a weight as the model computes with them: code times scale in float32, rounded once.

    Args:
        weight: The weight.
        start: First row.
        stop: One past the last row.
        out: (stop - start, K), contiguous, same device, to write to.

    Returns:
        False where no kernel takes this dtype.

    Memory: none.
    """
    if out.dtype not in FLOATS:
        return False
    where: dict[str, Any] = {"start": start, "stop": stop, "out": out, "dtype": out.dtype}
    rows, columns = weight.shape
    if weight.kind == INT4:
        dequantize_int4(weight.packed, weight.scale, weight.zero, columns=columns, **where)
    elif weight.kind == INT8:
        dequantize_int8(weight.packed, weight.scale, **where)
    else:
        dequantize_codebook4(*_codebook4(weight), rows=rows, columns=columns, **where)
    return True


def gather(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Rows of a packed table by their index.

    Args:
        weight: int4 or int8.
        index: Integers of any shape on the same device, each the number of a row; nothing waits to see whether it is. What is
            below 0 or beyond the last row becomes NaN.
        dtype: Of the result.

    Returns:
        (..., K); None where no kernel takes it.

    Memory: the result.
    """
    if dtype not in FLOATS or index.dtype not in (torch.int32, torch.int64):
        return None
    if weight.kind == INT4:
        return gather_int4(index, weight.packed, weight.scale, weight.zero, columns=weight.shape[1], dtype=dtype)
    return gather_int8(index, weight.packed, weight.scale, dtype=dtype) if weight.kind == INT8 else None


def grouped(x: Tensor, counts: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor | None:
    """Multiply rows by the int4 or int8 weight of their expert, all experts in one launch; nothing waits for the device.

    Args:
        x: (T, K), sorted by expert.
        counts: (E,) integers, same device: rows of each expert. They may add up to less than T.
        packed: (E, N, ceil(K/8)) int32, or (E, N, K) uint8.
        scale: (E, N, G).
        zero: int32 (E, ceil(N/8), G); None for int8 and where symmetric.

    Returns:
        (T, N) in the dtype of `x`; zeros in the rows that are no expert's. None where no kernel takes it.

    Memory: the result, and a few integers for each expert and 16 rows.
    """
    tokens = x.shape[0]
    if x.dtype not in FLOATS or tokens == 0:
        return None
    tile = default_tile(min(-(-tokens // counts.shape[0]), 64), x.dtype)
    blocks = group_blocks(counts, tokens, tile.block_m)
    out = x.new_zeros(tokens, packed.shape[1])
    if packed.dtype == torch.uint8:
        return grouped_gemm_int8(x, packed, scale, blocks, tile=tile, out=out)
    return grouped_gemm_int4(x, packed, scale, zero, blocks, tile=tile, out=out)


@functools.lru_cache(maxsize=4096)
def _choice(device: str, kind: int, tokens: int, rows: int, columns: int) -> tuple[str, Tile | None]:
    """Name of the kernel, and its tile where the table has one."""
    table, name = tuned.table_for(device), NAMES[kind]
    where = tokens, rows, columns
    alone = kind == CODEBOOK4 and not _has_bitsandbytes()
    kernel = tuned.choose(table["dispatch"]["codebook4_alone" if alone else name], *where)["kernel"]
    tiles = table["tiles"].get(f"{kernel}_{name}")
    tile = None if tiles is None else Tile(**{field: tuned.choose(tiles, *where)[field] for field in tuned.TILE_FIELDS})
    return kernel, tile


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "generic"


def _codebook4(weight: Weight) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Packed codes, absmax, values of the codes, and what unpacks a nested absmax, as the kernels take them."""
    assert weight.code is not None
    device = weight.packed.device
    nested = None
    if weight.nested is not None:
        nested_absmax, offset, values = weight.nested
        nested = gpu.on_device(values, device), nested_absmax, offset
    return weight.packed, weight.scale, gpu.on_device(weight.code, device), nested


@functools.cache
def _has_bitsandbytes() -> bool:
    """Whether bitsandbytes is there with a kernel for CUDA; to look takes its import, some seconds."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(bitsandbytes, "matmul_4bit") and (
        hasattr(torch.ops.bitsandbytes, "gemm_4bit") and has_kernel("bitsandbytes::gemm_4bit", "CUDA")
    )


def _by_bitsandbytes(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    packed, absmax, _, nested = _codebook4(weight)
    if weight.shape[1] % BNB_BLOCK or not x.is_cuda:
        return None
    kind = "nf4" if weight.code is codebook.CODES["nf4"] else "fp4"
    shared: tuple[Any, ...] = (x.contiguous(), packed.view(-1, 1), weight.shape)
    bias = None if bias is None else bias.to(x.dtype)
    if nested is None:
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(*shared, absmax, BNB_BLOCK, kind, bias)
    else:
        values, nested_absmax, offset = nested
        y = torch.ops.bitsandbytes.gemm_4bit.default(*shared, nested_absmax, BNB_BLOCK, kind, bias, absmax, values, offset)
    return y
