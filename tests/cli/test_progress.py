"""Progress: few lines where there is no terminal, one bar where there is one, none where nothing is to be said."""

from __future__ import annotations

import io
import sys

import pytest

from qlazy.cli.progress import Display, duration, line
from qlazy.report import Progress

MIB = 1 << 20


def at(done, total=100 * MIB, stage="read"):
    return Progress(stage=stage, done_bytes=done, total_bytes=total, host_bytes=50 * MIB)


def test_a_line_every_tenth(capsys):
    now = iter(range(1000))
    with Display(silent=False, clock=lambda: next(now) / 10) as display:
        for done in range(101):
            display(at(done * MIB))
    lines = capsys.readouterr().err.splitlines()
    assert [text[:3].strip() for text in lines] == [str(p) for p in range(10, 101, 10)]
    assert lines[4] == " 50 %  Reading 50.0 MiB of 100.0 MiB  10.0 MiB/s  ETA 5 s  RAM 50.0 MiB"


def test_a_line_every_thirty_seconds(capsys):
    now = iter([0.0, 10.0, 29.0, 30.5, 31.0, 61.0])
    with Display(silent=False, clock=lambda: next(now)) as display:
        for _ in range(6):
            display(at(MIB, total=1000 * MIB))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_stages_follow_each_other(capsys):
    now = iter([0.0, 1.0, 100.0, 101.0])
    with Display(silent=False, clock=lambda: next(now)) as display:
        for stage in ("download", "read"):
            display(at(0, stage=stage))
            display(at(100 * MIB, stage=stage))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("100 %  Downloading 100.0 MiB of 100.0 MiB  100.0 MiB/s")
    assert second.startswith("100 %  Reading 100.0 MiB of 100.0 MiB  100.0 MiB/s")


@pytest.mark.parametrize("how", ["silent", "variable"])
def test_nothing_where_nothing_is_wanted(capsys, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with Display(silent=how == "silent") as display:
        display(at(0))
        display(at(100 * MIB))
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("NO_COLOR", raising=False)
    now = iter([0.0, 1.0, 2.0])
    with Display(silent=False, clock=lambda: next(now)) as display:
        display(at(0, stage="download"))
        display(at(0))
        display(at(60 * MIB))
        display._bar.refresh()
    shown = terminal.getvalue()
    assert "Reading 60.0 MiB of 100.0 MiB  60.0 MiB/s  ETA 1 s" in shown and "60 %" in shown
    assert shown.count("Downloading") <= shown.count("Reading")


def test_line_without_a_rate_yet():
    assert line(at(0), 0.0, 0) == "Reading 0 B of 100.0 MiB  RAM 50.0 MiB"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text
