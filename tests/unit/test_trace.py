"""The trace file: what a viewer needs of it, event by event."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlazy.errors import UsageError
from qlazy.formats import Int8
from qlazy.matching.fill import Fill
from qlazy.reading.chunks import Chunk
from qlazy.sources.source import TensorInfo
from qlazy.trace import Trace, span


def written(path: Path, *phases: str) -> list[dict[str, Any]]:
    """Events of a trace file, of some phases."""
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] in phases]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def test_blocks_become_complete_events_that_nest(path):
    trace = Trace(path)
    with span(trace, "outer"), span(trace, "inner"):
        pass
    began = time.perf_counter()
    trace.add("read", began, file="a.safetensors", offset=8, bytes=4096)
    trace.write()
    inner, outer, read = written(path, "X")
    assert [inner["name"], outer["name"], read["name"]] == ["inner", "outer", "read"]
    assert 0 <= outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] <= read["ts"]
    assert read["args"] == {"file": "a.safetensors", "offset": 8, "bytes": 4096} and read["dur"] >= 0
    assert len({(event["pid"], event["tid"]) for event in (inner, outer, read)}) == 1


def test_threads_have_rows_with_their_names(path):
    trace = Trace(path)
    ready = threading.Barrier(2)

    def work():
        ready.wait()  # both live at once, so that their numbers differ
        trace.add("read", time.perf_counter())

    threads = [threading.Thread(target=work, name=f"reader {i}") for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.write()
    names = {event["tid"]: event["args"]["name"] for event in written(path, "M") if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["reader 0", "reader 1"]
    assert {event["tid"] for event in written(path, "X")} == set(names)


def test_numbers_over_time_become_counters(path):
    trace = Trace(path)
    started = time.perf_counter()
    trace.count("host memory", started, [(0.0, 5), (0.25, 7)])
    trace.write()
    first, second = written(path, "C")
    assert (first["args"], second["args"]) == ({"bytes": 5}, {"bytes": 7})
    assert first["name"] == "host memory" and second["ts"] - first["ts"] == pytest.approx(250_000, abs=0.01)


def test_a_placement_says_what_became_of_which_rows(path):
    info = TensorInfo(name="stored", shape=(128, 32), dtype="bfloat16", path=Path("a"), offset=0, nbytes=8192)
    formats = {"layer.weight": Int8(), "norm.weight": None}
    plan: Any = SimpleNamespace(tensors=[SimpleNamespace(name=name, format=format) for name, format in formats.items()])
    placed = []
    trace = Trace(path)
    place = trace.placing(lambda chunk, tensors: placed.append((chunk, tensors)), plan)
    for target in formats:
        chunk = Chunk(fill=Fill(sources=(info,), targets=(target,)), start=64, stop=128)
        tensors = [torch.zeros(64, 32)]
        place(chunk, tensors)
        assert placed.pop() == (chunk, tensors)
    trace.write()
    quantize, copy = written(path, "X")
    assert (quantize["name"], copy["name"]) == ("quantize", "place")
    assert quantize["args"] == {"tensor": "layer.weight", "rows": "64:128", "bytes": 4096, "format": "int8-channel"}
    assert copy["args"] == {"tensor": "norm.weight", "rows": "64:128", "bytes": 4096, "format": None}


def test_no_trace_notes_nothing():
    with span(None, "resolve"):
        pass


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        Trace(tmp_path / "absent" / "trace.json")


def test_the_file_is_there_only_when_it_is_whole(path):
    path.write_text("old")
    trace = Trace(path)
    trace.add("broken", time.perf_counter(), what=object())
    with pytest.raises(TypeError):
        trace.write()
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
