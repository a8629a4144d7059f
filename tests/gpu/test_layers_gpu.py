"""Low-bit layers on a GPU: bytes of a CPU, products on each side of the table's borders, graphs, and no wait for the device.

`TRITON_INTERPRET=1 python -m pytest tests/gpu/test_layers_gpu.py` runs what can run without a GPU on small shapes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlazy import gpu, native
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import NonFiniteError, QuantLinear
from qlazy.products import ops
from tests.gpu.device import DEVICE, INTERPRETED
from tests.kernels.packed import require_no_worse

# Shown, not raised: what PyTorch and Triton warn of differs between machines that these tests have never seen.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

FORMATS: list[Format] = [
    Int4(),
    Int4(group_size=128, symmetric=True),
    Int4(group_size=-1),
    Int8(),
    Int8(group_size=64),
    Codebook4(),
    Codebook4(kind="fp4", double_quant=False),
]
SHAPE = (24, 128) if INTERPRETED else (1032, 1024)
TOKENS = [1, 9, 65] if INTERPRETED else [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 300]
"""Each side of every border in the generic table."""

needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(autouse=True)
def where_kernels_run(monkeypatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture(params=[False, True] if HAS_BITSANDBYTES and not INTERPRETED else [False], ids=lambda has: "bnb" if has else "")
def bitsandbytes(request, monkeypatch) -> Iterator[bool]:
    """NF4 and FP4 with bitsandbytes' kernel and without it."""
    from qlazy.products import triton_products

    if request.param and not isinstance(request.getfixturevalue("fmt"), Codebook4):
        pytest.skip("int4 and int8 are not bitsandbytes'")
    triton_products._choice.cache_clear()
    if not request.param:
        monkeypatch.setattr(triton_products, "_has_bitsandbytes", lambda: False)
    yield request.param
    triton_products._choice.cache_clear()


@pytest.fixture(params=FORMATS, ids=lambda fmt: fmt.name)
def fmt(request) -> Format:
    return request.param


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(
    fmt: Format, device: str = DEVICE, *, shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.bfloat16
) -> QuantLinear:
    rows, columns = shape
    layer = LAYERS[type(fmt)](columns, rows, format=fmt.for_columns(columns), dtype=dtype, bias=None)
    layer.allocate(device)
    layer.fill(random(rows, columns, dtype=dtype).to(device) * 0.05)
    return layer


def require_equal(y: Tensor, expected: Tensor, loose: bool) -> None:
    """The same bits; bitsandbytes promises none."""
    torch.testing.assert_close(y, expected, **({} if loose else {"rtol": 0, "atol": 0}))


DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
"""The interpreter multiplies in bfloat16 wrongly."""

CASES = [(DTYPE, tokens) for tokens in TOKENS]
CASES += [(dtype, tokens) for dtype in (torch.float16, torch.float32) for tokens in (1, 9, 65) if dtype is not DTYPE]


@pytest.mark.parametrize(("dtype", "tokens"), CASES)
def test_error_is_at_most_twice_that_of_torch(fmt, tokens, dtype, bitsandbytes):
    layer, x = filled(fmt, dtype=dtype), random(tokens, SHAPE[1], seed=1, dtype=dtype).to(DEVICE)
    weight = layer.dequantize(torch.float32).double()
    plain = x @ weight.to(dtype).T
    y = layer(x)
    require_no_worse(y, plain, x.double() @ weight.T)
    if not bitsandbytes:
        assert torch.equal(y, layer(x)), "the same bits every time"


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_are_those_of_the_cpu(fmt, dtype, by_kernels, monkeypatch):
    shape = (72, 192) if INTERPRETED else (1032, 1152)
    there = filled(fmt, shape=shape, dtype=dtype) if by_kernels else None
    monkeypatch.setattr(gpu, "DEVICES", set())
    there = there or filled(fmt, shape=shape, dtype=dtype)
    here = filled(fmt, "cpu", shape=shape, dtype=dtype)
    for key in here.storage:
        assert torch.equal(getattr(there, key).cpu(), getattr(here, key)), key


@pytest.mark.parametrize("blocks", [1, 31, 257, 40_000, 262_144])
def test_the_mean_of_absmax_is_one_number_everywhere(blocks):
    from qlazy.quantizing.nested import nest_absmax

    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) * 0.02 + 0.03
    here = nest_absmax(absmax)
    for one, other in zip(nest_absmax(absmax.to(DEVICE)), here, strict=True):
        assert torch.equal(one.cpu(), other)


def test_values_and_gradients_are_those_of_the_cpu(fmt):
    dtype = DTYPE
    layer, here = filled(fmt, dtype=dtype), filled(fmt, "cpu", dtype=dtype)
    assert torch.equal(layer.weight.cpu(), here.weight)
    x, grad = random(5, SHAPE[1], seed=1, dtype=dtype), random(5, SHAPE[0], seed=2, dtype=dtype)
    there = x.to(DEVICE).requires_grad_(True)
    layer(there).backward(grad.to(DEVICE))
    weight = here.dequantize(torch.float32).double()
    assert there.grad is not None
    require_no_worse(there.grad.cpu(), grad @ weight.to(dtype), grad.double() @ weight)


