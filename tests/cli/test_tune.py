"""`qlazy tune` without a GPU says so; with one (here a stand-in) it leaves a whole table or none."""

from __future__ import annotations

import json
import sys

import pytest

from qlazy import tune
from qlazy.cli import app
from qlazy.products import tuned


@pytest.mark.parametrize("device", ["cuda:0", "cpu", "nonsense"])
def test_no_such_gpu(qlazy, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = qlazy("tune", "--device", device, "--json")
    assert done.code == 6
    assert done.json["error"]["type"] == "DeviceUnavailable" and device in done.json["error"]["message"]
    assert "qlazy doctor" in done.err


def test_the_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "device_name", lambda device: "Some GPU")
    table = {"schema": 1, "dispatch": {"int8": [{"max_tokens": None, "kernel": "gemv"}]}}
    monkeypatch.setattr(tune, "tune", lambda device, on_progress: table)
    monkeypatch.setattr(sys, "argv", ["qlazy"])
    with pytest.raises(SystemExit) as ended:
        app(["tune"])
    file = tmp_path / "qlazy" / "devices" / "some-gpu.json"
    assert not ended.value.code and capsys.readouterr().out.strip() == str(file)
    assert json.loads(file.read_text()) == table and list(file.parent.iterdir()) == [file]
    tuned.table_for.cache_clear()
    assert tuned.table_for("Some GPU")["dispatch"]["int8"] == table["dispatch"]["int8"]
    assert tuned.table_for("Some GPU")["dispatch"]["int4"] == tuned.table_for("another")["dispatch"]["int4"]

    monkeypatch.setattr(tune, "tune", lambda device, on_progress: {"schema": 1, "dispatch": {"int8": []}})
    with pytest.raises(SystemExit) as ended:
        app(["tune"])
    assert ended.value.code == 2
    assert json.loads(file.read_text()) == table and list(file.parent.iterdir()) == [file]
    tuned.table_for.cache_clear()
