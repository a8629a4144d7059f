"""The kernels on a real device: packing and unpacking bit for bit, products no worse than torch's own in the same dtype."""

from __future__ import annotations

import importlib

import pytest
import torch
from qlazy_kernels import reference

from qlazy import codebook
from qlazy.packing import pack_int4, pack_zero_points
from qlazy.quantize import quantize_int8
from qlazy.search import ASYMMETRIC_FACTORS, SYMMETRIC_FACTORS, search_int4
from tests.kernels.packed import (
    random_codebook4,
    random_int4,
    random_int8,
    random_tokens,
    require_no_worse,
    require_precise,
    require_same,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(4096, 4096, 128), (1023, 2048, 64), (5632, 2048, 32), (2048, 5632, -1), (19, 264, -1), (11, 960, 96)]
"""Rows, columns, group size."""


def kernel(module: str):
    return importlib.import_module(f"qlazy_kernels.{module}")


def on_gpu(tensors):
    return tuple(on_gpu(t) if isinstance(t, tuple) else None if t is None else t.cuda() for t in tensors)


def groups_of(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else columns // group_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_dequantize_int4_equals_reference(rows, columns, group_size, symmetric, dtype):
    stored = on_gpu(random_int4(rows, columns, groups_of(columns, group_size), symmetric=symmetric, dtype=dtype))
    expected = reference.dequantize_int4(*stored)
    assert torch.equal(kernel("dequantize").dequantize_int4(*stored), expected)
    part = kernel("dequantize").dequantize_int4(*stored, start=3, stop=rows - 1)
    assert torch.equal(part, expected[3 : rows - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_dequantize_int8_equals_reference(rows, columns, group_size, dtype):
    stored = on_gpu(random_int8(rows, columns, groups_of(columns, group_size), dtype=dtype))
    assert torch.equal(kernel("dequantize").dequantize_int8(*stored), reference.dequantize_int8(*stored))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(512, 1024), (77, 101), (128, 2048)])
def test_codebook4_equals_reference(kind, nested, rows, columns):
    given = on_gpu((*random_codebook4(rows, columns, kind, nested=nested)[:2], codebook.CODES[kind]))
    rest = random_codebook4(rows, columns, kind, nested=nested)[2]
    rest = None if rest is None else on_gpu(rest)
    options = {"rows": rows, "columns": columns, "dtype": torch.bfloat16}
    expected = reference.dequantize_codebook4(*given, rest, **options)
    require_same(kernel("codebook4").dequantize_codebook4(*given, rest, **options), expected)


def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    spread = torch.rand((rows, 1), generator=generator).mul_(0.1)
    return torch.randn((rows, columns), generator=generator).mul_(spread).to(dtype)


def same_bytes(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """The GPU's against the CPU's."""
    pair = (tensor.cpu().reshape(-1).clone().view(torch.uint8) for tensor in (got, expected))
    return got.dtype == expected.dtype and torch.equal(*pair)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_int4_packed_on_the_gpu_has_the_bytes_of_the_cpu(group, symmetric, dtype, scale_dtype):
    weight = weights(515, 1152, dtype)
    codes, scale, zero = search_int4(weight, group, symmetric, scale_dtype)
    factors = (SYMMETRIC_FACTORS if symmetric else ASYMMETRIC_FACTORS).cuda()
    options = {"group_size": group, "symmetric": symmetric, "scale_dtype": scale_dtype}
    got = kernel("quantize").quantize_int4(weight.cuda(), factors, **options)
    assert same_bytes(got[1], scale)
    assert same_bytes(got[0], pack_int4(codes))
    assert got[2] is None if zero is None else same_bytes(got[2], pack_zero_points(zero))


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_packed_on_the_gpu_has_the_bytes_of_the_cpu(group, dtype):
    weight = weights(515, 1152, dtype)
    q, scale = quantize_int8(weight, group_size=group, scale_dtype=dtype)
    got = kernel("quantize").quantize_int8(weight.cuda(), group_size=group, scale_dtype=dtype)
    assert same_bytes(got[1], scale)
    assert same_bytes(got[0], q)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns"), [(515, 1152), (3, 77)])
def test_codebook4_packed_on_the_gpu_has_the_bytes_of_the_cpu(kind, rows, columns):
    weight = weights(rows, columns, torch.bfloat16)
    packed, absmax = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), torch.empty(-(-weight.numel() // 64))
    codebook.quantize_blocks(weight, kind, packed_out=packed, absmax_out=absmax)
    values, order = codebook.CODES[kind].sort(stable=True)
    bounds = (values[:-1] + values[1:]) / 2
    got = kernel("codebook4").quantize_codebook4(weight.cuda(), bounds.cuda(), order.int().cuda())
    assert same_bytes(got[0], packed)
    assert same_bytes(got[1], absmax)


def test_float8_bytes_are_weights():
    every = torch.arange(256).to(torch.uint8)
    finite = every[~torch.isnan(every.view(torch.float8_e4m3fn).float())]
    byte = finite[torch.randint(0, len(finite), (64, 256), generator=torch.Generator().manual_seed(0))].cuda()
    options = {"group_size": 32, "symmetric": False, "scale_dtype": torch.bfloat16}
    factors = ASYMMETRIC_FACTORS.cuda()
    got = kernel("quantize").quantize_int4(byte, factors, **options)
    expected = kernel("quantize").quantize_int4(byte.view(torch.float8_e4m3fn).float(), factors, **options)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_products_with_few_tokens(tokens, rows, columns, group_size, dtype):
    x, bias = on_gpu((random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]))
    groups = groups_of(columns, group_size)
    for symmetric in (True, False):
        stored = on_gpu(random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype))
        weight = reference.dequantize_int4(*stored, dtype=torch.float64)
        y = kernel("gemv").gemv_int4(x, *stored, bias)
        require_precise(y, x, weight, bias)
        assert torch.equal(y, kernel("gemv").gemv_int4(x, *stored, bias)), "the same bits every time"
    stored = on_gpu(random_int8(rows, columns, groups, dtype=dtype))
    weight = reference.dequantize_int8(*stored, dtype=torch.float64)
    require_precise(kernel("gemv").gemv_int8(x, *stored, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 16, 33, 64, 200])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_products_on_tensor_cores(tokens, rows, columns, group_size, dtype):
    x, bias = on_gpu((random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]))
    groups = groups_of(columns, group_size)
    stored = on_gpu(random_int4(rows, columns, groups, symmetric=False, dtype=dtype))
    weight = reference.dequantize_int4(*stored, dtype=torch.float64)
    y = kernel("gemm").gemm_int4(x, *stored, bias)
    require_precise(y, x, weight, bias)
    assert torch.equal(y, kernel("gemm").gemm_int4(x, *stored, bias)), "the same bits every time"
    stored = on_gpu(random_int8(rows, columns, groups, dtype=dtype))
    weight = reference.dequantize_int8(*stored, dtype=torch.float64)
    require_precise(kernel("gemm").gemm_int8(x, *stored, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_products_with_codebook4(nested, dtype):
    rows, columns = 1023, 2048
    packed, absmax, rest = random_codebook4(rows, columns, "nf4", nested=nested)
    given = on_gpu((packed, absmax, codebook.CODES["nf4"], rest))
    weight = reference.dequantize_codebook4(*given, rows=rows, columns=columns, dtype=torch.float64)
    for tokens in (1, 3, 16):
        x = random_tokens(tokens, columns, dtype).cuda()
        require_precise(kernel("gemv_codebook4").gemv_codebook4(x, *given, rows=rows), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_gate_and_up_together(tokens, dtype):
    gate = on_gpu(random_int4(1408, 2048, 64, symmetric=False, dtype=dtype))
    up = tuple(tensor.flip(0) for tensor in gate)
    x = random_tokens(tokens, 2048, dtype).cuda()
    unpacked = [reference.dequantize_int4(*one, dtype=torch.float64) for one in (gate, up)]
    plain = torch.nn.functional.silu(x @ unpacked[0].to(dtype).T) * (x @ unpacked[1].to(dtype).T)
    require_no_worse(kernel("gate_up").gemv_gate_up_int4(x, gate, up), plain, reference.gate_up(x, *unpacked))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_an_embedding(dtype):
    index = torch.randint(0, 1003, (7, 33), generator=torch.Generator().manual_seed(0)).cuda()
    table = on_gpu(random_int4(1003, 2048, 64, symmetric=False, dtype=dtype))
    assert torch.equal(kernel("gather").gather_int4(index, *table), reference.dequantize_int4(*table)[index])
    table = on_gpu(random_int8(1003, 2048, 1, dtype=dtype))
    assert torch.equal(kernel("gather").gather_int8(index, *table), reference.dequantize_int8(*table)[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_m", [16, 64])
def test_experts_in_one_launch(block_m, dtype):
    experts, rows, columns = 8, 640, 1024
    packed, scale, zero = on_gpu(random_int4(experts * rows, columns, 32, symmetric=False, dtype=dtype))
    weight = reference.dequantize_int4(packed, scale, zero, dtype=torch.float64).view(experts, rows, columns)
    counts = torch.tensor([0, 1, 100, 3, 64, 0, 17, 15], device="cuda")
    x = random_tokens(200, columns, dtype).cuda()
    blocks = kernel("grouped").group_blocks(counts, 200, block_m)
    stacked = (packed.view(experts, rows, -1), scale.view(experts, rows, -1), zero.view(experts, rows // 8, -1))
    y = kernel("grouped").grouped_gemm_int4(x, *stacked, blocks)
    parts = zip(x.split(counts.tolist()), weight, strict=True)
    require_no_worse(y, torch.cat([part @ one.to(dtype).T for part, one in parts]), reference.grouped(x, weight, counts))


def test_products_are_captured_in_a_graph():
    stored = on_gpu(random_int4(512, 1024, 8, symmetric=False, dtype=torch.bfloat16))
    x = random_tokens(1, 1024, torch.bfloat16).cuda()
    out = torch.empty((1, 512), dtype=torch.bfloat16, device="cuda")
    expected = kernel("gemv").gemv_int4(x, *stored)  # compiled here, as nothing may compile during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel("gemv").gemv_int4(x, *stored, out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_offsets_beyond_32_bits():
    rows, columns = 262_144 + 8, 8_192  # 2^31 elements and a few rows: 4 GiB in float16
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip(f"needs 8 GiB free on the device, there are {torch.cuda.mem_get_info()[0] >> 30} GiB")
    packed = torch.full((rows, columns // 8), 0x76543210, dtype=torch.int32, device="cuda")
    scale = torch.ones((rows, 1), dtype=torch.float16, device="cuda")
    expected = torch.arange(-8, 0, dtype=torch.float16, device="cuda").repeat(columns // 8)
    weight = kernel("dequantize").dequantize_int4(packed, scale)
    assert torch.equal(weight[-8:], expected.expand(8, -1))
    y = kernel("gemv").gemv_int4(torch.ones((1, columns), dtype=torch.float16, device="cuda"), packed, scale)
    assert (y == expected.double().sum().half()).all()


def test_result_lands_on_the_device_of_its_input():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    packed = torch.full((8, 4), 0x76543210, dtype=torch.int32, device="cuda:1")
    weight = kernel("dequantize").dequantize_int4(packed, torch.ones((8, 1), device="cuda:1"))
    assert weight.device == packed.device
    assert weight[0, :8].tolist() == list(range(-8, 0))
