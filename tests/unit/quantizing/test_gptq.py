"""Calibrated rounding: against a textbook in float64, against the plain quantizer, and what must not matter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlazy.errors import UsageError
from qlazy.formats import Int4, Int8
from qlazy.quantizing import descent, feedback
from qlazy.quantizing.curvature import DAMPING, Curvature, curvature_blocks
from qlazy.quantizing.gptq import quantize_calibrated, store_calibrated
from qlazy.quantizing.packing import unpack_int4, unpack_zero_points
from qlazy.quantizing.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

FORMATS = [
    Int4(),
    Int4(group_size=64, symmetric=True),
    Int4(group_size=128),
    Int4(group_size=-1),
    Int8(),
    Int8(group_size=64),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Short parallel regions crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def correlated(columns: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """H of inputs that go together and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / columns**0.5
    )
    inputs = (mixed + 0.5 * torch.randn(columns, generator=generator)) * torch.randn(columns, generator=generator).exp()
    return inputs.T @ inputs / tokens


def random_weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).mul(0.3).exp() * 0.02


def values(stored: dict[str, Tensor], fmt: Int4 | Int8, shape: torch.Size) -> Tensor:
    """The weight that a layer would compute with, float32."""
    if isinstance(fmt, Int8):
        return dequantize_int8(stored["weight_packed"], stored["weight_scale"], torch.float32)
    codes = unpack_int4(stored["weight_packed"], shape[1])
    zero = None if fmt.symmetric else unpack_zero_points(stored["weight_zero_point"], shape[0])
    return dequantize_int4(codes, stored["weight_scale"], zero, torch.float32)


def plain(weight: Tensor, fmt: Int4 | Int8) -> Tensor:
    if isinstance(fmt, Int8):
        return dequantize_int8(*quantize_int8(weight, group_size=fmt.group_size, scale_dtype=torch.bfloat16), torch.float32)
    stored = quantize_int4(weight, group_size=fmt.group_size, symmetric=fmt.symmetric, scale_dtype=torch.bfloat16)
    return dequantize_int4(*stored, torch.float32)


def loss(error: Tensor, hessian: Tensor) -> float:
    return float((error @ hessian * error).sum())


def textbook(weight: Tensor, hessian: Tensor, rounded: feedback.Rounded, group: int) -> Tensor:
    """GPTQ as its paper has it, column by column in float64, on given scales and zeros; the last column first. Steps (K, N)."""
    left = weight.to(torch.float64).flip(1)
    scale = rounded.scale.to(torch.float64).repeat_interleave(group, 0).flip(0)
    zero = rounded.zero.to(torch.float64).repeat_interleave(group, 0).flip(0)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian.to(torch.float64).flip(0, 1)), upper=True)
    steps = torch.empty_like(left)
    for column in range(left.shape[1]):
        steps[:, column] = (left[:, column] / scale[column]).round().clamp(-zero[column], 15 - zero[column])
        error = (left[:, column] - steps[:, column] * scale[column]) / inverse[column, column]
        left[:, column:] -= error.unsqueeze(1) * inverse[column, column:]
    return steps.flip(1).T


@pytest.mark.parametrize(("columns", "group"), [(64, 32), (320, 64)])
def test_rounding_is_that_of_the_textbook(columns: int, group: int) -> None:
    weight, curvature = random_weight(64, columns), Curvature.from_hessian(correlated(columns))
    rounded = feedback.round_rows(weight.T.contiguous(), curvature, feedback.INT4, group, torch.bfloat16)
    expected = textbook(weight, curvature.hessian[0], rounded, group)
    # A weight halfway between two steps may go either way, and takes those after it along.
    assert (rounded.steps == expected).float().mean() > 0.995


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_format_has_its_layout_and_less_error_than_without_calibration(fmt: Int4 | Int8) -> None:
    weight, hessian = random_weight(24, 256).to(torch.bfloat16), correlated(256)
    stored = quantize_calibrated(weight, fmt, Curvature.from_hessian(hessian.clone()), scale_dtype=torch.bfloat16)
    listed = {name: (storage.shape, storage.dtype) for name, storage in fmt.storage(24, 256, "bfloat16").items()}
    assert {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in stored.items()} == listed
    error, without = weight - values(stored, fmt, weight.shape), weight - plain(weight, fmt)
    assert loss(error, hessian) < 0.7 * loss(without, hessian)


@pytest.mark.parametrize("columns", [48, 96])
@pytest.mark.parametrize("fmt", [Int4(group_size=-1), Int8()], ids=lambda fmt: fmt.name)
def test_layers_of_few_columns_have_one_group(fmt: Int4 | Int8, columns: int) -> None:
    weight, hessian = random_weight(16, columns), correlated(columns)
    stored = quantize_calibrated(weight, fmt, Curvature.from_hessian(hessian.clone()), scale_dtype=torch.bfloat16)
    error, without = weight - values(stored, fmt, weight.shape), weight - plain(weight, fmt)
    assert loss(error, hessian) < 0.9 * loss(without, hessian)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(16, 40), groups=st.integers(1, 5), tokens=st.integers(20, 400), seed=st.integers(0, 10**6))
