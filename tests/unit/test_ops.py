"""The products: packed bytes as torch orders them, every awkward shape of x, and errors no worse than torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from qlazy import native, ops
from qlazy.codebook import CODES, unnest_absmax
from qlazy.formats import Codebook4, Format, Int4, Int8, Layout
from qlazy.layers import LAYERS, Int4Linear
from qlazy.packing import unpack_int4, unpack_zero_points
from qlazy.quant_linear import QuantLinear

FORMATS: list[Format] = [
    Int4(group_size=32),
    Int4(group_size=64, symmetric=True),
    Int4(group_size=128),
    Int4(group_size=-1),
    Int8(),
    Int8(group_size=32),
    Codebook4(kind="nf4", double_quant=True),
    Codebook4(kind="nf4", double_quant=False),
    Codebook4(kind="fp4", double_quant=True),
]
NAMES = [fmt.name for fmt in FORMATS]
DECODE, PREFILL = 3, ops.INT4_PACKED_TOKENS + 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Short parallel regions are slow on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with the compiled loops and, as on a machine without a compiler, without them."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(
    fmt: Format,
    rows: int = 128,
    columns: int = 256,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    bias: bool = False,
) -> QuantLinear:
    """A filled layer. `device` decides its layout, as when a plan names it; the storage is on the CPU all the same."""
    held = torch.nn.Parameter(random(rows, seed=2, dtype=dtype), requires_grad=False) if bias else None
    layer = LAYERS[type(fmt)](columns, rows, format=fmt.for_columns(columns), dtype=dtype, device=device, bias=held)
    layer.allocate("cpu")
    layer.fill(random(rows, columns, seed=1, dtype=dtype) * 0.05)
    return layer


def exact_weight(layer: QuantLinear) -> Tensor:
    """What the stored bytes stand for, float64, from the definitions in `formats` and no code of `ops`."""
    stored = {key: getattr(layer, key) for key in layer.storage}
    rows, columns, fmt = layer.out_features, layer.in_features, layer.format
    if isinstance(fmt, Codebook4):
        packed = stored["weight_packed"]
        codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: rows * columns].long()
        absmax = stored.get("absmax")
        if absmax is None:
            absmax = unnest_absmax(stored["absmax_packed"], stored["nested_absmax"], stored["nested_offset"])
        scales = absmax.double().repeat_interleave(64)[: rows * columns]
        return (CODES[fmt.kind].double()[codes] * scales).view(rows, columns)
    if isinstance(fmt, Int8):
        codes, scale = stored["weight_packed"].double(), stored["weight_scale"].double()
        return (codes.view(rows, scale.shape[1], -1) * scale.unsqueeze(2)).view(rows, columns)
    if layer.layout is Layout.CPU_INT4:
        scale, offset = stored["weight_scale"].double().permute(1, 0, 2).unbind(2)
        codes = ops.unpack_int4_cpu(stored["weight_packed"]).double().view(rows, scale.shape[1], -1)
        return ((codes - 8) * scale.unsqueeze(2) + offset.unsqueeze(2)).view(rows, columns)
    scale = stored["weight_scale"].double()
    zero = torch.full(scale.shape, 8.0).double()
    if not fmt.symmetric:
        zero = unpack_zero_points(stored["weight_zero_point"], rows).double()
    codes = unpack_int4(stored["weight_packed"], columns).double().view(rows, scale.shape[1], -1)
    return ((codes - zero.unsqueeze(2)) * scale.unsqueeze(2)).view(rows, columns)


def require_close(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Our error against float64 is at most twice that of torch's own product with the same weight in `dtype`."""
    wide = None if bias is None else bias.double()
    exact = linear(x.double(), weight, wide)
    theirs = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    assert ours.shape == exact.shape and ours.dtype == x.dtype
    error, allowed = (ours.double() - exact).norm(), 2 * (theirs.double() - exact).norm()
    assert error <= allowed, f"error {error:.3g}, torch's own {allowed / 2:.3g}"


@pytest.mark.parametrize("shape", [(64, 32), (64, 64), (128, 96), (256, 160), (320, 32)])
def test_cpu_order_is_that_of_torch(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    packed = ops.pack_int4_cpu(codes)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(packed.view(-1), theirs.view(torch.uint8).view(-1))
    assert torch.equal(ops.unpack_int4_cpu(packed), codes)


ORDERS = {
    "avx512": (64, list(range(64))),
    "avx2": (32, list(range(32))),
    "plain": (16, [*range(0, 16, 2), *range(1, 16, 2)]),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_every_order_is_undone(order, monkeypatch):
    """Also those that the processor here does not have."""
    monkeypatch.setattr(ops, "cpu_int4_order", lambda: order)
    codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = ops.pack_int4_cpu(codes)
    assert torch.equal(ops.unpack_int4_cpu(packed), codes)
    scale = random(2, 128, 2).abs()
    exact = torch.addcmul(
        scale[..., 1].T.unsqueeze(2), codes.view(128, 2, 32).bfloat16() - 8, scale[..., 0].T.unsqueeze(2)
    ).reshape(128, 64)
    for start, stop in ((0, 128), (64, 128)):
        made = ops.dequantize_int4_cpu_rows(packed, scale, torch.bfloat16, start, stop)
        assert torch.equal(made.T, exact[start:stop])


def test_order_is_a_permutation_of_a_block():
    width, order = ops.cpu_int4_order()
    assert width in (16, 32, 64) and sorted(order) == list(range(width))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if isinstance(f, Int4)], ids=lambda f: f.name)
