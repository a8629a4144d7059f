"""The trace of a whole load: every byte and every row once, in the stage and on the thread where it happened."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import qlazy
from qlazy.sources.source import open_source

STAGES = ["resolve", "plan", "build", "stream", "finish"]


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]


def end(event: dict[str, Any]) -> float:
    # To a nanosecond: times are in microseconds with three decimals.
    return round(event["ts"] + event["dur"], 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "siglip"])
def test_trace_of_a_load(checkpoint, tmp_path, name):
    path = tmp_path / "trace.json"
    report = qlazy.load_quantized(checkpoint(name), device_map="cpu", trace=path).qlazy_report
    found = events(path)
    done = [event for event in found if event["ph"] == "X"]
    stages = [event for event in done if event["name"] in STAGES]
    reads = [event for event in done if event["name"] == "read"]
    places = [event for event in done if event["name"] in ("quantize", "place")]
    assert len(stages) + len(reads) + len(places) == len(done)

    # Stages follow each other on one thread, and all the reading is in one of them.
    assert [stage["name"] for stage in stages] == STAGES and len({stage["tid"] for stage in stages}) == 1
    assert all(end(one) <= other["ts"] for one, other in pairwise(stages))
    stream = stages[3]
    assert all(stream["ts"] <= event["ts"] and end(event) <= end(stream) for event in reads + places)

    # On each thread one event is over before the next begins, or lies within it.
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert {event["tid"] for event in done} == set(names)
    assert all(names[event["tid"]].startswith("qlazy-load") for event in reads + places)
    for tid in names:
        row = sorted((event for event in done if event["tid"] == tid), key=lambda event: event["ts"])
        assert all(end(one) <= other["ts"] or end(other) <= end(one) for one, other in pairwise(row))

    # Each stored tensor is read and placed once, and nothing else is.
    ranges = sorted((event["args"]["file"], event["args"]["offset"], event["args"]["bytes"]) for event in reads)
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in pairwise(ranges))
    stored = open_source(checkpoint(name)).tensors.values()
    assert sum(nbytes for _, _, nbytes in ranges) == report.bytes_read
    for tensor in stored:
        inside = [
            r
            for r in ranges
            if r[0] == tensor.path.name and r[1] < tensor.offset + tensor.nbytes and tensor.offset < r[1] + r[2]
        ]
        assert inside or tensor.name in report.unexpected, tensor.name
    assert sum(event["args"]["bytes"] for event in places) == report.bytes_read
    quantized = {tensor.name: tensor.format.name for tensor in report.plan.tensors if tensor.format is not None}
    for event in places:
        formats = {quantized.get(target) for target in event["args"]["tensor"].split(", ")}
        assert event["args"]["format"] in formats
        assert event["name"] == ("place" if formats == {None} else "quantize")
    targets = [target for event in places for target in event["args"]["tensor"].split(", ")]
    assert len(set(targets)) == report.tensors_loaded

    counters = {
        counter: [e["args"]["bytes"] for e in found if e["ph"] == "C" and e["name"] == counter]
        for counter in ("host memory", "bytes read")
    }
    assert counters["host memory"] == [nbytes for _, nbytes in report.samples]
    assert counters["bytes read"] == [nbytes for _, nbytes in report.read_samples] == sorted(counters["bytes read"])
    assert counters["bytes read"][0] == 0 and counters["bytes read"][-1] == report.bytes_read
    assert [seconds for seconds, _ in report.samples] == [seconds for seconds, _ in report.read_samples]


def test_a_load_that_fails_leaves_no_trace(copied, tmp_path, rewrite):
    folder = copied("llama")
    rewrite(folder, {"model.norm.weight": None})
    with pytest.raises(qlazy.QlazyError, match=r"model\.norm\.weight"):
        qlazy.load_quantized(folder, device_map="cpu", trace=tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()
