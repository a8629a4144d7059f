"""Meters: how much memory is free on each device, and how much this process holds. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from qlazy.errors import DeviceUnavailable

HUGE_PAGE_BYTES = 2 << 20
"""Below it huge pages are not asked for."""

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""

CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
"""Which of them this process is in, as lines of `number:controllers:path`."""

CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage, in version 2 and version 1."""


def free_bytes(device: str) -> int:
    """Bytes that a new allocation on `device` can have now.

    Args:
        device: `cpu`, or `cuda:N` with N as `CUDA_VISIBLE_DEVICES` numbers them.
    Returns:
        For the CPU what the kernel calls available, no more than the container's limit leaves; for a GPU what its driver calls
        free.
    Raises:
        DeviceUnavailable: there is no such device, or no driver to ask.
    """
    if device == "cpu":
        return min(int(psutil.virtual_memory().available), _cgroup_free())
    gpus = cuda_devices()
    if device not in gpus:
        found = ", ".join(["cpu", *gpus])
        raise DeviceUnavailable(f"There is no device {device!r} on this machine; it has {found}.", hint="Use --device-map cpu.")
    return gpus[device].free_bytes


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One CUDA device as its driver describes it."""

    name: str
    """Product name."""
    free_bytes: int
    """Bytes not in use by any process."""
    total_bytes: int
    """Bytes in all."""


def cuda_devices() -> dict[str, Gpu]:
    """CUDA devices by torch's name, in the order that `CUDA_VISIBLE_DEVICES` gives them; empty without a driver.

    Returns:
        `cuda:0`, `cuda:1`, ... to name and bytes.
    """
    try:
        import pynvml
    except ImportError:
        return _cuda_devices_of_torch()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpu = Gpu(name=str(pynvml.nvmlDeviceGetName(handle)), free_bytes=int(memory.free), total_bytes=int(memory.total))
            found.append((str(pynvml.nvmlDeviceGetUUID(handle)), gpu))
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()
    if len({gpu.name for _, gpu in found}) > 1:
        # CUDA's own order is fastest first; the driver's is the one that people know, from nvidia-smi.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return {f"cuda:{i}": gpu for i, gpu in enumerate(_visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")))}


def _cuda_devices_of_torch() -> dict[str, Gpu]:
    """The same from torch, where nvidia-ml-py is not installed: slower, and it starts CUDA on every device."""
    import torch

    found = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"cuda:{number}"] = Gpu(name=torch.cuda.get_device_name(number), free_bytes=free, total_bytes=total)
    return found


def anonymous_bytes() -> int:
    """Bytes of this process that no file backs: what a load must keep small; pages of mapped files do not count.

    Returns:
        `RssAnon` from /proc on Linux, the resident set elsewhere.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Give pages that the allocator holds but nobody uses back to the kernel: each thread of a load leaves some behind.

    Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def use_huge_pages(address: int, nbytes: int) -> None:
    """Ask for pages of 2 MiB, which are filled in a fraction of the time of 512 pages of 4 KiB; the kernel may decline.

    A huge page is only used where all of it lies in memory that was asked for, so no more is taken than without.

    Args:
        address: Of memory that is not filled yet.
        nbytes: How much.
    """
    if nbytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = address - address % mmap.PAGESIZE
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(address + nbytes - start), ctypes.c_int(mmap.MADV_HUGEPAGE)
        )


@dataclass(kw_only=True)
class Meter:
    """Samples the anonymous memory of this process, and a number to watch, on a thread while a `with` block runs.

    Memory: two samples of two numbers every `interval_s`.
    """

    interval_s: float = 0.02
    """Seconds between samples."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, anonymous bytes)."""
    watched: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, the watched number), at the same times."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __enter__(self) -> Meter:
        """Start sampling."""
        self._stop = threading.Event()
        self.started = time.perf_counter()
        self._number: Callable[[], int] = int
        self._sample()
        self._thread = threading.Thread(target=self._run, name="qlazy-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop sampling, with one last sample."""
        self._stop.set()
        self._thread.join()
        self._sample()

    def restart(self) -> None:
        """Forget what was sampled: what the process holds now is the new baseline."""
        with self._lock:
            self.samples.clear()
            self.watched.clear()
            self._note()

    def watch(self, number: Callable[[], int]) -> None:
        """Sample a number as well; until it is given, 0 is noted.

        Args:
            number: Tells it, on the meter's thread.
        """
        self._number = number

    @property
    def baseline_bytes(self) -> int:
        """Anonymous bytes when the meter started."""
        return self.samples[0][1]

    @property
    def peak_bytes(self) -> int:
        """Most anonymous bytes seen above the baseline."""
        return max(nbytes for _, nbytes in self.samples) - self.baseline_bytes

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            self._note()

    def _note(self) -> None:
        seconds = time.perf_counter() - self.started
        self.samples.append((seconds, anonymous_bytes()))
        self.watched.append((seconds, self._number()))


def _cgroup_free() -> int:
    """Bytes that the limits of the container or batch job leave; its page cache counts as free, as the kernel reclaims it."""
    free = 1 << 62
    for folder in _cgroup_folders():
        for limit_file, usage_file in CGROUP_FILES:
            try:
                limit, usage = (folder / limit_file).read_text().strip(), (folder / usage_file).read_text().strip()
            except OSError:
                continue
            if limit.isdigit() and usage.isdigit():
                free = min(free, max(0, int(limit) - int(usage) + _cgroup_cache(folder)))
    return free


def _cgroup_folders() -> list[Path]:
    """The control group of this process and all above it, as each of them limits it; in a container the roots alone."""
    folders = [CGROUP_ROOT, CGROUP_ROOT / "memory"]
    try:
        lines = [line.split(":", 2) for line in CGROUP_OF_PROCESS.read_text().splitlines()]
    except OSError:
        return folders
    for fields in lines:
        if len(fields) == 3 and (fields[1] == "" or "memory" in fields[1].split(",")):
            base = CGROUP_ROOT if fields[1] == "" else CGROUP_ROOT / "memory"
            own = base / fields[2].lstrip("/")
            folders += [folder for folder in (own, *own.parents) if base in folder.parents]
    return folders


def _cgroup_cache(folder: Path) -> int:
    try:
        pairs = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(pairs.get("inactive_file", 0)) + int(pairs.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def _visible(found: list[tuple[str, Gpu]], setting: str | None) -> list[Gpu]:
    """What CUDA shows under a value of `CUDA_VISIBLE_DEVICES`: indices or UUIDs, up to the first that is neither."""
    if setting is None:
        return [gpu for _, gpu in found]
    shown = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit() and int(entry) < len(found):
            shown.append(found[int(entry)][1])
        else:
            match = [gpu for uuid, gpu in found if entry and uuid.startswith(entry)]
            if len(match) != 1:
                break
            shown.append(match[0])
    return shown
