"""Rows of packed embeddings, interpreted."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

from tests.kernels.packed import random_int4, random_int8, require_same

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("columns", "groups", "symmetric", "dtype"),
    [(256, 8, False, FP16), (1056, 33, True, BF16), (100, 1, False, FP32), (1152, 3, False, FP16)],
)
def test_int4_rows_equal_those_of_the_whole_table(kernels, columns, groups, symmetric, dtype, index_dtype):
    table = random_int4(21, columns, groups, symmetric=symmetric, dtype=dtype)
    index = torch.tensor([[20, 0, 7], [7, 8, 15]], dtype=index_dtype)
    got = kernels.gather.gather_int4(index, *table, columns=columns)
    require_same(got, reference.dequantize_int4(*table, columns=columns)[index])


@pytest.mark.parametrize(("columns", "groups", "dtype"), [(256, 8, FP16), (77, 1, BF16), (2048, 1, FP32)])
def test_int8_rows_equal_those_of_the_whole_table(kernels, columns, groups, dtype):
    table = random_int8(21, columns, groups, dtype=dtype)
    index = torch.tensor([20, 0, 7, 7])
    require_same(kernels.gather.gather_int8(index, *table), reference.dequantize_int8(*table)[index])


def test_an_index_that_points_nowhere_is_seen(kernels):
    index = torch.tensor([3, 21, -1, 20])
    for rows in (
        kernels.gather.gather_int4(index, *random_int4(21, 64, 2, symmetric=False, dtype=FP32)),
        kernels.gather.gather_int8(index, *random_int8(21, 64, 2, dtype=FP32)),
    ):
        assert rows.isnan().all(1).tolist() == [False, True, True, False]
        assert rows[[0, 3]].isfinite().all()


def test_gather_refuses_with_the_numbers(kernels):
    table = random_int8(4, 64, 1, dtype=FP32)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        kernels.gather.gather_int8(torch.zeros(3), *table)
    with pytest.raises(ValueError, match="meta"):
        kernels.gather.gather_int8(torch.zeros(3, dtype=torch.int32, device="meta"), *table)
    assert kernels.gather.gather_int8(torch.zeros((0, 2), dtype=torch.int32), *table).shape == (0, 2, 64)
    assert kernels.gather.gather_int4(
        torch.zeros(0, dtype=torch.int32), *random_int4(4, 64, 1, symmetric=True, dtype=FP32)
    ).shape == (0, 64)
