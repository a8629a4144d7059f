"""`qlazy doctor`: what this machine has, for a bug report or a doubt. Nothing here needs a GPU, and nothing is changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from qlazy import __version__, memory
from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Json
from qlazy.compilers import find_compilers
from qlazy.sizes import format_bytes

PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "triton", "accelerate", "huggingface-hub", "gguf")
"""Packages whose versions matter."""

CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
"""Processor features that the products on a CPU use, as Linux names them."""

VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "NO_COLOR",
    "CC",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "QLAZY_CACHE",
    "QLAZY_NATIVE",
    "QLAZY_TRITON",
    "QLAZY_DEBUG",
)
"""Environment variables that change what qlazy does; QLAZY_CACHE is the folder of `--cache`, QLAZY_NATIVE=0 quantizes and
multiplies without the C compiler, QLAZY_TRITON=0 on a GPU without the Triton kernels, QLAZY_DEBUG=1 adds a traceback to
errors."""

SECRETS = ("HF_TOKEN",)
"""Variables whose values are never shown."""


@app.command(epilog="Examples:\nqlazy doctor\nqlazy doctor --json")
def doctor(*, json: Json = False) -> None:
    """Say what this machine has: versions, processor, memory, GPUs, environment."""
    found = examine()
    if json:
        print_json(found)
    else:
        print(text(found))


def examine() -> dict[str, Any]:
    """Look at the machine.

    Returns:
        JSON-ready data; what cannot be told is None.
    """
    compiler, cpp_compiler = find_compilers()
    return {
        "schema": 1,
        "qlazy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": {name: version(name) for name in PACKAGES},
        "qlazy_kernels": kernels(),
        "compiler": compiler,
        "cpp_compiler": cpp_compiler,
        "cpu": {
            "name": cpu_info("model name"),
            "threads": os.cpu_count(),
            "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "features": [flag for flag in CPU_FLAGS if flag in (cpu_info("flags") or "").split()],
            "free_bytes": memory.free_bytes("cpu"),
            "total_bytes": int(psutil.virtual_memory().total),
        },
        "gpus": gpus(),
        "visible_gpus": {device: gpu.name for device, gpu in memory.cuda_devices().items()},
        "environment": {name: shown(name) for name in VARIABLES},
    }


def version(package: str) -> str | None:
    """Version of an installed package, without importing it.

    Args:
        package: Name of the distribution.
    Returns:
        The version, or None where it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels() -> str:
    """Whether the Triton kernels can be imported.

    Returns:
        `ok`, or what went wrong.
    """
    try:
        importlib.import_module("qlazy_kernels")
    except Exception as error:  # whatever it is, it is what the user must see
        return f"{type(error).__name__}: {error}"
    return "ok"


def cpu_info(field: str) -> str | None:
    """A field of /proc/cpuinfo.

    Args:
        field: Its name.
    Returns:
        Its value for the first processor, or None where there is none.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), None)


def shown(variable: str) -> str | None:
    """An environment variable as it may be shown.

    Args:
        variable: Its name.
    Returns:
        Its value, `set` for a secret, None where it is not set.
    """
    value = os.environ.get(variable)
    return "set" if value and variable in SECRETS else value


def gpus() -> list[dict[str, Any]]:
    """Every GPU that the driver knows, whether or not CUDA_VISIBLE_DEVICES hides it, and the processes that hold its memory.

    Returns:
        JSON-ready data; empty without a driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: str) -> Any:
        """A driver may refuse a single question, e.g. on a slice of a GPU."""
        try:
            return getattr(nvml, question)(handle)
        except nvml.NVMLError:
            return None

    room, capability = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetCudaComputeCapability")
    holders = ask("nvmlDeviceGetComputeRunningProcesses") or []
    return {
        "index": index,
        "name": ask("nvmlDeviceGetName"),
        "compute_capability": ".".join(map(str, capability)) if capability else None,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "free_bytes": int(room.free) if room else None,
        "total_bytes": int(room.total) if room else None,
        "processes": [{"pid": p.pid, "name": process_name(p.pid), "used_bytes": p.usedGpuMemory} for p in holders],
    }


def process_name(pid: int) -> str | None:
    """Name of a process.

    Args:
        pid: Its id.
    Returns:
        Its name, or None where it is gone or not ours to see.
    """
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return None


def text(found: dict[str, Any]) -> str:
    """What was found, as a person reads it.

    Args:
        found: What `examine` returned.
    Returns:
        Lines of text without a final newline.
    """
    cpu = found["cpu"]
    rows = [
        ("qlazy", found["qlazy"]),
        ("python", f"{found['python']} ({found['executable']})"),
        ("platform", found["platform"]),
        *((name, number or "not installed") for name, number in found["packages"].items()),
        ("qlazy_kernels", found["qlazy_kernels"]),
        ("c compiler", found["compiler"] or "none; on a CPU quantizing and answering take several times longer: install gcc"),
        ("c++ compiler", found["cpp_compiler"] or "none; on a CPU small models answer somewhat slower: install g++"),
        ("cpu", f"{cpu['name'] or 'unknown'}, {cpu['usable_threads']} of {cpu['threads']} threads"),
        ("cpu features", " ".join(cpu["features"]) or "none that matter"),
        ("memory", f"{format_bytes(cpu['free_bytes'])} free of {format_bytes(cpu['total_bytes'])}"),
    ]
    for gpu in found["gpus"]:
        room = f"{_size(gpu['free_bytes'])} free of {_size(gpu['total_bytes'])}"
        rows.append((f"gpu {gpu['index']}", f"{gpu['name']}, sm {gpu['compute_capability']}, driver {gpu['driver']}, {room}"))
        for p in gpu["processes"]:
            rows.append(("", f"held by {p['name'] or 'a process'} (pid {p['pid']}): {_size(p['used_bytes'])}"))
    visible = [f"{device} = {name}" for device, name in found["visible_gpus"].items()]
    rows.append(("visible gpus", ", ".join(visible) or "none"))
    rows += [(name, "not set" if value is None else value) for name, value in found["environment"].items()]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_bytes(nbytes)
