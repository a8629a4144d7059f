"""Integer codes, scales and zeros: error, order of operations, edge cases, and where each bit goes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qlazy.errors import UsageError
from qlazy.quantizing import native_quantize, search
from qlazy.quantizing.packing import pack_int4, pack_zero_points, unpack_int4, unpack_zero_points
from qlazy.quantizing.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUPS = [32, 64, 128, -1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Short parallel regions crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Rows of different widths and offsets, with outliers, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.005] *= 6
    widths = torch.rand(rows, 1, generator=generator) + 0.1
    return (0.02 * (weight * widths + 0.3 * torch.randn(rows, 1, generator=generator))).to(dtype)


def per_group(values: Tensor, group_size: int) -> Tensor:
    return values.to(torch.float64).reshape(values.shape[0], -1, values.shape[1] if group_size == -1 else group_size)


def plain_rounding(weight: Tensor, group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> Tensor:
    """Minimum and maximum on the outermost codes, rounded to nearest, with the scale as it is stored; float64."""
    grouped = per_group(weight, group_size)
    if symmetric:
        scale = (grouped.abs().amax(2, keepdim=True) / 7).to(scale_dtype).to(torch.float64)
        zero = torch.full_like(scale, 8)
    else:
        low, high = grouped.amin(2, keepdim=True).clamp(max=0), grouped.amax(2, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).to(scale_dtype).to(torch.float64)
        zero = (-low / scale).round().clamp(0, 15)
    return (((grouped / scale).round() + zero).clamp(0, 15) - zero) * scale


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_shapes_dtypes_and_ranges(group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = weights(24, 256, dtype)
    codes, scale, zero = quantize_int4(weight, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    groups = 1 if group_size == -1 else 256 // group_size
    assert (codes.shape, codes.dtype) == ((24, 256), torch.uint8)
    assert (scale.shape, scale.dtype) == ((24, groups), dtype)
    assert int(codes.max()) == 15
    assert bool((scale > 0).all())
    if symmetric:
        assert zero is None
    else:
        assert zero is not None
        assert (zero.shape, zero.dtype, int(zero.max()) <= 15) == ((24, groups), torch.uint8, True)
    assert dequantize_int4(codes, scale, zero, dtype).dtype is dtype


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_search_is_never_worse_than_plain_rounding(group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    weight = weights(96, 512)
    codes, scale, zero = quantize_int4(weight, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    exact = per_group(weight, group_size)
    searched = (per_group(dequantize_int4(codes, scale, zero, torch.float32), group_size) - exact).square().sum(2)
    plain = (plain_rounding(weight, group_size, symmetric, scale_dtype) - exact).square().sum(2)
    # In every single group; 1e-5 is for sums in float32 and for w * (1/s) in place of w / s.
    assert bool((searched <= plain * (1 + 1e-5)).all())
    # And well below on the whole: measured 0.73 to 0.80 (symmetric) and 0.86 to 0.91 (asymmetric).
    assert float(searched.sum() / plain.sum()) < (0.83 if symmetric else 0.93)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_code_is_the_nearest_one(group_size: int, symmetric: bool) -> None:
    """Given scale and zero, no other code is closer: inside the range the error is at most half a step."""
    weight = weights(32, 256)
    codes, scale, zero = quantize_int4(weight, group_size=group_size, symmetric=symmetric, scale_dtype=torch.bfloat16)
    step = per_group(scale.repeat_interleave(256 // scale.shape[1], 1), group_size)
    exact, got = per_group(weight, group_size), per_group(dequantize_int4(codes, scale, zero, torch.float32), group_size)
    inside = (per_group(codes, group_size) > 0) & (per_group(codes, group_size) < 15)
    assert bool(((got - exact).abs() <= 0.5001 * step)[inside].all())
    clipped = per_group(codes, group_size) == 15
    assert bool((exact - got >= -0.5001 * step)[clipped].all())


def test_values_on_the_grid_come_back_exactly() -> None:
    """What is 4-bit already loses nothing: zero on code 3, scale 0.25, the extremes present in each group."""
    codes = torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(3))
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    weight = (codes - 3) * 0.25
    got, scale, zero = quantize_int4(weight, group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    assert torch.equal(got, codes.to(torch.uint8))
    assert torch.equal(scale, torch.full((8, 4), 0.25, dtype=torch.bfloat16))
    assert zero is not None and bool((zero == 3).all())
    assert torch.equal(dequantize_int4(got, scale, zero, torch.float32), weight)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_groups_keep_zero_in_the_range(sign: int) -> None:
    weight = sign * weights(8, 64).abs()
    codes, scale, zero = quantize_int4(weight, group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    assert zero is not None and bool((zero == (0 if sign == 1 else 15)).all())
    error = dequantize_int4(codes, scale, zero, torch.float32) - weight.float()
    assert float(error.square().sum() / weight.float().square().sum()) < 0.01


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros(group_size: int, dtype: torch.dtype) -> None:
    weight = weights(4, 64, dtype)
    weight[1] = 0
    for symmetric in (False, True):
        codes, scale, zero = quantize_int4(weight, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
        assert bool((scale[1] == 1).all())
        assert bool((dequantize_int4(codes, scale, zero, dtype)[1] == 0).all())
    codes, scale = quantize_int8(weight, group_size=group_size, scale_dtype=dtype)
    assert bool((scale[1] == 1).all()) and bool((codes[1] == 128).all())


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-8])
def test_tiny_weights_have_a_positive_finite_scale(scale_dtype: torch.dtype, size: float) -> None:
    weight = torch.full((2, 32), size)
    for symmetric in (False, True):
        codes, scale, zero = quantize_int4(weight, group_size=32, symmetric=symmetric, scale_dtype=scale_dtype)
        assert bool((scale > 0).all()) and bool(scale.isfinite().all())
        # A scale that float16 cannot hold is its least number, 2**-24, and the weight at most half of that away.
        bound = max(size, 2.0**-25 if scale_dtype is torch.float16 else 0)
        assert float((dequantize_int4(codes, scale, zero, torch.float32) - weight).abs().max()) <= bound
    _, scale = quantize_int8(weight, group_size=32, scale_dtype=scale_dtype)
    assert bool((scale > 0).all()) and bool(scale.isfinite().all())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_shows_in_the_scale_of_its_group(poison: float, group_size: int, dtype: torch.dtype) -> None:
    weight = weights(6, 256, dtype)
    clean = weight.clone()
    weight[2, 130] = poison
    where = torch.zeros(6, 1 if group_size == -1 else 256 // group_size, dtype=torch.bool)
    where[2, 0 if group_size == -1 else 130 // group_size] = True
    for symmetric in (False, True):
        codes, scale, _ = quantize_int4(weight, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
        expected, good, _ = quantize_int4(clean, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
        assert torch.equal(~scale.isfinite(), where)
        assert torch.equal(scale[~where], good[~where])
        assert torch.equal(codes[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    _, scale = quantize_int8(weight, group_size=group_size, scale_dtype=dtype)
    assert torch.equal(~scale.isfinite(), where)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_in_pieces_are_the_whole(group_size: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes depend neither on the chunk, nor on the block inside, nor on threads beside, nor on torch's own threads."""
    weight = weights(150, 192)

    def run(part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return quantize_int4(part, group_size=group_size, symmetric=symmetric, scale_dtype=torch.bfloat16)

    def same(pieces: list[tuple[Tensor, Tensor, Tensor | None]]) -> bool:
        return all(
            piece[i] is None if w is None else torch.equal(torch.cat([p[i] for p in pieces]), w)  # type: ignore[misc]
            for piece in pieces
            for i, w in enumerate(whole)
        )

    whole = run(weight)
    chunks = weight.split([1, 64, 7, 78])
    assert same([run(chunk) for chunk in chunks])
    with ThreadPoolExecutor(4) as pool:
        assert same(list(pool.map(run, chunks)))
    monkeypatch.setattr(native_quantize, "int4", lambda *_, **__: None)
    monkeypatch.setattr(search, "CPU_BLOCK_ELEMENTS", 13 * 192)
    assert same([run(weight)])
    torch.set_num_threads(2)
    assert same([run(weight)])


@pytest.mark.parametrize("group_size", [32, -1])
def test_int8_rows_in_pieces_are_the_whole(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(50, 96)
    q, scale = quantize_int8(weight, group_size=group_size, scale_dtype=torch.bfloat16)
    monkeypatch.setattr(native_quantize, "int8", lambda *_, **__: None)
    monkeypatch.setattr(search, "CPU_BLOCK_ELEMENTS", 7 * 96)
    pieces = [quantize_int8(part, group_size=group_size, scale_dtype=torch.bfloat16) for part in weight.split(13)]
    assert torch.equal(torch.cat([p[0] for p in pieces]), q)
    assert torch.equal(torch.cat([p[1] for p in pieces]), scale)


def test_a_view_with_strides_is_quantized_as_its_copy() -> None:
    weight = weights(96, 64).t()
    got = quantize_int4(weight, group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    expected = quantize_int4(weight.contiguous(), group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None)


def test_the_argument_is_left_alone() -> None:
    weight = weights(8, 64, torch.float32)
    before = weight.clone()
    quantize_int4(weight, group_size=-1, symmetric=False, scale_dtype=torch.float32)
    quantize_int8(weight, group_size=-1, scale_dtype=torch.float32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_error_is_at_most_half_a_step(group_size: int, dtype: torch.dtype) -> None:
    weight = weights(16, 256, dtype)
    codes, scale = quantize_int8(weight, group_size=group_size, scale_dtype=dtype)
    assert (codes.dtype, scale.dtype, codes.shape) == (torch.uint8, dtype, weight.shape)
    assert int(codes.min()) >= 1
    error = per_group(dequantize_int8(codes, scale, torch.float32), group_size) - per_group(weight, group_size)
    step = scale.to(torch.float64).unsqueeze(2)
    # Rounding the scale down to bfloat16 leaves the largest weight at up to 127.25 steps, still nearest to 127.
    assert float((error.abs() / step).max()) <= 0.5001


@pytest.mark.parametrize("columns", [7, 33, 577])
def test_odd_columns_have_one_scale_a_row(columns: int) -> None:
    weight = weights(5, columns)
    codes, scale, zero = quantize_int4(weight, group_size=-1, symmetric=False, scale_dtype=torch.bfloat16)
    assert scale.shape == (5, 1)
    error = dequantize_int4(codes, scale, zero, torch.float32) - weight.float()
    assert float(error.square().sum() / weight.float().square().sum()) < 0.05
    assert torch.equal(unpack_int4(pack_int4(codes), columns), codes)


@pytest.mark.parametrize("group_size", [32, 0, -2])
def test_a_group_that_does_not_divide_is_refused(group_size: int) -> None:
    for run in (
        lambda: quantize_int4(torch.zeros(2, 48), group_size=group_size, symmetric=True, scale_dtype=torch.float32),
        lambda: quantize_int8(torch.zeros(2, 48), group_size=group_size, scale_dtype=torch.float32),
    ):
        with pytest.raises(UsageError, match=f"{group_size} does not divide the 48 columns") as caught:
            run()
        assert "-1" in caught.value.hint


def test_no_rows() -> None:
    codes, scale, zero = quantize_int4(torch.empty(0, 64), group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    assert zero is not None
    assert (codes.shape, scale.shape, zero.shape) == ((0, 64), (0, 2), (0, 2))


def test_bits_of_packed_codes_by_hand() -> None:
    """k = 0 in bits 0-3 of word 0, k = 7 in bits 28-31, k = 8 in bits 0-3 of word 1; the rest of the last word is 0."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 10]], dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.dtype is torch.int32
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == [0x87654321, 0x000000AF]
    assert packed.view(torch.uint8)[0].tolist() == [0x21, 0x43, 0x65, 0x87, 0xAF, 0, 0, 0]
    assert torch.equal(unpack_int4(packed, 10), codes)


def test_bits_of_packed_zeros_by_hand() -> None:
    """Row 0 in bits 0-3 of word (0, g), row 8 in bits 0-3 of word (1, g): eight zeros along the rows, not along the groups."""
    zero = torch.stack([torch.arange(9), torch.tensor([15, 0, 0, 0, 0, 0, 0, 1, 2])], 1).to(torch.uint8)
    packed = pack_zero_points(zero)
    assert (packed.dtype, packed.shape) == (torch.int32, (2, 2))
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == [[0x76543210, 0x1000000F], [0x8, 0x2]]
    assert torch.equal(unpack_zero_points(packed, 9), zero)


def test_dequantized_values_by_hand() -> None:
    codes = torch.tensor([[0, 8, 15, 7]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0]])
    assert dequantize_int4(codes, scale, None, torch.float32).tolist() == [[-4.0, 0.0, 14.0, -2.0]]
    zero = torch.tensor([[1, 15]], dtype=torch.uint8)
    assert dequantize_int4(codes, scale, zero, torch.float32).tolist() == [[-0.5, 3.5, 0.0, -16.0]]
    codes = torch.tensor([[1, 128, 129, 255]], dtype=torch.uint8)
    assert dequantize_int8(codes, scale, torch.float32).tolist() == [[-63.5, 0.0, 2.0, 254.0]]
