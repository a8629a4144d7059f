"""Few tokens times packed weights, interpreted."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

from tests.kernels.packed import random_int4, random_int8, random_tokens, require_precise

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Tokens, rows, columns, groups, dtype: several spans a tile and tiles a span, a group of 12 words, one of the row, ragged ends.
CASES = [
    *((1, 11, 256, 8, dtype) for dtype in DTYPES),
    (2, 9, 1056, 33, torch.bfloat16),
    (3, 8, 1280, 10, torch.float16),
    (5, 4, 960, 10, torch.float32),
    (9, 3, 104, 1, torch.bfloat16),
    (4, 3, 520, 13, torch.float16),
    (2, 9, 100, 1, torch.float16),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tokens", "rows", "columns", "groups", "dtype"), [*CASES, (1, 1, 1, 1, torch.float16)])
def test_int4_is_as_precise_as_a_dequantized_product(kernels, tokens, rows, columns, groups, dtype, symmetric):
    packed, scale, zero = random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype)
    x, bias = random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]
    weight = reference.dequantize_int4(packed, scale, zero, columns=columns, dtype=torch.float64)
    require_precise(kernels.gemv.gemv_int4(x, packed, scale, zero, bias), x, weight, bias)


@pytest.mark.parametrize(("tokens", "rows", "columns", "groups", "dtype"), [*CASES, (1, 1, 4, 1, torch.float16)])
def test_int8_is_as_precise_as_a_dequantized_product(kernels, tokens, rows, columns, groups, dtype):
    packed, scale = random_int8(rows, columns, groups, dtype=dtype)
    x, bias = random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]
    weight = reference.dequantize_int8(packed, scale, dtype=torch.float64)
    require_precise(kernels.gemv.gemv_int8(x, packed, scale, bias), x, weight, bias)


def test_any_shape_of_x_and_a_given_out(kernels):
    packed, scale, zero = random_int4(16, 64, 2, symmetric=False, dtype=torch.float16)
    x = random_tokens(6, 64, torch.float16)
    flat = kernels.gemv.gemv_int4(x, packed, scale, zero)
    out = torch.full((2, 3, 16), torch.nan, dtype=torch.float16)
    assert kernels.gemv.gemv_int4(x.view(2, 3, 64), packed, scale, zero, out=out) is out
    assert torch.equal(out.view(6, 16), flat)
    strided = x.t().contiguous().t()
    assert torch.equal(kernels.gemv.gemv_int4(strided, packed, scale, zero), flat)
    assert kernels.gemv.gemv_int4(x[:0], packed, scale, zero).shape == (0, 16)


@pytest.mark.parametrize("block_k", [32, 64, 256])
def test_a_tile_longer_or_shorter_than_the_group_gives_the_same_weights(kernels, block_k):
    packed, scale, zero = random_int4(8, 384, 3, symmetric=False, dtype=torch.float32)
    x = random_tokens(1, 384, torch.float32)
    tile = kernels.tiles.Tile(block_n=4, block_k=block_k)
    weight = reference.dequantize_int4(packed, scale, zero, dtype=torch.float64)
    require_precise(kernels.gemv.gemv_int4(x, packed, scale, zero, tile=tile), x, weight)


def test_large_and_tiny_activations(kernels):
    packed, scale, _ = random_int4(8, 64, 2, symmetric=True, dtype=torch.float32)
    weight = reference.dequantize_int4(packed, scale, dtype=torch.float64)
    for factor in (2.0**60, 2.0**-20):
        x = random_tokens(1, 64, torch.float32) * factor
        require_precise(kernels.gemv.gemv_int4(x, packed, scale), x, weight)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"x": torch.zeros(1, 65)}, ["65 columns", "has 8"]),
        ({"x": torch.zeros(1, 64, dtype=torch.float64)}, ["torch.float64"]),
        ({"bias": torch.zeros(3)}, ["(3,)", "4 rows"]),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, ["torch.int32"]),
        ({"out": torch.zeros(1, 5)}, ["(1, 5)", "(1, 4)"]),
        ({"out": torch.zeros(1, 4, dtype=torch.float16)}, ["torch.float16", "torch.float32"]),
        ({"weight_scale": torch.zeros(4, 3)}, ["64 columns", "3 groups"]),
    ],
)
def test_int4_refuses_with_the_numbers(kernels, change, numbers):
    good = {"x": torch.zeros(1, 64), "weight_packed": torch.zeros(4, 8, dtype=torch.int32), "weight_scale": torch.zeros(4, 2)}
    with pytest.raises(ValueError) as caught:
        kernels.gemv.gemv_int4(**(good | change))
    for number in numbers:
        assert number in str(caught.value)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"x": torch.zeros(1, 68)}, ["68 columns", "64"]),
        ({"weight_packed": torch.zeros(4, 64, dtype=torch.int8)}, ["torch.int8", "torch.uint8"]),
        ({"weight_scale": torch.zeros(4, 32)}, ["2 columns", "multiples of 4"]),
        ({"weight_packed": torch.zeros(4 * 64 + 1, dtype=torch.uint8)[1:].view(4, 64)}, ["address", "multiples of 4"]),
    ],
)
def test_int8_refuses_with_the_numbers(kernels, change, numbers):
    good = {"x": torch.zeros(1, 64), "weight_packed": torch.zeros(4, 64, dtype=torch.uint8), "weight_scale": torch.zeros(4, 2)}
    with pytest.raises(ValueError) as caught:
        kernels.gemv.gemv_int8(**(good | change))
    for number in numbers:
        assert number in str(caught.value)
