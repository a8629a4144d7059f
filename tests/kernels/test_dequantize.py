"""Weights unpacked by the interpreted kernels, bit for bit against plain torch."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

from qlazy.quantizing import codebook
from tests.kernels.packed import random_codebook4, random_int4, random_int8, require_same

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def test_reference_follows_the_drawn_bits():
    packed = torch.tensor([[0x76543210]], dtype=torch.int32)
    scale = torch.tensor([[0.5]])
    symmetric = reference.dequantize_int4(packed, scale)
    assert symmetric.tolist() == [[(code - 8) * 0.5 for code in range(8)]]
    shifted = reference.dequantize_int4(packed, scale, torch.tensor([[0xF3]], dtype=torch.int32))
    assert shifted.tolist() == [[(code - 3) * 0.5 for code in range(8)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(19, 256, 8), (8, 320, 5), (9, 288, 3), (3, 264, 1), (1, 8, 1), (17, 520, 13), (3, 101, 1)]
)
def test_int4_equals_reference(kernels, rows, columns, groups, symmetric, dtype):
    stored = random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype)
    expected = reference.dequantize_int4(*stored, columns=columns, dtype=torch.float32)
    got = kernels.dequantize.dequantize_int4(*stored, columns=columns, dtype=torch.float32)
    assert torch.equal(got, expected)
    require_same(kernels.dequantize.dequantize_int4(*stored, columns=columns), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(9, 256, 8), (3, 288, 3), (5, 77, 1), (2, 518, 37)])
def test_int8_equals_reference(kernels, rows, columns, groups, dtype):
    stored = random_int8(rows, columns, groups, dtype=dtype)
    expected = reference.dequantize_int8(*stored, dtype=torch.float32)
    assert torch.equal(kernels.dequantize.dequantize_int8(*stored, dtype=torch.float32), expected)
    require_same(kernels.dequantize.dequantize_int8(*stored), expected.to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("rows", "columns", "start"), [(9, 256, 2), (5, 77, 2), (40, 515, 32), (1, 1, 0)])
def test_codebook4_equals_reference_and_package(kernels, kind, double_quant, rows, columns, start):
    count = rows * columns
    packed, absmax, nested = random_codebook4(rows, columns, kind, nested=double_quant)
    given = {"rows": rows, "columns": columns, "dtype": torch.float32}
    expected = reference.dequantize_codebook4(packed, absmax, codebook.CODES[kind], nested, **given)
    assert torch.equal(kernels.codebook4.dequantize_codebook4(packed, absmax, codebook.CODES[kind], nested, **given), expected)
    part = kernels.codebook4.dequantize_codebook4(packed, absmax, codebook.CODES[kind], nested, start=start, **given)
    assert torch.equal(part, expected[start:])
    full = absmax if nested is None else codebook.unnest_absmax(absmax, nested[1], nested[2])
    ours = codebook.dequantize_blocks(packed, full, kind, torch.float32, 0, count)
    assert torch.equal(expected.view(-1), ours)


def test_a_range_of_rows_goes_where_it_is_told(kernels):
    packed, scale, zero = random_int4(21, 64, 2, symmetric=False, dtype=torch.float16)
    whole = reference.dequantize_int4(packed, scale, zero)
    scratch = torch.full((7, 64), torch.nan, dtype=torch.float16)
    assert kernels.dequantize.dequantize_int4(packed, scale, zero, start=5, stop=12, out=scratch) is scratch
    assert torch.equal(scratch, whole[5:12])
    packed, scale = random_int8(21, 64, 2, dtype=torch.float16)
    assert torch.equal(
        kernels.dequantize.dequantize_int8(packed, scale, start=20), reference.dequantize_int8(packed, scale)[20:]
    )


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"weight_packed": torch.zeros(4, 8)}, ["torch.float32", "torch.int32"]),
        ({"weight_packed": torch.zeros(4, dtype=torch.int32)}, ["(4,)", "two dimensions"]),
        ({"weight_packed": torch.zeros(4, 16, dtype=torch.int32)[:, ::2]}, ["(16, 2)", "contiguous"]),
        ({"weight_scale": torch.zeros(3, 2)}, ["3 rows", "4."]),
        ({"weight_scale": torch.zeros(4, 3)}, ["64 columns", "3 groups"]),
        ({"weight_scale": torch.zeros(4, 16)}, ["64 columns", "16 groups"]),
        ({"weight_scale": torch.zeros(4, 0)}, ["(4, 0)"]),
        ({"weight_scale": torch.zeros(4, 2, dtype=torch.int8)}, ["torch.int8"]),
        ({"weight_scale": torch.zeros(4, 2, device="meta")}, ["meta", "cpu"]),
        ({"weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}, ["(4, 2)", "(1, 2)"]),
        ({"dtype": torch.float64}, ["torch.float64"]),
        ({"start": 3, "stop": 5}, ["3 to 5", "4 rows"]),
        ({"out": torch.zeros(4, 63)}, ["(4, 63)", "(4, 64)"]),
    ],
)
def test_int4_refuses_with_the_numbers(kernels, change, numbers):
    good = {"weight_packed": torch.zeros(4, 8, dtype=torch.int32), "weight_scale": torch.zeros(4, 2)}
    with pytest.raises(ValueError) as caught:
        kernels.dequantize.dequantize_int4(**(good | change))
    for number in numbers:
        assert number in str(caught.value)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"weight_packed": torch.zeros(63, dtype=torch.uint8)}, ["63 elements", "2 x 64"]),
        ({"absmax": torch.zeros(2, dtype=torch.uint8)}, ["torch.uint8", "torch.float32"]),
        ({"code": torch.zeros(15)}, ["15 elements"]),
        ({"nested": (torch.zeros(256), torch.zeros(1), torch.zeros(()))}, ["torch.float32", "torch.uint8"]),
        (
            {"absmax": torch.zeros(2, dtype=torch.uint8), "nested": (torch.zeros(256), torch.zeros(2), torch.zeros(()))},
            ["nested_absmax", "2 elements"],
        ),
    ],
)
def test_codebook4_refuses_with_the_numbers(kernels, change, numbers):
    good = {"weight_packed": torch.zeros(64, dtype=torch.uint8), "absmax": torch.zeros(2), "code": torch.zeros(16)}
    with pytest.raises(ValueError) as caught:
        kernels.codebook4.dequantize_codebook4(**(good | change), rows=2, columns=64, dtype=torch.float32)
    for number in numbers:
        assert number in str(caught.value)