def test_no_weight_loses_by_calibration(rows: int, groups: int, tokens: int, seed: int) -> None:
    columns = 32 * groups
    weight, hessian = random_weight(rows, columns, seed + 1), correlated(columns, tokens, seed)
    damped = Curvature.from_hessian(hessian)
    stored = quantize_calibrated(weight, Int4(), damped, scale_dtype=torch.bfloat16)
    error, without = weight - values(stored, Int4(), weight.shape), weight - plain(weight, Int4())
    assert loss(error, damped.hessian[0]) <= loss(without, damped.hessian[0])


@pytest.mark.parametrize("fmt", [Int4(), Int4(symmetric=True), Int4(group_size=128)], ids=lambda fmt: fmt.name)
def test_inputs_without_any_order_give_no_more_error_than_plain_search(fmt: Int4) -> None:
    weight = random_weight(64, 256)
    stored = quantize_calibrated(weight, fmt, Curvature.from_hessian(torch.eye(256)), scale_dtype=torch.bfloat16)
    assert (weight - values(stored, fmt, weight.shape)).square().sum() <= (weight - plain(weight, fmt)).square().sum()


def test_descent_makes_no_row_worse() -> None:
    weight, curvature = random_weight(64, 384).T.contiguous(), Curvature.from_hessian(correlated(384))
    rounded = feedback.round_rows(weight, curvature, feedback.INT4, 32, torch.bfloat16)

    def by_row() -> Tensor:
        error = (weight - rounded.values()).to(torch.float64)
        return (error * (curvature.hessian[0].to(torch.float64) @ error)).sum(0)

    before = by_row()
    descent.descend(weight, rounded, curvature, feedback.INT4, torch.bfloat16)
    after = by_row()
    assert bool((after <= before * (1 + 1e-5)).all()) and after.sum() < 0.95 * before.sum()
    codes = rounded.steps.view(12, 32, 64) + rounded.zero.unsqueeze(1)
    assert codes.min() >= 0 and codes.max() <= 15 and torch.equal(codes, codes.round())


@pytest.mark.parametrize("fmt", [Int4(), Int8(group_size=32)], ids=lambda fmt: fmt.name)
def test_bytes_do_not_depend_on_the_piece_of_rows(fmt: Int4 | Int8) -> None:
    weight = random_weight(60, 256)
    curvature = Curvature.from_hessian(correlated(256), drift=0.1 * correlated(256, seed=7))
    whole = quantize_calibrated(weight, fmt, curvature, scale_dtype=torch.float16)
    pieces = [
        quantize_calibrated(weight[a:b], fmt, curvature, scale_dtype=torch.float16) for a, b in ((0, 8), (8, 48), (48, 60))
    ]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([piece[name] for piece in pieces])), name


def test_bytes_do_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, curvature = random_weight(60, 128), Curvature.from_hessian(correlated(128))
    whole = quantize_calibrated(weight, Int4(), curvature, scale_dtype=torch.bfloat16)
    monkeypatch.setattr("qlazy.quantizing.gptq.TILE", 16)
    for name, tensor in quantize_calibrated(weight, Int4(), curvature, scale_dtype=torch.bfloat16).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_do_not_depend_on_the_dtype_that_holds_the_weight(dtype: torch.dtype) -> None:
    weight, curvature = random_weight(8, 128).to(dtype), Curvature.from_hessian(correlated(128))
    wide = quantize_calibrated(weight.float(), Int4(), curvature, scale_dtype=torch.bfloat16)
    for name, tensor in quantize_calibrated(weight, Int4(), curvature, scale_dtype=torch.bfloat16).items():
        assert torch.equal(tensor, wide[name]), name


def test_blocks_of_h_are_weights_of_their_own() -> None:
    weight, hessians = random_weight(16, 256), torch.stack([correlated(128, seed=2), correlated(128, seed=3)])
    stored = quantize_calibrated(weight, Int4(), Curvature.from_hessian(hessians.clone()), scale_dtype=torch.bfloat16)
    halves = [
        quantize_calibrated(half, Int4(), Curvature.from_hessian(hessian.clone()), scale_dtype=torch.bfloat16)
        for half, hessian in zip(weight.split(128, 1), hessians, strict=True)
    ]
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.cat([half[name] for half in halves], 1)), name


