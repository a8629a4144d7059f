"""The way to a GPU, on a stand-in for CUDA that runs pending work as late and in as odd an order as events allow."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlazy import place
from qlazy import stream as stream_module
from qlazy.errors import CorruptCheckpoint, DeviceUnavailable
from qlazy.formats import Codebook4, Int4, Int8
from qlazy.layers import linear as layers
from qlazy.layers import quant_linear
from qlazy.layers.linear import LAYERS
from qlazy.matching.fill import Fill
from qlazy.place import Placer
from qlazy.planning.budget import Budget
from qlazy.planning.plan import SCRATCH_CHUNKS, Plan, TensorPlan
from qlazy.planning.recipe import Recipe
from qlazy.quantizing import codebook
from qlazy.reading import staging
from qlazy.reading.chunks import by_device, take_turns
from qlazy.reading.files import make_ring
from qlazy.reading.staging import DeviceQueue, open_gpus, page_locked
from qlazy.sources.source import TensorInfo
from qlazy.stream import Stream
from tests.unit.fake_cuda import FakeCuda


def carry(cuda: FakeCuda, sizes: list[int], threads: int, chunk: int = 64) -> bool:
    """Send rows from slots that are overwritten as soon as they may be; whether all arrived as they were sent."""
    queue = DeviceQueue("cpu", chunk, cuda)
    starts = [0, *itertools.accumulate(sizes)]
    final = torch.zeros(starts[-1], dtype=torch.int16)
    wanted = torch.arange(1, starts[-1] + 1).to(torch.int16)
    numbers, lock = iter(range(len(sizes))), threading.Lock()

    def work() -> None:
        slot = torch.empty(max(sizes), dtype=torch.int16)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            begin, end = starts[number], starts[number + 1]
            rows = slot[: end - begin]
            rows.copy_(wanted[begin:end])
            queue.run(rows, lambda there, begin=begin, end=end: final[begin:end].copy_(there))
            slot.fill_(-1)

    if threads == 1:
        work()
    else:
        with ThreadPoolExecutor(threads) as pool:
            for task in [pool.submit(work) for _ in range(threads)]:
                task.result()
    cuda.ignored = ""
    queue.close()
    return torch.equal(final, wanted)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=24), seed=st.integers(0, 1 << 20), threads=st.integers(1, 4))
def test_everything_arrives_whatever_the_order(sizes, seed, threads):
    """Also rows that are larger than the scratch chunk was."""
    assert carry(FakeCuda(seed), sizes, threads)


@pytest.mark.parametrize("ignored", ["wait_event", "synchronize", "record"])
def test_without_any_one_of_the_waits_something_is_overwritten(ignored):
    """That the stand-in finds what it is there to find."""
    assert not all(carry(FakeCuda(seed, ignored), [20] * 12, 1) for seed in range(20))


def test_close_waits_and_gives_the_memory_back():
    cuda = FakeCuda()
    queue, final = DeviceQueue("cpu", 16, cuda), torch.zeros(4)
    queue.run(torch.ones(4), final.copy_)
    queue.close()
    assert final.tolist() == [1] * 4 and cuda.emptied == 1 and queue._scratch == []


def test_scratch_memory_is_three_chunks_and_no_more():
    queue = DeviceQueue("cpu", 48, FakeCuda())
    for _ in range(10):
        queue.run(torch.ones(12), lambda there: None)
    assert [chunk.nbytes for chunk in queue._scratch] == [48] * SCRATCH_CHUNKS


def test_failed_work_leaves_nothing_in_flight():
    """The slot may go away, and the next rows are copied after what was begun."""
    cuda = FakeCuda(3)
    queue, final = DeviceQueue("cpu", 16, cuda), torch.zeros(4)

    def fail(there: Tensor) -> None:
        raise ZeroDivisionError

    slot = torch.ones(4)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            queue.run(slot, fail)
        slot.fill_(2)
        queue.run(slot, final.copy_)
        slot.fill_(1)
    queue.close()
    assert final.tolist() == [2] * 4


class Runtime:
    """CUDA's runtime, as far as a ring needs it."""

    def __init__(self, refuses: int = 0) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refuses = refuses

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("lock", address, nbytes, flags))
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unlock", address))
        return 0


