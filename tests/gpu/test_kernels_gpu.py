"""The kernels on a real device: packing and unpacking bit for bit, products no worse than torch's own in the same dtype.

`TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels_gpu.py` runs what can run without a GPU on small shapes.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qlazy_kernels import reference

from qlazy.quantizing import codebook
from qlazy.quantizing.packing import pack_int4, pack_zero_points
from qlazy.quantizing.quantize import quantize_int8
from qlazy.quantizing.search import ASYMMETRIC_FACTORS, SYMMETRIC_FACTORS, search_int4
from tests.gpu.device import DEVICE, INTERPRETED, there
from tests.kernels.packed import (
    random_codebook4,
    random_int4,
    random_int8,
    random_tokens,
    require_no_worse,
    require_precise,
    require_same,
)

# Shown, not raised: what PyTorch and Triton warn of differs between machines that these tests have never seen.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LARGE = [(4096, 4096, 128), (1023, 2048, 64), (5632, 2048, 32), (2048, 5632, -1)]
SMALL = [(19, 264, -1), (11, 960, 96), (9, 256, 32)]
SHAPES = SMALL if INTERPRETED else LARGE + SMALL
"""Rows, columns, group size."""

PRODUCTS = [(torch.bfloat16, shape) for shape in SHAPES]
PRODUCTS += [(dtype, shape) for dtype in (torch.float16, torch.float32) for shape in (SHAPES[0], SHAPES[-1])]
"""Not every dtype with every shape: most of the time goes into compiling."""

needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def kernel(module: str):
    return importlib.import_module(f"qlazy_kernels.{module}")


def groups_of(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else columns // group_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_dequantize_int4_equals_reference(rows, columns, group_size, symmetric, dtype):
    stored = there(random_int4(rows, columns, groups_of(columns, group_size), symmetric=symmetric, dtype=dtype))
    expected = reference.dequantize_int4(*stored)
    require_same(kernel("dequantize").dequantize_int4(*stored), expected)
    part = kernel("dequantize").dequantize_int4(*stored, start=3, stop=rows - 1)
    require_same(part, expected[3 : rows - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_dequantize_int8_equals_reference(rows, columns, group_size, dtype):
    stored = there(random_int8(rows, columns, groups_of(columns, group_size), dtype=dtype))
    require_same(kernel("dequantize").dequantize_int8(*stored), reference.dequantize_int8(*stored))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(77, 101), (16, 192)] + [(512, 1024), (128, 2048)] * (not INTERPRETED))
def test_codebook4_equals_reference(kind, nested, rows, columns):
    packed, absmax, rest = random_codebook4(rows, columns, kind, nested=nested)
    *given, rest = there((packed, absmax, codebook.CODES[kind], rest))
    options = {"rows": rows, "columns": columns, "dtype": torch.bfloat16}
    expected = reference.dequantize_codebook4(*given, rest, **options)
    require_same(kernel("codebook4").dequantize_codebook4(*given, rest, **options), expected)


def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    spread = torch.rand((rows, 1), generator=generator).mul_(0.1)
    return torch.randn((rows, columns), generator=generator).mul_(spread).to(dtype)


BYTES = (11, 384) if INTERPRETED else (515, 1152)
"""Rows and columns of weights that are packed here and there."""


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
    weight = weights(*BYTES, dtype)
    codes, scale, zero = search_int4(weight, group, symmetric, scale_dtype)
    factors = (SYMMETRIC_FACTORS if symmetric else ASYMMETRIC_FACTORS).to(DEVICE)
    options = {"group_size": group, "symmetric": symmetric, "scale_dtype": scale_dtype}
    got = kernel("quantize").quantize_int4(weight.to(DEVICE), factors, **options)
    assert same_bytes(got[1], scale)
    assert same_bytes(got[0], pack_int4(codes))
    assert got[2] is None if zero is None else same_bytes(got[2], pack_zero_points(zero))


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_packed_on_the_gpu_has_the_bytes_of_the_cpu(group, dtype):
    weight = weights(*BYTES, dtype)
    q, scale = quantize_int8(weight, group_size=group, scale_dtype=dtype)
    got = kernel("quantize").quantize_int8(weight.to(DEVICE), group_size=group, scale_dtype=dtype)
    assert same_bytes(got[1], scale)
    assert same_bytes(got[0], q)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns"), [BYTES, (3, 77)])
def test_codebook4_packed_on_the_gpu_has_the_bytes_of_the_cpu(kind, rows, columns):
    weight = weights(rows, columns, torch.bfloat16)
    packed, absmax = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), torch.empty(-(-weight.numel() // 64))
    codebook.quantize_blocks(weight, kind, packed_out=packed, absmax_out=absmax)
    values, order = codebook.CODES[kind].sort(stable=True)
    bounds = (values[:-1] + values[1:]) / 2
    got = kernel("codebook4").quantize_codebook4(weight.to(DEVICE), bounds.to(DEVICE), order.int().to(DEVICE))
    assert same_bytes(got[0], packed)
    assert same_bytes(got[1], absmax)


def test_float8_bytes_are_weights():
    every = torch.arange(256).to(torch.uint8)
    finite = every[~torch.isnan(every.view(torch.float8_e4m3fn).float())]
    byte = finite[torch.randint(0, len(finite), (64, 256), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    options = {"group_size": 32, "symmetric": False, "scale_dtype": torch.bfloat16}
    factors = ASYMMETRIC_FACTORS.to(DEVICE)
    got = kernel("quantize").quantize_int4(byte, factors, **options)
    expected = kernel("quantize").quantize_int4(byte.view(torch.float8_e4m3fn).float(), factors, **options)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("dtype", "shape"), PRODUCTS)
def test_products_with_few_tokens(tokens, dtype, shape):
    rows, columns, group_size = shape
    x, bias = there((random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]))
    groups = groups_of(columns, group_size)
    for symmetric in (True, False):
        stored = there(random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype))
        weight = reference.dequantize_int4(*stored, dtype=torch.float64)
        y = kernel("gemv").gemv_int4(x, *stored, bias)
        require_precise(y, x, weight, bias)
        assert torch.equal(y, kernel("gemv").gemv_int4(x, *stored, bias)), "the same bits every time"
    stored = there(random_int8(rows, columns, groups, dtype=dtype))
    weight = reference.dequantize_int8(*stored, dtype=torch.float64)
    require_precise(kernel("gemv").gemv_int8(x, *stored, bias), x, weight, bias)


@pytest.mark.parametrize("tokens", [2, 17] if INTERPRETED else [2, 17, 33, 64, 200])
@pytest.mark.parametrize(("dtype", "shape"), PRODUCTS)
def test_products_on_tensor_cores(tokens, dtype, shape):
    rows, columns, group_size = shape
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies in bfloat16 wrongly")
    x, bias = there((random_tokens(tokens, columns, dtype), random_tokens(1, rows, dtype)[0]))
    groups = groups_of(columns, group_size)
    stored = there(random_int4(rows, columns, groups, symmetric=False, dtype=dtype))
    weight = reference.dequantize_int4(*stored, dtype=torch.float64)
    y = kernel("gemm").gemm_int4(x, *stored, bias)
    require_precise(y, x, weight, bias)
    assert torch.equal(y, kernel("gemm").gemm_int4(x, *stored, bias)), "the same bits every time"
    stored = there(random_int8(rows, columns, groups, dtype=dtype))
    weight = reference.dequantize_int8(*stored, dtype=torch.float64)
    require_precise(kernel("gemm").gemm_int8(x, *stored, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_products_with_codebook4(nested, dtype):
    rows, columns = (23, 192) if INTERPRETED else (1023, 2048)
    packed, absmax, rest = random_codebook4(rows, columns, "nf4", nested=nested)
    given = there((packed, absmax, codebook.CODES["nf4"], rest))
    weight = reference.dequantize_codebook4(*given, rows=rows, columns=columns, dtype=torch.float64)
    for tokens in (1, 3, 16):
        x = random_tokens(tokens, columns, dtype).to(DEVICE)
        require_precise(kernel("gemv_codebook4").gemv_codebook4(x, *given, rows=rows), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_gate_and_up_together(tokens, dtype):
    rows, columns = (24, 256) if INTERPRETED else (1408, 2048)
    gate = there(random_int4(rows, columns, columns // 32, symmetric=False, dtype=dtype))
    up = tuple(tensor.flip(0) for tensor in gate)
    x = random_tokens(tokens, columns, dtype).to(DEVICE)
    unpacked = [reference.dequantize_int4(*one, dtype=torch.float64) for one in (gate, up)]
    plain = torch.nn.functional.silu(x @ unpacked[0].to(dtype).T) * (x @ unpacked[1].to(dtype).T)
    require_no_worse(kernel("gate_up").gemv_gate_up_int4(x, gate, up), plain, reference.gate_up(x, *unpacked))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_an_embedding(dtype):
    index = torch.randint(0, 1003, (2, 3) if INTERPRETED else (7, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    columns = 256 if INTERPRETED else 2048
    table = there(random_int4(1003, columns, columns // 32, symmetric=False, dtype=dtype))
    require_same(kernel("gather").gather_int4(index, *table), reference.dequantize_int4(*table)[index])
    table = there(random_int8(1003, columns, 1, dtype=dtype))
    require_same(kernel("gather").gather_int8(index, *table), reference.dequantize_int8(*table)[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_m", [16, 64])
def test_experts_in_one_launch(block_m, dtype):
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies in bfloat16 wrongly")
    experts, rows, columns = 8, 40 if INTERPRETED else 640, 128 if INTERPRETED else 1024
    packed, scale, zero = there(random_int4(experts * rows, columns, columns // 32, symmetric=False, dtype=dtype))
    weight = reference.dequantize_int4(packed, scale, zero, dtype=torch.float64).view(experts, rows, columns)
    counts = torch.tensor([0, 1, 100, 3, 64, 0, 17, 15], device=DEVICE)
    x = random_tokens(200, columns, dtype).to(DEVICE)
    block_m = kernel("gemm").default_tile(block_m, dtype).block_m  # float32 has one tile
    blocks = kernel("grouped").group_blocks(counts, 200, block_m)
    stacked = (packed.view(experts, rows, -1), scale.view(experts, rows, -1), zero.view(experts, rows // 8, -1))
    y = kernel("grouped").grouped_gemm_int4(x, *stacked, blocks)
    parts = zip(x.split(counts.tolist()), weight, strict=True)
    require_no_worse(y, torch.cat([part @ one.to(dtype).T for part, one in parts]), reference.grouped(x, weight, counts))


CALLS = (
    *("gemv int4", "gemv int8", "gemv nf4", "gemm int4", "gemm int8", "gate and up", "experts", "gather int4", "gather int8"),
    *("dequantize int4", "dequantize int8", "dequantize nf4", "quantize int4", "quantize int8", "quantize nf4"),
)


def test_the_list_of_calls_is_whole():
    made = calls(9, 192, torch.float16)
    assert tuple(made) == CALLS
    for call in made.values():
        call()


def calls(rows: int, columns: int, dtype: torch.dtype):
    """Every kernel once, ragged at each end, by name."""
    int4 = there(random_int4(rows, columns, columns // 32, symmetric=False, dtype=dtype))
    int8 = there(random_int8(rows, columns, 1, dtype=dtype))
    packed, absmax, nested = random_codebook4(rows, columns, "nf4", nested=True)
    nf4 = there((packed, absmax, codebook.CODES["nf4"], nested))
    x, few, weight = there((random_tokens(33, columns, dtype), random_tokens(3, columns, dtype), weights(rows, columns, dtype)))
    index = torch.tensor([rows - 1, 0, 3], device=DEVICE)
    counts = torch.tensor([20, 0, 13], device=DEVICE)
    stacked = tuple(torch.stack([tensor] * 3) for tensor in int4)
    factors, (values, order) = ASYMMETRIC_FACTORS.to(DEVICE), codebook.CODES["nf4"].sort(stable=True)
    bounds, order = there(((values[:-1] + values[1:]) / 2, order.int()))
    options = {"group_size": 32, "symmetric": False, "scale_dtype": dtype}
    return {
        "gemv int4": lambda: kernel("gemv").gemv_int4(few, *int4),
        "gemv int8": lambda: kernel("gemv").gemv_int8(few, *int8),
        "gemv nf4": lambda: kernel("gemv_codebook4").gemv_codebook4(few, *nf4, rows=rows),
        "gemm int4": lambda: kernel("gemm").gemm_int4(x, *int4),
        "gemm int8": lambda: kernel("gemm").gemm_int8(x, *int8),
        "gate and up": lambda: kernel("gate_up").gemv_gate_up_int4(few, int4, int4),
        "experts": lambda: kernel("grouped").grouped_gemm_int4(x, *stacked, kernel("grouped").group_blocks(counts, 33, 16)),
        "gather int4": lambda: kernel("gather").gather_int4(index, *int4),
        "gather int8": lambda: kernel("gather").gather_int8(index, *int8),
        "dequantize int4": lambda: kernel("dequantize").dequantize_int4(*int4),
        "dequantize int8": lambda: kernel("dequantize").dequantize_int8(*int8),
        "dequantize nf4": lambda: kernel("codebook4").dequantize_codebook4(*nf4, rows=rows, columns=columns, dtype=dtype),
        "quantize int4": lambda: kernel("quantize").quantize_int4(weight, factors, **options),
        "quantize int8": lambda: kernel("quantize").quantize_int8(weight, group_size=-1, scale_dtype=dtype),
        "quantize nf4": lambda: kernel("codebook4").quantize_codebook4(weight, bounds, order),
    }


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_each_kernel_is_captured_in_a_graph(name):
    call = calls(520, 1024, torch.bfloat16)[name]
    expected = call()  # compiled here, as nothing may compile during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    for tensor in (made,) if isinstance(made, torch.Tensor) else made:
        tensor.zero_()
    graph.replay()
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


@needs_gpu
def test_no_kernel_touches_memory_that_is_not_its_own(tmp_path):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "sanitized.py"
    script.write_text(
        "import torch\n"
        "from tests.gpu.test_kernels_gpu import calls\n"
        "for shape in ((9, 192), (61, 1088)):\n"
        "    for call in calls(*shape, torch.bfloat16).values():\n"
        "        call()\n"
        "torch.cuda.synchronize()\n"
    )
    root = Path(__file__).parents[2]
    # Each tensor in an allocation of its own: within a larger one nobody would see a step over the end.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    # PyTorch asks the driver for things that it may not have: such answers are no errors of ours.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [tool, *options, sys.executable, str(script)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=280)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("this compute-sanitizer does not know the device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_gpu
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


@needs_gpu
def test_result_lands_on_the_device_of_its_input():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    packed = torch.full((8, 4), 0x76543210, dtype=torch.int32, device="cuda:1")
    weight = kernel("dequantize").dequantize_int4(packed, torch.ones((8, 1), device="cuda:1"))
    assert weight.device == packed.device
    assert weight[0, :8].tolist() == list(range(-8, 0))
