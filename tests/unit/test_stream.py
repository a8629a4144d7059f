"""The read: everything exactly once, whatever the number of workers; errors reach the caller; nothing is left behind."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlazy import stream as stream_module
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint
from qlazy.matching.fill import Fill, row_count
from qlazy.planning.plan import CHUNK_BYTES, RING_BYTES
from qlazy.reading import files
from qlazy.reading.chunks import CACHED_BYTES, GAP_BYTES, Chunk, host_chunk_bytes, merge, plan_chunks, slot_bytes, worker_count
from qlazy.sources.source import TensorInfo
from qlazy.stream import Stream

DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int64: "int64", torch.uint8: "uint8"}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with the threads, files and torch threads that it began with."""
    torch_threads, descriptors = torch.get_num_threads(), len(os.listdir("/proc/self/fd"))
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("qlazy-load")] == []
    assert torch.get_num_threads() == torch_threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


class Folder:
    """Files of tensors, written one after the other with a gap between them, as a checkpoint has its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Tensor] = {}
        self.fills: list[Fill] = []

    def add(self, name: str, tensor: Tensor, *, file: str = "a.bin", **options) -> Fill:
        path = self.path / file
        with path.open("ab") as out:
            out.write(b"\0" * 24)
            offset = out.tell()
            out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.values[name] = tensor
        info = TensorInfo(
            name=name,
            shape=tuple(tensor.shape),
            dtype=DTYPES[tensor.dtype],
            path=path,
            offset=offset,
            nbytes=tensor.numel() * tensor.element_size(),
        )
        fill = Fill(sources=(info,), targets=(name,), **options)
        self.fills.append(fill)
        return fill


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def collect(fills: list[Fill], workers: int, **options) -> tuple[dict[str, Tensor], Stream]:
    """What a read brings, row by row, each counted."""
    made: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    lock = threading.Lock()

    def place(chunk: Chunk, tensors: list[Tensor]) -> None:
        if chunk.fill.convert is not None:
            with lock:
                made.update({name: value.clone() for name, value in chunk.fill.convert(tensors).items()})
            return
        info = chunk.fill.sources[0]
        with lock:
            whole = made.setdefault(info.name, torch.zeros(info.shape, dtype=getattr(torch, info.dtype)))
            count = seen.setdefault(info.name, torch.zeros(row_count(info.shape), dtype=torch.int64))
        if info.shape:
            whole.view(-1, *info.shape[1:][-1:])[chunk.start : chunk.stop] = tensors[0]
        else:
            whole.copy_(tensors[0])
        count[chunk.start : chunk.stop] += 1

    with Stream(tuple(fills), place, workers, **options) as stream:
        for _ in stream:
            pass
    assert all(bool((count == 1).all()) for count in seen.values())
    return made, stream


def some_tensors(folder: Folder) -> None:
    generator = torch.Generator().manual_seed(0)
    folder.add("matrix", torch.randn(1000, 48, generator=generator).bfloat16())
    folder.add("vector", torch.randn(777, generator=generator))
    folder.add("scalar", torch.tensor(3.5), file="b.bin")
    folder.add("cube", torch.randn(5, 7, 3, generator=generator).bfloat16(), file="b.bin")
    folder.add("integers", torch.arange(100), file="b.bin")
    folder.add("one row", torch.randn(1, 4096, generator=generator).bfloat16())
    folder.add("nothing", torch.empty(0, 16).bfloat16(), file="b.bin")


@pytest.mark.parametrize("drop_page_cache", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_byte_comes_once(folder, workers, drop_page_cache, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 8192)
    some_tensors(folder)
    made, stream = collect(folder.fills, workers, drop_page_cache=drop_page_cache)
    for name, value in folder.values.items():
        assert torch.equal(made[name], value) and made[name].dtype == value.dtype, name
    assert stream.bytes_done == sum(fill.nbytes for fill in folder.fills)


def test_groups_that_are_converted_come_whole(folder):
    first, second = folder.add("a", torch.ones(4, 4)), folder.add("b", torch.zeros(4, 4), file="b.bin")
    both = Fill(
        sources=first.sources + second.sources,
        targets=("ab",),
        convert=lambda tensors: {"ab": torch.cat([tensors[1], tensors[0]])},
    )
    made, stream = collect([both], 2)
    assert torch.equal(made["ab"], torch.cat([torch.zeros(4, 4), torch.ones(4, 4)]))
    assert stream.bytes_done == both.nbytes == 128


shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3000)),
    st.tuples(st.integers(0, 700), st.integers(0, 300)),
    st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)),
)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES.values()))), min_size=1, max_size=5),
    limit=st.integers(1, 1 << 16),
    block=st.sampled_from([64, 128, 192]),
)
def test_chunks_cover_everything_once_in_order_and_in_whole_blocks(shapes, limit, block):
    fills = []
    for number, (shape, dtype) in enumerate(shapes):
        nbytes = torch.empty(shape, dtype=getattr(torch, dtype), device="meta").nbytes
        info = TensorInfo(name=str(number), shape=shape, dtype=dtype, path=Path("x"), offset=0, nbytes=nbytes)
        fills.append(Fill(sources=(info,), targets=(str(number),), row_block=block))
    chunks = list(plan_chunks(tuple(fills), limit))
    assert [c.fill.targets[0] for c in chunks] == sorted((c.fill.targets[0] for c in chunks), key=int)
    for fill in fills:
        info = fill.sources[0]
        own = [c for c in chunks if c.fill is fill]
        rows = row_count(info.shape)
        assert [c.start for c in own] == [0, *(c.stop for c in own[:-1])] and own[-1].stop == rows
        assert sum(c.nbytes for c in own) == info.nbytes
        for chunk in own:
            assert len(info.shape) != 2 or chunk.start % block == 0
            least = info.nbytes // max(1, rows) * (min(rows, block) if len(info.shape) == 2 else 1)
            assert chunk.nbytes <= max(limit, least)


@settings(max_examples=100, deadline=None)
@given(columns=st.integers(1, 1 << 21), rows=st.integers(1, 1 << 18))
def test_the_ring_holds_its_bytes_where_64_rows_fit_in_half_of_it(columns, rows):
    info = TensorInfo(name="w", shape=(rows, columns), dtype="bfloat16", path=Path("x"), offset=0, nbytes=2 * rows * columns)
    fills = (Fill(sources=(info,), targets=("w",)),)
    workers = worker_count(fills)
    slot = slot_bytes(fills, workers)
    assert workers >= 2
    assert all(c.nbytes <= slot for c in plan_chunks(fills, slot)) if rows * columns < 1 << 24 else True
    if 2 * columns * min(rows, 64) <= RING_BYTES // 2:
        assert workers * slot <= RING_BYTES
    assert slot <= max(CHUNK_BYTES, 128 * columns)


@given(workers=st.integers(2, 16))
def test_chunks_of_a_load_to_the_host_leave_room_for_what_is_decoded(workers):
    large = host_chunk_bytes(workers, compiled=True)
    assert CACHED_BYTES <= large <= CHUNK_BYTES and host_chunk_bytes(workers, compiled=False) == CACHED_BYTES
    assert large == CACHED_BYTES or 2 * workers * large <= RING_BYTES


@pytest.mark.parametrize("workers", [1, 3])
def test_error_of_a_worker_is_raised_to_the_caller(folder, workers, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 8192)
    some_tensors(folder)
    placed = []

    def place(chunk: Chunk, tensors: list[Tensor]) -> None:
        placed.append(chunk)
        if len(placed) == 3:
            raise CorruptCheckpoint("the third")

    with pytest.raises(CorruptCheckpoint, match="the third"), Stream(tuple(folder.fills), place, workers) as stream:
        list(stream)
    assert len(placed) < len(list(plan_chunks(tuple(folder.fills), 8192))), "the others stop as well"


def test_a_worker_that_cannot_start_is_an_error_too(folder, monkeypatch):
    some_tensors(folder)
    monkeypatch.setattr(stream_module, "make_ring", lambda slots, slot_bytes: [])
    with pytest.raises(IndexError):
        collect(folder.fills, 2)


def test_file_cut_short_while_it_is_read(folder):
    folder.add("first", torch.ones(64, 8))
    folder.add("second", torch.ones(64, 8))
    path = folder.path / "a.bin"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(IncompleteCheckpoint) as caught:
        collect(folder.fills, 2)
    size = path.stat().st_size
    assert "a.bin" in str(caught.value) and "'second'" in str(caught.value)
    assert f"{size + 100:,}" in str(caught.value) and f"{size:,}" in str(caught.value)


def test_file_gone_and_folder_in_its_place(folder):
    folder.add("first", torch.ones(64, 8))
    path = folder.path / "a.bin"
    path.unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"a\.bin.*No such file"):
        collect(folder.fills, 2)
    path.mkdir()
    with pytest.raises(IncompleteCheckpoint, match=r"a\.bin.*'first'.*Is a directory"):
        collect(folder.fills, 2)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_interrupt_of_the_caller_stops_the_workers(folder, interrupt, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 4096)
    folder.add("matrix", torch.ones(6400, 32))
    started, placed = threading.Event(), []

    def place(chunk: Chunk, tensors: list[Tensor]) -> None:
        placed.append(chunk)
        started.wait(5)

    torch_threads = torch.get_num_threads()
    with pytest.raises(interrupt), Stream(tuple(folder.fills), place, 2) as stream:
        for _ in stream:
            started.set()
            raise interrupt
    assert len(placed) < 100, "most chunks were never taken up"
    assert torch.get_num_threads() == torch_threads


def test_leaving_early_is_no_error(folder):
    some_tensors(folder)
    with Stream(tuple(folder.fills), lambda chunk, tensors: None, 2) as stream:
        next(iter(stream), None)


def test_nothing_to_read():
    made, stream = collect([], 2)
    assert made == {} and stream.bytes_done == 0


PAGE = mmap.PAGESIZE


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    done = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "PAGES", str(path)], capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.fixture
def cold(folder: Folder) -> Path:
    """A file of 16 MiB of which the page cache holds nothing."""
    if shutil.which("fincore") is None:
        pytest.skip("needs fincore (util-linux) to look at the page cache")
    folder.add("matrix", torch.randn(64 * 128, 512, generator=torch.Generator().manual_seed(0)))
    path = folder.path / "a.bin"
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if cached_pages(path) > 0:
        pytest.skip("this file system keeps pages whatever fadvise says")
    return path


def test_pages_that_the_read_brought_in_are_given_back(folder, cold):
    collect(folder.fills, 2, drop_page_cache=True)
    # A page that two chunks share stays, as the kernel drops whole pages only.
    chunks = len(list(plan_chunks(tuple(folder.fills), slot_bytes(tuple(folder.fills), 2))))
    assert cached_pages(cold) <= 2 * chunks


def test_what_is_not_cached_is_read_past_the_cache(folder, cold, monkeypatch):
    past, through = [], []
    monkeypatch.setattr(files._File, "read_past_cache", noting(files._File.read_past_cache, past))
    monkeypatch.setattr(files._File, "read_cached", noting(files._File.read_cached, through))
    made, _ = collect(folder.fills, 2)
    assert torch.equal(made["matrix"], folder.values["matrix"])
    if not past[0]:
        pytest.skip("this file system takes no reads past the page cache")
    assert sum(past) == folder.fills[0].nbytes and through == [], "every byte once"
    assert cached_pages(cold) == 0


def test_what_is_cached_is_read_from_there(folder, monkeypatch):
    past: list[int] = []
    monkeypatch.setattr(files._File, "read_past_cache", noting(files._File.read_past_cache, past))
    some_tensors(folder)
    collect(folder.fills, 2)
    assert past == []


@pytest.mark.parametrize("at", ["open", "read"])
def test_a_file_system_that_refuses_is_read_through_the_cache(folder, cold, at, monkeypatch):
    direct = set()
    real_open, real_preadv = os.open, os.preadv

    def refusing_open(path, flags, *rest):
        if flags & os.O_DIRECT and at == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refusing_preadv(descriptor, buffers, offset):
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_preadv)
    through: list[int] = []
    monkeypatch.setattr(files._File, "read_cached", noting(files._File.read_cached, through))
    made, _ = collect(folder.fills, 3)
    assert torch.equal(made["matrix"], folder.values["matrix"])
    assert sum(through) == folder.fills[0].nbytes
    assert cached_pages(cold) <= 2, "given back at the end, whatever was in hand meanwhile"


def test_on_tmpfs():
    """It holds all in memory, and some kernels refuse to read past that."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        folder = Folder(Path(path))
        some_tensors(folder)
        made, _ = collect(folder.fills, 2)
    assert all(torch.equal(made[name], value) for name, value in folder.values.items())