def test_the_whole_ring_is_locked_once_and_unlocked(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    ring = make_ring(3, 5000)
    address = ring[0].data.data_ptr()
    with pytest.raises(ZeroDivisionError), page_locked(ring) as locked:
        assert locked and len(runtime.calls) == 1
        raise ZeroDivisionError
    assert runtime.calls == [("lock", address, sum(slot.data.nbytes for slot in ring), 1), ("unlock", address)]


def test_a_refusal_is_said_and_goes_on(monkeypatch, caplog):
    runtime, zeros = Runtime(refuses=2), []

    def pending(*args, **kwargs):
        zeros.append(kwargs)
        raise RuntimeError("out of memory, said late")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", pending)
    with caplog.at_level(logging.WARNING), page_locked(make_ring(1, 1 << 20)) as locked:
        assert not locked
    assert zeros == [{"device": "cuda"}] and [call[0] for call in runtime.calls] == ["lock"]
    assert "does not lock 1 MiB of host memory (CUDA error 2)" in caplog.text


def test_a_gpu_that_pytorch_cannot_use_is_named():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(DeviceUnavailable, match=r"cannot use cuda:0: ") as error:
        open_gpus(["cuda:0"])
    assert "--device-map cpu" in error.value.hint


def test_devices_take_turns():
    assert list(take_turns([iter("aaaa"), iter("b"), iter("cc")])) == list("abcaca" + "a")
    assert list(take_turns([])) == []


# The whole way, from a file through readers and queues into storage.

SHAPES = {"embed.weight": (300, 64), "int4.weight": (200, 64), "int8.weight": (131, 64), "nf4.weight": (192, 64), "norm": (64,)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64, dtype=torch.bfloat16, device="meta")
        for name, fmt in (("int4", Int4()), ("int8", Int8()), ("nf4", Codebook4(double_quant=False))):
            rows = SHAPES[f"{name}.weight"][0]
            self.add_module(name, LAYERS[type(fmt)](64, rows, format=fmt, dtype=torch.bfloat16, bias=None))
        self.norm = nn.Parameter(torch.empty(64, dtype=torch.bfloat16, device="meta"))


def write(path: Path, *, bad: tuple[str, int] | None = None) -> tuple[Fill, ...]:
    generator, fills = torch.Generator().manual_seed(0), []
    with path.open("wb") as file:
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator)
            values = values if name == "embed.weight" else values.bfloat16()  # one that changes its dtype on the way
            if bad and bad[0] == name:
                values[bad[1]] = float("nan")
            info = TensorInfo(
                name=f"stored.{name}",
                shape=shape,
                dtype=str(values.dtype).removeprefix("torch."),
                path=path,
                offset=file.tell(),
                nbytes=values.nbytes,
            )
            file.write(values.view(torch.uint8).numpy().tobytes())
            fills.append(Fill(sources=(info,), targets=(name,)))
    return tuple(fills)


def plan_of(devices: dict[str, str]) -> Plan:
    tensors = tuple(
        TensorPlan(
            name=name,
            shape=shape,
            format=None,
            kind="other",
            dtype="",
            reason="",
            device=devices.get(name, "cpu"),
            nbytes=0,
            source_nbytes=0,
        )
        for name, shape in SHAPES.items()
    )
    budget = Budget(devices=("cpu",), free_bytes={"cpu": 1}, reserve_bytes=0, max_model_len=1)
    return Plan(
        model_id="m", resolved="m", recipe=Recipe(), budget=budget, dtype="bfloat16", tensors=tensors, devices=(), exact=True
    )


