"""Meters: the numbers of the machine, its container, its GPUs and of this process."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlazy import memory
from qlazy.errors import DeviceUnavailable
from qlazy.memory import Gpu, Meter, _visible, anonymous_bytes, cuda_devices, free_bytes

MIB = 1 << 20
GPUS = [(f"GPU-{letter * 4}-1234", Gpu(name=letter, free_bytes=i, total_bytes=9)) for i, letter in enumerate("abc")]


class FakeNvml(SimpleNamespace):
    """What pynvml shows of a machine, or of one without a driver."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: int, fails: str = "") -> None:
        super().__init__(fails=fails, gpus=gpus, shut=0)

    def _ask(self, name, answer):
        if self.fails == name:
            raise self.NVMLError(name)
        return answer

    def nvmlInit(self):
        return self._ask("init", None)

    def nvmlShutdown(self):
        self.shut += 1

    def nvmlDeviceGetCount(self):
        return self._ask("count", self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):
        return self._ask("memory", SimpleNamespace(free=100 + handle, total=1000))

    def nvmlDeviceGetName(self, handle):
        return f"Card {handle}"

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}"


@pytest.fixture
def nvml(monkeypatch):
    """Puts a fake driver in place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")  # so that it is put back
    monkeypatch.delenv("CUDA_DEVICE_ORDER")

    def install(gpus: int, fails: str = "") -> FakeNvml:
        fake = FakeNvml(gpus, fails)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


@pytest.fixture
def cgroup(monkeypatch, tmp_path):
    """Puts control groups with these files in place of the machine's."""
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_OF_PROCESS", tmp_path / "self")

    def install(files: dict[str, str], own: str | None = None) -> None:
        for name, text in files.items():
            path: Path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if own is not None:
            (tmp_path / "self").write_text(own)

    return install


def test_free_bytes_of_the_host():
    assert 0 < free_bytes("cpu") <= psutil.virtual_memory().total


