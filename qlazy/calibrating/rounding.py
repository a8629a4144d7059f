"""Quantize one weight by what its layer takes in, and put what it has become in the place of what it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlazy.calibrating.stages import ROWS, add_products
from qlazy.formats import Codebook4
from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import QUANTIZED_ELEMENTS, ROW_BLOCK, NonFiniteError, QuantLinear
from qlazy.quantizing.curvature import Curvature, curvature_blocks
from qlazy.quantizing.gptq import store_calibrated

FEWEST = 4
"""Tokens that a layer has to see are its columns by this; with fewer only the mean squares of its inputs count."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a layer takes in, of some tokens."""

    x: Tensor
    """(..., K), now that the layers before it are rounded."""
    clean: Tensor | None = None
    """The same where nothing is rounded; None where that is not known."""
    weights: Tensor | None = None
    """How much an error in what the layer gives for each token counts; None: all the same."""


def why_less(columns: int, curvature: Curvature | None) -> str:
    """Why a layer is rounded by less than all that its inputs could say.

    Args:
        columns: K, of the layer.
        curvature: What they do say.
    Returns:
        The reason; empty where it is not.
    """
    if curvature is None:
        return "no token came"
    if curvature.factor is not None:
        return ""
    reason = "few tokens for the columns" if curvature_blocks(columns) else "too many columns, and no multiple of 128"
    return f"{reason}: by the mean squares of the inputs alone"


def curvature_of(columns: int, inputs: Iterable[Seen]) -> Curvature | None:
    """What the inputs of a layer say of its weights.

    Args:
        columns: K, of the layer.
        inputs: What it takes in, some tokens after others.
    Returns:
        The curvature, of few tokens or too many columns its diagonal alone; None without tokens.

    Memory: K x K in float32 four times, or blocks of that for layers of many columns; 2048 tokens.
    """
    whole = curvature_blocks(columns)
    blocks = whole or columns
    hessian = torch.zeros(blocks, columns // blocks, columns // blocks)
    drift: Tensor | None = torch.zeros_like(hessian) if whole else None
    tokens = 0
    for seen in inputs:
        x = seen.x.reshape(-1, columns)
        weights = None if seen.weights is None or seen.weights.numel() != len(x) else seen.weights.reshape(-1, 1)
        clean = None if seen.clean is None or seen.clean.shape != seen.x.shape else seen.clean.reshape(-1, columns)
        drift = None if clean is None else drift
        tokens += len(x)
        for part in range(0, len(x), ROWS):
            rows = slice(part, part + ROWS)
            scale = 1.0 if weights is None else weights[rows]
            right = x[rows].to(torch.float32)
            if drift is not None and clean is not None:
                add_products(drift, (clean[rows].to(torch.float32) - right) * scale, right * scale)
            right = right * scale
            add_products(hessian, right, right)
    if not tokens:
        return None
    if not whole or tokens < columns // FEWEST:
        return Curvature.from_diagonal(hessian.diagonal(dim1=1, dim2=2).reshape(-1) / tokens)
    return Curvature.from_hessian(hessian.div_(tokens), drift=None if drift is None else drift.div_(tokens))


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
