"""Folders that appear as a whole or not at all: refusals, full disks, and going on where it was cut off."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from qlazy.errors import CorruptCheckpoint, OutOfSpace, QlazyError, UsageError
from qlazy.saving.folder import MANIFEST, writing
from qlazy.saving.saved import already_saved, verify

CONTENT = {"one.safetensors": b"1" * 1000, "two.safetensors": b"2" * 2000, "tokenizer.json": b"{}"}


def write(folder: Path, key: str = "key", *, force: bool = False, content: dict[str, bytes] = CONTENT) -> list[str]:
    """Writes a folder; gives the names of the files whose bytes were asked for."""
    asked = []

    def pieces(name: str):
        asked.append(name)
        yield memoryview(content[name])

    with writing(folder, key, force=force) as partial:
        for name in content:
            partial.write(name, pieces(name), journal=name.endswith(".safetensors"))
        partial.commit({"layout": "compressed-tensors"}, b'{"model_type": "x"}')
    return asked


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_whole_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "a" / "b"
    write(folder)
    assert names(folder) == sorted([*CONTENT, MANIFEST, "config.json"])
    assert all((folder / name).read_bytes() == content for name, content in CONTENT.items())
    assert names(folder.parent) == ["b"]
    assert verify(folder) == sum(len(content) for content in CONTENT.values()) + len(b'{"model_type": "x"}')


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b")
    assert verify(tmp_path / "b")


@pytest.mark.parametrize("force", [False, True])
def test_folder_that_holds_something(tmp_path, force):
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if force:
        write(folder, force=True)
        assert names(folder) == sorted([*CONTENT, MANIFEST, "config.json"])
    else:
        with pytest.raises(UsageError, match=r"is not empty: it holds notes\.txt"):
            write(folder)
        assert names(folder) == ["notes.txt"]
    assert names(tmp_path) == ["b"]


def test_folder_that_we_work_in_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(UsageError, match="would be replaced as a whole"):
        write(tmp_path, force=True)


def test_mount_points_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "b")
    with pytest.raises(UsageError, match="is a mount point"):
        write(tmp_path / "b")
    assert names(tmp_path) == []


def test_what_is_read_is_never_replaced(tmp_path):
    inner = tmp_path / "models" / "a"
    write(inner)
    (tmp_path / "link").symlink_to(inner.parent)
    for folder in (inner, inner.parent, tmp_path / "link" / "a"):
        with pytest.raises(UsageError, match="would be replaced as a whole"), writing(folder, "x", force=True, sources=[inner]):
            pass
    assert verify(inner)


def test_a_link_in_the_place_of_the_partial_folder_is_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    (tmp_path / ".b.qlazy-partial").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path / "b")
    assert names(tmp_path / "theirs") == ["notes.txt"]


def test_another_process_completes_the_folder_between_making_and_locking(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(file: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            os.rename(tmp_path / ".b.qlazy-partial", tmp_path / "other")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "b")
    assert verify(tmp_path / "b") and names(tmp_path / "other") == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "b").write_text("x")
    with pytest.raises(UsageError, match="is not a folder"):
        write(tmp_path / "b", force=True)


def test_two_at_once(tmp_path):
    with writing(tmp_path / "b", "key"), pytest.raises(UsageError, match="by another process"):
        write(tmp_path / "b")
    assert write(tmp_path / "b") == list(CONTENT)


class Fault:
    """Raises at the n-th call of a function of `os`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> None:
        self.calls = 0
        real = getattr(os, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_a_full_disk_names_the_file_and_the_next_attempt_goes_on(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        count = Fault(patch, name, -1, OSError())
        write(tmp_path / "counted")
    for at in range(1, count.calls + 1):
        folder = tmp_path / f"{name}{at}"
        with monkeypatch.context() as patch:
            Fault(patch, name, at, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OutOfSpace, match="cannot be written: No space left") as caught:
                write(folder)
        assert str(folder) in caught.value.message
        assert caught.value.exit_code == 1 and "goes on" in caught.value.hint
        if folder.exists():  # the rename was done, and only its record was not
            assert verify(folder)
        partial = folder.with_name(f".{folder.name}.qlazy-partial")
        done = {file.name for file in partial.glob("*.safetensors")} if partial.is_dir() else set()
        asked = write(folder, force=True)
        journaled = done - set(asked)
        assert len(done - journaled) <= 1  # at most the one whose line in the journal was not written
        assert verify(folder) and names(folder) == sorted([*CONTENT, MANIFEST, "config.json"])


def test_other_failures_are_told_too(tmp_path, monkeypatch):
    Fault(monkeypatch, "fsync", 3, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(QlazyError, match="cannot be written: Input/output error"):
        write(tmp_path / "b")


def test_another_key_begins_anew(tmp_path):
    with writing(tmp_path / "b", "first") as partial:
        partial.write("one.safetensors", [b"old"])
        (partial.path / "stray").mkdir()
    assert write(tmp_path / "b", "second") == list(CONTENT)
    assert (tmp_path / "b" / "one.safetensors").read_bytes() == CONTENT["one.safetensors"]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_journal_that_is_cut_short(tmp_path, cut):
    with writing(tmp_path / "b", "key") as partial:
        for name in ("one.safetensors", "two.safetensors"):
            partial.write(name, [CONTENT[name]])
    journal = partial.path / "journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert write(tmp_path / "b") in (["two.safetensors", "tokenizer.json"], ["tokenizer.json"])
    assert verify(tmp_path / "b")


def test_a_file_that_lost_bytes_is_written_again(tmp_path):
    with writing(tmp_path / "b", "key") as partial:
        partial.write("one.safetensors", [CONTENT["one.safetensors"]])
    (partial.path / "one.safetensors").write_bytes(b"short")
    assert "one.safetensors" in write(tmp_path / "b")


def test_already_saved_needs_key_and_files(tmp_path):
    folder = tmp_path / "b"
    assert already_saved(folder, "key") is None
    write(folder)
    report = already_saved(folder, "key")
    assert report is not None and (report.shards, report.nbytes) == (2, 3000)
    assert "2 files, 2 of them by an earlier attempt" in str(report)
    assert already_saved(folder, "other") is None
    (folder / "one.safetensors").unlink()
    assert already_saved(folder, "key") is None
    (folder / MANIFEST).write_text("[]")
    assert already_saved(folder, "key") is None


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": {"bytes": 19}},
        {"config.json": {"bytes": "19", "sha256": ""}},
        {"config.json": 1},
        {"config.json": {"bytes": 1, "sha256": ""}, "../x": {"bytes": 1, "sha256": ""}},
        {"config.json": {"bytes": 1, "sha256": ""}, "/etc/hostname": {"bytes": 1, "sha256": ""}},
    ],
    ids=str,
)
def test_a_manifest_that_is_damaged(tmp_path, files):
    write(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
    assert already_saved(tmp_path / "b", "key") is None
    with pytest.raises(CorruptCheckpoint, match="is damaged"):
        verify(tmp_path / "b")


def test_weights_that_the_manifest_does_not_tell_of(tmp_path):
    write(tmp_path / "b")
    (tmp_path / "b" / "three.safetensors").write_bytes(b"3")
    with pytest.raises(CorruptCheckpoint, match=r"three\.safetensors is there"):
        verify(tmp_path / "b")


def test_manifest_says_what_is_there(tmp_path):
    write(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert manifest["key"] == "key" and manifest["layout"] == "compressed-tensors"
    assert set(manifest["files"]) == {*CONTENT, "config.json"}
