"""A packed weight in the place of a parameter: whatever a model does with it gives what the dequantized values give."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers.quant_linear import NonFiniteError
from qlazy.layers.quant_weight import Matrix, QuantWeight
from qlazy.layers.stacks import Stack, stack_of
from qlazy.products import ops

FORMATS: dict[str, Format] = {
    "int4": Int4(),
    "int4-sym": Int4(symmetric=True),
    "int8": Int8(),
    "nf4-dq": Codebook4(),
    "nf4": Codebook4(double_quant=False),
}


def made(fmt: Format, *, experts: int = 3, rows: int = 72, columns: int = 64, transposed: bool = False) -> QuantWeight:
    """Filled at random; rows are no multiple of 64."""
    stack = Stack(experts=experts, rows=rows, columns=columns, transposed=transposed)
    held = (columns, rows) if transposed else (rows, columns)
    shape = (experts, *held) if experts else held
    weight = QuantWeight(shape, stack=stack, format=fmt, dtype=torch.float32)
    weight.allocate("cpu")
    weight.fill(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    return weight


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and float((one - other).norm()) <= 1e-5 * max(1e-30, float(other.norm()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_each_expert_is_what_its_format_makes_of_it(name, transposed):
    weight = made(FORMATS[name], transposed=transposed)
    whole = weight.dequantize()
    assert whole.shape == weight.shape == (3, 64, 72) if transposed else (3, 72, 64)
    original = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    for number in range(3):
        alone = made(FORMATS[name], experts=0, transposed=False)
        alone.fill(original[number].t() if transposed else original[number])
        matrix = alone.dequantize()
        assert torch.equal(whole[number], matrix.t() if transposed else matrix)
        for key in weight.storage:
            assert torch.equal(getattr(weight, key)[number], getattr(alone, key)), key


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_from_both_sides(name, transposed):
    weight = made(FORMATS[name], transposed=transposed)
    plain = weight.dequantize()
    narrow, wide = torch.randn(5, weight.shape[1]), torch.randn(5, weight.shape[2])
    for e in (0, torch.tensor(2), -1):
        assert close(narrow @ weight[e], narrow @ plain[e])
        assert close(torch.matmul(narrow, weight[e]), narrow @ plain[e])
        assert close(wide @ weight[e].T, wide @ plain[e].T)
        assert close(functional.linear(wide, weight[e]), functional.linear(wide, plain[e]))
        bias = torch.randn(weight.shape[1])
        assert close(functional.linear(wide, weight[e], bias), functional.linear(wide, plain[e], bias))
    x = torch.randn(3, 4, weight.shape[1])
    x[1, 2:] = 0.0
    assert close(torch.bmm(x, weight), torch.bmm(x, plain))
    y = torch.randn(3, 4, weight.shape[2])
    assert close(torch.bmm(y, weight.transpose(1, 2)), torch.bmm(y, plain.transpose(1, 2)))


def test_what_is_not_taken_over_has_a_dequantized_copy():
    weight = made(Int8())
    plain = weight.dequantize()
    assert torch.equal(weight + 1, plain + 1) and torch.equal(torch.cat([weight, weight]), torch.cat([plain, plain]))
    assert torch.equal(weight.sum(0), plain.sum(0)) and torch.equal(weight[:, 1:3], plain[:, 1:3])
    assert torch.equal(weight[torch.tensor([2, 0])], plain[torch.tensor([2, 0])])
    assert torch.equal(weight[1] * 2, plain[1] * 2) and torch.equal(weight[1].abs(), plain[1].abs())
    assert (weight.dim(), weight.numel(), weight.size(1), weight.dtype, weight.device) == (
        3,
        plain.numel(),
        72,
        torch.float32,
        plain.device,
    )
    with pytest.raises(AttributeError):
        _ = weight.no_such_thing


def test_a_loop_over_experts_ends():
    weight = made(Int8())
    for of in (weight, weight.transpose(1, 2)):
        assert len(list(itertools.islice(iter(of), 9))) == 3
        for number in (3, -4, torch.tensor(3)):
            with pytest.raises(IndexError, match="there are 3 matrices"):
                of[number]


def test_a_write_that_would_be_lost_is_an_error():
    weight, table = made(Int8()), made(Int8(), experts=0)
    for write in (
        lambda: weight.zero_(),
        lambda: weight[0].mul_(2),
        lambda: weight.data.copy_(torch.zeros(3, 72, 64)),
        lambda: nn.init.normal_(weight),  # type: ignore[arg-type]
        lambda: torch.relu_(table),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"cannot be changed in place \(\w+_\); dequantize\(\) gives a copy"):
            write()
    assert torch.equal(torch.zeros(72, 64).add_(table), table.dequantize())  # type: ignore[arg-type]


def test_experts_in_one_matrix_are_turned_together():
    weight = QuantWeight((192, 32), stack=Stack(experts=3, rows=64, columns=32), format=Int4(), dtype=torch.float32)
    weight.allocate("cpu")
    weight.fill(torch.randn(192, 32))
    plain = weight.dequantize().t()
    assert all(torch.equal(turned, plain) for turned in (weight.t(), weight.T, weight.mT, weight.transpose(0, 1)))


def test_experts_in_one_matrix_are_seen_as_a_stack_by_view():
    stack = Stack(experts=3, rows=64, columns=32)
    weight = QuantWeight((192, 32), stack=stack, format=Int4(), dtype=torch.float32)
    weight.allocate("cpu")
    weight.fill(torch.randn(192, 32))
    plain, x = weight.dequantize(), torch.randn(2, 32)
    seen = weight.view((-1, 64, 32))[torch.tensor(1)]
    assert isinstance(seen, Matrix)
    assert close(x.matmul(seen.T), x @ plain.view(3, 64, 32)[1].T)
    assert torch.equal(weight.view(-1), plain.view(-1))


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_embeds_and_is_a_head(name):
    table = made(FORMATS[name], experts=0, rows=70, columns=64)
    plain = table.dequantize()
    embedding, head = nn.Embedding(70, 64, padding_idx=3), nn.Linear(64, 70, bias=False)
    for module in (embedding, head):
        del module._parameters["weight"]
        module.add_module("weight", table)
    ids = torch.tensor([[0, 69, 3], [8, 8, 15]])
    assert torch.equal(embedding(ids), plain[ids])
    x = torch.randn(4, 64)
    assert close(head(x), x @ plain.T)
    for number in (70, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([number]))
    assert torch.equal(table[torch.tensor([-1, 2, -70])], plain[torch.tensor([-1, 2, -70])])
    with pytest.raises(IndexError):
        table[torch.tensor([-71])]
    assert embedding(torch.empty(0, dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("columns", [64, 320, 80])
@pytest.mark.parametrize("name", ["nf4-dq", "nf4"])
def test_a_lookup_in_a_codebook_dequantizes_no_other_rows(name, columns, monkeypatch):
    table = made(FORMATS[name], experts=0, rows=70, columns=columns)
    plain, asked = table.dequantize(), []
    dequantize_rows = ops.dequantize_rows

    def counted(weight, start, stop, out):
        asked.append(stop - start)
        return dequantize_rows(weight, start, stop, out)

    monkeypatch.setattr(ops, "dequantize_rows", counted)
    ids = torch.tensor([69, 0, 0, 33])
    assert torch.equal(table[ids], plain[ids])
    assert sum(asked) == (4 if columns % 64 == 0 else 70)


def test_gradients_pass_to_what_lies_below():
    weight = made(Int4(), rows=64)
    plain = weight.dequantize()
    for of in (lambda x, w: functional.linear(x, w[1]), lambda x, w: x @ w[1]):
        x, y = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        of(x, weight).square().sum().backward()
        of(y, plain).square().sum().backward()
        assert x.grad is not None and y.grad is not None and close(x.grad, y.grad)


def test_rows_in_any_order_and_nothing_but_whole_layers_left_open():
    whole = torch.randn(2, 192, 64)
    one, other = (
        QuantWeight((2, 192, 64), stack=Stack(experts=2, rows=192, columns=64), format=Codebook4(), dtype=torch.bfloat16)
        for _ in range(2)
    )
    one.allocate("cpu")
    other.allocate("cpu")
    one.fill(whole)
    flat = whole.reshape(-1, 64)
    for start in (320, 64, 0, 256, 128, 192):
        other.fill(flat[start : start + 64], start)
    assert torch.equal(one.dequantize(), other.dequantize()) and not one._open and not other._open


def test_a_weight_that_is_not_finite():
    weight = made(Int8())
    with pytest.raises(NonFiniteError):
        weight.fill(torch.full((72, 64), float("nan")), 72)


def test_it_moves_and_is_copied_but_never_cast():
    weight = made(Int4())
    plain = weight.dequantize()
    holder = nn.Module()
    holder.add_module("weight", weight)
    holder.to(torch.float16)
    assert weight.weight_packed.dtype == torch.int32 and weight.weight_scale.dtype == torch.float32
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(other.dequantize(), plain) and other.weight_packed.data_ptr() != weight.weight_packed.data_ptr()
    on_meta = QuantWeight((3, 72, 64), stack=weight.stack, format=Int4(), dtype=torch.float32)
    assert on_meta.is_meta and on_meta.dequantize().shape == (3, 72, 64)


def test_which_parameters_are_stacks():
    class ThingExperts(nn.Module):
        def __init__(self, transposed: bool = False) -> None:
            super().__init__()
            self.is_transposed = transposed
            self.gate_up_proj = nn.Parameter(torch.empty(4, 6, 5))
            self.gate_up_proj_bias = nn.Parameter(torch.empty(4, 6))
            self.steps = nn.Parameter(torch.empty(4, 2, 3, dtype=torch.int32), requires_grad=False)

    assert stack_of(ThingExperts(), "gate_up_proj") == Stack(experts=4, rows=6, columns=5)
    assert stack_of(ThingExperts(True), "gate_up_proj") == Stack(experts=4, rows=5, columns=6, transposed=True)
    assert stack_of(ThingExperts(), "gate_up_proj_bias") is None and stack_of(ThingExperts(), "steps") is None
    assert stack_of(nn.Conv1d(4, 4, 3), "weight") is None
