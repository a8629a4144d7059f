"""What formats store: the bytes that the plan counts are the bytes of real tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlazy.formats import ITEMSIZE, Codebook4, Int4, Int8, Storage, packed_nbytes
from qlazy.layers.linear import LAYERS

INT4 = [Int4(group_size=g, symmetric=s) for g in (32, 64, 128, -1) for s in (False, True)]
INT8 = [Int8(group_size=g) for g in (-1, 32, 64, 128)]
CODEBOOK = [Codebook4(kind=k, double_quant=d) for k in ("nf4", "fp4") for d in (True, False)]
FORMATS = [*INT4, *INT8, *CODEBOOK]
DTYPES = ["bfloat16", "float16", "float32"]


def real(storage: dict[str, Storage]) -> int:
    return sum(torch.empty(s.shape, dtype=getattr(torch, s.dtype)).nbytes for s in storage.values())


def test_itemsizes_are_torchs():
    for name, size in ITEMSIZE.items():
        assert getattr(torch, name).itemsize == size
    for name in ("uint8", "int8", "bool", "float8_e4m3fn"):
        assert name not in ITEMSIZE and getattr(torch, name).itemsize == 1


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 520), dtype=st.sampled_from(DTYPES))
def test_packed_bytes_are_those_of_the_tensors(fmt, rows, columns, dtype):
    fmt = fmt.for_columns(columns)
    assert packed_nbytes(fmt, rows, columns, dtype) == real(fmt.storage(rows, columns, dtype))
    # Every weight has its bits, and per-row and per-group values are not most of it beyond small shapes.
    assert real(fmt.storage(rows, columns, dtype)) >= rows * columns * fmt.bits // 8


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (192, 256), (7, 33), (100, 96), (1, 1)])
def test_a_layer_takes_what_its_format_says(fmt, dtype, rows, columns):
    fmt = fmt.for_columns(columns)
    layer = LAYERS[type(fmt)](columns, rows, format=fmt, dtype=getattr(torch, dtype), bias=None)
    layer.allocate("cpu")
    held = sum(t.nbytes for t in [*layer.buffers(), *layer.parameters()])
    assert held == packed_nbytes(fmt, rows, columns, dtype)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        # 4 + 16/32 of scale + 4/32 of zero; symmetric has none; NF4 has 32/64, or 8/64 and a little.
        (Int4(group_size=32), 4.625),
        (Int4(group_size=32, symmetric=True), 4.5),
        (Int4(group_size=128), 4.15625),
        (Codebook4(double_quant=False), 4.5),
        (Codebook4(), 4 + 8 / 64 + 32 / (64 * 256)),
        (Int8(), 8 + 16 / 4096),
        (Int8(group_size=32), 8.5),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_bits_per_weight(fmt, bits):
    assert 8 * packed_nbytes(fmt, 4096, 4096, "bfloat16") / 4096**2 == pytest.approx(bits, abs=1e-4)


def test_names_tell_formats_apart():
    assert len({fmt.name for fmt in FORMATS}) == len(FORMATS)
    assert (Int4().name, Int8().name, Codebook4().name) == ("int4-g32-asym", "int8-channel", "nf4-dq")


def test_for_columns_keeps_what_divides():
    for fmt in INT4 + INT8:
        assert fmt.for_columns(256) == fmt
        assert fmt.for_columns(100).group_size == -1
        assert fmt.for_columns(100).bits == fmt.bits
    assert Int4(symmetric=True).for_columns(100).symmetric
    assert all(fmt.for_columns(1) == fmt for fmt in CODEBOOK)


def test_sixteen_bits_are_more():
    weight = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16).weight
    assert all(packed_nbytes(fmt, 512, 512, "bfloat16") < 0.6 * weight.nbytes for fmt in FORMATS)
