"""Placing: rows end where they belong, each is counted once, and what is not finite is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlazy.errors import CorruptCheckpoint
from qlazy.formats import Int8
from qlazy.layers.linear import Int8Linear
from qlazy.matching.fill import Fill
from qlazy.place import Placer
from qlazy.planning.budget import Budget
from qlazy.planning.plan import Plan, TensorPlan
from qlazy.planning.recipe import Recipe
from qlazy.reading.chunks import Chunk
from qlazy.sources.source import TensorInfo

ROWS, COLUMNS = 128, 32


class Model(nn.Module):
    """A low-bit layer, one whose weight comes transposed, and every other kind of tensor."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("layer", "conv"):
            bias = nn.Parameter(torch.empty(ROWS, dtype=torch.bfloat16, device="meta"))
            made = Int8Linear(COLUMNS, ROWS, format=Int8(), dtype=torch.bfloat16, bias=bias, transposed=name == "conv")
            self.add_module(name, made)
        self.embedding = nn.Embedding(ROWS, COLUMNS, dtype=torch.bfloat16, device="meta")
        self.scale = nn.Parameter(torch.empty((), device="meta"))
        self.register_buffer("steps", torch.empty(4, dtype=torch.int64, device="meta"))
        self.register_buffer("real", torch.arange(3.0))


def plan_of(model: nn.Module) -> Plan:
    names = ["layer.weight", "layer.bias", "conv.weight", "conv.bias", "embedding.weight", "scale", "steps", "real"]
    tensors = tuple(
        TensorPlan(name=n, shape=(), format=None, kind="other", dtype="", reason="", device="cpu", nbytes=0, source_nbytes=0)
        for n in names
    )
    budget = Budget(devices=("cpu",), free_bytes={"cpu": 1}, reserve_bytes=0, max_model_len=1)
    return Plan(
        model_id="m", resolved="m", recipe=Recipe(), budget=budget, dtype="bfloat16", tensors=tensors, devices=(), exact=True
    )


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def placer(model: Model) -> Placer:
    return Placer(model, plan_of(model))


def fill_of(target: str, tensor: Tensor, **options) -> Fill:
    info = TensorInfo(
        name=f"stored.{target}",
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        path=Path("a.safetensors"),
        offset=0,
        nbytes=tensor.nbytes,
    )
    return Fill(sources=(info,), targets=(target,), **options)


def whole(target: str, tensor: Tensor, **options) -> tuple[Chunk, list[Tensor]]:
    fill = fill_of(target, tensor, **options)
    return Chunk(fill=fill, start=0, stop=tensor.shape[0] if tensor.dim() else 1), [tensor]


def test_everything_gets_storage_and_real_buffers_keep_their_values(model, placer):
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(model.real, torch.arange(3.0))
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in model.parameters())
    assert placer.rows_left("layer.weight") == ROWS and placer.rows_left("steps") == 4 and placer.rows_left("scale") == 1


def test_chunks_of_a_low_bit_layer(model, placer):
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    fill = fill_of("layer.weight", weight)
    placer.place(Chunk(fill=fill, start=64, stop=128), [weight[64:]])
    assert placer.rows_left("layer.weight") == 64
    placer.place(Chunk(fill=fill, start=0, stop=64), [weight[:64]])
    assert placer.rows_left("layer.weight") == 0
    assert (model.layer.weight - weight).abs().max() <= 0.02 * weight.abs().max()


def test_transposed_weight_of_a_low_bit_layer_comes_whole(model, placer):
    weight = torch.randn(COLUMNS, ROWS).bfloat16()
    placer.place(*whole("conv.weight", weight, convert=lambda tensors: {"conv.weight": tensors[0]}))
    assert placer.rows_left("conv.weight") == 0
    assert (model.conv.weight - weight.T).abs().max() <= 0.02 * weight.abs().max()


def test_values_are_copied_in_the_dtype_of_the_model(model, placer):
    values = torch.randn(ROWS, COLUMNS)
    placer.place(*whole("embedding.weight", values))
    placer.place(*whole("scale", torch.tensor(2.5)))
    placer.place(*whole("steps", torch.arange(4, dtype=torch.int32)))
    assert torch.equal(model.embedding.weight, values.bfloat16())
    assert model.scale == 2.5 and model.scale.shape == ()
    assert model.steps.tolist() == [0, 1, 2, 3] and model.steps.dtype == torch.int64
    assert [placer.rows_left(name) for name in ("embedding.weight", "scale", "steps")] == [0, 0, 0]


def test_rows_that_move_within_their_block(model, placer):
    values = torch.randn(ROWS, COLUMNS).bfloat16()
    order = torch.cat([torch.randperm(64), 64 + torch.randperm(64)])
    fill = fill_of("embedding.weight", values, row_order=order)
    for start in (64, 0):
        placer.place(Chunk(fill=fill, start=start, stop=start + 64), [values[start : start + 64]])
    wanted = torch.empty_like(values)
    wanted[order] = values
    assert torch.equal(model.embedding.weight, wanted)


def test_a_conversion_fills_all_its_targets(model, placer):
    def halves(tensors: list[Tensor]) -> dict[str, Tensor]:
        return {"layer.bias": tensors[0][:ROWS], "conv.bias": tensors[0][ROWS:]}

    placer.place(*whole("layer.bias", torch.arange(2.0 * ROWS), convert=halves))
    assert model.layer.bias[1] == 1 and model.conv.bias[0] == ROWS
    assert placer.rows_left("layer.bias") == placer.rows_left("conv.bias") == 0


@pytest.mark.parametrize("target", ["layer.weight", "embedding.weight", "layer.bias", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(model, placer, target, value):
    shape = {"layer.bias": (ROWS,), "scale": ()}.get(target, (ROWS, COLUMNS))
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    tensor.view(-1)[-1] = value
    with pytest.raises(CorruptCheckpoint, match=rf"a\.safetensors: tensor 'stored\.{target}' holds a NaN or an infinity"):
        placer.place(*whole(target, tensor))


def test_coming_twice_is_an_error(placer):
    placer.place(*whole("layer.bias", torch.zeros(ROWS)))
    with pytest.raises(CorruptCheckpoint, match=r"'layer\.bias' was filled twice"):
        placer.place(*whole("layer.bias", torch.zeros(ROWS)))
