"""NF4 and FP4 against bitsandbytes itself: same codes, same absmax, same nested bytes, same values back."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlazy.formats import Codebook4
from qlazy.quantizing import codebook, native_quantize

KINDS = ["nf4", "fp4"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(576, 576), (1536, 576), (5, 7), (1, 1), (1, 193), (3, 100), (1, 64), (1, 65)]
DISTRIBUTIONS = ["normal", "uniform", "outliers", "midpoints", "zeros", "tiny"]


def make_weight(distribution: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str = "nf4") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if distribution == "uniform":
        return (uniform * 2 - 1).to(dtype)
    if distribution == "outliers":
        return torch.where(uniform > 0.999, normal * 100, normal * 0.02).to(dtype)
    if distribution == "midpoints":  # values exactly between two codes, times an absmax that keeps most of them exact
        values = codebook.CODES[kind].sort().values
        middle = (values[1:] + values[:-1]) / 2
        weight = middle[(uniform * 15).long()]
        weight.view(-1)[::64] = 1.0
        return (weight * 4).to(dtype)
    if distribution == "zeros":  # both signs, whole blocks and single elements
        weight = normal.view(-1)
        weight[torch.arange(len(weight)) % 192 < 128] = 0.0
        weight[1::3] = -0.0
        return weight.view(shape).to(dtype)
    return (normal * (1e-38 if distribution == "tiny" else 0.02)).to(dtype)


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    packed = torch.full((-(-count // 2),), 0xAA, dtype=torch.uint8)
    absmax = torch.full((-(-count // 64),), -1.0)
    codebook.quantize_blocks(weight, kind, packed_out=packed, absmax_out=absmax)
    plain = packed.clone(), absmax.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_quantize, "codebook4", lambda *_, **__: None)
        codebook.quantize_blocks(weight, kind, packed_out=plain[0], absmax_out=plain[1])
    sound = absmax.isfinite()  # what is not means nothing
    assert same_bits(absmax[sound], plain[1][sound]) and (not bool(sound.all()) or same_bits(packed, plain[0]))
    return packed, absmax


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers that quantize while loading; short parallel regions are slow on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["table", "native"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Dequantization by qlazy's table, and by bitsandbytes' kernel where that is loaded (this file imports it)."""
    if request.param == "table":
        monkeypatch.setattr(codebook, "_has_native_kernel", lambda device, count: False)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_bitsandbytes(kind: str) -> None:
    assert same_bits(codebook.CODES[kind], bnb.get_4bit_type(kind, device="cpu"))


def test_nested_code_is_the_dynamic_map_of_bitsandbytes() -> None:
    assert same_bits(codebook.nested_code(), bnb.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_bytes_equal_those_of_bitsandbytes(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for distribution in DISTRIBUTIONS:
        weight = make_weight(distribution, shape, dtype, kind)
        packed, absmax = quantize(weight, kind)
        expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
        assert same_bits(packed, expected.view(-1)), distribution
        assert same_bits(absmax, state.absmax), distribution


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_bytes_equal_those_of_bitsandbytes(shape: tuple[int, ...]) -> None:
    for distribution in DISTRIBUTIONS:
        weight = make_weight(distribution, shape, torch.bfloat16)
        nested = codebook.nest_absmax(quantize(weight, "nf4")[1])
        state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
        assert same_bits(nested[0], state.absmax), distribution
        assert same_bits(nested[1], state.state2.absmax), distribution
        assert torch.equal(nested[2], state.offset) and nested[2].shape == ()
        expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert same_bits(codebook.unnest_absmax(*nested), expected), distribution
        assert same_bits(codebook.unnest_absmax(*nested, code=state.state2.code), expected), distribution


def test_nested_bytes_equal_those_of_bitsandbytes_between_two_values() -> None:
    code = codebook.nested_code()
    middle = (code[1:] + code[:-1]) / 2
    near = [torch.nextafter(middle, torch.full_like(middle, side)) for side in (-2.0, 2.0)]
    absmax = torch.cat([middle, torch.ones(1), *(torch.cat([n, -torch.ones(1)]) for n in near)]).repeat(8) + 2.0
    offset = absmax.mean()
    expected, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    packed, nested, ours = codebook.nest_absmax(absmax)
    assert same_bits(packed, expected) and same_bits(nested, state.absmax) and torch.equal(ours, offset)


def test_a_constant_absmax_comes_back_exactly_from_8_bits() -> None:
    absmax = torch.full((300,), 0.5)
    packed, nested, offset = codebook.nest_absmax(absmax)
    assert torch.equal(nested, torch.zeros(2)) and not packed.any()
    assert torch.equal(codebook.unnest_absmax(packed, nested, offset), absmax)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [64, 6400, 65536, 65600, 131072])
def test_two_runs_make_the_bytes_of_one(kind: str, cut: int) -> None:
    weight = make_weight("outliers", (140, 1001), torch.bfloat16).view(-1)
    packed, absmax = quantize(weight, kind)
    twice = torch.zeros_like(packed), torch.zeros_like(absmax)
    for begin, end in ((0, cut), (cut, len(weight))):
        codebook.quantize_blocks(
            weight[begin:end],
            kind,
            packed_out=twice[0][begin // 2 : -(-end // 2)],
            absmax_out=twice[1][begin // 64 : -(-end // 64)],
        )
    assert torch.equal(twice[0], packed) and torch.equal(twice[1], absmax)


def test_a_transposed_weight_is_taken_in_row_major_order() -> None:
    weight = make_weight("normal", (96, 64), torch.bfloat16)
    assert torch.equal(quantize(weight.T, "nf4")[0], quantize(weight.T.contiguous(), "nf4")[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 100, 129])
def test_absmax_shows_a_value_that_is_not_finite(bad: float, dtype: torch.dtype, place: int) -> None:
    weight = make_weight("normal", (1, 130), dtype)
    weight[0, place] = bad
    absmax = quantize(weight, "nf4")[1]
    assert absmax.isfinite().tolist() == [block != place // 64 for block in range(3)]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 576), (1, 64), (3, 100), (33, 2002)])
def test_dequantized_values_equal_those_of_bitsandbytes(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for distribution in ("normal", "outliers", "zeros"):
        weight = make_weight(distribution, shape, dtype)
        packed, absmax = quantize(weight, kind)
        expected = bnb.dequantize_4bit(packed[:, None], bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)[1])
        ours = codebook.dequantize_blocks(packed, absmax, kind, dtype, 0, weight.numel())
        assert torch.equal(ours, expected.reshape(-1)), distribution


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 13), (48, 80), (1, 2), (7, 32)])
def test_rows_need_not_hold_whole_blocks(kind: str, shape: tuple[int, int]) -> None:
    weight = make_weight("normal", shape, torch.float32)
    packed, absmax = quantize(weight, kind)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: weight.numel()].long()
    expected = codebook.CODES[kind][codes] * absmax.repeat_interleave(64)[: weight.numel()]
    made = codebook.dequantize_blocks(packed, absmax, kind, torch.float32, 0, weight.numel())
    assert torch.equal(made, expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("start", "count"), [(0, 64), (64, 1), (640, 66), (65536, 70000), (64, 65536), (139968, 172)])