@needs_gpu
def test_a_weight_that_is_not_finite_is_seen(fmt):
    layer, weight = filled(fmt), random(*SHAPE).to(DEVICE)
    weight[SHAPE[0] // 2, 3] = torch.nan
    layer.allocate(DEVICE)
    with pytest.raises(NonFiniteError):
        layer.fill(weight)


@pytest.mark.parametrize("tokens", [3, 70])
def test_ops_are_what_torch_library_expects(fmt, tokens):
    layer, dtype = filled(fmt), DTYPE
    x, grad = random(tokens, SHAPE[1], dtype=dtype).to(DEVICE), random(tokens, SHAPE[0], dtype=dtype).to(DEVICE)
    held = [getattr(layer, key) for key in layer.storage]
    name = "codebook4" if isinstance(fmt, Codebook4) else f"int{fmt.bits}"
    after: tuple[object, ...] = {"int4": (SHAPE[1],), "int8": (), "codebook4": (SHAPE[0], getattr(fmt, "kind", ""))}[name]
    stored = (*held, *[None] * ({"int4": 3, "int8": 2, "codebook4": 4}[name] - len(held)))
    torch.library.opcheck(getattr(torch.ops.qlazy, f"linear_{name}").default, (x, *stored, None, *after))
    after_grad = (*after, SHAPE[1]) if name == "codebook4" else after
    torch.library.opcheck(getattr(torch.ops.qlazy, f"linear_{name}_backward").default, (grad, *stored, None, *after_grad))


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_a_product_is_captured_in_a_graph_and_replayed(fmt, tokens, bitsandbytes):
    layer, x = filled(fmt), random(tokens, SHAPE[1]).to(DEVICE)
    layer(x)  # compiled here, as nothing may compile during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in (3, 4):
        x.copy_(random(tokens, SHAPE[1], seed=seed))
        graph.replay()
        require_equal(y, layer(x.clone()), bitsandbytes)


@needs_gpu
def test_nothing_waits_for_the_device(fmt, bitsandbytes):
    layer = filled(fmt)
    weight, inputs = random(*SHAPE).to(DEVICE), [random(tokens, SHAPE[1]).to(DEVICE) for tokens in (1, 20, 300)]
    for x in inputs:
        layer(x)
    layer.allocate(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.fill_rows(0, weight)
        for x in inputs:
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_as_one_graph(fmt, mode, bitsandbytes):
    layer = filled(fmt)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with torch.no_grad():
        for tokens in (1, 1, 1, 24):
            x = random(tokens, SHAPE[1], seed=tokens).to(DEVICE)
            expected = layer(x)  # first, so that no constant is copied while a graph is warmed up
            torch.compiler.cudagraph_mark_step_begin()
            require_equal(compiled(x), expected, bitsandbytes)
    torch._dynamo.reset()


@needs_gpu
def test_many_tokens_take_no_more_than_a_block_of_scratch(monkeypatch):
    monkeypatch.setattr("qlazy.products.blocks.GPU_BLOCK_ELEMENTS", 1 << 20)
    layer, x = filled(Int4(), shape=(8192, 2048)), random(512, 2048).to(DEVICE)
    y = layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    again = layer(x)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert peak - before <= y.nbytes + (1 << 21) + (1 << 20)
    assert torch.equal(again, y)


@needs_gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_and_experts(bits):
    from qlazy.layers import experts
    from qlazy.products import gather

    made: Format = Int4() if bits == 4 else Int8()
    layer = filled(made)
    index = torch.randint(0, SHAPE[0], (300,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(gather.gather_rows(layer._packed(), index, torch.bfloat16), layer.weight[index])
    stacked = [torch.stack([getattr(layer, key)] * 3) for key in layer.storage]
    counts, x = torch.tensor([5, 0, 30], device=DEVICE), random(36, SHAPE[1]).to(DEVICE)
    op = getattr(experts, f"_experts_int{bits}")
    args = (x, counts, *stacked) if bits == 8 or len(stacked) == 3 else (x, counts, *stacked, None)
    y = op(*args)
    weight = layer.dequantize(torch.float32).double()
    require_no_worse(y[:35], x[:35] @ weight.bfloat16().T, x[:35].double() @ weight.T)
    assert not y[35:].any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = op(*args)
    again.zero_()
    graph.replay()
    assert torch.equal(again, y)


@needs_gpu
def test_plain_torch_gives_the_same_where_there_is_no_triton(fmt, monkeypatch):
    layer, x = filled(fmt), random(5, SHAPE[1], seed=1).to(DEVICE)
    exact = x.double() @ layer.dequantize(torch.float32).double().T
    monkeypatch.setattr(gpu, "DEVICES", set())
    plain = x @ layer.weight.T
    require_no_worse(ops.product(x, layer._packed(), None), plain, exact)


@needs_gpu
def test_a_layer_of_the_cpu_moves_to_a_gpu_and_back(fmt):
    layer, wanted = filled(fmt, "cpu"), filled(fmt, "cpu")
    x = random(5, SHAPE[1], seed=1)
    for device in ("cuda", "cpu"):
        layer.to(device)
        assert set(layer.state_dict()) == set(wanted.storage)
        for key in wanted.storage:
            assert torch.equal(getattr(layer, key).cpu(), getattr(wanted, key))
        assert torch.allclose(layer(x.to(device)).cpu().float(), x.float() @ wanted.weight.float().T, atol=0.1)
