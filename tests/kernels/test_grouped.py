"""All experts of a layer in one launch, interpreted."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

from tests.kernels.packed import random_int4, random_int8, random_tokens, require_no_worse

FP16, FP32 = torch.float16, torch.float32


def stacked_int4(experts: int, rows: int, columns: int, groups: int, *, symmetric: bool, dtype: torch.dtype):
    """Experts that differ, stacked, and the same unpacked to float64."""
    packed, scale, zero = random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype)
    each = [(packed + i * 0x01234567, scale * (1 + i), None if zero is None else zero ^ i * 0x1357) for i in range(experts)]
    weight = torch.stack([reference.dequantize_int4(*one, columns=columns, dtype=torch.float64) for one in each])
    stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
    return (*stacked, weight)


def test_blocks_never_mix_experts(kernels):
    counts = torch.tensor([0, 17, 3, 0, 32, 1])
    blocks = kernels.grouped.group_blocks(counts, 53, 16)
    taken = [(e, f) for e, f in zip(blocks.expert.tolist(), blocks.first.tolist(), strict=True) if e < 6]
    assert taken == [(1, 0), (1, 16), (2, 17), (4, 20), (4, 36), (5, 52)]
    assert blocks.end.tolist() == [0, 17, 20, 20, 52, 53]
    assert len(blocks.expert) == 4 + 6


@pytest.mark.parametrize(
    ("counts", "rows", "columns", "groups", "symmetric", "dtype"),
    [
        ([0, 17, 3, 1], 9, 256, 8, False, FP16),
        ([2, 0, 0], 40, 100, 1, True, FP32),
        ([1, 1, 1, 1, 0], 19, 320, 10, False, FP16),
    ],
)
@pytest.mark.parametrize("with_index", [False, True])
def test_int4_is_as_precise_as_one_expert_after_the_other(kernels, counts, rows, columns, groups, symmetric, dtype, with_index):
    packed, scale, zero, weight = stacked_int4(len(counts), rows, columns, groups, symmetric=symmetric, dtype=dtype)
    counts = torch.tensor(counts)
    total = int(counts.sum())
    source = random_tokens(total, columns, dtype)
    index = torch.randperm(total, generator=torch.Generator().manual_seed(total)) if with_index else None
    x = source if index is None else source[index]
    blocks = kernels.grouped.group_blocks(counts, total, 16)
    y = kernels.grouped.grouped_gemm_int4(source, packed, scale, zero, blocks, index=index)
    exact = reference.grouped(x, weight, counts)
    plain = torch.cat([part @ one.to(dtype).T for part, one in zip(x.split(counts.tolist()), weight, strict=True)])
    require_no_worse(y, plain, exact)


def test_int8_with_fewer_rows_of_x_than_tokens(kernels):
    packed, scale = random_int8(3 * 5, 64, 2, dtype=FP16)
    packed, scale = packed.view(3, 5, 64), scale.view(3, 5, 2)
    weight = torch.stack([reference.dequantize_int8(*one, dtype=torch.float64) for one in zip(packed, scale, strict=True)])
    source = random_tokens(4, 64, FP16)
    index = torch.tensor([0, 3, 1, 1, 2, 0, 2, 3], dtype=torch.int32)  # two experts a token
    counts = torch.tensor([2, 5, 1])
    blocks = kernels.grouped.group_blocks(counts, 8, 16)
    y = kernels.grouped.grouped_gemm_int8(source, packed, scale, blocks, index=index)
    x = source[index]
    plain = torch.cat([part @ one.to(FP16).T for part, one in zip(x.split(counts.tolist()), weight, strict=True)])
    require_no_worse(y, plain, reference.grouped(x, weight, counts))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"weight_scale": torch.zeros(2, 8, 1)}, ["2 experts", "for 3"]),
        ({"x": torch.zeros(4, 65)}, ["65 columns", "64"]),
        ({"index": torch.zeros(4)}, ["torch.float32", "torch.int32"]),
        ({"weight_packed": torch.zeros(8, 64, dtype=torch.uint8)}, ["(8, 64)", "three dimensions"]),
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, ["torch.float64"]),
    ],
)
def test_grouped_refuses_with_the_numbers(kernels, change, numbers):
    blocks = kernels.grouped.group_blocks(torch.tensor([1, 3, 0]), 4, 16)
    good = {
        "x": torch.zeros(4, 64),
        "weight_packed": torch.zeros(3, 8, 64, dtype=torch.uint8),
        "weight_scale": torch.zeros(3, 8, 1),
    }
    with pytest.raises(ValueError) as caught:
        kernels.grouped.grouped_gemm_int8(**(good | change), blocks=blocks)
    for number in numbers:
        assert number in str(caught.value)
    with pytest.raises(ValueError, match="takes 32 tokens, blocks have 16"):
        kernels.grouped.grouped_gemm_int8(**good, blocks=blocks, tile=kernels.gemm.TILES[32])
