"""Products on tensor cores, interpreted. bfloat16 products are for a GPU: the interpreter computes in it wrongly."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

from tests.kernels.packed import random_int4, random_int8, random_tokens, require_precise

FP16, FP32 = torch.float16, torch.float32
CASES = [
    (2, 19, 256, 8, FP32),
    (2, 19, 256, 8, FP16),
    (17, 40, 320, 10, FP16),
    (33, 9, 1056, 33, FP32),
    (5, 12, 100, 1, FP16),
    (3, 9, 960, 10, FP16),
    (65, 3, 128, 1, FP16),
    (1, 1, 8, 1, FP32),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tokens", "rows", "columns", "groups", "dtype"), CASES)
def test_int4_is_as_precise_as_a_dequantized_product(kernels, tokens, rows, columns, groups, dtype, symmetric):
    packed, scale, zero = random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype)
    x, bias = random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]
    weight = reference.dequantize_int4(packed, scale, zero, columns=columns, dtype=torch.float64)
    require_precise(kernels.gemm.gemm_int4(x, packed, scale, zero, bias), x, weight, bias)


@pytest.mark.parametrize(("tokens", "rows", "columns", "groups", "dtype"), [*CASES, (4, 5, 77, 1, FP16)])
def test_int8_is_as_precise_as_a_dequantized_product(kernels, tokens, rows, columns, groups, dtype):
    packed, scale = random_int8(rows, columns, groups, dtype=dtype)
    x, bias = random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]
    weight = reference.dequantize_int8(packed, scale, dtype=torch.float64)
    require_precise(kernels.gemm.gemm_int8(x, packed, scale, bias), x, weight, bias)


@pytest.mark.parametrize("split_k", [1, 2, 3, 8])
def test_any_number_of_parts_gives_the_same_product(kernels, split_k):
    packed, scale, zero = random_int4(8, 320, 5, symmetric=False, dtype=FP32)
    x, bias = random_tokens(3, 320, FP32), random_tokens(1, 8, FP32)[0]
    tile = kernels.tiles.Tile(block_m=16, block_n=16, block_k=64, split_k=split_k)
    weight = reference.dequantize_int4(packed, scale, zero, dtype=torch.float64)
    workspace = torch.full((min(split_k, 5) * 3 * 8,), torch.nan)
    y = kernels.gemm.gemm_int4(x, packed, scale, zero, bias, tile=tile, workspace=workspace)
    require_precise(y, x, weight, bias)
    assert workspace.isnan().any() == (split_k == 1)
    if split_k > 1:
        with pytest.raises(ValueError, match="at least"):
            kernels.gemm.gemm_int4(x, packed, scale, zero, bias, tile=tile, workspace=workspace[1:])


def test_no_tokens(kernels):
    packed, scale = random_int8(4, 64, 1, dtype=FP16)
    assert kernels.gemm.gemm_int8(torch.zeros((0, 64), dtype=FP16), packed, scale).shape == (0, 4)