def load(path: Path, devices: dict[str, str], seed: int, monkeypatch: pytest.MonkeyPatch, **bad) -> tuple[Model, list[str]]:
    """Load through queues whose device is the host, in chunks of 64 rows; and what was done to the ring."""
    model, cuda, events = Model(), FakeCuda(seed), []
    plain = quant_linear.allocate
    for module in (place, quant_linear):
        monkeypatch.setattr(module, "allocate", lambda shape, dtype, device: plain(shape, dtype, "cpu"))
    for layer in LAYERS.values():
        real = layer.fill_rows

        def late(self, start, weight, real=real):
            cuda.defer(lambda: real(self, start, weight))

        if devices:
            monkeypatch.setattr(layer, "fill_rows", late)
    runtime = Runtime()
    runtime.calls = events
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    placer = Placer(model, plan_of(devices), lambda device, size: DeviceQueue("cpu", 64 * 64 * 2, cuda))
    fills = write(path, **bad)
    with placer, Stream(fills, placer.place, 3, chunk_bytes=1, ring_bytes=1 << 20, devices=devices) as stream:
        for _ in stream:
            pass
    placer.require_finite()
    assert all(placer.rows_left(name) == 0 for name in SHAPES)
    return model, [str(event[0]) for event in events]


GPUS = dict(zip(SHAPES, itertools.cycle(("cuda:0", "cuda:1")), strict=False))


@pytest.mark.parametrize("seed", range(4))
def test_a_load_through_queues_gives_the_bytes_of_a_load_to_the_host(tmp_path, monkeypatch, seed):
    with monkeypatch.context() as patch:
        on_host, events = load(tmp_path / "a", {}, seed, patch)
        assert events == []
    with monkeypatch.context() as patch:
        sent, events = load(tmp_path / "b", GPUS, seed, patch)
        assert events == ["lock", "unlock"]
    wanted = on_host.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in sent.state_dict().items())


@pytest.mark.parametrize(
    ("bad", "rows"),
    [
        (("embed.weight", 70), "70 to 71"),
        (("int4.weight", 199), "199 to 200"),
        (("int8.weight", 3), "3 to 4"),
        (("nf4.weight", 64), "64 to 65"),
        (("norm", 5), "5 to 6"),
    ],
)
def test_what_is_not_finite_is_named_at_the_end(tmp_path, monkeypatch, bad, rows):
    # On a GPU nothing looks on the way.
    for module, name in ((layers, "store_int4"), (layers, "store_int8"), (codebook, "quantize_blocks")):
        monkeypatch.setattr(module, name, functools.partial(unseeing, getattr(module, name)))
    with pytest.raises(CorruptCheckpoint, match=rf"tensor 'stored\.{bad[0]}' holds a NaN or an infinity in rows {rows}\."):
        load(tmp_path / "a", GPUS, 0, monkeypatch, bad=bad)


def unseeing(quantize, *args, **kwargs) -> bool:
    quantize(*args, **kwargs)
    return True


def test_fills_are_sorted_by_device(tmp_path):
    fills = write(tmp_path / "a")
    lanes = by_device(fills, GPUS)
    assert [[fill.targets[0] for fill in lane] for lane in lanes] == [
        ["embed.weight", "int8.weight", "norm"],
        ["int4.weight", "nf4.weight"],
    ]
    assert by_device(fills, {}) == [fills]


def test_the_ring_is_unlocked_before_it_goes_and_after_the_last_worker(tmp_path, monkeypatch):
    fills, order = write(tmp_path / "a"), []

    class Locked:
        def __init__(self, ring) -> None:
            self.slots = ring

        def __enter__(self) -> None:
            order.append("lock")

        def __exit__(self, *exc: object) -> None:
            assert [t.name for t in threading.enumerate() if t.name.startswith("qlazy-load")] == []
            order.append(f"unlock {len(self.slots)}")

    monkeypatch.setattr(stream_module, "page_locked", Locked)

    def fail(chunk, tensors) -> None:
        raise CorruptCheckpoint("no")

    with pytest.raises(CorruptCheckpoint, match="no"), Stream(fills, fail, 2, devices=GPUS) as stream:
        list(stream)
    assert order == ["lock", "unlock 2"]


def test_page_locking_is_left_alone_on_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "page_locked", SimpleNamespace())
    monkeypatch.setattr(stream_module, "page_locked", SimpleNamespace())
    with Stream(write(tmp_path / "a"), lambda chunk, tensors: None, 2) as stream:
        list(stream)
