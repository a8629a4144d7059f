"""qlazy's products and quantizers by the kernels, interpreted: what the table chooses, and what comes out of it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qlazy import gpu
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers import experts
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import QuantLinear
from qlazy.products import blocks, gather, tuned
from qlazy.quantizing import codebook
from tests.kernels.packed import random_tokens, require_precise

FORMATS: list[Format] = [
    Int4(),
    Int4(group_size=64, symmetric=True),
    Int4(group_size=-1),
    Int8(),
    Int8(group_size=32),
    Codebook4(),
    Codebook4(kind="fp4", double_quant=False),
]


@pytest.fixture(params=FORMATS, ids=lambda fmt: fmt.name)
def fmt(request) -> Format:
    return request.param


def layer_of(fmt: Format, rows: int = 24, columns: int = 128, dtype: torch.dtype = torch.float16) -> QuantLinear:
    bias = torch.nn.Parameter(random_tokens(1, rows, dtype)[0], requires_grad=False)
    layer = LAYERS[type(fmt)](columns, rows, format=fmt.for_columns(columns), dtype=dtype, bias=bias)
    layer.allocate("cpu")
    layer.fill(random_tokens(rows, columns, dtype) * 0.05)
    return layer


def exact(layer: QuantLinear) -> Tensor:
    plain = (blocks._plain_int4, blocks._plain_int8, blocks._plain_codebook4)[layer._packed().kind]
    return plain(layer._packed(), torch.float32, 0, layer.out_features).double()


def kernels_called(monkeypatch, module) -> list[str]:
    """Names of the kernels, in the order in which they will be called."""
    called: list[str] = []
    for name in [name for name in vars(module) if name.split("_")[0] in ("gemv", "gemm", "dequantize", "grouped")]:
        kernel = getattr(module, name)
        if not name.endswith(("int4", "int8", "codebook4")):
            continue

        def watched(*args, name=name, kernel=kernel, **options):
            called.append(name)
            return kernel(*args, **options)

        monkeypatch.setattr(module, name, watched)
    return called


@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 65])
def test_every_side_of_the_borders_of_the_table(dispatch, fmt, tokens, monkeypatch):
    layer, x = layer_of(fmt), random_tokens(tokens, 128, torch.float16)
    called = kernels_called(monkeypatch, dispatch.triton_products)
    y = layer(x)
    require_precise(y, x, exact(layer), layer.bias)
    name = "codebook4" if isinstance(fmt, Codebook4) else f"int{fmt.bits}"
    entries = tuned.table_for("generic")["dispatch"]["codebook4_alone" if name == "codebook4" else name]
    assert called == [f"{tuned.choose(entries, tokens, 24, 128)['kernel']}_{name}"]
    assert torch.equal(layer(x.view(1, tokens, 128)), y.view(1, tokens, 24))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_are_those_of_the_cpu(dispatch, fmt, dtype, monkeypatch):
    by_kernel = layer_of(fmt, 72, 192, dtype)
    monkeypatch.setattr(gpu, "DEVICES", set())
    plain = layer_of(fmt, 72, 192, dtype)
    assert plain.storage.keys() == by_kernel.storage.keys()
    for key in plain.storage:
        got, expected = getattr(by_kernel, key), getattr(plain, key)
        assert got.dtype == expected.dtype and torch.equal(got, expected), key


def test_the_gradient_and_the_dequantized_weight(dispatch, fmt):
    layer, x = layer_of(fmt), random_tokens(3, 128, torch.float16).requires_grad_(True)
    assert torch.equal(layer.weight, exact(layer).half())
    grad = random_tokens(3, 24, torch.float16)
    layer(x).backward(grad)
    wanted, theirs = grad.double() @ exact(layer), grad @ exact(layer).half()
    assert (x.grad - wanted).norm() <= 2 * (theirs - wanted).norm()


@pytest.mark.parametrize(("fmt", "tokens"), [(FORMATS[0], 2), (FORMATS[1], 70), (FORMATS[3], 10), (FORMATS[5], 1)])
def test_ops_are_what_torch_library_expects(dispatch, fmt, tokens):
    layer, x = layer_of(fmt), random_tokens(tokens, 128, torch.float16)
    held, grad = [getattr(layer, key) for key in layer.storage], random_tokens(tokens, 24, torch.float16)
    name = "codebook4" if isinstance(fmt, Codebook4) else f"int{fmt.bits}"
    count, after = {"int4": (3, (128,)), "int8": (2, ()), "codebook4": (4, (24, getattr(fmt, "kind", "")))}[name]
    stored = (*held, *[None] * (count - len(held)))
    torch.library.opcheck(getattr(torch.ops.qlazy, f"linear_{name}").default, (x, *stored, layer.bias, *after))
    after_grad = (*after, 128) if name == "codebook4" else after
    torch.library.opcheck(getattr(torch.ops.qlazy, f"linear_{name}_backward").default, (grad, *stored, None, *after_grad))


def test_what_no_kernel_takes_goes_another_way(dispatch, fmt):
    for columns, dtype in ((100, torch.float16), (128, torch.float64)):
        layer = layer_of(fmt, 9, columns, dtype if dtype != torch.float64 else torch.float32)
        for tokens in (1, 20):
            x = random_tokens(tokens, columns, dtype)
            y = layer(x)
            assert y.dtype == dtype and torch.allclose(y.double(), x.double() @ exact(layer).T + layer.bias, atol=0.02)
    assert layer(torch.empty(0, 128, dtype=torch.float16)).shape == (0, 9)


def test_rows_of_a_table(dispatch):
    index = torch.tensor([[3, 0], [23, 3]])
    for fmt in FORMATS[:5]:
        layer = layer_of(fmt)
        assert torch.equal(dispatch.triton_products.gather(layer._packed(), index, torch.float32), exact(layer).float()[index])
    nested = layer_of(Codebook4())._packed()
    assert dispatch.triton_products.gather(nested, index, torch.float32) is None


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[1], FORMATS[3]], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_in_one_launch(dispatch, fmt, dtype):
    layers = [layer_of(fmt, 24, 128, dtype) for _ in range(3)]
    for number, layer in enumerate(layers):
        layer.weight_scale *= number + 1
    stacked = [torch.stack([getattr(layer, key) for layer in layers]) for key in layers[0].storage]
    counts, x = torch.tensor([4, 0, 17]), random_tokens(23, 128, dtype)
    y = dispatch.triton_products.grouped(x, counts, *stacked)
    assert not y[21:].any(), "rows that are no expert's"
    for start, stop, layer in ((0, 4, layers[0]), (4, 21, layers[2])):
        require_precise(y[start:stop], x[start:stop], exact(layer))


def test_a_table_of_the_user_comes_first(dispatch, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tuned.user_file("Some GPU")
    assert file == tmp_path / "qlazy" / "devices" / "some-gpu.json"
    file.parent.mkdir(parents=True)
    tile = {"block_m": 16, "block_n": 16, "block_k": 32, "split_k": 2, "num_warps": 4, "num_stages": 2}
    always = [{"max_tokens": None, "kernel": "gemm"}]
    tiles = [{"max_tokens": None, "rows": 24, "columns": 128} | tile, {"max_tokens": None} | tile | {"block_k": 64}]
    file.write_text(json.dumps({"schema": 1, "dispatch": {"int8": always}, "tiles": {"gemm_int8": tiles}}))
    monkeypatch.setattr(dispatch.triton_products, "_device_name", lambda device: "Some GPU")
    layer, x = layer_of(Int8()), random_tokens(1, 128, torch.float16)
    called = kernels_called(monkeypatch, dispatch.triton_products)
    require_precise(layer(x), x, exact(layer), layer.bias)
    layer_of(Int4())(x)
    assert called == ["gemm_int8", "gemv_int4"], "what the user's table leaves out the generic one says"
    choice = dispatch.triton_products._choice
    assert [choice("Some GPU", 1, 1, rows, 128)[1].block_k for rows in (24, 25)] == [32, 64]


def test_weights_on_a_cpu_never_ask_for_triton(fmt, monkeypatch):
    for name in ("qlazy.products.triton_products", "qlazy.quantizing.triton_quantize", "triton"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    layer = layer_of(fmt)
    assert not gpu.has_kernels(layer.weight_packed)
    assert layer(random_tokens(3, 128, torch.float16)).shape == (3, 24)


def test_no_triton_no_kernels(monkeypatch):
    gpu.installed.cache_clear()
    monkeypatch.setenv("QLAZY_TRITON", "0")
    assert not gpu.installed()
    gpu.installed.cache_clear()


def test_no_c_compiler_no_kernels(monkeypatch, caplog):
    pytest.importorskip("triton")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    found, device = (8, 0), torch.device("cuda", 7)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda asked: found)
    monkeypatch.setattr("triton.runtime.driver", Driver())
    capable = gpu._capable.__wrapped__
    assert not capable(device)
    assert [record.message for record in caplog.records] == [
        "no Triton kernels on cuda:7, plain PyTorch is slower: Failed to find C compiler."
    ]
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    assert capable(device)
    found = (7, 5)
    assert not capable(device) and len(caplog.records) == 1


def test_constants_are_there_before_any_graph(monkeypatch):
    seen, real = [], gpu.on_device
    monkeypatch.setattr(gpu, "on_device", lambda constant, device: seen.append(id(constant)) or real(constant, device))
    LAYERS[Codebook4](128, 24, format=Codebook4(), dtype=torch.float16, bias=None).allocate("cpu")
    assert {id(codebook.CODES["nf4"]), id(codebook.nested_code())} <= set(seen)


def test_only_the_op_that_waits_stays_out_of_graphs():
    ops = torch.ops.qlazy
    made = (ops.experts_int4, ops.experts_int8, ops.experts_codebook4, ops.linear_int4, ops.linear_codebook4)
    assert [op for op in made if torch.Tag.cudagraph_unsafe in op.default.tags] == [ops.experts_codebook4]


def test_embeddings_and_experts_ask_for_the_kernels(dispatch, monkeypatch):
    layer, index = layer_of(Int4()), torch.tensor([3, 0])
    called = kernels_called(monkeypatch, dispatch.triton_products)
    assert torch.equal(gather.gather_rows(layer._packed(), index, torch.float16), exact(layer).half()[index])
    stacked = [getattr(layer, key).unsqueeze(0) for key in layer.storage]
    x = random_tokens(2, 128, torch.float16)
    require_precise(experts._experts_int4(x, torch.tensor([2]), *stacked), x, exact(layer))
    assert called == ["grouped_gemm_int4"]
