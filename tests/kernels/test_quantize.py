"""Quantizing on the device gives the bytes of the plain PyTorch definition: the interpreted kernels against it."""

from __future__ import annotations

import pytest
import torch

from qlazy.quantizing import codebook, quantize
from qlazy.quantizing.packing import pack_int4, pack_zero_points
from qlazy.quantizing.search import ASYMMETRIC_FACTORS, SYMMETRIC_FACTORS, search_int4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    spread = torch.rand((rows, 1), generator=generator).mul_(0.1)
    made = torch.randn((rows, columns), generator=generator).mul_(spread).to(dtype)
    made[0, : columns // 2] = 0.0
    made[-1, :] = made[-1, :].abs()
    return made


def factors(symmetric: bool) -> torch.Tensor:
    return SYMMETRIC_FACTORS if symmetric else ASYMMETRIC_FACTORS


def same_bytes(got: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if got is None or expected is None:
        return got is expected
    return got.dtype == expected.dtype and torch.equal(*(t.reshape(-1).clone().view(torch.uint8) for t in (got, expected)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "dtype", "scale_dtype"),
    [
        (19, 128, 32, BF16, BF16),
        (9, 192, 64, FP16, FP16),
        (3, 384, 128, FP32, FP32),
        (8, 160, 32, FP32, BF16),
        (10, 64, 64, BF16, FP32),
        (5, 128, 128, FP32, FP16),
    ],
)
def test_int4_gives_the_defined_bytes(kernels, rows, columns, group, dtype, scale_dtype, symmetric):
    weight = weights(rows, columns, dtype)
    options = {"group_size": group, "symmetric": symmetric, "scale_dtype": scale_dtype}
    codes, scale, zero = search_int4(weight, group, symmetric, scale_dtype)
    got = kernels.quantize.quantize_int4(weight, factors(symmetric), **options)
    assert same_bytes(got[0], pack_int4(codes))
    assert same_bytes(got[1], scale)
    assert same_bytes(got[2], None if zero is None else pack_zero_points(zero))


def test_int4_in_blocks_of_rows_is_int4_at_once(kernels):
    weight = weights(27, 64, BF16)
    options = {"group_size": 32, "symmetric": False, "scale_dtype": BF16}
    whole = kernels.quantize.quantize_int4(weight, factors(False), **options)
    parts = tuple(torch.zeros_like(tensor) for tensor in whole)
    for start in (0, 16, 24):
        stop = min(27, start + 16)
        out = (parts[0][start:stop], parts[1][start:stop], parts[2][start // 8 : -(-stop // 8)])
        kernels.quantize.quantize_int4(weight[start:stop], factors(False), **options, out=out)
    assert all(same_bytes(part, one) for part, one in zip(parts, whole, strict=True))


@pytest.mark.parametrize(
    ("rows", "columns", "group", "dtype", "scale_dtype"),
    [
        (9, 256, 32, BF16, BF16),
        (3, 1100, -1, FP32, FP16),
        (5, 96, 24, FP16, FP32),
        (4, 2560, 1280, BF16, BF16),
    ],
)
def test_int8_gives_the_defined_bytes(kernels, rows, columns, group, dtype, scale_dtype):
    weight = weights(rows, columns, dtype)
    q, scale = quantize.quantize_int8(weight, group_size=group, scale_dtype=scale_dtype)
    got = kernels.quantize.quantize_int8(weight, group_size=group, scale_dtype=scale_dtype)
    assert same_bytes(got[0], q)
    assert same_bytes(got[1], scale)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(9, 256, BF16), (3, 77, FP32), (1, 1, FP16), (2, 64, FP32), (5, 101, BF16)]
)
def test_codebook4_gives_bitsandbytes_bytes(kernels, kind, rows, columns, dtype):
    weight = weights(rows, columns, dtype)
    count = weight.numel()
    packed, absmax = torch.empty(-(-count // 2), dtype=torch.uint8), torch.empty(-(-count // 64))
    codebook.quantize_blocks(weight, kind, packed_out=packed, absmax_out=absmax)
    values, order = codebook.CODES[kind].sort(stable=True)
    got = kernels.codebook4.quantize_codebook4(weight, (values[:-1] + values[1:]) / 2, order.int())
    assert same_bytes(got[0], packed)
    assert same_bytes(got[1], absmax)


def test_values_on_a_boundary_between_codes(kernels):
    values, order = codebook.CODES["nf4"].sort(stable=True)
    bounds = (values[:-1] + values[1:]) / 2
    weight = torch.cat([torch.ones(1), bounds, bounds.nextafter(torch.ones(15)), torch.zeros(33)])
    packed, absmax = torch.empty(32, dtype=torch.uint8), torch.empty(1)
    codebook.quantize_blocks(weight, "nf4", packed_out=packed, absmax_out=absmax)
    assert same_bytes(kernels.codebook4.quantize_codebook4(weight, bounds, order.int())[0], packed)


def test_bytes_of_float8_are_weights(kernels):
    every = torch.arange(256).to(torch.uint8)
    finite = every[~torch.isnan(every.view(torch.float8_e4m3fn).float())]
    weight = finite[torch.randint(0, len(finite), (8, 128), generator=torch.Generator().manual_seed(0))]
    wide = weight.view(torch.float8_e4m3fn).float()
    options = {"group_size": 32, "symmetric": False, "scale_dtype": BF16}
    got = kernels.quantize.quantize_int4(weight, factors(False), **options)
    expected = kernels.quantize.quantize_int4(wide, factors(False), **options)
    assert all(same_bytes(one, other) for one, other in zip(got, expected, strict=True))
    q, scale = kernels.quantize.quantize_int8(weight, group_size=-1, scale_dtype=FP32)
    wanted = quantize.quantize_int8(wide, group_size=-1, scale_dtype=FP32)
    assert same_bytes(q, wanted[0]) and same_bytes(scale, wanted[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_says_so(kernels, bad):
    weight = weights(8, 64, FP32)
    weight[3, 40] = bad
    for symmetric in (True, False):
        options = {"group_size": 32, "symmetric": symmetric, "scale_dtype": BF16}
        scale = kernels.quantize.quantize_int4(weight, factors(symmetric), **options)[1]
        assert scale.isfinite().logical_not().nonzero().tolist() == [[3, 1]]
    scale = kernels.quantize.quantize_int8(weight, group_size=32, scale_dtype=FP32)[1]
    assert scale.isfinite().logical_not().nonzero().tolist() == [[3, 1]]
    values, order = codebook.CODES["nf4"].sort(stable=True)
    absmax = kernels.codebook4.quantize_codebook4(weight, (values[:-1] + values[1:]) / 2, order.int())[1]
    assert absmax.isfinite().logical_not().nonzero().tolist() == [[3]]
    byte = torch.zeros((8, 64), dtype=torch.uint8)
    byte[2, 1] = 0xFF
    assert kernels.quantize.quantize_int8(byte, group_size=-1, scale_dtype=FP32)[1].isnan().nonzero().tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"group_size": 48}, ["48", "64 columns"]),
        ({"group_size": 128}, ["128", "64 columns"]),
        ({"weight": torch.zeros(8, 64, dtype=torch.float64)}, ["torch.float64"]),
        ({"weight": torch.zeros(8, 128)[:, ::2]}, ["(128, 2)", "contiguous"]),
        ({"factors": torch.ones(4, dtype=torch.float64)}, ["torch.float64", "torch.float32"]),
        ({"scale_dtype": torch.float64}, ["torch.float64"]),
        (
            {"out": (torch.zeros(8, 9, dtype=torch.int32), torch.zeros(8, 2), torch.zeros(1, 2, dtype=torch.int32))},
            ["(8, 9)", "(8, 8)"],
        ),
    ],
)
def test_int4_refuses_with_the_numbers(kernels, change, numbers):
    good = {"weight": torch.zeros(8, 64), "factors": factors(False), "group_size": 32, "symmetric": False, "scale_dtype": FP32}
    with pytest.raises(ValueError) as caught:
        kernels.quantize.quantize_int4(**(good | change))
    for number in numbers:
        assert number in str(caught.value)


def test_the_others_refuse_with_the_numbers(kernels):
    with pytest.raises(ValueError, match="48 does not divide 64 columns"):
        kernels.quantize.quantize_int8(torch.zeros(8, 64), group_size=48, scale_dtype=FP32)
    with pytest.raises(ValueError, match=r"bounds is .* with 14 elements"):
        kernels.codebook4.quantize_codebook4(torch.zeros(64), torch.zeros(14), torch.zeros(16, dtype=torch.int32))
