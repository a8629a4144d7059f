"""Random packed weights and activations, and what a product of them must be."""

from __future__ import annotations

import torch
from qlazy_kernels import reference
from torch import Tensor

from qlazy.quantizing import codebook


def random_int4(rows: int, columns: int, groups: int, *, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Packed words, scales and zeros: every bit pattern is a valid weight."""
    generator = torch.Generator().manual_seed(rows * columns + groups)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    scale = (torch.rand((rows, groups), generator=generator) + 0.5).mul_(0.02).to(dtype)
    return words(rows, -(-columns // 8)), scale, None if symmetric else words(-(-rows // 8), groups)


def random_int8(rows: int, columns: int, groups: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + groups)
    packed = torch.randint(1, 256, (rows, columns), generator=generator, dtype=torch.int64).to(torch.uint8)
    return packed, (torch.rand((rows, groups), generator=generator) + 0.5).mul_(0.002).to(dtype)


def random_tokens(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn((tokens, columns), generator=torch.Generator().manual_seed(tokens * columns)).to(dtype)


def random_codebook4(rows: int, columns: int, kind: str, *, nested: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Packed codes, absmax, and what unpacks the absmax where it is nested."""
    count = rows * columns
    packed, absmax = torch.empty(-(-count // 2), dtype=torch.uint8), torch.empty(-(-count // 64))
    weight = torch.randn(count, generator=torch.Generator().manual_seed(count))
    codebook.quantize_blocks(weight, kind, packed_out=packed, absmax_out=absmax)
    if not nested:
        return packed, absmax, None
    absmax, *rest = codebook.nest_absmax(absmax)
    return packed, absmax, (codebook.nested_code(), *rest)


def require_precise(y: Tensor, x: Tensor, weight64: Tensor, bias: Tensor | None = None) -> None:
    """Error against float64 at most twice that of a torch product of the weight dequantized to the dtype of `x`."""
    plain = torch.nn.functional.linear(x, weight64.to(x.dtype), bias)
    require_no_worse(y, plain, reference.product(x, weight64, bias))


def require_no_worse(y: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error at most twice that of what plain torch computes in the same dtype.

    Triton's interpreter cuts bfloat16 results off where a GPU rounds them: that costs up to one unit in the last place, 2**-8.
    """
    error, allowed = ((one.double() - exact).norm() / exact.norm() for one in (y, plain))
    assert y.dtype == plain.dtype and y.shape == plain.shape and y.isfinite().all()
    cut_off = y.dtype is torch.bfloat16 and y.device.type == "cpu"
    assert error <= 2 * allowed + (2**-8 if cut_off else 1e-7), (error, allowed)


def require_same(got: Tensor, expected: Tensor) -> None:
    """The same bits; interpreted in bfloat16 a neighbour will do, as Triton's interpreter cuts off where a GPU rounds."""
    assert got.dtype == expected.dtype
    if got.dtype is torch.bfloat16 and got.device.type == "cpu":
        assert ((got.view(torch.int16).int() - expected.view(torch.int16).int()).abs() <= 1).all()
    else:
        assert torch.equal(got, expected)
