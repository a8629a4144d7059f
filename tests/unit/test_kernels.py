"""The kernels without a GPU: interpreted against plain torch, and compiled ahead of time for the GPUs people have."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from qlazy_kernels import reference

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

KERNELS = Path(reference.__file__).parent


@pytest.fixture(scope="module")
def dequantize():
    """The kernel module loaded a second time, so that Triton interprets it here and in no other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("interpreted_dequantize", KERNELS / "dequantize.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def packed_int4(rows: int, columns: int, groups: int, *, symmetric: bool, dtype: torch.dtype, device: str = "cpu"):
    """Random words: every bit pattern is a valid weight."""
    generator = torch.Generator().manual_seed(rows * columns + groups)
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64).to(torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (-(-rows // 8), groups), generator=generator, dtype=torch.int64).to(torch.int32)
    scale = torch.randn((rows, groups), generator=generator).to(dtype)
    return words.to(device), scale.to(device), None if symmetric else zeros.to(device)


def test_reference_follows_the_drawn_bits():
    packed = torch.tensor([[0x76543210]], dtype=torch.int32)
    scale = torch.tensor([[0.5]])
    symmetric = reference.dequantize_int4(packed, scale)
    assert symmetric.tolist() == [[(code - 8) * 0.5 for code in range(8)]]
    shifted = reference.dequantize_int4(packed, scale, torch.tensor([[0xF3]], dtype=torch.int32))
    assert shifted.tolist() == [[(code - 3) * 0.5 for code in range(8)]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(19, 256, 8), (8, 320, 5), (9, 256, 2), (3, 264, 1), (1, 8, 1), (17, 520, 13)]
)
def test_interpreted_kernel_equals_reference(dequantize: ModuleType, rows, columns, groups, symmetric, dtype):
    stored = packed_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype)
    expected = reference.dequantize_int4(*stored, dtype=torch.float32)
    in_float32 = dequantize.dequantize_int4(*stored, dtype=torch.float32)
    assert torch.equal(in_float32, expected)
    got = dequantize.dequantize_int4(*stored)
    assert got.dtype == dtype
    if dtype is torch.bfloat16:
        # Only the interpreter's cast differs: it rounds ties its own way, so a neighbour of the right value is right here.
        assert ((got.view(torch.int16).int() - expected.to(dtype).view(torch.int16).int()).abs() <= 1).all()
    else:
        assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"weight_packed": torch.zeros(4, 8)}, ["torch.float32", "torch.int32"]),
        ({"weight_packed": torch.zeros(4, dtype=torch.int32)}, ["(4,)", "two dimensions"]),
        ({"weight_packed": torch.zeros(4, 16, dtype=torch.int32)[:, ::2]}, ["(16, 2)", "contiguous"]),
        ({"weight_scale": torch.zeros(3, 2)}, ["3 rows", "4."]),
        ({"weight_scale": torch.zeros(4, 3)}, ["64 columns", "3 groups"]),
        ({"weight_scale": torch.zeros(4, 16)}, ["64 columns", "16 groups"]),
        ({"weight_scale": torch.zeros(4, 0)}, ["(4, 0)"]),
        ({"weight_scale": torch.zeros(4, 2, dtype=torch.int8)}, ["torch.int8"]),
        ({"weight_scale": torch.zeros(4, 2, device="meta")}, ["meta", "cpu"]),
        ({"weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}, ["(4, 2)", "(1, 2)"]),
        ({"dtype": torch.float64}, ["torch.float64"]),
    ],
)
def test_kernel_refuses_with_the_numbers(dequantize: ModuleType, change, numbers):
    good = {"weight_packed": torch.zeros(4, 8, dtype=torch.int32), "weight_scale": torch.zeros(4, 2)}
    with pytest.raises(ValueError) as caught:
        dequantize.dequantize_int4(**(good | change))
    for number in numbers:
        assert number in str(caught.value)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlazy_kernels.dequantize import BLOCK_K, BLOCK_N, NUM_WARPS, dequantize_int4_kernel

for capability in map(int, sys.argv[1:]):
    for scale, zero in (("bf16", True), ("fp16", False)):
        pointers = {"packed_NP": "*i32", "scale_NG": "*" + scale, "zero_NG": "*i32", "weight_NK": "*" + scale}
        sizes = dict.fromkeys(["rows", "columns", "groups", "group_size"], "i32")
        fixed = {"HAS_ZERO": zero, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
        source = ASTSource(dequantize_int4_kernel, pointers | sizes | dict.fromkeys(fixed, "constexpr"), fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
        print(capability, scale, len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


def test_kernel_compiles_for_every_gpu_generation(tmp_path):
    # In a process of its own: the kernel must not be interpreted there, and its cache must be empty.
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(KERNELS.parent)}
    env.pop("TRITON_INTERPRET", None)
    capabilities = ["80", "86", "89", "90", "120"]
    command = [sys.executable, "-W", "error", "-c", COMPILE, *capabilities]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [capability for capability in capabilities for _ in range(2)]
    for _, _, cubin_bytes, shared_bytes in rows:
        assert int(cubin_bytes) > 1000
        assert int(shared_bytes) <= 99 * 1024, "the smallest of these GPUs have 99 KiB of shared memory to a block"


def test_package_imports_neither_torch_nor_triton(tmp_path):
    code = "import sys, qlazy_kernels; print([name for name in ('torch', 'triton', 'qlazy') if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(KERNELS.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
