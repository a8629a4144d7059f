"""The compiled loops give the bytes of the plain ones, or stand aside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlazy import native
from qlazy.quantizing import codebook, native_quantize, quantize
from qlazy.quantizing.packing import pack_int4

compiled = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
QUICKLY = tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS)
"""For tests of the compiling itself: a fifth of the time."""


def plainly(store: Callable[..., bool], **storage: Tensor | None) -> bool:
    """Run a quantizer as it runs without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return store(**storage)


def int4_storage(rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Storage that holds something else before."""
    return {
        "packed_out": torch.full((rows, columns // 8), -1, dtype=torch.int32),
        "scale_out": torch.full((rows, columns // group), 7.0, dtype=dtype),
        "zero_out": None if symmetric else torch.full((-(-rows // 8), columns // group), -1, dtype=torch.int32),
    }


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    """Bit by bit: NaN equals NaN, and 0 is not -0."""
    return all(
        a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # type: ignore[union-attr]
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def awkward_weight(rows: int, columns: int) -> torch.Tensor:
    """Heavy tails, outliers, zeros, ties, subnormal and one-sided groups."""
    weight = torch.distributions.StudentT(torch.tensor(2.0)).sample((rows, columns)) * 0.01
    weight[::7, ::13] *= 50
    weight[0] = 0
    weight[1] = 1e-39
    weight[2] = torch.randint(-3, 4, (columns,)).float()
    weight[3], weight[4] = weight[3].abs(), -weight[4].abs()
    weight[5] = -0.0
    weight[6] = 1e30
    return weight


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@compiled
@pytest.mark.parametrize("group_size", native_quantize.GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_int4_bytes_equal_the_plain_quantizer(
    group_size: int, symmetric: bool, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = awkward_weight(27, 384).to(dtype)  # 27 rows: the last sixteen lanes are not all in use
    weight[~weight.isfinite()] = 1.0  # 1e30 is infinite in float16
    if scale_dtype is torch.float16:
        weight.clamp_(-1e4, 1e4)
    found, expected = (int4_storage(27, 384, group_size, symmetric, scale_dtype) for _ in range(2))
    store = functools.partial(quantize.store_int4, weight, group_size=group_size)
    assert store(**found) and plainly(store, **expected)
    assert same(found, expected)
    codes = quantize.quantize_int4(weight, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)[0]
    assert torch.equal(pack_int4(codes), found["packed_out"])  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("group_size", [32, 48, 384])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_int8_bytes_equal_the_plain_quantizer(group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = awkward_weight(27, 384).to(dtype)
    weight[~weight.isfinite()] = 1.0
    if scale_dtype is torch.float16:
        weight.clamp_(-1e4, 1e4)
    found, expected = (
        {
            "packed_out": torch.full((27, 384), 99, dtype=torch.uint8),
            "scale_out": torch.full((27, 384 // group_size), 7.0, dtype=scale_dtype),
        }
        for _ in range(2)
    )
    store = functools.partial(quantize.store_int8, weight, group_size=group_size)
    assert store(**found) and plainly(store, **expected)
    assert same(found, expected)  # type: ignore[arg-type]


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@compiled
@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.one_of(finite, st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0])), min_size=32, max_size=32
    ),
    spread=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_all_compiled_quantizers_on_any_values(values: list[float], spread: int, dtype: torch.dtype) -> None:
    """Groups that hypothesis makes, and a second row of the same values in another order and size."""
    generator = torch.Generator().manual_seed(spread)
    base = torch.tensor(values)
    weight = torch.stack([base, base[torch.randperm(32, generator=generator)] * torch.rand(32, generator=generator)])
    weight = weight.to(dtype).repeat(1, 2)
    for symmetric in (False, True):
        found, expected = (int4_storage(2, 64, 32, symmetric, torch.bfloat16) for _ in range(2))
        store = functools.partial(quantize.store_int4, weight, group_size=32)
        sound = store(**found)
        assert sound == plainly(store, **expected)
        assert not sound or same(found, expected)
    found8, expected8 = (
        {"packed_out": torch.empty((2, 64), dtype=torch.uint8), "scale_out": torch.empty((2, 1), dtype=dtype)} for _ in range(2)
    )
    store8 = functools.partial(quantize.store_int8, weight, group_size=-1)
    sound = store8(**found8)
    assert sound == plainly(store8, **expected8)
    assert not sound or same(found8, expected8)  # type: ignore[arg-type]
    for kind in ("nf4", "fp4"):
        found4, expected4 = ({"packed_out": torch.empty(64, dtype=torch.uint8), "absmax_out": torch.empty(2)} for _ in range(2))
        store4 = functools.partial(codebook.quantize_blocks, weight, kind)
        sound = store4(**found4)
        assert sound == plainly(store4, **expected4) == bool(weight.isfinite().all())
        assert not sound or same(found4, expected4)  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_is_told_by_the_compiled_loop_as_by_the_plain_one(dtype: torch.dtype) -> None:
    values = torch.full((40000,), torch.finfo(dtype).max, dtype=dtype)
    values[::2] *= -1
    assert native_quantize.is_finite(values) is True and native_quantize.is_finite(values[:0]) is True
    for place in (0, 17, 20000, 39999):
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken = values.clone()
            broken[place] = bad
            assert native_quantize.is_finite(broken) is False
    assert native_quantize.is_finite(values.double()) is None and native_quantize.is_finite(values[::2]) is None


@compiled
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 17, 31])
def test_a_bad_weight_shows_in_its_scale_alone(bad: float, position: int) -> None:
    weight = torch.randn(16, 64)
    weight[3, 32 + position] = bad
    _, scale, _ = quantize.quantize_int4(weight, group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    assert (~scale.isfinite()).nonzero().tolist() == [[3, 1]]


def test_stands_aside_for_what_it_does_not_take() -> None:
    weight = torch.randn(4, 256)
    factors = torch.ones(1)

    def taken(weight: Tensor, group_size: int) -> bool:
        storage = int4_storage(*weight.shape, group_size, False, torch.bfloat16)
        return native_quantize.int4(weight, group_size=group_size, factors=factors, **storage) is not None  # type: ignore[arg-type]

    assert taken(weight, 32) == (native.library() is not None)
    assert not taken(weight.double(), 32)
    assert not taken(weight, 256)
    assert not taken(torch.randn(256, 64).t(), 32)
    assert not taken(weight.to("meta"), 32)


def test_without_a_compiler_the_plain_quantizer_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    weight = torch.randn(64, 64)
    options = {"group_size": 32, "symmetric": False, "scale_dtype": torch.float32}
    expected = quantize.quantize_int4(weight, **options)  # type: ignore[arg-type]
    native.library.cache_clear()
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CC", "/nowhere/cc")
        assert native.library() is None
        found = quantize.quantize_int4(weight, **options)  # type: ignore[arg-type]
    finally:
        native.library.cache_clear()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]


@compiled
def test_a_compiler_may_have_arguments_and_a_broken_library_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native.library.cache_clear()
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CC", "cc -DNOTHING")
        monkeypatch.setattr(native, "VARIANTS", (("-fopenmp",),))  # without the op, of which a process has one
        monkeypatch.setattr(native, "FLAGS", QUICKLY)
        assert native.available()
        (made,) = (tmp_path / "qlazy").glob("native-*.so")
        (tmp_path / "other").mkdir()
        made.rename(tmp_path / "other" / made.name)
        made.write_bytes(b"")
        native.library.cache_clear()
        assert native.available() and made.stat().st_size > 0
    finally:
        native.library.cache_clear()


@compiled
def test_where_the_op_does_not_compile_the_loops_do_and_it_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native.library.cache_clear()
    tried: list[tuple[str, ...]] = []
    compile = native._compile

    def counted(sources: dict[str, str], compilers: tuple[str, str | None], variant: tuple[str, ...], path: Path) -> None:
        tried.append(variant)
        compile(sources, compilers, variant, path)

    monkeypatch.setattr(native, "_compile", counted)
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", "/nowhere/c++")
        monkeypatch.setattr(native, "FLAGS", QUICKLY)
        assert native.available() and tried == [native.WITH_OP, ("-fopenmp",)]
        native.library.cache_clear()
        assert native.available() and len(tried) == 2
    finally:
        native.library.cache_clear()
