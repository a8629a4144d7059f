"""Any subset in any order, cut for any number of ranks, has the bytes of eager construction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlazy.errors import UsageError
from qlazy.lazy import lazy_build, materialize, materialize_shard, release

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make(rows: int, columns: int, dtype: torch.dtype) -> nn.Module:
    """Tensors that are filled in every way that shards know, and in some that they do not."""
    module = nn.Module()
    module.normal = nn.Parameter(torch.empty(rows, columns, dtype=dtype).normal_(0, 0.02))
    module.uniform = nn.Parameter(
        torch.empty(rows, columns, dtype=dtype).uniform_(-1, 1).mul_(3).add_(0.1).div_(7).sub_(0.01).clamp_(-0.3, 0.3).abs_()
    )
    module.drawn = torch.randn(rows, columns, dtype=dtype)
    module.constant = torch.full((rows, columns), 0.3, dtype=dtype)
    module.ones = nn.Parameter(torch.ones(rows, columns, dtype=dtype))
    module.trunc = nn.init.trunc_normal_(torch.empty(rows, columns, dtype=dtype), std=0.5)
    module.padded = torch.randn(rows, columns, dtype=dtype)
    module.padded[0].fill_(0)
    module.transposed = torch.randn(columns, rows, dtype=dtype).t()
    module.computed = (module.drawn * 2).tanh()
    module.expert = torch.empty(2, rows, columns, dtype=dtype).normal_()
    module.integers = torch.randint(0, 100, (rows, columns))
    module.erf = torch.empty(rows, columns).uniform_(-0.9, 0.9).erfinv_().mul_(0.02)
    return module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    found = dict(module.named_parameters()) | {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}
    return {name: tensor.detach() for name, tensor in found.items()}


def both(rows: int, columns: int, dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], nn.Module]:
    torch.manual_seed(seed)
    eager = tensors(make(rows, columns, dtype))
    torch.manual_seed(seed)
    return eager, lazy_build(make, rows, columns, dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


sizes = st.integers(1, 40)


@settings(max_examples=12, deadline=None)
@given(rows=sizes, columns=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), data=st.data())
def test_any_subset_in_any_order(rows, columns, dtype, seed, data):
    eager, lazy = both(rows, columns, dtype, seed)
    order = data.draw(st.permutations(sorted(eager)))
    for name in order[: data.draw(st.integers(1, len(order)))]:
        materialize(lazy, only=f"^{name}$")
        assert same(tensors(lazy)[name], eager[name]), name


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@settings(max_examples=4, deadline=None)
@given(rows=sizes, columns=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_world_size(world, rows, columns, dtype, seed):
    eager, lazy = both(rows, columns, dtype, seed)
    for name, tensor in tensors(lazy).items():
        whole = eager[name]
        for dim in range(whole.dim()):
            parts = []
            for rank in reversed(range(world)):
                step = math.ceil(whole.shape[dim] / world)
                cut = slice(min(rank * step, whole.shape[dim]), min((rank + 1) * step, whole.shape[dim]))
                index = (*[slice(None)] * dim, cut)
                parts.append(materialize_shard(tensor, *index))
                assert same(parts[-1], whole[index]), (name, dim, rank)
            assert same(torch.cat(parts[::-1], dim), whole)
        step = math.ceil(whole.numel() / world)
        for rank in range(world):
            cut = slice(rank * step, (rank + 1) * step)
            assert same(materialize_shard(tensor, flat=cut), whole.flatten()[cut]), (name, rank)
    assert all(tensor.is_meta for tensor in tensors(lazy).values())
    materialize(lazy)
    for name, tensor in tensors(lazy).items():
        assert same(tensor, eager[name]) and same(materialize_shard(tensor, slice(1)), eager[name][:1])


class Layers(nn.Module):
    """What models are made of, with a tie and buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width, padding_idx=1)
        self.attention = nn.MultiheadAttention(width, 1)
        self.recurrent = nn.LSTM(width, 3)
        self.convolution = nn.utils.parametrizations.weight_norm(nn.Conv1d(width, 4, 3))
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("steps", torch.rand(width), persistent=False)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight


@settings(max_examples=10, deadline=None)
@given(width=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
def test_layers_in_any_order_by_tensor_module_or_shard(width, seed, data):
    torch.manual_seed(seed)
    eager = Layers(width)
    torch.manual_seed(seed)
    lazy = lazy_build(Layers, width)
    wanted = dict(eager.named_parameters()) | dict(eager.named_buffers())
    for name in data.draw(st.permutations(sorted(wanted))):
        tensor = (dict(lazy.named_parameters()) | dict(lazy.named_buffers()))[name]
        how = data.draw(st.sampled_from(["tensor", "module", "shard", "release"]))
        if how == "tensor":
            materialize(tensor)
        elif how == "module":
            materialize(lazy.get_submodule(name.rpartition(".")[0]))
        elif how == "release":
            release(lazy)
        part = slice(data.draw(st.integers(0, wanted[name].numel())), None)
        assert same(materialize_shard(tensor, flat=part), wanted[name].detach().flatten()[part]), (name, how)
    materialize(lazy)
    for name, tensor in (dict(lazy.named_parameters()) | dict(lazy.named_buffers())).items():
        assert same(tensor.detach(), wanted[name].detach()), name
    assert lazy.head.weight is lazy.embedding.weight


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@settings(max_examples=3, deadline=None)
@given(width=st.integers(1, 20), seed=st.integers(0, 99))
def test_flat_parameters_of_any_world_size(world, width, seed):
    """As FSDP has them: all parameters end to end, cut into equal parts wherever that may be."""
    torch.manual_seed(seed)
    whole = torch.cat([parameter.detach().flatten() for parameter in Layers(width).parameters()])
    torch.manual_seed(seed)
    lazy = lazy_build(Layers, width)
    step = math.ceil(len(whole) / world)
    for rank in reversed(range(world)):
        parts, first = [], 0
        for parameter in lazy.parameters():
            start, stop = (min(max(at - first, 0), parameter.numel()) for at in (rank * step, (rank + 1) * step))
            parts.append(materialize_shard(parameter, flat=slice(start, stop)))
            first += parameter.numel()
        assert same(torch.cat(parts), whole[rank * step : (rank + 1) * step])
    assert all(parameter.is_meta for parameter in lazy.parameters())


def test_a_shard_of_a_tensor_that_does_not_fit_anywhere():
    torch.manual_seed(0)
    lazy = lazy_build(lambda: nn.Linear(1 << 20, 1 << 20, bias=False))  # 4 TiB
    rows = materialize_shard(lazy.weight, slice(1 << 19, (1 << 19) + 1))
    part = materialize_shard(lazy.weight, slice(1 << 19, (1 << 19) + 1), slice(1000, 1010))
    start = (1 << 39) + 1000
    assert same(part, rows[:, 1000:1010]) and same(materialize_shard(lazy.weight, flat=slice(start, start + 10)), part[0])


def test_what_cannot_be_cut():
    lazy = lazy_build(nn.Linear, 2, 2)
    with pytest.raises(UsageError, match="step"):
        materialize_shard(lazy.weight, slice(0, 2, 2))
    with pytest.raises(UsageError, match="no values"):
        materialize_shard(torch.empty(2, device="meta"), slice(1))
    nn.init.zeros_(lazy.weight)
    with pytest.raises(UsageError, match="after"):
        materialize_shard(lazy.weight, slice(1))
