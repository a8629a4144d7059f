"""The products: packed bytes as torch orders them, every awkward shape of x, and errors no worse than torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from qlazy import native
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import QuantLinear
from qlazy.products import ops
from qlazy.quantizing.codebook import CODES, unnest_absmax
from qlazy.quantizing.packing import unpack_int4, unpack_zero_points

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
DECODE, PREFILL = 3, max(ops.FEW_TOKENS.values()) + 5


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
    bias: bool = False,
) -> QuantLinear:
    """A filled layer."""
    held = torch.nn.Parameter(random(rows, seed=2, dtype=dtype), requires_grad=False) if bias else None
    layer = LAYERS[type(fmt)](columns, rows, format=fmt.for_columns(columns), dtype=dtype, bias=held)
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
        codes, scale = stored["weight_packed"].double() - 128, stored["weight_scale"].double()
        return (codes.view(rows, scale.shape[1], -1) * scale.unsqueeze(2)).view(rows, columns)
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


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 2, DECODE, 7, PREFILL])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(fmt, tokens, bias):
    layer = layer_of(fmt, 320, 256, bias=bias)
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


def stored(layer: QuantLinear) -> tuple[str, tuple[object, ...], tuple[object, ...]]:
    """Name of a layer's op, and what it takes beside x: before the bias, and after it."""
    tensors = [getattr(layer, key) for key in layer.storage]
    if isinstance(layer.format, Int4):
        return "linear_int4", (*tensors, *[None] * (3 - len(tensors))), (layer.in_features,)
    if isinstance(layer.format, Int8):
        return "linear_int8", tuple(tensors), ()
    return "linear_codebook4", (*tensors, *[None] * (4 - len(tensors))), (layer.out_features, layer.format.kind)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_ops_are_what_torch_library_expects(fmt, bias):
    layer = layer_of(fmt, bias=bias)
    name, before, after = stored(layer)
    tokens = 1 if bias else PREFILL
    x, grad = random(2, tokens, 256, seed=3), random(2, tokens, 128, seed=4)
    torch.library.opcheck(getattr(torch.ops.qlazy, name).default, (x, *before, layer.bias, *after))
    after_grad = (*after, layer.in_features) if isinstance(fmt, Codebook4) else after
    torch.library.opcheck(getattr(torch.ops.qlazy, f"{name}_backward").default, (grad, *before, None, *after_grad))


def few_arguments(layer: QuantLinear, x: Tensor) -> tuple[object, ...]:
    """What `qlazy::few_tokens` is called with."""
    kind, (rows, _), group, packed, scale, zero, nested, code = layer._packed()
    return x, packed, scale, zero, *(nested or (None, None, None)), code, layer.bias, kind, rows, group


@pytest.mark.parametrize("shape", [(256,), (1, 1, 256), (2, 4, 256), (0, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_op_for_few_tokens_gives_the_bits_of_the_others(fmt, dtype, shape):
    layer, x = layer_of(fmt, dtype=dtype, bias=True), random(*shape, dtype=dtype)
    few, other = torch.ops.qlazy.few_tokens(*few_arguments(layer, x)), layer.product(x, layer.bias)
    assert few.shape == other.shape and few.stride() == other.stride()
    if native.available() or not x.numel():  # a test that has no loops still has the op that is made with them
        assert torch.equal(few, other)


def test_a_bias_that_is_one_number_for_all_rows():
    layer, x = layer_of(Int4(), bias=True), random(2, 256)
    layer.bias = torch.nn.Parameter(torch.full((128,), 3.0, dtype=torch.bfloat16), requires_grad=False)
    expected = layer(x)
    layer.bias = torch.nn.Parameter(torch.full((1,), 3.0, dtype=torch.bfloat16).expand(128), requires_grad=False)
    require_close(layer(x), x, exact_weight(layer), layer.bias, torch.bfloat16)
    assert torch.allclose(layer(x), expected, rtol=0.02)


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[4], FORMATS[6]], ids=lambda fmt: fmt.name)
def test_op_for_few_tokens_is_what_torch_library_expects(fmt):
    layer = layer_of(fmt, bias=True)
    torch.library.opcheck(torch.ops.qlazy.few_tokens.default, few_arguments(layer, random(2, 1, 256)))


def test_layer_takes_the_op_for_few_tokens_where_it_knows_them(loops):
    """Up to eight tokens in the layer's dtype, and where there are loops at all."""
    layer, found = layer_of(Int4()), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    def op_of(x: Tensor) -> str:
        found.clear()
        with Seen():
            layer(x)
        return next(name for name in found if name in ("few_tokens", "linear_int4"))

    few = "few_tokens" if native.available() else "linear_int4"
    assert op_of(random(8, 256)) == few
    assert op_of(random(9, 256)) == "linear_int4"
    assert op_of(random(1, 256, dtype=torch.float32)) == "linear_int4"


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
def test_op_for_few_tokens_says_what_it_does_not_take(loops):
    if native.available():
        arguments = list(few_arguments(layer_of(Int4()), random(1, 256)))
        arguments[8] = torch.zeros(128, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="bfloat16, float16 and float32 alone"):
            torch.ops.qlazy.few_tokens(*arguments)


@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_gradient_errs_at_most_twice_as_much_as_that_of_torch(fmt, dtype, tokens):
    layer = layer_of(fmt, 320, 256, dtype=dtype, bias=True)
    layer.bias.requires_grad_(True)
    weight = exact_weight(layer)
    x, grad = random(tokens, 256, seed=3, dtype=dtype).requires_grad_(True), random(tokens, 320, seed=4, dtype=dtype)
    layer(x).backward(grad)
    exact, theirs = grad.double() @ weight, grad @ weight.to(dtype)
    assert x.grad is not None and (x.grad - exact).norm() <= 2 * (theirs - exact).norm()
    assert torch.equal(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_a_bias_alone_is_trained(fmt):
    layer = layer_of(fmt, bias=True)
    layer.bias.requires_grad_(True)
    layer(random(DECODE, 256, seed=3)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((128,), float(DECODE), dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_what_is_not_finite_in_x_shows_in_its_row_alone(fmt, value):
    layer, x = layer_of(fmt), random(DECODE, 256, seed=3)
    clean = layer(x)
    x[1, 77] = value
    found = layer(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[0], clean[0]) and torch.equal(found[2], clean[2])


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_x_of_any_size(fmt, size):
    layer, x = layer_of(fmt), random(DECODE, 256, seed=3)
    x[:, 32:64] *= 300  # an outlier among columns leaves the others as exact as they were
    x[:, 64:96] *= 1e-3
    x = (x * size).to(torch.bfloat16)
    exact = x.double() @ exact_weight(layer).T
    theirs = (linear(x, exact_weight(layer).to(torch.bfloat16)) - exact).norm()
    assert (layer(x) - exact).norm() <= max(2 * theirs, 1e-30 * 256)