def noting(read, results):
    """A method that notes what it returns."""

    def noted(*args):
        results.append(read(*args))
        return results[-1]

    return noted


@pytest.mark.parametrize("begin", [0, 1, 4095, 4096, 5000])
@pytest.mark.parametrize("drop_page_cache", [True, False])
def test_any_bytes_of_a_file(tmp_path, begin, drop_page_cache, monkeypatch):
    """A tensor may begin and end anywhere, on no multiple of its element or of a page, in more than one piece."""
    monkeypatch.setattr(files, "_PIECE", 4 * PAGE)
    data = torch.randint(0, 256, (100_003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "x.bin"
    path.write_bytes(data.numpy().tobytes())
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for end in (begin + 2, begin + 4095, begin + 60_000, len(data) - 1, len(data)):
        info = TensorInfo(name="x", shape=(end - begin,), dtype="uint8", path=path, offset=begin, nbytes=end - begin)
        reader = files.Files(drop_page_cache)
        (slot,) = files.make_ring(1, end - begin)
        assert torch.equal(reader.read([info], begin, end - begin, slot), data[begin:end])
        longer = replace(info, nbytes=len(data) + 1 - begin)
        (slot,) = files.make_ring(1, longer.nbytes)
        with pytest.raises(IncompleteCheckpoint, match=f"the file has {len(data):,}"):
            reader.read([longer], begin, longer.nbytes, slot)
        reader.close()


def test_a_tensor_on_no_multiple_of_its_element(folder):
    folder.add("odd", torch.arange(5, dtype=torch.uint8))
    folder.add("after", torch.randn(64, 16))
    folder.add("last", torch.arange(9))
    assert folder.fills[1].sources[0].offset % 4 and folder.fills[2].sources[0].offset % 8
    made, _ = collect(folder.fills, 2)
    assert all(torch.equal(made[name], value) for name, value in folder.values.items())


def test_small_neighbours_are_read_at_once(folder, monkeypatch):
    for number in range(40):
        folder.add(f"norm {number}", torch.full((256,), float(number)))
    folder.add("matrix", torch.ones(640, 256))
    folder.add("elsewhere", torch.ones(256), file="b.bin")
    reads = []
    monkeypatch.setattr(files.Files, "read", noting(files.Files.read, reads))
    made, _ = collect(folder.fills, 2)
    assert all(torch.equal(made[name], value) for name, value in folder.values.items())
    assert len(reads) == 2, "one a file: all of it fits in a slot"


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from([0, 8, GAP_BYTES, GAP_BYTES + 1]), st.booleans()), max_size=12
    ),
    limit=st.integers(1, 20_000),
)
def test_reads_hold_every_chunk_once_in_order_and_no_more_than_fits(sizes, limit):
    fills, offset = [], 0
    for number, (count, gap, other) in enumerate(sizes):
        info = TensorInfo(
            name=str(number), shape=(count,), dtype="uint8", path=Path("b" if other else "a"), offset=offset, nbytes=count
        )
        fills.append(Fill(sources=(info,), targets=(str(number),)))
        offset += count + gap
    chunks = list(plan_chunks(tuple(fills), limit))
    reads = list(merge(iter(chunks), limit))
    assert [chunk for read in reads for chunk in read] == chunks
    for read in reads:
        assert read[-1].begin + read[-1].nbytes - read[0].begin <= max(limit, read[0].nbytes)
        assert len({chunk.fill.sources[0].path for chunk in read}) == 1
        assert all(0 <= b.begin - a.begin - a.nbytes <= GAP_BYTES for a, b in itertools.pairwise(read))


