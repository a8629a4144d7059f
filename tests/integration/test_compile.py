"""Low-bit models under torch.compile and torch.export: one graph, the same answers, no new graph for another length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import qlazy
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.swap import quant_layer

OPTIONS = {"int4": {"bits": 4}, "int8": {"bits": 8}, "nf4": {"format": "nf4"}}
FORMATS: list[Format] = [Int4(), Int4(symmetric=True), Int8(), Codebook4(), Codebook4(double_quant=False)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def model(request, checkpoint):
    return qlazy.load_quantized(checkpoint("llama"), device_map="cpu", **request.param).eval()


def tokens(length: int) -> Tensor:
    return torch.randint(0, 60, (1, length), generator=torch.Generator().manual_seed(length))


class Logits(nn.Module):
    """A model from token ids to logits, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def graphs(model: nn.Module) -> int:
    """Graphs that torch.compile makes for prompts of several lengths, few tokens and many."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(Logits(model), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 9, 24, 40):
            assert torch.equal(compiled(tokens(length)), Logits(model)(tokens(length)))
    return int(counter.frame_count)


@pytest.fixture(scope="module")
def graphs_in_16_bits(checkpoint) -> int:
    """Of the model as transformers loads it: counted once, as a backend takes seconds."""
    return graphs(AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16).eval())


def test_model_is_one_graph_as_often_as_in_16_bits(model, graphs_in_16_bits):
    """The choice between a way for few tokens and one for many is inside the op."""
    assert graphs(model) == graphs_in_16_bits


def test_model_is_exported(model):
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Logits(model), (tokens(7),), dynamic_shapes=({1: length},), strict=False)
        for other in (7, 12, 40):
            assert torch.allclose(program.module()(tokens(other)), Logits(model)(tokens(other)))


def two_layers(fmt: Format) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)).to(torch.bfloat16)
    for at in (0, 2):
        weight = layers[at].weight
        layers[at] = quant_layer(layers[at], fmt, torch.bfloat16)
        layers[at].allocate("cpu")
        layers[at].fill(weight)
    return layers


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_gradients_through_a_compiled_layer(fmt):
    layers = two_layers(fmt)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    layers(x).sum().backward()
    expected, x.grad = x.grad, None
    compiled(x).sum().backward()
    assert expected is not None and torch.equal(x.grad, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_inductor_makes_one_graph():
    layers = two_layers(Int4())
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layers, fullgraph=True)
        assert torch.allclose(compiled(x), layers(x), atol=1e-2)
