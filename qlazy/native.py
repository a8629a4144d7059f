"""The compiled twin of the quantizer's hot loop: made with the machine's own C compiler, used where there is one.

The first quantization compiles `native.c` (about a second) into the cache folder, under a name that holds its hash, the
compiler and the processor; later runs only open it. Without a compiler, or with `QLAZY_NATIVE=0`, the plain-torch quantizer
gives the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""Contraction off: a fused multiply-add would round once where the definition rounds twice."""

GROUPS = (32, 64, 128)
"""Group sizes that the compiled loop takes."""


_compiling = threading.Lock()


class _Options(ctypes.Structure):
    _fields_ = (
        ("symmetric", ctypes.c_int32),
        ("bfloat16_in", ctypes.c_int32),
        ("bfloat16_scale", ctypes.c_int32),
        ("candidates", ctypes.c_int32),
        ("factors", ctypes.c_float * 16),
    )


def available() -> bool:
    """Whether the compiled loops run here; the first call compiles them.

    Returns:
        True where they do.
    """
    return _library() is not None


class _Codebook4(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax_packed", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("nested_offset", ctypes.c_float),
        ("code", ctypes.c_float * 16),
        ("columns", ctypes.c_int64),
        ("all_rows", ctypes.c_int64),
    )


def codebook4_product(
    x_MK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    code: Tensor,
    out_features: int,
) -> Tensor | None:
    """Multiply a few tokens by an NF4 or FP4 weight without unpacking it.

    Args:
        x_MK: (M, K) in any float dtype, K a multiple of 64.
        packed: uint8, the weight's codes.
        absmax: float32 for every 64 weights, or uint8 where `nested`.
        nested: Nested absmax, offset, and the 256 values of `absmax`; None where it is float32.
        code: float32 (16,), the values of the codes.
        out_features: N.

    Returns:
        (M, N) in the dtype of `x_MK`, summed in float32; None where the loop does not take it, or there is no compiler.

    Memory: the result and `x_MK` in float32.
    """
    library = _library()
    tokens, columns = x_MK.shape
    if library is None or columns % 64 or not _on_cpu(x_MK, packed, absmax):
        return None
    sorted_MK = x_MK.float().view(tokens, -1, 32, 2).transpose(2, 3).contiguous()
    y_MN = torch.empty((tokens, out_features), dtype=torch.float32)
    weight = _Codebook4(
        packed=packed.data_ptr(),
        absmax=None if nested else absmax.data_ptr(),
        absmax_packed=absmax.data_ptr() if nested else None,
        nested_absmax=nested[0].data_ptr() if nested else None,
        nested_offset=float(nested[1]) if nested else 0.0,
        nested_code=nested[2].data_ptr() if nested else None,
        code=(ctypes.c_float * 16)(*code.tolist()),
        columns=columns,
        all_rows=out_features,
    )

    def rows(part: int, parts: int) -> None:
        first, last = out_features * part // parts, out_features * (part + 1) // parts
        library.qlazy_codebook4_product(ctypes.byref(weight), _pointer(sorted_MK), tokens, first, last, _pointer(y_MN))

    parts = torch.get_num_threads()
    others = [_workers().submit(rows, part, parts) for part in range(1, parts)]
    rows(0, parts)
    for other in others:
        other.result()
    return y_MN.to(x_MK.dtype)


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """Threads that help the calling one: PyTorch's own cannot be borrowed from Python."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="qlazy-product")


def quantize_int4(
    weight_NK: Tensor, *, group_size: int, symmetric: bool, scale_dtype: torch.dtype, factors: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`qlazy.quantize.quantize_int4` by the compiled loop.

    Args:
        weight_NK: (N, K), on any device.
        group_size: Columns that share a scale.
        symmetric: True: no zeros.
        scale_dtype: Dtype of the scales.
        factors: The candidates.

    Returns:
        Codes, scale and zero as there; None where the loop does not take this weight, or there is no compiler.

    Memory: the results, and four bytes for each group.
    """
    known = weight_NK.device.type == "cpu" and weight_NK.is_contiguous() and group_size in GROUPS
    dtypes = (torch.bfloat16, torch.float32)
    library = _library() if known and weight_NK.dtype in dtypes and scale_dtype in dtypes else None
    if library is None or weight_NK.shape[1] % group_size:
        return None
    rows, columns = weight_NK.shape
    groups = columns // group_size
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    scale = torch.empty((rows, groups), dtype=torch.float32)
    zero = torch.empty((rows, groups), dtype=torch.uint8)
    options = _Options(
        symmetric=symmetric,
        bfloat16_in=weight_NK.dtype is torch.bfloat16,
        bfloat16_scale=scale_dtype is torch.bfloat16,
        candidates=len(factors),
        factors=(ctypes.c_float * 16)(*factors),
    )
    library.qlazy_quantize_int4(
        _pointer(weight_NK), rows * groups, group_size, ctypes.byref(options), _pointer(codes), _pointer(scale), _pointer(zero)
    )
    return codes, scale.to(scale_dtype), None if symmetric else zero


