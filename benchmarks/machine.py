"""The machine that is measured: what it is, what else it does meanwhile, how fast it reads memory, what files it caches."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
THREADS = 2
"""For everybody."""

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "optimum-quanto",
    "torchao",
    "llama-cpp-python",
    "gguf",
    "safetensors",
    "numpy",
)


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    processor = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flags = Path("/proc/cpuinfo").read_text()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if flag in flags]
    return {"processor": processor, "cores": os.cpu_count(), "memory_bytes": memory, "instructions": known}


def versions() -> dict[str, str]:
    """Python and what takes part, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def bandwidth(work_dir: Path) -> dict[str, Any]:
    """GB/s that all threads together read from memory, and fill fresh pages of it; without a compiler PyTorch reads, alone."""
    program = work_dir / "bandwidth"
    compiler = shutil.which("cc")
    if compiler is None:
        import torch

        torch.set_num_threads(THREADS)
        data = torch.ones(1 << 27, dtype=torch.int64)
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            data.sum()
            best = min(best, time.perf_counter() - start)
        return {"bandwidth": data.nbytes / best / 1e9, "by": "torch"}
    source = HERE / "bandwidth.c"
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "1024", str(THREADS)], check=True, capture_output=True, text=True)
    fresh, read = map(float, done.stdout.split())
    return {"bandwidth": read, "fresh": fresh, "by": "bandwidth.c"}


def warm(files: list[Path]) -> None:
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def drop(files: list[Path]) -> None:
    os.sync()
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(files: list[Path]) -> int | None:
    """Bytes of files that are in the page cache, as `fincore` of util-linux counts them; None without that program."""
    if shutil.which("fincore") is None:
        return None
    done = subprocess.run(["fincore", "-b", "-n", "-o", "RES", *map(str, files)], capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split())


@contextlib.contextmanager
def other_work(record: dict[str, Any]) -> Iterator[None]:
    """Record how much of the processors something else used, or the hypervisor took, while the block ran."""
    before, own_before, start = _cpu_seconds(), _own_seconds(), time.perf_counter()
    yield
    took = (time.perf_counter() - start) * (os.cpu_count() or 1)
    busy, stolen = (after - earlier for after, earlier in zip(_cpu_seconds(), before, strict=True))
    record["others_share"] = max(0.0, busy - (_own_seconds() - own_before)) / took
    record["stolen_share"] = stolen / took


def _cpu_seconds() -> tuple[float, float]:
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, interrupts, soft, stolen = (field / os.sysconf("SC_CLK_TCK") for field in fields)
    return user + nice + system + interrupts + soft, stolen


def _own_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
