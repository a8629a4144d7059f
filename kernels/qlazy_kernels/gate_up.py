"""Gate and up projection of a gated feed-forward layer in one launch: each weight read once, nothing stored in between.

Shape legend: M = tokens, N = out_features (rows), K = in_features (columns), G = groups along K, P = packed words along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlazy_kernels.checks import check_int4, check_tokens, result
from qlazy_kernels.gemv import default_tile, row_span
from qlazy_kernels.inner import multiply_rows, store_tile
from qlazy_kernels.tiles import Tile


def gemv_gate_up_int4(
    x: Tensor,
    gate: tuple[Tensor, Tensor, Tensor | None],
    up: tuple[Tensor, Tensor, Tensor | None],
    *,
    activation: str = "silu",
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The first half of a gated feed-forward layer in one launch: `activation(x @ gate.T) * (x @ up.T)`, four bits.

    Bits lie as `gemv_int4` draws them. The products stay in fp32 until the end.

    Args:
        x: (..., K) float16, bfloat16 or float32, on a CUDA device.
        gate: Packed weight, scale and zeros (or None) as `gemv_int4` takes them.
        up: The same, of the same shapes.
        activation: `silu` or `gelu_tanh`.
        tile: How to cut the work; None = by number of tokens.
        out: (..., N) of x's dtype to write into; None = new.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not belong together; the message has both numbers.

    Memory: the result, and a copy of `x` where it is not contiguous.
    """
    extents = [check_int4(*weight, x.shape[-1]) for weight in (gate, up)]
    for name, one, other in zip(("packed", "scale", "zeros"), gate, up, strict=True):
        if (one is None) != (other is None) or (one is not None and other is not None and one.shape != other.shape):
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (one, other)]
            raise ValueError(f"{name} of gate and up have shapes {shapes[0]} and {shapes[1]}; they must be the same.")
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}; it must be 'silu' or 'gelu_tanh'.")
    if gate[0].device != up[0].device:
        raise ValueError(f"gate is on {gate[0].device}, up on {up[0].device}; they need one device.")
    extent = extents[0]
    x_MK = check_tokens(x, extent.columns, gate[0].device)
    tokens = x_MK.shape[0]
    y = result(out, (*x.shape[:-1], extent.rows), x.dtype, x.device)
    if tokens == 0:
        return y
    tile = default_tile(4, tokens) if tile is None else tile
    span = row_span(extent, tile)
    pointers = [weight[0] if tensor is None else tensor for weight in (gate, up) for tensor in weight]
    with torch.cuda.device_of(x):
        gemv_gate_up_kernel[(triton.cdiv(extent.rows, tile.block_n), triton.cdiv(tokens, tile.block_m))](
            x_MK,
            *pointers,
            y,
            tokens,
            extent.rows,
            extent.columns,
            extent.words,
            extent.groups,
            1 if extent.groups == 1 else extent.group_size // span,
            ACTIVATION=activation,
            BITS=4,
            ONE_GROUP=extent.groups == 1,
            HAS_ZERO=gate[2] is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SPAN=span,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


@triton.jit
def gemv_gate_up_kernel(
    x_MK,
    gate_packed_NP,
    gate_scale_NG,
    gate_zero_NG,
    up_packed_NP,
    up_scale_NG,
    up_zero_NG,
    y_MN,
    tokens,
    rows,
    columns,
    words,
    groups,
    spans_per_group,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """BLOCK_M tokens by BLOCK_N rows of two weights, all of K; the second time x comes out of the cache."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_M
    x = x_MK + first_token * columns
    left = tokens - first_token
    gate = multiply_rows(
        x,
        gate_packed_NP,
        gate_scale_NG,
        gate_zero_NG,
        first,
        left,
        rows,
        columns,
        words,
        groups,
        spans_per_group,
        BITS,
        ONE_GROUP,
        HAS_ZERO,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPAN,
    )
    up = multiply_rows(
        x,
        up_packed_NP,
        up_scale_NG,
        up_zero_NG,
        first,
        left,
        rows,
        columns,
        words,
        groups,
        spans_per_group,
        BITS,
        ONE_GROUP,
        HAS_ZERO,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPAN,
    )
    if ACTIVATION == "silu":
        slope = gate
    else:  # gelu_tanh: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    y = gate / (1.0 + tl.exp(-slope)) * up
    store_tile(y_MN, y, y_MN, first_token, first, tokens, rows, False)
