"""The compiled loops give the bytes of the plain ones, or stand aside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlazy import native, native_quantize, quantize

compiled = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")


def plain_int4(weight: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`quantize_int4` as it runs without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_quantize, "quantize_int4", lambda *_, **__: None)
        return quantize.quantize_int4(weight, **options)  # type: ignore[arg-type]


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


@compiled
@pytest.mark.parametrize("group_size", native_quantize.GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_int4_bytes_equal_the_plain_quantizer(
    group_size: int, symmetric: bool, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = awkward_weight(27, 384).to(dtype)  # 27 rows: the last sixteen lanes are not all in use
    options = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    found = quantize.quantize_int4(weight, **options)  # type: ignore[arg-type]
    for one, other in zip(found, plain_int4(weight, **options), strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 17, 31])
def test_a_bad_weight_shows_in_its_scale_alone(bad: float, position: int) -> None:
    weight = torch.randn(16, 64)
    weight[3, 32 + position] = bad
    _, scale, _ = quantize.quantize_int4(weight, group_size=32, symmetric=False, scale_dtype=torch.bfloat16)
    assert (~scale.isfinite()).nonzero().tolist() == [[3, 1]]


def test_stands_aside_for_what_it_does_not_take() -> None:
    weight = torch.randn(4, 64)
    options = {"symmetric": False, "scale_dtype": torch.bfloat16, "factors": (1.0,)}
    assert native_quantize.quantize_int4(weight.half(), group_size=32, **options) is None  # type: ignore[arg-type]
    assert native_quantize.quantize_int4(weight, group_size=64 * 4, **options) is None  # type: ignore[arg-type]
    assert native_quantize.quantize_int4(weight.t(), group_size=32, **options) is None  # type: ignore[arg-type]


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
        assert native.available()
        (made,) = (tmp_path / "qlazy").glob("native-*.so")
        (tmp_path / "other").mkdir()
        made.rename(tmp_path / "other" / made.name)
        made.write_bytes(b"")
        native.library.cache_clear()
        assert native.available() and made.stat().st_size > 0
    finally:
        native.library.cache_clear()
