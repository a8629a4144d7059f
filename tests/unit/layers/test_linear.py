"""Low-bit layers: filled in any order, read back bit for bit, copied, pickled, and with a gradient for what is below them."""

from __future__ import annotations

import copy
import pickle
import random as shuffling
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qlazy.formats import Codebook4, Format, Int4, Int8, packed_nbytes
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import NonFiniteError, QuantLinear, require_finite
from qlazy.quantizing import codebook
from qlazy.quantizing.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

FORMATS: list[Format] = [
    Int4(group_size=32),
    Int4(group_size=128, symmetric=True),
    Int4(group_size=-1),
    Int8(),
    Int8(group_size=64),
    Codebook4(kind="nf4", double_quant=True),
    Codebook4(kind="fp4", double_quant=False),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS, COLUMNS = 320, 256

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers of a load; short parallel regions are slow on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weight_of(rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05).to(dtype)


def empty(fmt: Format, rows: int = ROWS, columns: int = COLUMNS, *, dtype=torch.bfloat16, bias=None, **more):
    fmt = fmt.for_columns(columns)
    return LAYERS[type(fmt)](columns, rows, format=fmt, dtype=dtype, bias=bias, **more)


def filled(fmt: Format, weight: Tensor | None = None, **more) -> QuantLinear:
    weight = weight_of() if weight is None else weight
    layer = empty(fmt, *weight.shape, **more)
    layer.allocate("cpu")
    layer.fill(weight)
    return layer


def expected(fmt: Format, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantized and dequantized by the reference, in float32."""
    rows, columns = weight.shape
    fmt = fmt.for_columns(columns)
    if isinstance(fmt, Int4):
        made = quantize_int4(weight, group_size=fmt.group_size, symmetric=fmt.symmetric, scale_dtype=dtype)
        return dequantize_int4(*made, torch.float32)
    if isinstance(fmt, Int8):
        return dequantize_int8(*quantize_int8(weight, group_size=fmt.group_size, scale_dtype=dtype), torch.float32)
    packed, absmax = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), torch.empty(-(-weight.numel() // 64))
    codebook.quantize_blocks(weight, fmt.kind, packed_out=packed, absmax_out=absmax)
    if fmt.double_quant:
        absmax = codebook.unnest_absmax(*codebook.nest_absmax(absmax))
    return codebook.dequantize_blocks(packed, absmax, fmt.kind, torch.float32, 0, weight.numel()).view(rows, columns)


def same(one: QuantLinear, other: QuantLinear) -> bool:
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in one.storage)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (72, 100)], ids=str)
@each_format
def test_weight_reads_back_bit_for_bit(fmt, shape, dtype):
    weight = weight_of(*shape, dtype=dtype)
    layer = filled(fmt, weight, dtype=dtype)
    assert torch.equal(layer.weight, expected(fmt, weight, dtype).to(dtype))
    assert layer.weight.dtype == dtype and layer.weight.shape == shape


@each_format
def test_rows_in_any_order_from_many_threads_give_the_same_bytes(fmt):
    whole, pieces = filled(fmt), empty(fmt)
    pieces.allocate("cpu")
    starts = list(range(0, ROWS, 64))
    shuffling.Random(1).shuffle(starts)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda start: pieces.fill_rows(start, weight_of()[start : start + 64]), starts))
    assert sum(done) == 1, "the last one, whichever it is, completes the layer"
    assert same(whole, pieces)


@each_format
def test_fill_cuts_large_weights_into_pieces(fmt, monkeypatch):
    whole = filled(fmt)
    monkeypatch.setattr("qlazy.layers.quant_linear.QUANTIZED_ELEMENTS", 64 * COLUMNS)
    calls = []
    layer = empty(fmt)
    layer.allocate("cpu")
    fill_rows = layer.fill_rows
    monkeypatch.setattr(layer, "fill_rows", lambda start, weight: calls.append(start) or fill_rows(start, weight))
    layer.fill(weight_of())
    assert calls == [0, 64, 128, 192, 256]
    assert same(whole, layer)


@each_format
def test_a_weight_that_wants_a_gradient_is_quantized_all_the_same(fmt):
    assert same(filled(fmt), filled(fmt, nn.Parameter(weight_of())))


@each_format
def test_transposed_checkpoints(fmt):
    layer = empty(fmt, transposed=True)
    layer.allocate("cpu")
    layer.fill(weight_of().t().contiguous())
    assert same(filled(fmt), layer)


@each_format
def test_takes_no_storage_until_told_and_then_what_the_format_says(fmt):
    layer = empty(fmt)
    assert all(getattr(layer, key).is_meta for key in layer.storage)
    layer.allocate("cpu")
    taken = sum(b.untyped_storage().nbytes() for b in layer.buffers())
    assert taken == packed_nbytes(fmt.for_columns(COLUMNS), ROWS, COLUMNS, "bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (100, 77), (ROWS - 1, COLUMNS - 1)], ids=str)
@each_format
def test_one_bad_weight_is_enough(fmt, place, value):
    weight = weight_of()
    weight[place] = value
    with pytest.raises(NonFiniteError):
        filled(fmt, weight)


@each_format
def test_a_weight_of_zeros_is_sound(fmt):
    layer = filled(fmt, torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16))
    assert torch.equal(layer.weight, torch.zeros_like(layer.weight))


def test_finite_is_told_from_infinite_where_the_difference_overflows():
    largest = torch.finfo(torch.bfloat16).max
    require_finite(torch.tensor([largest, -largest], dtype=torch.bfloat16))
    require_finite(torch.empty(0))
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(NonFiniteError):
            require_finite(torch.tensor([0.0, value, 1.0]))


@each_format
def test_forward_is_the_same_with_and_without_gradients(fmt):
    layer, x = filled(fmt), torch.randn(3, COLUMNS).bfloat16()
    with torch.no_grad():
        quiet = layer(x)
    assert torch.equal(layer(x.clone().requires_grad_()).detach(), quiet)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
@each_format
def test_a_copy_is_a_layer_of_its_own(fmt, copied):
    bias = nn.Parameter(torch.randn(ROWS).bfloat16(), requires_grad=False)
    layer = filled(fmt, bias=bias)
    x = torch.randn(3, COLUMNS).bfloat16()
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    before = layer.weight
    twin.allocate("cpu")
    twin.fill(weight_of() * 2)
    assert torch.equal(layer.weight, before), "the copy shares no storage"
    assert not torch.equal(twin.weight, before)


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.float, lambda layer: layer.to(torch.float64)], ids=["half", "float", "to"]
)
@each_format
def test_casting_a_model_casts_no_packed_tensor(fmt, cast):
    bias = nn.Parameter(torch.randn(ROWS).bfloat16(), requires_grad=False)
    layer, model = filled(fmt), nn.Sequential(filled(fmt, bias=bias))
    cast(model)
    assert same(layer, model[0]) and model[0].bias.dtype != torch.bfloat16
    assert all(getattr(model[0], key).dtype == getattr(layer, key).dtype for key in layer.storage)
    assert list(model[0].state_dict()) == ["bias", *layer.storage]
    x = torch.randn(3, COLUMNS).to(model[0].bias.dtype)
    assert torch.allclose(model(x).float(), linear(x.float(), layer.weight.float(), bias.float()), atol=0.05)


@each_format
def test_moves_to_meta_and_is_filled_again(fmt):
    layer = filled(fmt).to("meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.allocate("cpu")
    layer.fill(weight_of())
    assert same(layer, filled(fmt))


@each_format
def test_state_dict_holds_packed_tensors_only_and_goes_back(fmt):
    layer = filled(fmt)
    state = layer.state_dict()
    assert set(state) == set(layer.storage)
    other = empty(fmt)
    other.allocate("cpu")
    other.load_state_dict(state)
    assert same(layer, other)


@each_format
def test_is_no_linear_and_says_what_it_is(fmt):
    layer = filled(fmt)
    assert not isinstance(layer, nn.Linear)
    assert layer.extra_repr() == f"256, 320, format={layer.format.name}, bias=False"
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(layer.weight, layer.dequantize())
    assert torch.equal(layer.dequantize(torch.float32).bfloat16(), layer.weight)


@pytest.mark.parametrize("fmt", [Int4(), Int8(), Codebook4()])
def test_inputs_of_another_width_and_layers_without_storage_are_refused(fmt):
    layer = LAYERS[type(fmt)](64, 64, format=fmt, dtype=torch.bfloat16, bias=None)
    assert layer.weight.is_meta and layer.weight.shape == (64, 64)
    with pytest.raises(ValueError, match="no storage for its weight yet"):
        layer(torch.ones(1, 64, dtype=torch.bfloat16))
    layer.allocate("cpu")
    layer.fill(torch.randn(64, 64))
    for width in (32, 128):
        with pytest.raises(ValueError, match=f"takes 64 features, and got {width}"):
            layer(torch.ones(1, width, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 3, 8, 257, 264])
def test_rows_that_fill_no_word_of_zeros(rows):
    layer = LAYERS[Int4](64, rows, format=Int4(), dtype=torch.bfloat16, bias=None)
    layer.allocate("cpu")
    weight = torch.randn(rows, 64)
    layer.fill(weight)
    x = torch.randn(2, 64)
    assert torch.allclose(layer(x), x @ layer.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4)
    assert (layer.dequantize(torch.float32) - weight).abs().max() < 0.5
