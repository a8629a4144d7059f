"""The compiled products on every kind of processor: the same answers from vectors of 64, 32 and 16 bytes."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from qlazy import native
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers.linear import LAYERS
from qlazy.products import blocks, native_product

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")

FORMATS: list[Format] = [
    Int4(group_size=32),
    Int4(group_size=64, symmetric=True),
    Int4(group_size=128),
    Int4(group_size=-1),
    Int8(),
    Int8(group_size=32),
    Int8(group_size=128),
    Codebook4(kind="nf4", double_quant=True),
    Codebook4(kind="fp4", double_quant=False),
]
PROCESSORS = {"here": "-march=native"}
if platform.machine() == "x86_64":
    PROCESSORS |= {
        "avx512": "-march=skylake-avx512",
        "vnni": "-march=alderlake",
        "avx2": "-march=haswell",
        "portable": "-march=x86-64",
    }
NEEDS = {"avx512": "avx512bw", "vnni": "avx_vnni", "avx2": "avx2"}
"""Processors to compile for, and the flag in /proc/cpuinfo without which one is not tried."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Short parallel regions are slow on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The loops as they are compiled for a processor; what this one lacks is not tried."""
    if NEEDS.get(request.param, "") not in native._processor():
        pytest.skip(f"this processor has no {NEEDS[request.param]}")
    flags = tuple(PROCESSORS[request.param] if flag == "-march=native" else flag for flag in native.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(native, "FLAGS", flags)
        patch.setattr(native, "VARIANTS", (("-fopenmp",),))  # without the op, of which a process has one
        native.library.cache_clear()
        assert native.available()
        yield request.param
    native.library.cache_clear()


def made(fmt: Format, rows: int, columns: int, dtype: torch.dtype) -> tuple[native_product.Weight, Tensor]:
    """A weight, and its values by plain PyTorch."""
    generator = torch.Generator().manual_seed(rows * columns)
    layer = LAYERS[type(fmt)](columns, rows, format=fmt.for_columns(columns), dtype=dtype, bias=None)
    layer.allocate("cpu")
    layer.fill((torch.randn(rows, columns, generator=generator) * 0.05).to(dtype))
    weight = layer._packed()
    plain = {native_product.INT4: blocks._plain_int4, native_product.INT8: blocks._plain_int8}
    values = plain.get(weight.kind, blocks._plain_codebook4)(weight, torch.float32, 0, rows)
    return weight, values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [64, 192, 576])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_products_err_at_most_twice_as_much_as_that_of_torch(processor, fmt, columns, dtype):
    weight, values = made(fmt, 70, columns, dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype)
    for tokens in (1, 2, 3, 5, 8):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
        x[:, ::37] *= 100
        x = x.to(dtype)
        found = native_product.linear(x, weight, bias)
        exact = linear(x.double(), values.double(), bias.double())
        theirs = linear(x, values.to(dtype), bias)
        assert found is not None and found.dtype == dtype
        assert (found - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [64, 192, 576])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_dequantized_rows_are_those_of_plain_torch(processor, fmt, columns, dtype):
    weight, _ = made(fmt, 70, columns, torch.float32)
    out = torch.empty(64 - 8, columns, dtype=dtype)
    assert native_product.dequantize(weight, 8, 64, out)
    plain = {native_product.INT4: blocks._plain_int4, native_product.INT8: blocks._plain_int8}
    assert torch.equal(out, plain.get(weight.kind, blocks._plain_codebook4)(weight, dtype, 0, 70)[8:64])


@pytest.mark.parametrize("columns", [200, 40, 8])
def test_whole_rows_of_columns_that_fill_no_vector(processor, columns):
    for fmt in (Int4(group_size=-1), Int8()):
        weight, values = made(fmt, 9, columns, torch.bfloat16)
        x = torch.randn(2, columns, generator=torch.Generator().manual_seed(2)).bfloat16()
        found, exact = native_product.linear(x, weight, None), x.double() @ values.double().T
        assert found is not None
        assert (found - exact).norm() <= 2 * (linear(x, values.bfloat16()) - exact).norm()


def test_threads_share_the_rows_and_change_nothing(processor, monkeypatch):
    weight, _ = made(Int4(), 70, 576, torch.bfloat16)
    x = torch.randn(5, 576).bfloat16()
    alone, *others = (
        [monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n), native_product.linear(x, weight, None)][1]
        for n in (1, 2, 5)
    )
    assert all(torch.equal(alone, other) for other in others)


def test_stands_aside_for_what_it_does_not_take(processor):
    weight, _ = made(Int4(), 64, 64, torch.bfloat16)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert native_product.linear(x.double(), weight, None) is None
    assert native_product.linear(x, weight._replace(packed=weight.packed.t().contiguous().t()), None) is None
    assert native_product.linear(x, weight._replace(group_size=16), None) is None
    assert native_product.linear(x[:, :60], weight._replace(shape=(64, 60)), None) is None
    assert not native_product.dequantize(weight, 0, 64, torch.empty(64, 64, dtype=torch.float64))
