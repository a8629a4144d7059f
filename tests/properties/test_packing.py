"""Packing loses nothing and puts every code where the layout says, for any shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlazy.formats import Int4
from qlazy.quantizing.packing import pack_int4, pack_zero_points, unpack_int4, unpack_zero_points

shapes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))


def codes_of(shape: tuple[int, int, int]) -> torch.Tensor:
    rows, columns, seed = shape
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_codes_come_back(shape: tuple[int, int, int]) -> None:
    codes = codes_of(shape)
    packed = pack_int4(codes)
    assert tuple(packed.shape) == Int4(group_size=-1).storage(shape[0], shape[1], "bfloat16")["weight_packed"].shape
    assert torch.equal(unpack_int4(packed, shape[1]), codes)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_every_code_is_in_its_bits(shape: tuple[int, int, int]) -> None:
    """By integer arithmetic on the words, which knows nothing of bytes."""
    codes = codes_of(shape)
    words = pack_int4(codes).to(torch.int64)
    k = torch.arange(shape[1])
    assert torch.equal((words[:, k // 8] >> (4 * (k % 8))) & 15, codes.to(torch.int64))
    used = shape[1] % 8
    if used:
        assert bool(((words[:, -1] & 0xFFFFFFFF) >> (4 * used) == 0).all())


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_zeros_come_back_and_are_in_their_bits(shape: tuple[int, int, int]) -> None:
    zero = codes_of(shape)
    packed = pack_zero_points(zero)
    assert tuple(packed.shape) == (-(-shape[0] // 8), shape[1])
    assert packed.is_contiguous()
    assert torch.equal(unpack_zero_points(packed, shape[0]), zero)
    n = torch.arange(shape[0])
    assert torch.equal((packed.to(torch.int64)[n // 8] >> (4 * (n % 8)).unsqueeze(1)) & 15, zero.to(torch.int64))


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_a_view_packs_as_its_copy(shape: tuple[int, int, int]) -> None:
    codes = codes_of(shape)
    assert torch.equal(pack_int4(codes.t()), pack_int4(codes.t().contiguous()))
    words = pack_int4(codes).t().contiguous().t()
    assert torch.equal(unpack_int4(words, shape[1]), codes)