def test_a_part_of_a_weight_is_the_part_of_the_whole(start: int, count: int) -> None:
    weight = make_weight("normal", (140, 1001), torch.bfloat16)
    packed, absmax = quantize(weight, "nf4")
    whole = codebook.dequantize_blocks(packed, absmax, "nf4", torch.bfloat16, 0, weight.numel())
    out = torch.empty(count, dtype=torch.bfloat16)
    made = codebook.dequantize_blocks(packed, absmax, "nf4", torch.bfloat16, start, count, out)
    assert made is out and torch.equal(out, whole[start : start + count])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_whole_weight_comes_back_from_its_storage(double_quant: bool) -> None:
    weight = make_weight("normal", (48, 128), torch.bfloat16)
    fmt = Codebook4(double_quant=double_quant)
    packed, absmax = quantize(weight, fmt.kind)
    stored = {"weight_packed": packed, "absmax": absmax}
    if double_quant:
        nested = codebook.nest_absmax(absmax)
        stored = {"weight_packed": packed} | dict(zip(("absmax_packed", "nested_absmax", "nested_offset"), nested, strict=True))
    sizes = {name: (s.shape, getattr(torch, s.dtype)) for name, s in fmt.storage(48, 128, "bfloat16").items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == sizes

    state = bnb.quantize_4bit(weight, blocksize=64, quant_type=fmt.kind, compress_statistics=double_quant)[1]
    made = codebook.dequantize(stored, fmt, 48, 128, torch.bfloat16)
    assert torch.equal(made, bnb.dequantize_4bit(packed[:, None], state))
    out = torch.empty(48, 128, dtype=torch.float32)
    codebook.dequantize(stored, fmt, 48, 128, torch.float32, out)
    assert torch.equal(out.bfloat16(), made)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 300),
    scale=st.floats(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_no_value_moves_by_more_than_half_the_widest_step(kind: str, count: int, scale: float, seed: int) -> None:
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    packed, absmax = quantize(weight, kind)
    made = codebook.dequantize_blocks(packed, absmax, kind, torch.float32, 0, count)
    step = codebook.CODES[kind].sort().values.diff().max()
    bound = absmax.repeat_interleave(64)[:count] * step / 2 * (1 + 1e-6)
    assert bool(((made - weight).abs() <= bound).all())
    largest = weight.abs() == absmax.repeat_interleave(64)[:count]
    assert torch.equal(made[largest], weight[largest])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=200),
)
def test_any_finite_weight_has_the_bytes_of_bitsandbytes(kind: str, dtype: torch.dtype, values: list[float]) -> None:
    weight = torch.tensor(values).to(dtype)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    packed, absmax = quantize(weight, kind)
    assert same_bits(packed, expected.view(-1)) and same_bits(absmax, state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_float64_is_the_float32_product_with_bitsandbytes_imported(kind: str) -> None:
    """Its compiled kernel gives zeros for that dtype."""
    pytest.importorskip("bitsandbytes")
    packed, absmax = torch.empty(128, dtype=torch.uint8), torch.empty(4)
    codebook.quantize_blocks(torch.randn(4, 64), kind, packed_out=packed, absmax_out=absmax)
    exact = codebook.dequantize_blocks(packed, absmax, kind, torch.float32, 0, 256)
    assert exact.abs().max() > 0
    assert torch.equal(codebook.dequantize_blocks(packed, absmax, kind, torch.float64, 0, 256), exact.double())