def test_a_diagonal_weighs_columns() -> None:
    weight, diagonal = random_weight(32, 192), torch.ones(192)
    diagonal[::8] = 400.0
    stored = quantize_calibrated(weight, Int4(), Curvature.from_diagonal(diagonal), scale_dtype=torch.bfloat16)
    error, without = weight - values(stored, Int4(), weight.shape), weight - plain(weight, Int4())
    assert (error.square() * diagonal).sum() < 0.7 * (without.square() * diagonal).sum()


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_few_inputs_and_dead_columns_are_no_harm(tokens: int) -> None:
    weight, hessian = random_weight(16, 128), correlated(128, max(tokens, 1)) * float(tokens > 0)
    hessian[5], hessian[:, 5], hessian[64:96], hessian[:, 64:96] = 0.0, 0.0, 0.0, 0.0
    curvature = Curvature.from_hessian(hessian.clone())
    error = weight - values(quantize_calibrated(weight, Int4(), curvature, scale_dtype=torch.bfloat16), Int4(), weight.shape)
    without = weight - plain(weight, Int4())
    assert loss(error, hessian) <= loss(without, hessian)
    # What was never seen is rounded as if by itself.
    assert error[:, 64:96].square().sum() <= 1.02 * without[:, 64:96].square().sum()


def test_damping_is_a_share_of_the_mean_and_grows_where_there_is_no_factor() -> None:
    hessian = correlated(64)
    mean = hessian.diagonal().mean()
    torch.testing.assert_close(
        Curvature.from_hessian(hessian.clone()).diagonal, hessian.diagonal() + DAMPING * mean, rtol=1e-5, atol=0
    )
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    curvature = Curvature.from_hessian(indefinite.clone())
    assert curvature.factor is not None and bool(torch.isfinite(curvature.factor).all())
    torch.testing.assert_close(curvature.factor[0] @ curvature.factor[0].T, curvature.hessian[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "blocks"),
    [
        (4096, 1),
        (8192, 1),
        (11008, 2),
        (14336, 2),
        (18944, 4),
        (28672, 4),
        (13696, 1),
        (18176, 2),
        (128 * 131, 131),
        (9000, 1),
        (17000, 0),
    ],
)
def test_h_is_cut_evenly_where_it_is_large(columns: int, blocks: int) -> None:
    assert curvature_blocks(columns) == blocks
    assert columns // max(1, blocks) <= 16384 or not blocks


def test_what_cannot_be_meant_is_refused() -> None:
    curvature = Curvature.from_hessian(torch.eye(96))
    with pytest.raises(UsageError, match="96 inputs"):
        quantize_calibrated(torch.zeros(8, 64), Int4(), curvature, scale_dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="48 of 96"):
        quantize_calibrated(torch.zeros(8, 96), Int4(group_size=48), curvature, scale_dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="not finite"):
        Curvature.from_hessian(torch.full((32, 32), torch.inf))
    with pytest.raises(UsageError, match="not that of H"):
        Curvature.from_hessian(torch.eye(32), drift=torch.eye(64))
    with pytest.raises(UsageError, match="neither"):
        Curvature.from_hessian(torch.eye(32, dtype=torch.float64))
    with pytest.raises(UsageError, match="diagonal"):
        Curvature.from_diagonal(torch.tensor([1.0, torch.nan]))


def test_a_weight_that_is_not_finite_is_told() -> None:
    weight, fmt = random_weight(8, 64), Int4()
    outs = {name: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for name, s in fmt.storage(8, 64, "bfloat16").items()}
    curvature = Curvature.from_hessian(correlated(64))
    out = {
        "packed_out": outs["weight_packed"],
        "scale_out": outs["weight_scale"],
        "zero_out": outs["weight_zero_point"],
    }
    assert store_calibrated(weight, fmt, curvature, **out)
    weight[3, 40] = torch.nan
    assert not store_calibrated(weight, fmt, curvature, **out)


@pytest.mark.parametrize("blocks", [1, 2])
def test_weights_make_up_for_the_drift_of_their_inputs(blocks: int) -> None:
    generator, weight = torch.Generator().manual_seed(3), random_weight(16, 128)
    before = torch.randn(1024, 128, generator=generator)
    after = before * 0.9 + 0.1 * before.roll(1, 1) + 0.1 * torch.randn(1024, 128, generator=generator)

    def products(left: Tensor) -> Tensor:
        return torch.stack([a.T @ b for a, b in zip(left.chunk(blocks, 1), after.chunk(blocks, 1), strict=True)])

    def off(curvature: Curvature) -> float:
        stored = quantize_calibrated(weight, Int4(), curvature, scale_dtype=torch.bfloat16)
        return float((before @ weight.T - after @ values(stored, Int4(), weight.shape).T).square().sum())

    still = off(Curvature.from_hessian(products(after)))
    assert off(Curvature.from_hessian(products(after), drift=products(before - after))) < 0.75 * still
    # No drift, no difference.
    same = quantize_calibrated(weight, Int4(), Curvature.from_hessian(products(after)), scale_dtype=torch.bfloat16)
    none = Curvature.from_hessian(products(after), drift=torch.zeros(blocks, 128 // blocks, 128 // blocks))
    for name, tensor in quantize_calibrated(weight, Int4(), none, scale_dtype=torch.bfloat16).items():
        assert torch.equal(tensor, same[name]), name