def test_pages_stay_where_that_is_not_asked_for(folder, cold):
    collect(folder.fills, 2, drop_page_cache=False)
    assert cached_pages(cold) >= cold.stat().st_size // PAGE


def test_pages_that_were_there_before_stay(folder, cold):
    half = cold.stat().st_size // 2
    with cold.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(half)
    before = cached_pages(cold)
    assert half // PAGE <= before <= half // PAGE + 2
    made, _ = collect(folder.fills, 2, drop_page_cache=True)
    assert torch.equal(made["matrix"], folder.values["matrix"])
    chunks = len(list(plan_chunks(tuple(folder.fills), slot_bytes(tuple(folder.fills), 2))))
    assert before - 1 <= cached_pages(cold) <= before + 2 * chunks


def test_a_system_that_does_not_tell_what_is_cached_reads_all_the_same(folder, monkeypatch):
    some_tensors(folder)
    monkeypatch.setattr(files, "_held_pages", lambda _: (np.empty(0, dtype=np.uint8), True))
    made, _ = collect(folder.fills, 2)
    assert all(torch.equal(made[name], value) for name, value in folder.values.items())
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    made, _ = collect(folder.fills, 2)
    assert all(torch.equal(made[name], value) for name, value in folder.values.items())


def test_fused_experts_are_cut_by_rows_and_not_by_expert():
    info = TensorInfo(name="w", shape=(16, 512, 1024), dtype="bfloat16", path=Path("x"), offset=0, nbytes=2 * 16 * 512 * 1024)
    fills = (Fill(sources=(info,), targets=("w",)),)
    slot = slot_bytes(fills, 2)
    assert slot <= 8 << 20 and worker_count(fills) * slot <= 64 << 20
    chunks = list(plan_chunks(fills, 1 << 16))
    assert sum(chunk.nbytes for chunk in chunks) == info.nbytes and all(chunk.nbytes <= 1 << 16 for chunk in chunks)
