"""Few tokens times NF4 and FP4 weights, interpreted."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

from qlazy.quantizing import codebook
from tests.kernels.packed import random_codebook4, random_tokens, require_precise


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "dtype"),
    [(1, 11, 256, torch.float16), (3, 9, 1088, torch.bfloat16), (2, 5, 64, torch.float32), (9, 3, 192, torch.float16)],
)
def test_codebook4_is_as_precise_as_a_dequantized_product(kernels, kind, nested, tokens, rows, columns, dtype):
    packed, absmax, rest = random_codebook4(rows, columns, kind, nested=nested)
    x, bias = random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]
    given = (packed, absmax, codebook.CODES[kind], rest)
    weight = reference.dequantize_codebook4(*given, rows=rows, columns=columns, dtype=torch.float64)
    y = kernels.gemv_codebook4.gemv_codebook4(x, *given, bias, rows=rows)
    require_precise(y, x, weight, bias)


def test_codebook4_refuses_with_the_numbers(kernels):
    packed, absmax, _ = random_codebook4(4, 96, "nf4", nested=False)
    with pytest.raises(ValueError, match="96 columns"):
        kernels.gemv_codebook4.gemv_codebook4(torch.zeros(1, 96), packed, absmax, codebook.CODES["nf4"], rows=4)
    with pytest.raises(ValueError, match="5 x 96"):
        kernels.gemv_codebook4.gemv_codebook4(torch.zeros(1, 96), packed, absmax, codebook.CODES["nf4"], rows=5)
