"""Compiled loops: C that is made with the machine's own compiler at first use, and opened from a cache afterwards.

The first use compiles `csrc/` (some seconds) into the cache folder, under a name that holds its hash, the compiler and the
processor; later runs only open it. Without a compiler, or with `QLAZY_NATIVE=0`, plain PyTorch does the same work: quantizers
give the same bytes, products the same values within rounding.

The loops run on PyTorch's own OpenMP threads: the library is linked to no OpenMP runtime, so that the names of the one that
PyTorch has loaded for everybody are found. A second runtime would bring a second team of threads, and the two would wait for
each other on the same processors.
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
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-unknown-pragmas")
"""Contraction off: a fused multiply-add would round once where the definition of a quantizer rounds twice."""

THREAD_FLAGS = ("-fopenmp",), ()
"""Tried in this order: with PyTorch's threads, and on the calling thread alone."""

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
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("QLAZY_NATIVE") == "0" or platform.system() != "Linux" or compiler is None:
        return None
    folder = importlib.resources.files("qlazy") / "csrc"
    sources = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith((".c", ".h"))}
    said: list[str] = []
    with _compiling:  # all workers of a load ask at the same time; the others find the file
        for thread_flags in THREAD_FLAGS:
            flags = (*FLAGS, *thread_flags)
            parts = (*(part for item in sorted(sources.items()) for part in item), compiler, *flags, torch.__version__)
            key = hashlib.sha256("\0".join((*parts, platform.machine(), _processor())).encode()).hexdigest()[:16]
            path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlazy" / f"native-{key}.so"
            try:
                if not path.is_file() or not path.stat().st_size:
                    _compile(sources, compiler, flags, path)
                # Bound now, so that a missing OpenMP runtime shows here and not in a product.
                opened = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
                for name, argtypes in SIGNATURES.items():
                    loop = getattr(opened, name)
                    loop.argtypes, loop.restype = argtypes, _I
                return opened
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                stderr = getattr(error, "stderr", b"") or b""
                said.append(f"{error} {stderr.decode(errors='replace').strip()}")
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


def _compile(sources: dict[str, str], compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile beside the target and rename: another process never sees half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        units = sorted(name for name in sources if name.endswith(".c"))
        objects = [name[:-1] + "o" for name in units]
        command = shlex.split(compiler)
        running = [
            subprocess.Popen([*command, *flags, "-c", unit], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for unit in units
        ]
        for process, unit in zip(running, units, strict=True):
            _, stderr = process.communicate(timeout=120)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, f"{compiler} {unit}", stderr=stderr)
        # Without the flag for OpenMP, which would link another runtime than PyTorch's.
        link = [*command, "-shared", "-o", "native.so", *objects, "-lm"]
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
