"""The kernels compiled ahead of time for the GPUs that people have, and the committed table of what they take."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "docs" / "generate_kernels.py"
FEW_REGISTERS = ("gemv_kernel", "gemv_codebook4_kernel", "gemv_gate_up_kernel")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_kernels", GENERATOR)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_kernel_compiles_within_its_limits(generator, tmp_path):
    # In a process of its own: the kernels must not be interpreted there, and the cache must be empty.
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", str(GENERATOR), "--check"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in made} == set(all_kernels())
    for one in made:
        assert one["spills"] == 0, one
        assert one["float64"] == 0, "a constant that does not fit fp32 makes everything it meets float64"
        assert one["flushing"] == 0, "products with few tokens read codes as subnormal numbers"
        assert one["loose"] == 0, "bytes equal to those of a CPU need every operation rounded by itself"
        assert one["registers"] <= (128 if one["kernel"] in FEW_REGISTERS else 255), one
        assert one["shared"] <= generator.SHARED_LIMIT[one["capability"]], one
        assert one["loads"].get("128", 0) + one["loads"].get("64", 0) > 0, one


def all_kernels() -> list[str]:
    sources = [path.read_text() for path in sorted((ROOT / "kernels" / "qlazy_kernels").glob("*.py"))]
    return [name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)]


def test_the_committed_table_covers_every_kernel(generator):
    page = generator.PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == set(all_kernels())
    for row in rows:
        cells = row[2 : 2 + len(generator.CAPABILITIES)]
        assert all(int(cell.split(" / ")[0]) <= 255 for cell in cells)


def test_package_imports_neither_torch_nor_triton(tmp_path):
    code = "import sys, qlazy_kernels; print([name for name in ('torch', 'triton', 'qlazy') if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
