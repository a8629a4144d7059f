"""Quantize one weight by what its layer takes in, and put what it has become in the place of what it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlazy.calibrating.stages import add_products
from qlazy.formats import Codebook4
from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import QUANTIZED_ELEMENTS, ROW_BLOCK, NonFiniteError, QuantLinear
from qlazy.quantizing.curvature import Curvature, curvature_blocks
from qlazy.quantizing.gptq import store_calibrated

FEWEST = 4
"""Tokens that a layer has to see are its columns by this; with fewer only the mean squares of its inputs count."""


def curvature_of(columns: int, inputs: Iterable[Tensor]) -> Curvature | None:
    """What the inputs of a layer say of its weights.

    Args:
        columns: K, of the layer.
        inputs: (..., K), some tokens after others.
    Returns:
        The curvature; None without tokens.

    Memory: K x K in float32 twice, or blocks of that for layers of many columns; 1024 tokens.
    """
    blocks = curvature_blocks(columns)
    hessian = torch.zeros(blocks, columns // blocks, columns // blocks)
    tokens = sum(add_products(hessian, x) for x in inputs)
    if not tokens:
        return None
    hessian /= tokens
    if tokens < columns // FEWEST:
        return Curvature.from_diagonal(hessian.diagonal(dim1=1, dim2=2).reshape(-1).clone())
    return Curvature.from_hessian(hessian)


def round_layer(layer: QuantLinear, weight: Tensor, curvature: Curvature | None) -> Tensor:
    """Fill a low-bit layer with a weight.

    Args:
        layer: It, with storage.
        weight: (N, K).
        curvature: What its inputs say; None: every weight counts the same.
    Returns:
        (N, K), what the layer computes with, in the dtype of the weight.
    Raises:
        NonFiniteError: a weight is NaN or infinite.

    Memory: as `store_calibrated` for a million weights, and the result.
    """
    held: Any = layer
    step = max(ROW_BLOCK, QUANTIZED_ELEMENTS // layer.in_features // ROW_BLOCK * ROW_BLOCK)
    for start in range(0, layer.out_features, step):
        rows = weight[start : start + step].contiguous()
        stop = start + len(rows)
        if curvature is None:
            layer.fill_rows(start, rows)
            continue
        zeros = held.weight_zero_point[start // 8 : math.ceil(stop / 8)] if "weight_zero_point" in layer.storage else None
        assert not isinstance(layer.format, Codebook4)
        finite = store_calibrated(
            rows,
            layer.format,
            curvature,
            packed_out=held.weight_packed[start:stop],
            scale_out=held.weight_scale[start:stop],
            zero_out=zeros,
        )
        if not finite:
            raise NonFiniteError
    return layer.dequantize(weight.dtype)


def round_stack(stack: PackedStack, parameter: Tensor) -> None:
    """Fill the matrices of a parameter with it, every weight counting the same, and put what they have become in their place.

    Args:
        stack: Where they go.
        parameter: In 16 bits.
    Raises:
        NonFiniteError: a weight is NaN or infinite.

    Memory: one matrix.
    """
    stack.fill(parameter.data)
    matrices = parameter.data.view(stack.stack.count, -1, parameter.shape[-1])
    for number, matrix in enumerate(matrices):
        made = stack.layer(number).dequantize(parameter.dtype)
        matrix.copy_(made.t() if stack.stack.transposed else made)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as rows of its outputs.

    Args:
        linear: In 16 bits; a Conv1D holds it as (K, N).
    Returns:
        (N, K), a view.
    """
    held = linear.get_parameter("weight").data
    return held.t() if isinstance(linear, Conv1D) else held