def test_cpu_layout_gives_the_logical_one_back(fmt):
    ours, logical = layer_of(fmt, 192, 256), layer_of(fmt, 192, 256, device="cuda:0")
    assert isinstance(ours, Int4Linear) and isinstance(logical, Int4Linear)
    assert (ours.layout, logical.layout) == (Layout.CPU_INT4, Layout.LOGICAL)
    given, wanted = ours.logical(), logical.logical()
    assert set(given) == set(wanted) == set(logical.storage)
    assert all(torch.equal(given[key], wanted[key]) and given[key].dtype == wanted[key].dtype for key in wanted)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, DECODE, ops.INT8_PACKED_TOKENS + 1, PREFILL])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"], ids=["cpu-layout", "logical"])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(fmt, device, tokens, bias):
    layer = layer_of(fmt, 320, 256, device=device, bias=bias)
    x = random(tokens, 256, seed=3)
    require_close(layer(x), x, exact_weight(layer), layer.bias, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_other_model_dtypes(fmt, dtype):
    layer = layer_of(fmt, dtype=dtype, bias=True)
    for tokens in (DECODE, PREFILL):
        x = random(tokens, 256, seed=3, dtype=dtype)
        require_close(layer(x), x, exact_weight(layer), layer.bias, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_x_of_another_dtype_is_as_exact_as_the_layer(fmt, dtype):
    layer = layer_of(fmt)
    for tokens in (DECODE, PREFILL):
        x = random(tokens, 256, seed=3, dtype=dtype)
        require_close(layer(x), x, exact_weight(layer), None, torch.bfloat16)


@pytest.mark.parametrize(
    "columns, rows", [(8, 8), (24, 40), (40, 64), (100, 72), (33, 9), (72, 200), (1, 1)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_columns_and_rows_that_no_kernel_likes(fmt, columns, rows):
    layer = layer_of(fmt, rows, columns, bias=True)
    for tokens in (1, DECODE, PREFILL):
        x = random(tokens, columns, seed=3)
        require_close(layer(x), x, exact_weight(layer), layer.bias, torch.bfloat16)


AWKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "three dimensions": lambda x: x.view(2, -1, 256),
    "one dimension": lambda x: x[0],
    "one odd element off": lambda x: x.view(-1)[1 : 1 + 2 * 256].view(2, 256),
    "every second row": lambda x: x[::2],
    "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, 128:384],
    "transposed": lambda x: x.t().contiguous().t(),
    "one row for all": lambda x: x[:1].expand(4, 256),
    "batch and tokens swapped": lambda x: x.view(2, -1, 256).transpose(0, 1),
}


@pytest.mark.parametrize("tokens", [4, 2 * PREFILL])
@pytest.mark.parametrize("view", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[4:7], ids=NAMES[:1] + NAMES[4:7])
def test_awkward_views_of_x(fmt, view, tokens):
    layer = layer_of(fmt, bias=True)
    x = view(random(tokens, 256, seed=3))
    require_close(layer(x), x, exact_weight(layer), layer.bias, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_no_tokens_at_all(fmt, shape):
    assert layer_of(fmt, bias=True)(torch.empty(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 128)


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_x_is_left_as_it_was(fmt):
    layer, x = layer_of(fmt, bias=True), random(DECODE, 256, seed=3)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_a_row_is_the_same_in_any_batch_of_a_path(fmt):
    layer, x = layer_of(fmt), random(2 * PREFILL, 256, seed=3)
    few, many = x[:DECODE], x
    assert torch.equal(layer(few)[1], layer(x[1:2])[0])
    require_close(layer(many)[:DECODE], few, exact_weight(layer), None, torch.bfloat16)
    require_close(layer(few), few, exact_weight(layer), None, torch.bfloat16)


@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[4:7], ids=NAMES[:1] + NAMES[4:7])
def test_ops_are_what_torch_library_expects(fmt):
    layer, x = layer_of(fmt, bias=True), random(DECODE, 256, seed=3)
    if isinstance(fmt, Int4):
        for made in (layer, layer_of(fmt, bias=True, device="cuda:0")):
            zero, cpu_layout = getattr(made, "weight_zero_point", None), made.layout is Layout.CPU_INT4
            given = (x, made.weight_packed, made.weight_scale, zero, made.bias, 256, cpu_layout)
            torch.library.opcheck(torch.ops.qlazy.linear_int4.default, given)
    elif isinstance(fmt, Int8):
        torch.library.opcheck(torch.ops.qlazy.linear_int8.default, (x, layer.weight_packed, layer.weight_scale, layer.bias))
    else:
        nested = fmt.double_quant
        absmax = (layer.absmax_packed, layer.nested_absmax, layer.nested_offset) if nested else (layer.absmax, None, None)
        given = (x, layer.weight_packed, *absmax, layer.bias, 128, fmt.kind)
        torch.library.opcheck(torch.ops.qlazy.linear_codebook4.default, given)
