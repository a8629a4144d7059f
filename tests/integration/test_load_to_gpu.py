"""Whole loads to a GPU that is the host in truth, its streams running as late and in as odd an order as events allow."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

import qlazy
from qlazy import load as story
from qlazy import memory
from qlazy.layers import storage
from qlazy.layers.linear import LAYERS
from qlazy.layers.packed_stack import PackedStack
from qlazy.place import Placer
from qlazy.planning.plan import SCRATCH_CHUNKS
from qlazy.reading.staging import DeviceQueue
from tests.unit.fake_cuda import FakeCuda


class Runtime:
    """CUDA's runtime, as far as the ring needs it."""

    def __init__(self) -> None:
        self.locked: set[int] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU; what is stored there lies on the host, and quantizing waits for its stream."""
    cuda, runtime, taken = FakeCuda(7), Runtime(), []
    card = memory.Gpu(name="Card", free_bytes=4 << 30, total_bytes=4 << 30)
    monkeypatch.setattr(memory, "cuda_devices", lambda: {"cuda:0": card})
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    monkeypatch.setattr(story, "open_gpus", taken.extend)
    made, to = storage._make, torch.Tensor.to
    monkeypatch.setattr(storage, "_make", lambda shape, dtype, device: made(shape, dtype, "cpu"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kw: self if args == ("cuda:0",) else to(self, *args, **kw))

    def open_queue(device: str, chunk_bytes: int) -> DeviceQueue:
        assert device == "cuda:0" and chunk_bytes == 16 << 20
        return DeviceQueue("cpu", 1 << 14, cuda)  # so that most tensors come in pieces

    monkeypatch.setattr(story, "Placer", functools.partial(Placer, open_queue=open_queue))

    for kind in (*LAYERS.values(), PackedStack):
        monkeypatch.setattr(kind, "fill_rows", functools.partialmethod(late, real=kind.fill_rows, cuda=cuda))
    return types.SimpleNamespace(cuda=cuda, runtime=runtime, opened=taken)


def late(self, start, rows, *, real, cuda):
    """Fill rows when the stream comes to it. A stack fills layers of its own, which is on time by then."""
    if getattr(cuda.here, "running", False) or cuda.current_stream() is cuda.default:
        return real(self, start, rows)

    def run() -> None:
        cuda.here.running = True
        try:
            real(self, start, rows)
        finally:
            cuda.here.running = False

    cuda.defer(run)
    return None


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3", "mixtral", "bert"])
@pytest.mark.parametrize("options", [{"bits": 4}, {"format": "nf4"}], ids=["int4", "nf4"])
def test_a_load_gives_the_bytes_of_one_to_the_host(name, options, checkpoint, gpu):
    wanted = tensors(qlazy.load_quantized(checkpoint(name), device_map="cpu", max_model_len=64, **options))
    assert gpu.cuda.ran == 0 and gpu.opened == []
    model = qlazy.load_quantized(checkpoint(name), max_model_len=64, **options)
    assert gpu.opened == ["cuda:0"] and gpu.cuda.ran > 100 and gpu.runtime.locked == set()
    found = tensors(model)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    plan = model.qlazy_report.plan
    assert plan.devices[0].staging_bytes == SCRATCH_CHUNKS * (16 << 20)
    assert next(device for device in plan.devices if device.device == "cpu").staging_bytes >= 128 << 20


def test_an_error_of_the_caller_leaves_nothing_in_flight(checkpoint, gpu):
    def interrupt(progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlazy.load_quantized(checkpoint("llama"), max_model_len=64, on_progress=interrupt)
    assert gpu.runtime.locked == set() and gpu.cuda.emptied == 1
    assert not any(stream.pending for stream in gpu.cuda.streams)


def test_random_weights_go_the_same_way(checkpoint, gpu):
    made = []
    for device_map in ("cpu", "auto"):
        torch.manual_seed(3)
        made.append(qlazy.load_quantized(checkpoint("llama"), device_map=device_map, max_model_len=64, random_init=True))
    wanted, found = map(tensors, made)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
