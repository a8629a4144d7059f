"""Writes docs/kernels.md: every kernel compiled for five GPU generations on a machine that needs none of them.

`python docs/generate_kernels.py` compiles everything and writes the page; with `--check` it compiles one variant of each kernel
and prints its resources as JSON lines, for the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as a launch has it; kernels that must not fuse say so themselves

CAPABILITIES = (80, 86, 89, 90, 120)
"""A100, RTX 30, RTX 40, H100, RTX 50."""

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Shared memory that a block can have, in bytes."""

PAGE = Path(__file__).with_name("kernels.md")
SIZES = ("columns", "words", "rows", "group_size", "count", "first_byte", "packed_count")
"""Arguments that are multiples of 16 for the layers of language models; Triton compiles a launch for that."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compile a kernel."""

    name: str
    """What a reader calls it."""
    module: str
    """Its module in qlazy_kernels."""
    kernel: str
    """Its name there."""
    pointers: dict[str, str]
    """Dtype of what each pointer points to."""
    integers: tuple[str, ...]
    """Arguments that are integers, in no order."""
    fixed: dict[str, Any]
    """Arguments that are compiled in."""
    warps: int = 4
    stages: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the compiler."""


def variants() -> Iterator[Variant]:
    """Every kernel, in the shapes that its defaults give it.

    Yields:
        Variants; those of one kernel follow each other.
    """
    yield from gemv_variants()
    yield from dequantize_variants()
    yield from quantize_variants()
    yield from gemm_variants()
    yield from other_variants()


def gemv_variants() -> Iterator[Variant]:
    """Few tokens, by the default tile.

    Yields:
        Variants.
    """
    from qlazy_kernels.gemv import TILES

    sizes = ("tokens", "rows", "columns", "words", "groups")
    for bits, zero, group, tokens, dtype in (
        (4, False, 128, 1, "bf16"),
        (4, True, 128, 1, "bf16"),
        (4, True, 32, 1, "bf16"),
        (4, True, 64, 1, "fp16"),
        (4, True, 0, 1, "bf16"),
        (4, True, 32, 2, "bf16"),
        (4, True, 32, 4, "bf16"),
        (4, True, 32, 8, "bf16"),
        (4, True, 32, 1, "fp32"),
        (8, False, 0, 1, "bf16"),
        (8, False, 128, 1, "bf16"),
        (8, False, 0, 4, "bf16"),
        (8, False, 0, 8, "fp16"),
    ):
        tile = TILES[bits][tokens]
        pointers = dict.fromkeys(("x_MK", "scale_NG", "bias_N", "y_MN"), dtype) | {"packed_NP": "i32", "zero_NG": "i32"}
        fixed = {"spans_per_group": 1, "BITS": bits, "ONE_GROUP": group == 0, "HAS_ZERO": zero, "HAS_BIAS": True}
        fixed |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "SPAN": group or 128}
        name = f"int{bits} {'group ' + str(group) if group else 'channel'}{' zero' if zero else ''}, M = {tokens}, {dtype}"
        yield Variant(
            name=name, module="gemv", kernel="gemv_kernel", pointers=pointers, integers=sizes, fixed=fixed, warps=tile.num_warps
        )


def dequantize_variants() -> Iterator[Variant]:
    """Blocks of rows unpacked.

    Yields:
        Variants.
    """
    from qlazy_kernels.dequantize import TILE

    shape = {"BLOCK_N": TILE.block_n, "BLOCK_K": TILE.block_k}
    for dtype, zero, group in (("bf16", True, 32), ("bf16", False, 128), ("fp16", True, 64), ("fp32", True, 32)):
        yield Variant(
            name=f"int4 group {group}{' zero' if zero else ''}, {dtype}",
            module="dequantize",
            kernel="dequantize_int4_kernel",
            pointers={"index_T": "i32", "packed_NP": "i32", "scale_NG": dtype, "zero_NG": "i32", "weight_NK": dtype},
            integers=("start", "stop", "rows", "columns", "words", "groups"),
            fixed={"spans_per_group": 1, "HAS_INDEX": False, "HAS_ZERO": zero, "ONE_GROUP": False, "SPAN": group} | shape,
        )
    for dtype, group in (("bf16", 0), ("bf16", 32)):
        yield Variant(
            name=f"int8 {'group ' + str(group) if group else 'channel'}, {dtype}",
            module="dequantize",
            kernel="dequantize_int8_kernel",
            pointers={"index_T": "u8", "packed_NK": "u8", "scale_NG": dtype, "weight_NK": dtype},
            integers=("start", "stop", "rows", "columns", "groups"),
            fixed={"spans_per_group": 1, "HAS_INDEX": False, "ONE_GROUP": group == 0, "SPAN": group or TILE.block_k} | shape,
        )
    for nested in (True, False):
        yield Variant(
            name=f"NF4/FP4{' nested' if nested else ''}, bf16",
            module="codebook4",
            kernel="dequantize_codebook4_kernel",
            pointers={"packed": "u8", "absmax_B": "u8" if nested else "fp32", "weight": "bf16"}
            | dict.fromkeys(("code", "nested_code", "nested_absmax", "offset"), "fp32"),
            integers=("first_byte", "count", "packed_count"),
            fixed={"NESTED": nested, "SIZE": TILE.block_n * TILE.block_k},
            options={"enable_fp_fusion": False},
        )


def quantize_variants() -> Iterator[Variant]:
    """Weights packed as they come.

    Yields:
        Variants.
    """
    from qlazy_kernels.codebook4 import QUANTIZE_TILE
    from qlazy_kernels.quantize import INT4_ELEMENTS, INT8_TILE

    exact: dict[str, Any] = {"enable_fp_fusion": False}
    for source, group, symmetric in (
        ("bf16", 32, False),
        ("bf16", 64, False),
        ("bf16", 128, True),
        ("fp16", 128, False),
        ("fp32", 32, False),
        ("u8", 128, False),
    ):
        scale = "bf16" if source == "u8" else source
        yield Variant(
            name=f"int4 group {group}{'' if symmetric else ' zero'}, {source.replace('u8', 'fp8 e4m3')} in",
            module="quantize",
            kernel="quantize_int4_kernel",
            pointers={"weight_NK": source, "factors": "fp32", "packed_NP": "i32", "scale_NG": scale, "zero_NG": "i32"},
            integers=("rows", "groups"),
            fixed={"CANDIDATES": 4, "SYMMETRIC": symmetric, "FP8": source == "u8", "GROUP": group}
            | {"BLOCK_G": INT4_ELEMENTS // 8 // group, "LEVELS": group.bit_length() - 1},
            options=exact,
        )
    for group, block_k in (("channel", INT8_TILE.block_k), ("group 32", 32), ("group 128", 128)):
        yield Variant(
            name=f"int8 {group}, bf16 in",
            module="quantize",
            kernel="quantize_int8_kernel",
            pointers={"weight_GK": "bf16", "code_GK": "u8", "scale_G": "bf16"},
            integers=("groups", "group_size"),
            fixed={"FP8": False, "BLOCK_G": INT8_TILE.block_n * INT8_TILE.block_k // block_k, "BLOCK_K": block_k},
            options=exact,
        )
    yield Variant(
        name="NF4/FP4, bf16 in",
        module="codebook4",
        kernel="quantize_codebook4_kernel",
        pointers={"weight": "bf16", "bounds": "fp32", "order": "i32", "packed": "u8", "absmax_B": "fp32"},
        integers=("count", "packed_count"),
        fixed={"FP8": False, "BLOCK_B": QUANTIZE_TILE.block_n},
        options=exact,
    )


def gemm_variants() -> Iterator[Variant]:
    """Tensor cores, by the default tile.

    Yields:
        Variants.
    """
    import torch
    from qlazy_kernels.gemm import REDUCE_SIZE, default_tile

    sizes = ("tokens", "rows", "columns", "words", "groups", "steps_per_part")
    for bits, zero, group, tokens, dtype in (
        (4, True, 32, 16, "bf16"),
        (4, False, 128, 16, "bf16"),
        (4, True, 64, 32, "bf16"),
        (4, True, 32, 64, "bf16"),
        (4, True, 32, 128, "fp16"),
        (8, False, 0, 16, "bf16"),
        (8, False, 32, 64, "bf16"),
        (8, False, 0, 128, "bf16"),
        (4, True, 32, 16, "fp32"),
    ):
        tile = default_tile(tokens, torch.float32 if dtype == "fp32" else torch.bfloat16)
        y = "fp32" if tile.split_k > 1 else dtype
        pointers = {"x_MK": dtype, "scale_NG": dtype, "bias_N": dtype, "y_SMN": y, "zero_NG": "i32"}
        pointers["packed_NP"] = "i32" if bits == 4 else "u8"
        span = min(group or tile.block_k, tile.block_k)
        fixed = {"BITS": bits, "ONE_GROUP": group == 0, "HAS_ZERO": zero, "HAS_BIAS": tile.split_k == 1, "SPAN": span}
        fixed |= {"spans_per_group": max(1, group // span)} if group <= span else {}
        fixed |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        yield Variant(
            name=f"int{bits} {'group ' + str(group) if group else 'channel'}{' zero' if zero else ''}, M = {tokens}, {dtype}",
            module="gemm",
            kernel="gemm_kernel",
            pointers=pointers,
            integers=sizes + (("spans_per_group",) if group > span else ()),
            fixed=fixed,
            warps=tile.num_warps,
            stages=tile.num_stages,
        )
    yield Variant(
        name="4 parts, bf16",
        module="gemm",
        kernel="add_parts_kernel",
        pointers={"part_SMN": "fp32", "bias_N": "bf16", "y_MN": "bf16"},
        integers=("count", "rows"),
        fixed={"SPLIT_K": 4, "HAS_BIAS": True, "SIZE": REDUCE_SIZE},
    )


def other_variants() -> Iterator[Variant]:
    """Embedding rows, NF4 products, gate and up together, experts.

    Yields:
        Variants.
    """
    from qlazy_kernels.gather import TILE
    from qlazy_kernels.gemm import TILES as GEMM_TILES
    from qlazy_kernels.gemv import TILES

    packed4 = {"packed_NP": "i32", "zero_NG": "i32"}
    yield Variant(
        name="int4 group 32 zero, rows by index, bf16",
        module="dequantize",
        kernel="dequantize_int4_kernel",
        pointers=packed4 | {"index_T": "i64", "scale_NG": "bf16", "weight_NK": "bf16"},
        integers=("start", "stop", "rows", "columns", "words", "groups"),
        fixed={"spans_per_group": 1, "HAS_INDEX": True, "HAS_ZERO": True, "ONE_GROUP": False, "SPAN": 32}
        | {"BLOCK_N": TILE.block_n, "BLOCK_K": TILE.block_k},
    )
    yield Variant(
        name="int8 channel, rows by index, bf16",
        module="dequantize",
        kernel="dequantize_int8_kernel",
        pointers={"index_T": "i64", "packed_NK": "u8", "scale_NG": "bf16", "weight_NK": "bf16"},
        integers=("start", "stop", "rows", "columns", "groups"),
        fixed={"spans_per_group": 1, "HAS_INDEX": True, "ONE_GROUP": True, "SPAN": TILE.block_k}
        | {"BLOCK_N": TILE.block_n, "BLOCK_K": TILE.block_k},
    )
    for tokens, nested in ((1, False), (1, True), (4, True)):
        tile = TILES[4][tokens]
        yield Variant(
            name=f"NF4/FP4{' nested' if nested else ''}, M = {tokens}, bf16",
            module="gemv_codebook4",
            kernel="gemv_codebook4_kernel",
            pointers={"packed": "i32", "absmax_B": "u8" if nested else "fp32"}
            | dict.fromkeys(("x_MK", "bias_N", "y_MN"), "bf16")
            | dict.fromkeys(("code", "nested_code", "nested_absmax", "offset"), "fp32"),
            integers=("tokens", "rows", "columns"),
            fixed={"NESTED": nested, "HAS_BIAS": True}
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
            warps=tile.num_warps,
        )
    for tokens, zero, group in ((1, True, 32), (1, False, 128), (4, True, 32)):
        tile = TILES[4][tokens]
        yield Variant(
            name=f"int4 group {group}{' zero' if zero else ''}, M = {tokens}, bf16",
            module="gate_up",
            kernel="gemv_gate_up_kernel",
            pointers=dict.fromkeys(("x_MK", "gate_scale_NG", "up_scale_NG", "y_MN"), "bf16")
            | dict.fromkeys(("gate_packed_NP", "gate_zero_NG", "up_packed_NP", "up_zero_NG"), "i32"),
            integers=("tokens", "rows", "columns", "words", "groups"),
            fixed={"spans_per_group": 1, "ACTIVATION": "silu", "BITS": 4, "ONE_GROUP": False, "HAS_ZERO": zero, "SPAN": group}
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
            warps=tile.num_warps,
        )
    for bits, zero, group, block_m in ((4, True, 32, 16), (4, True, 32, 64), (8, False, 0, 16)):
        tile = GEMM_TILES[block_m]
        yield Variant(
            name=f"int{bits} {'group ' + str(group) + ' zero' if group else 'channel'}, blocks of {block_m}, bf16",
            module="grouped",
            kernel="grouped_gemm_kernel",
            pointers={"x_MK": "bf16", "index_T": "i32", "packed_ENP": "i32" if bits == 4 else "u8", "scale_ENG": "bf16"}
            | {"zero_ENG": "i32", "block_expert": "i32", "block_first": "i32", "expert_end": "i32", "y_TN": "bf16"},
            integers=("experts", "rows", "columns", "words", "groups"),
            fixed={"spans_per_group": 1, "BITS": bits, "ONE_GROUP": group == 0, "HAS_ZERO": zero, "HAS_INDEX": True}
            | {"SPAN": group or tile.block_k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
            warps=tile.num_warps,
            stages=tile.num_stages,
        )


def compile_for(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile a variant and count what it takes.

    Args:
        variant: What to compile.
        capability: 80 for sm_80, and so on.

    Returns:
        `registers`, `spills` (bytes of local memory and stack), `shared` (bytes), `flushing` (arithmetic that takes subnormal
        numbers for 0), `loose` (arithmetic that is not rounded step by step, where it has to be), `float64` (instructions),
        `instructions`, and the loads and stores of global memory by width in bits.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"qlazy_kernels.{variant.module}"), variant.kernel)
    types = {name: f"*{dtype}" for name, dtype in variant.pointers.items()} | dict.fromkeys(variant.integers, "i32")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name in kernel.arg_names if name in variant.pointers or (name in SIZES and name in types)]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": variant.warps, "num_stages": variant.stages} | variant.options
    source = ASTSource(kernel, signature, variant.fixed, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.DEVNULL)
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    wide = re.findall(r"\.f64\b", compiled.asm["ptx"])
    # What would not round as plain PyTorch does, where a variant must: a fused multiply-add, a division that is not exact.
    loose = re.findall(r"\b(?:fma\.rn\.f32|div\.(?:full|approx)\S*|rcp\.approx\S*)", compiled.asm["ptx"])
    flushing = re.findall(r"\b(?:add|sub|mul|fma)\.[a-z.]*ftz\S*", compiled.asm["ptx"])
    used = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "flushing": len(flushing),
        "loose": 0 if variant.options.get("enable_fp_fusion", True) else len(loose),
        "float64": len(wide),
        "instructions": len(instructions),
        "loads": widths(instructions, "LDG", "LDGSTS"),
        "stores": widths(instructions, "STG"),
        "tensor_cores": sum(name.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "WGMMA") for name in instructions),
    }


def widths(instructions: list[str], *kinds: str) -> dict[str, int]:
    """How many instructions of a kind there are for each width.

    Args:
        instructions: Names as the disassembler gives them.
        *kinds: Their first part.

    Returns:
        Counts by bits: `LDG.E.128` counts for 128, one without a width for 32.
    """
    found: Counter[str] = Counter()
    for name in instructions:
        head, *parts = name.split(".")
        if head in kinds:
            found[next((re.sub(r"\D", "", p) for p in parts if re.fullmatch(r"[US]?(8|16|64|128|BYPASS128)", p)), "32")] += 1
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def page() -> str:
    """The reference of the kernels.

    Returns:
        Markdown.
    """
    import triton

    heads = ("kernel", "variant", *(f"sm_{c}" for c in CAPABILITIES), "loads, sm_90", "stores", "SASS", "tensor cores")
    rows = []
    for variant in variants():
        made = {capability: compile_for(variant, capability) for capability in CAPABILITIES}
        for capability, one in made.items():
            assert one["spills"] == 0 and one["registers"] <= 255, (variant.name, capability, one)
            assert one["shared"] <= SHARED_LIMIT[capability], (variant.name, capability, one)
            # Products with few tokens live on subnormal numbers, quantizers on plain rounding.
            assert one["flushing"] == one["float64"] == one["loose"] == 0, (variant.name, capability, one)
        cells = [f"{one['registers']} / {one['shared'] / 1024:.1f}" for one in made.values()]
        at90 = made[90]
        loads, stores = (", ".join(f"{n} x {bits}" for bits, n in at90[k].items()) for k in ("loads", "stores"))
        rows.append(
            (f"`{variant.kernel}`", variant.name, *cells, loads, stores, str(at90["instructions"]), str(at90["tensor_cores"]))
        )
    return INTRODUCTION.format(triton=triton.__version__) + table(heads, rows) + "\n"


INTRODUCTION = """# Kernels