@pytest.mark.parametrize("device", ["cuda:77", "cuda", "mps", "", "cpu:0"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(device):
    with pytest.raises(DeviceUnavailable, match=f"no device '{device}' on this machine; it has cpu"):
        free_bytes(device)


def test_devices_are_those_of_the_driver(nvml):
    fake = nvml(2)
    assert cuda_devices() == {
        "cuda:0": Gpu(name="Card 0", free_bytes=100, total_bytes=1000),
        "cuda:1": Gpu(name="Card 1", free_bytes=101, total_bytes=1000),
    }
    assert fake.shut == 1
    assert free_bytes("cuda:1") == 101
    with pytest.raises(DeviceUnavailable, match="it has cpu, cuda:0, cuda:1"):
        free_bytes("cuda:2")


def test_different_devices_are_numbered_as_the_driver_numbers_them(nvml, monkeypatch):
    fake = nvml(2)
    monkeypatch.setattr(fake, "nvmlDeviceGetName", lambda handle: "Card")
    cuda_devices()
    assert "CUDA_DEVICE_ORDER" not in os.environ
    nvml(2)
    cuda_devices()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    cuda_devices()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_without_its_bindings_torch_is_asked_for_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (100 + number, 1000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    assert cuda_devices() == {f"cuda:{n}": Gpu(name=f"Card {n}", free_bytes=100 + n, total_bytes=1000) for n in (0, 1)}


def test_a_meter_that_starts_over_forgets_what_was():
    with Meter(interval_s=60) as meter:
        meter.samples.insert(0, (0.0, 1))
        meter.watch(lambda: 7)
        meter.restart()
        assert len(meter.samples) == 1 and meter.baseline_bytes > 1
    assert [number for _, number in meter.watched] == [7, 7] and len(meter.samples) == 2


def test_hidden_devices_are_renumbered(nvml, monkeypatch):
    nvml(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert [gpu.name for gpu in cuda_devices().values()] == ["Card 2", "Card 0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_devices() == {}


@pytest.mark.parametrize(("fails", "shut"), [("init", 0), ("count", 1), ("memory", 1)])
def test_no_driver_is_no_device(nvml, fails, shut):
    fake = nvml(1, fails)
    assert cuda_devices() == {} and fake.shut == shut


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (None, "abc"),
        ("", ""),
        ("0", "a"),
        ("2,0", "ca"),
        (" 1 , 2 ", "bc"),
        ("-1", ""),
        ("0,-1,1", "a"),
        ("0,7,1", "a"),
        ("GPU-bbbb", "b"),
        ("GPU-cccc-1234,GPU-aaaa", "ca"),
        ("GPU-", ""),
        ("GPU-dddd", ""),
        ("NoDevFiles", ""),
    ],
)
def test_cuda_visible_devices(setting, names):
    assert "".join(gpu.name for gpu in _visible(GPUS, setting)) == names


def test_a_container_limits_what_is_free(cgroup):
    stat = f"anon 5\nfile {9 * MIB}\ninactive_file {2 * MIB}\nactive_file {MIB}\n"
    cgroup({"memory.max": f"{100 * MIB}\n", "memory.current": f"{60 * MIB}\n", "memory.stat": stat})
    assert free_bytes("cpu") == 43 * MIB


def test_a_container_over_its_limit_has_nothing_free(cgroup):
    cgroup({"memory.max": "100\n", "memory.current": "160\n"})
    assert free_bytes("cpu") == 0


def test_version_1_of_control_groups(cgroup):
    cgroup({"memory/memory.limit_in_bytes": f"{10 * MIB}", "memory/memory.usage_in_bytes": f"{4 * MIB}"})
    assert free_bytes("cpu") == 6 * MIB


@pytest.mark.parametrize("own", ["0::/batch/job7\n", "4:cpu,memory:/batch/job7\n1:name=systemd:/elsewhere\n"])
def test_the_limit_of_the_own_group_and_of_those_above_it_counts(cgroup, own):
    base, files = ("", ("memory.max", "memory.current"))
    if "memory" in own:
        base, files = ("memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    limit, usage = files
    cgroup(
        {
            f"{base}batch/{limit}": f"{50 * MIB}",
            f"{base}batch/{usage}": f"{20 * MIB}",
            f"{base}batch/job7/{limit}": f"{20 * MIB}",
            f"{base}batch/job7/{usage}": f"{15 * MIB}",
            f"{base}batch/job8/{limit}": "1",
            f"{base}batch/job8/{usage}": "1",
        },
        own,
    )
    assert free_bytes("cpu") == 5 * MIB


@pytest.mark.parametrize("limit", ["max\n", "nonsense", ""])
def test_without_a_limit_the_kernel_says_what_is_free(cgroup, limit):
    cgroup({"memory.max": limit, "memory.current": "7"}, "0::/\nbroken line\n")
    assert free_bytes("cpu") > 100 * MIB
    cgroup({"memory.max": f"{1 << 62}", "memory.current": "7", "memory.stat": "a line of many words"})
    assert free_bytes("cpu") > 100 * MIB


def fresh_pages(nbytes: int) -> mmap.mmap:
    """Written pages straight from the kernel: an allocator may hand out again what an earlier test gave back."""
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, nbytes, 4096):
        block[start] = 1
    return block


def test_anonymous_bytes_see_what_is_written():
    before = anonymous_bytes()
    with fresh_pages(64 * MIB):
        assert 60 * MIB < anonymous_bytes() - before < 80 * MIB


def test_anonymous_bytes_do_not_see_mapped_files(tmp_path):
    import mmap

    (tmp_path / "file").write_bytes(b"x" * (32 * MIB))
    before = anonymous_bytes()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) > 0
        assert anonymous_bytes() - before < 8 * MIB


def wait_for_samples(meter, count):
    """However long a busy machine takes for them."""
    enough = len(meter.samples) + count
    while len(meter.samples) < enough:
        time.sleep(0.005)


def test_meter_sees_an_allocation_that_is_gone_again():
    with Meter(interval_s=0.005) as meter:
        block = fresh_pages(64 * MIB)
        wait_for_samples(meter, 3)
        block.close()
        wait_for_samples(meter, 3)
    assert 60 * MIB < meter.peak_bytes < 90 * MIB
    assert meter.samples[-1][1] - meter.baseline_bytes < 16 * MIB
    times = [seconds for seconds, _ in meter.samples]
    assert times == sorted(times) and len(times) > 5
    count = len(meter.samples)
    time.sleep(0.03)
    assert len(meter.samples) == count


def test_meter_watches_a_number_at_the_same_times():
    done = 0
    with Meter(interval_s=0.005) as meter:
        wait_for_samples(meter, 1)
        meter.watch(lambda: done)
        for done in range(1, 4):  # noqa: B007  # the lambda reads it
            wait_for_samples(meter, 2)
    assert [seconds for seconds, _ in meter.watched] == [seconds for seconds, _ in meter.samples]
    numbers = [number for _, number in meter.watched]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2, 3} and numbers[-1] == 3


def test_meter_stops_when_its_block_raises():
    meter = Meter(interval_s=0.005)
    with pytest.raises(KeyError), meter:
        raise KeyError
    assert not meter._thread.is_alive()
