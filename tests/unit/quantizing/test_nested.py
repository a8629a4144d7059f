"""Double quantization: the mean that it centres on does not depend on who adds it up."""

from __future__ import annotations

import platform

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlazy.quantizing import nested

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 63, 65, 511, 513, 4096, 8200, 32_768, 40_001, 262_144]


def absmax(blocks: int) -> torch.Tensor:
    return torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) * 0.02 + 0.03


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("blocks", SIZES)
def test_it_is_one_number_whatever_the_number_of_threads(threads, blocks):
    values = absmax(blocks)
    made = []
    for count in (1, 2, 3):
        threads(count)
        made.append(nested.nest_absmax(values))
    for other in made[1:]:
        assert all(torch.equal(one, two) for one, two in zip(made[0], other, strict=True))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="PyTorch adds up in another order on this processor",
)
@pytest.mark.parametrize("blocks", SIZES)
def test_it_is_that_of_pytorch_on_one_thread(threads, blocks):
    threads(1)
    assert torch.equal(nested._mean(absmax(blocks)), absmax(blocks).mean())


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 512, 513, 4096, 8200])
def test_pieces_have_the_bytes_of_the_whole(blocks, monkeypatch):
    values = absmax(blocks)
    values[: min(blocks, 300)] = values.mean()
    whole = nested.nest_absmax(values)
    monkeypatch.setattr(nested, "_PIECE", 512)
    for one, other in zip(nested.nest_absmax(values), whole, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_work_buffers_do_not_grow_with_the_weight(monkeypatch):
    large: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            large.extend([str(func)] if made.numel() > 1024 else [])
            return made

    values = absmax(1 << 16)
    nested.nest_absmax(values[:1024])  # makes the tables
    monkeypatch.setattr(nested, "_PIECE", 1024)
    monkeypatch.setattr(nested, "_mean", torch.mean)
    with Watch():
        nested.nest_absmax(values)
    assert large == ["aten.empty_like.default"], "nothing but the codes"


def test_a_weight_that_is_not_finite_stays_so():
    for bad in (torch.nan, torch.inf):
        values = absmax(100)
        values[50] = bad
        assert not nested._mean(values).isfinite()
