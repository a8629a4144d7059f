"""Budgets: which devices a load may use and how much of each, on machines with and without GPUs."""

from __future__ import annotations

import pytest

from qlazy import memory
from qlazy.errors import DeviceUnavailable, UsageError
from qlazy.memory import Gpu
from qlazy.planning.budget import make_budget

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def machine(monkeypatch):
    """A machine with 64 GiB of free host memory and so many GPUs, with 24, 20, 16 ... GiB free."""

    def install(gpus: int) -> None:
        cards = {f"cuda:{i}": Gpu(name="card", free_bytes=(24 - 4 * i) * GIB, total_bytes=24 * GIB) for i in range(gpus)}
        monkeypatch.setattr(memory, "cuda_devices", lambda: cards)
        monkeypatch.setattr(memory, "_cgroup_free", lambda: 1 << 62)
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": 64 * GIB}))

    install(0)
    return install


def test_auto_is_the_host_where_there_is_no_gpu(machine):
    budget = make_budget()
    assert budget.devices == ("cpu",) and budget.free_bytes == {"cpu": 64 * GIB}
    assert budget.reserve_bytes == 256 * MIB and budget.max_model_len == 4096 and budget.device_map is None


def test_auto_is_all_gpus_where_there_are_some(machine):
    machine(2)
    budget = make_budget()
    assert budget.devices == ("cuda:0", "cuda:1")
    assert budget.free_bytes == {"cuda:0": 24 * GIB, "cuda:1": 20 * GIB, "cpu": 64 * GIB}
    assert budget.reserve_bytes == GIB


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [("cpu", ("cpu",)), ("cuda", ("cuda:0", "cuda:1")), ("cuda:1", ("cuda:1",)), ("1", ("cuda:1",))],
)
def test_named_devices(machine, device_map, devices):
    machine(2)
    assert make_budget(device_map).devices == devices


def test_a_map_names_its_devices_in_order(machine):
    machine(2)
    budget = make_budget({"model.layers": "cuda:1", "lm_head": 0, "": "cpu"})
    assert budget.devices == ("cuda:1", "cuda:0", "cpu")
    assert budget.device_map == {"model.layers": "cuda:1", "lm_head": "cuda:0", "": "cpu"}


@pytest.mark.parametrize("key", [0, "0", "cuda:0", "cuda"])
def test_limits_take_numbers_for_gpus(machine, key):
    machine(2)
    budget = make_budget(max_memory={key: "22GiB"})
    assert budget.devices == ("cuda:0",) and budget.free_bytes["cuda:0"] == 22 * GIB


def test_a_limit_is_not_more_than_is_free(machine):
    machine(2)
    budget = make_budget(max_memory={1: "100GiB", 0: 5 * GIB, "cpu": "3GiB"})
    assert budget.devices == ("cuda:0", "cuda:1")
    assert budget.free_bytes == {"cuda:0": 5 * GIB, "cuda:1": 20 * GIB, "cpu": 3 * GIB}


def test_devices_without_a_limit_are_not_used(machine):
    machine(2)
    assert make_budget(max_memory={"cpu": "30GiB"}).devices == ("cpu",)
    assert make_budget("cuda", max_memory={1: "30GiB"}).devices == ("cuda:1",)


def test_a_limit_beside_a_named_device_holds_for_it(machine):
    machine(1)
    assert make_budget("cpu", max_memory={"cpu": "2GiB"}).free_bytes["cpu"] == 2 * GIB
    assert make_budget({"": "cuda:0"}, max_memory={0: "2GiB"}).free_bytes["cuda:0"] == 2 * GIB


def test_reserve(machine):
    assert make_budget(reserve="2GiB").reserve_bytes == 2 * GIB
    assert make_budget(reserve=5).reserve_bytes == 5
    assert make_budget(reserve=0).reserve_bytes == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": "cuda"},
        {"device_map": "cuda:0"},
        {"device_map": "cuda:-1"},
        {"device_map": "mps"},
        {"device_map": "balanced"},
        {"device_map": {"": "disk"}},
        {"device_map": {"": 3}},
        {"max_memory": {0: "22GiB"}},
        {"max_memory": {"gpu": "22GiB"}},
        {"device_map": "cpu", "max_memory": {0: "22GiB"}},
    ],
    ids=str,
)
def test_devices_that_are_not_there(machine, arguments):
    with pytest.raises(DeviceUnavailable) as caught:
        make_budget(**arguments)
    assert caught.value.hint


def test_a_limit_for_a_missing_gpu_beside_one_that_is_there(machine):
    machine(1)
    with pytest.raises(DeviceUnavailable, match="cuda:7"):
        make_budget(max_memory={0: "22GiB", 7: "22GiB"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_memory": {"cpu": "16"}}, "'16' is not a size"),
        ({"max_memory": {"cpu": "all"}}, "'all' is not a size"),
        ({"max_memory": {"cpu": -1}}, r"max_memory\['cpu'\] is -1"),
        ({"reserve": "1"}, "'1' is not a size"),
        ({"reserve": -5}, "reserve is -5"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_model_len": -4096}, "max_model_len is -4096"),
        ({"device_map": {}}, "device map is empty"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(machine, arguments, words):
    with pytest.raises(UsageError, match=words) as caught:
        make_budget(**arguments)
    assert caught.value.hint
