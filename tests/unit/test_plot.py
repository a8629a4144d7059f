"""Plots: what is drawn is what was measured, and what cannot be drawn is refused before the work."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qlazy.bench import Benchmark, Timing
from qlazy.errors import UsageError
from qlazy.planning.recipe import make_recipe
from qlazy.plot import KINDS, draw_benchmark, draw_load, require_plot, save_figure
from qlazy.report import LoadReport

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def report() -> LoadReport:
    devices = [SimpleNamespace(device="cpu", weight_bytes=100 * MIB, staging_bytes=64 * MIB, runtime_bytes=36 * MIB)]
    plan: Any = SimpleNamespace(model_id="some/model", recipe=make_recipe(), devices=devices)
    return LoadReport(
        plan=plan,
        seconds={"plan": 0.01, "total": 4.01, "build": 1.0, "stream": 3.0, "finish": 0.0},
        bytes_read=2 * GIB,
        host_peak_bytes=150 * MIB,
        samples=[(0.0, 10 * MIB), (2.0, 160 * MIB), (4.01, 110 * MIB)],
        read_samples=[(0.0, 0), (2.0, GIB), (4.01, 2 * GIB)],
    )


def test_a_load_is_drawn_against_its_plan(report):
    figure = draw_load(report)
    memory, read = figure.axes
    measured, planned, *_ = memory.get_lines()
    assert list(measured.get_xdata()) == [0.0, 2.0, 4.01] and list(measured.get_ydata()) == [0.0, 150.0, 100.0]
    assert set(planned.get_ydata()) == {200.0} and planned.get_linestyle() == "--"
    assert [text.get_text() for text in memory.get_legend().get_texts()] == [
        "measured, peak 150.0 MiB",
        "planned peak 200.0 MiB",
    ]
    assert list(read.get_lines()[0].get_ydata()) == [0.0, 1.0, 2.0]
    assert (memory.get_ylabel(), read.get_ylabel(), read.get_xlabel()) == ("host memory, MiB", "bytes read, GiB", "seconds")
    assert figure.get_suptitle() == "Loading some/model to int4-g32-asym"
    # Stages end where the next begins; those that took no time have no room for their names.
    assert [line.get_xdata()[0] for line in read.get_lines()[1:]] == pytest.approx([0.01, 1.01, 4.01])
    assert [text.get_text() for text in read.texts] == ["build", "stream"]


def test_a_load_for_a_target_is_drawn_as_one(report):
    report.plan.recipe = make_recipe(target_bpw=4.3)
    assert draw_load(report).get_suptitle() == "Loading some/model to target of 4.3 bits per weight"


def test_a_load_to_a_gpu_has_no_planned_peak_of_the_host(report):
    report.plan.devices.clear()
    memory, _ = draw_load(report).axes
    assert [line.get_linestyle() for line in memory.get_lines()] == ["-"] * 4


def benchmark(*timings: Timing) -> Benchmark:
    return Benchmark(
        model="demo",
        format="int8-channel",
        weight_bytes=1,
        parameters=1,
        device="cpu",
        threads=2,
        timings=timings,
        load_seconds=1.0,
        load_peak_bytes=1,
        run_peak_bytes=1,
        device_peak_bytes={},
    )


def test_a_benchmark_has_a_bar_for_each_test():
    prompts = [Timing(kind="prompt", tokens=n, seconds=(1.0, 2.0)) for n in (8, 16)]
    answer = Timing(kind="generation", tokens=4, seconds=(1.0,))
    figure = draw_benchmark(benchmark(*prompts, answer))
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [6.0, 12.0] and [bar.get_height() for bar in right.patches] == [4.0]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["pp8", "pp16"]
    assert {axes.get_ylabel() for axes in figure.axes} == {"tokens per second"}
    assert figure.get_suptitle() == "demo, int8-channel, cpu, 2 threads"
    assert len(draw_benchmark(benchmark(answer)).axes) == 1


@pytest.mark.parametrize(("kind", "begins"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_every_kind_of_file(report, tmp_path, kind, begins):
    path = require_plot(tmp_path / f"load{kind}")
    save_figure(draw_load(report), path)
    assert path.read_bytes().startswith(begins) and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no kind of picture") as caught:
        require_plot(tmp_path / "load.jpeg")
    assert all(kind in caught.value.hint for kind in KINDS)
    with pytest.raises(UsageError, match="there is no folder"):
        require_plot(tmp_path / "absent" / "load.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="needs matplotlib") as caught:
        require_plot(tmp_path / "load.png")
    assert caught.value.hint == "pip install matplotlib"
