"""`qlazy doctor`: tells what there is, never a secret, and fails over nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from types import SimpleNamespace

import pynvml
import pytest

from qlazy.cli import doctor


def test_what_it_tells(qlazy):
    found = qlazy("doctor", "--json").json
    assert found["schema"] == 1
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert 0 < found["cpu"]["free_bytes"] <= found["cpu"]["total_bytes"]
    assert found["cpu"]["usable_threads"] >= 1
    assert found["qlazy_kernels"] == "ok"


def test_text_names_all_of_it(qlazy):
    done = qlazy("doctor", env={"HF_TOKEN": "hf_secret", "QLAZY_DEBUG": ""})
    assert done.code == 0 and done.err == ""
    for words in (
        "qlazy",
        "python",
        "torch",
        "bitsandbytes",
        "cpu features",
        "c compiler",
        "memory",
        "visible gpus",
        "CUDA_VISIBLE_DEVICES",
    ):
        assert words in done.out


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_token_is_never_shown(qlazy, arguments):
    done = qlazy("doctor", *arguments, env={"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in done.out + done.err
    assert "set" in done.out


def test_works_outside_the_repository(shell):
    done = shell("doctor", "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 0 and done.err == "" and done.json["visible_gpus"] == {}


def test_what_is_not_installed_is_said(monkeypatch):
    assert doctor.version("no-such-distribution-at-all") is None
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: 1 / 0)
    assert doctor.kernels() == "ZeroDivisionError: division by zero"


def test_cpu_info_where_there_is_none(monkeypatch):
    monkeypatch.setattr(doctor, "Path", lambda name: SimpleNamespace(read_text=lambda: (_ for _ in ()).throw(OSError())))
    assert doctor.cpu_info("flags") is None


class Driver:
    """Stands for pynvml with two GPUs, the second of which answers little."""

    NVMLError = pynvml.NVMLError

    @staticmethod
    def nvmlDeviceGetHandleByIndex(index):
        return index

    @staticmethod
    def nvmlSystemGetDriverVersion():
        return "570.1"

    @staticmethod
    def nvmlDeviceGetName(handle):
        return f"Card {handle}"

    @staticmethod
    def nvmlDeviceGetMemoryInfo(handle):
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return SimpleNamespace(free=3 << 30, total=24 << 30)

    @staticmethod
    def nvmlDeviceGetCudaComputeCapability(handle):
        return (8, 6)

    @staticmethod
    def nvmlDeviceGetComputeRunningProcesses(handle):
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=20 << 30), SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)]


def test_gpus_and_who_holds_them(monkeypatch):
    found = doctor.examine()
    found["gpus"] = [doctor._gpu(Driver, 0), doctor._gpu(Driver, 1)]
    text = doctor.text(found)
    assert "Card 0, sm 8.6, driver 570.1, 3.0 GiB free of 24.0 GiB" in text
    assert f"(pid {os.getpid()}): 20.0 GiB" in text
    assert f"held by a process (pid {2**22 + 1}): unknown" in text
    assert "Card 1, sm 8.6, driver 570.1, unknown free of unknown" in text


def test_gpus_asks_the_driver(monkeypatch):
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    for name in vars(Driver):
        if name.startswith("nvml"):
            monkeypatch.setattr(pynvml, name, getattr(Driver, name))
    (gpu,) = doctor.gpus()
    assert gpu["index"] == 0 and gpu["free_bytes"] == 3 << 30