def pack_int4_cpu(codes_NK: Tensor) -> Tensor | None:
    """Pack codes in torch's AVX-512 order.

    Args:
        codes_NK: uint8 (N, K), contiguous; N a multiple of 64.

    Returns:
        uint8 (N, K/2); None where there is no compiler.

    Memory: the result.
    """
    library = _library()
    if library is None or not (_on_cpu(codes_NK) and codes_NK.is_contiguous()):
        return None
    rows, columns = codes_NK.shape
    packed = torch.empty((rows, columns // 2), dtype=torch.uint8)
    library.qlazy_pack_int4_cpu(_pointer(codes_NK), rows, columns, _pointer(packed))
    return packed


def unpack_int4_cpu(packed: Tensor, scale: Tensor, start: int, stop: int) -> Tensor | None:
    """Dequantize rows of a weight in torch's AVX-512 order.

    Args:
        packed: uint8 (N, K/2).
        scale: bfloat16 (G, N, 2): scale, and (8 - zero) * scale.
        start: First row, a multiple of 64.
        stop: One past the last row, likewise.

    Returns:
        bfloat16 (K, stop - start), the transpose of the rows; None where there is no compiler.

    Memory: the result.
    """
    library = _library()
    if library is None or not (_on_cpu(packed, scale) and packed.is_contiguous() and scale.is_contiguous()):
        return None
    all_rows, columns = packed.shape[0], packed.shape[1] * 2
    out = torch.empty((columns, stop - start), dtype=torch.bfloat16)
    first_packed, first_scale = packed[start:], scale[0, start:]
    library.qlazy_unpack_int4_cpu(
        _pointer(first_packed), _pointer(first_scale), stop - start, columns, scale.shape[0], all_rows, _pointer(out)
    )
    return out


def _on_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


os.register_at_fork(after_in_child=_workers.cache_clear)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled loops, from the cache or made now; None where that cannot be."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("QLAZY_NATIVE") == "0" or platform.system() != "Linux" or compiler is None:
        return None
    source = (importlib.resources.files("qlazy") / "native.c").read_text()
    key = hashlib.sha256("\0".join((source, compiler, *FLAGS, platform.machine(), _processor())).encode()).hexdigest()[:16]
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlazy" / f"native-{key}.so"
        with _compiling:  # all workers of a load ask at the same time; the others find the file
            if not path.is_file() or not path.stat().st_size:
                _compile(source, compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or b""
        logger.warning("no compiled loops, plain PyTorch is slower: %s %s", error, said.decode(errors="replace").strip())
        return None
    int64, int32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    library.qlazy_quantize_int4.argtypes = (pointer, int64, int32, pointer, pointer, pointer, pointer)
    library.qlazy_quantize_int4.restype = None
    library.qlazy_pack_int4_cpu.argtypes = (pointer, int64, int64, pointer)
    library.qlazy_pack_int4_cpu.restype = None
    library.qlazy_unpack_int4_cpu.argtypes = (pointer, pointer, int64, int64, int64, int64, pointer)
    library.qlazy_unpack_int4_cpu.restype = None
    library.qlazy_codebook4_product.argtypes = (pointer, pointer, int64, int64, int64, pointer)
    library.qlazy_codebook4_product.restype = None
    return library


def _compile(source: str, compiler: str, path: Path) -> None:
    """Compile beside the target and rename: another process never sees half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        code, made = Path(folder, "native.c"), Path(folder, "native.so")
        code.write_text(source)
        command = [*shlex.split(compiler), *FLAGS, "-o", str(made), str(code), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
