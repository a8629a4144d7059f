"""Compiled loops: C that is made with the machine's own compiler at first use, and opened from a cache afterwards.

The first use compiles `csrc/` (some seconds) into the cache folder, under a name that holds its hash, the compiler and the
processor; later runs only open it. Without a compiler, or with `QLAZY_NATIVE=0`, plain PyTorch does the same work: quantizers
give the same bytes, products the same values within rounding.

Where there is a C++ compiler too, `csrc/op.cpp` is made with it: the op of products of few tokens, as PyTorch calls it without
Python. The same op exists in Python, see `qlazy/products/ops.py`.

The loops run on PyTorch's own OpenMP threads: the library is linked to no OpenMP runtime, so that the names of the one that
PyTorch has loaded for everybody are found. A second runtime would bring a second team of threads, and the two would wait for
each other on the same processors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import logging
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from qlazy.compilers import find_compilers

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-unknown-pragmas")
"""Contraction off: a fused multiply-add would round once where the definition of a quantizer rounds twice."""

OP_FLAGS = ("-O2", "-std=c++17", "-fPIC")
"""Of `op.cpp`, which computes nothing."""

WITH_OP = "-fopenmp", "op.cpp"
VARIANTS = WITH_OP, ("-fopenmp",), ("op.cpp",), ()
"""Tried in this order: on PyTorch's threads with and without the op, and on the calling thread alone with and without."""

DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}
"""Float dtypes that the loops know, by their numbers in `csrc/arguments.h`."""

_A, _I = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "qlazy_quantize_int4": (_A,),
    "qlazy_quantize_int8": (_A,),
    "qlazy_quantize_codebook4": (_A,),
    "qlazy_is_finite": (_A, _I, _I),
    "qlazy_populate": (_A, _A, _I, _A),
    "qlazy_linear": (ctypes.c_char_p,),
    "qlazy_dequantize": (ctypes.c_char_p,),
}
"""Each compiled loop and its arguments, addresses and 64-bit integers; what each returns its source says."""

_compiling = threading.Lock()


def available() -> bool:
    """Whether the compiled loops run here; the first call compiles them.

    Returns:
        True where they do.
    """
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, from the cache or made now.

    Returns:
        The library; None where it cannot be had.
    """
    compiler, cpp_compiler = find_compilers()
    if os.environ.get("QLAZY_NATIVE") == "0" or platform.system() != "Linux" or compiler is None:
        return None
    folder = importlib.resources.files("qlazy") / "csrc"
    sources = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith((".c", ".h", ".cpp"))}
    compilers = compiler, cpp_compiler
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlazy"
    said: list[str] = []
    with _compiling:  # all workers of a load ask at the same time; the others find the file
        tried = [variant for variant in VARIANTS if compilers[1] or "op.cpp" not in variant]
        paths = {variant: cache / f"native-{_key(sources, compilers, variant)}.so" for variant in tried}
        # What is there was the best that compiled: what comes before it need not fail once more.
        for variant in [variant for variant in tried if paths[variant].is_file()][:1] + tried:
            path = paths[variant]
            try:
                if not path.is_file() or not path.stat().st_size:
                    _compile(sources, compilers, variant, path)
                # Bound now, so that a missing OpenMP runtime shows here and not in a product.
                opened = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
                for name, argtypes in SIGNATURES.items():
                    loop = getattr(opened, name)
                    loop.argtypes, loop.restype = argtypes, _I
                if said:
                    logger.info("not all of csrc compiled here: %s", "; ".join(said))
                return opened
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                stderr = getattr(error, "stderr", b"") or b""
                said.append(f"{error} {stderr.decode(errors='replace').strip()}")
                if isinstance(error, subprocess.TimeoutExpired):
                    break  # it says nothing about the compiler, and a lesser library would be kept
    logger.warning("no compiled loops, plain PyTorch is slower: %s", "; ".join(said))
    return None


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all tensors lie in the memory of the host, one row after the other.

    Args:
        *tensors: Any; None counts as one that does.

    Returns:
        True where C may read them.
    """
    return all(tensor is None or (tensor.device.type == "cpu" and tensor.is_contiguous()) for tensor in tensors)


def _key(sources: dict[str, str], compilers: tuple[str, str | None], variant: tuple[str, ...]) -> str:
    """Of everything that the library's bytes depend on."""
    parts = (*(part for item in sorted(sources.items()) for part in item), *map(str, compilers), *FLAGS, *OP_FLAGS, *variant)
    whole = "\0".join((*parts, torch.__version__, platform.machine(), _processor()))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _compile(sources: dict[str, str], compilers: tuple[str, str | None], variant: tuple[str, ...], path: Path) -> None:
    """Compile beside the target and rename: another process never sees half a library."""
    c, cpp = shlex.split(compilers[0]), shlex.split(compilers[1] or "")
    flags = *FLAGS, *(flag for flag in variant if flag != "op.cpp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        commands = {name: [*c, *flags, "-c", name] for name in sorted(sources) if name.endswith(".c")}
        # Without the flag for OpenMP, which would link another runtime than PyTorch's.
        link = ["-shared", "-o", "native.so", *(name[:-1] + "o" for name in commands), "-lm"]
        if "op.cpp" in variant:
            torch_folder = Path(torch.__file__).parent
            commands["op.cpp"] = [*cpp, *OP_FLAGS, f"-I{torch_folder / 'include'}", "-c", "op.cpp"]
            # Named though the linker sees no need: only where a library names PyTorch's are its symbols found.
            link = [*cpp, *link, "op.o", "-Wl,--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        else:
            link = [*c, *link]
        with contextlib.ExitStack() as running:  # where one fails or takes too long, the others are ended
            compiling = []
            for command in commands.values():
                process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                compiling.append(running.enter_context(process))
                running.callback(process.kill)  # does nothing to one that has ended
            for process, unit in zip(compiling, commands, strict=True):
                _, stderr = process.communicate(timeout=600)
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, unit, stderr=stderr)
        subprocess.run(link, cwd=folder, check=True, capture_output=True, timeout=60)
        made = Path(folder, "native.so")
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
