"""Files asked for by name: refused before the work, whole or not at all after it."""

from __future__ import annotations

import os

import pytest

from qlazy.errors import UsageError
from qlazy.outfile import replacing, require_writable


def test_what_cannot_be_written_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(UsageError, match="is a folder") as caught:
        require_writable(tmp_path)
    assert caught.value.hint
    with pytest.raises(UsageError, match="there is no folder") as caught:
        require_writable(tmp_path / "absent" / "a.json")
    assert caught.value.hint == f"mkdir -p {tmp_path / 'absent'}"
    assert require_writable(str(tmp_path / "a.json")) == tmp_path / "a.json"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="is not yours to write in"):
        require_writable(tmp_path / "a.json")


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as made:
        made.write_text("new")
        assert path.read_text() == "old" and made.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_when_the_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as made:
        made.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