<!-- Written by docs/generate_kernels.py; do not edit. -->

Every kernel of `qlazy_kernels`, compiled ahead of time with Triton {triton} for sm_80 (A100), sm_86 (RTX 30), sm_89 (RTX 40),
sm_90 (H100) and sm_120 (RTX 50), in the tiles that its defaults give. A cell of a generation is registers of a thread / KiB of
shared memory of a block. No variant spills a register or flushes subnormal numbers, and
no quantizer has a fused multiply-add or a division that is not exact; the generator refuses one that does, or
that takes more shared memory than 99 KiB on sm_86, sm_89 and sm_120, 163 KiB on sm_80 or 227 KiB on sm_90. Loads and stores
are instructions by width in bits, SASS counts all instructions, tensor cores the matrix instructions, on sm_90. What each
kernel computes, its bit layout and its limits stand in its docstring, and in plain torch in `qlazy_kernels/reference.py`. No
kernel uses atomics: the same input gives the same bits.

These are counts of a compiler, not times.

"""


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table.

    Args:
        heads: Names of the columns.
        rows: Cells.

    Returns:
        Markdown.
    """
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check() -> None:
    """Print what the first variant of each kernel takes on two generations, another two for each kernel."""
    seen: list[str] = []
    for variant in variants():
        if variant.kernel in seen:
            continue
        seen.append(variant.kernel)
        for step in (0, 2):
            capability = CAPABILITIES[(len(seen) + step) % len(CAPABILITIES)]
            made = compile_for(variant, capability)
            print(json.dumps({"kernel": variant.kernel, "capability": capability} | made), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compile one variant of each kernel, write nothing")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
    if arguments.check:
        check()
    else:
        PAGE.write_text(page(), encoding="utf-8")
