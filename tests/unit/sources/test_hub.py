"""Hub models against a small hub on the loopback interface: found, gated, absent, slow, cut off, resumed, offline."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from qlazy.errors import (
    CorruptCheckpoint,
    GatedModel,
    HubUnreachable,
    IncompleteCheckpoint,
    ModelNotFound,
    OutOfSpace,
    QlazyError,
    UnsupportedModel,
)
from qlazy.sources import hub_client
from qlazy.sources.source import open_source
from tests.hub_server import COMMIT, Hub, point_to, serve_hub

ID = "acme/tiny"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of about 400 kB, with index, config, tokenizer and things that must not be fetched."""
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for shard in (1, 2):
        name = f"model-0000{shard}-of-00002.safetensors"
        tensors = {f"layer.{shard}.{i}.weight": np.full((100, 100), i, np.float32) for i in range(10)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 100}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    huggingface_hub.close_session()
    with serve_hub() as hub:
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        hub.add(ID, model)
        yield hub
        huggingface_hub.close_session()


def test_found_and_downloaded(hub: Hub, model: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = open_source(ID, on_progress=lambda done, total: seen.append((done, total)))
    assert (source.model_id, source.resolved, source.revision, source.kind) == (ID, ID, COMMIT, "safetensors")
    assert source.folder is not None and len(source.tensors) == 20 and source.config["hidden_size"] == 100
    fetched = {file.name for file in source.folder.iterdir()}
    assert fetched == {file.name for file in model.iterdir()} - {"pytorch_model.bin", "modeling_tiny.py"}
    for tensor in source.tensors.values():
        assert (
            tensor.path.read_bytes()[tensor.offset : tensor.end]
            == (model / tensor.path.name).read_bytes()[tensor.offset : tensor.end]
        )
    # The index is fetched first, to know the shards, and does not count.
    wanted = sum((model / name).stat().st_size for name in fetched - {"model.safetensors.index.json"})
    assert seen[-1] == (wanted, wanted) and all(total == wanted for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_second_time_fetches_nothing(hub: Hub) -> None:
    open_source(ID)
    hub.requests.clear()
    open_source(ID)
    assert [path for _, path, _ in hub.requests] == [f"/api/models/{ID}/revision/main"]


def test_headers_only_fetches_no_weights(hub: Hub, model: Path, tmp_path: Path) -> None:
    source = open_source(f"{ID}@main", headers_only=True)
    assert source.folder is None and source.revision == COMMIT and source.config["model_type"] == "llama"
    local = open_source(model)
    assert source.tensors.keys() == local.tensors.keys()
    for name, tensor in source.tensors.items():
        there = local.tensors[name]
        assert (tensor.shape, tensor.dtype, tensor.offset, tensor.nbytes) == (
            there.shape,
            there.dtype,
            there.offset,
            there.nbytes,
        )
        assert tensor.path == Path(there.path.name)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert hub.gets("model-00001-of-00002.safetensors") == ["bytes=0-131071"]


def test_headers_longer_than_the_first_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlazy.sources.hub.FIRST_BYTES", 64)
    assert len(open_source(ID, headers_only=True).tensors) == 20
    first, second = hub.gets("model-00002-of-00002.safetensors")
    assert first == "bytes=0-63" and second not in (None, first)


def test_headers_from_a_server_that_ignores_ranges(hub: Hub) -> None:
    hub.ignore_range = True
    assert len(open_source(ID, headers_only=True).tensors) == 20


def test_headers_only_uses_a_complete_cache(hub: Hub) -> None:
    folder = open_source(ID).folder
    hub.requests.clear()
    assert open_source(ID, headers_only=True).folder == folder
    assert not hub.gets("model-00001-of-00002.safetensors")


def test_damaged_remote_header(hub: Hub) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.repos[ID][name] = hub.repos[ID][name][:-4]
    with pytest.raises(
        IncompleteCheckpoint, match=r"model-00001-of-00002\.safetensors: tensor 'layer\.1\.\d\.weight' ends at byte"
    ):
        open_source(ID, headers_only=True)
    hub.repos[ID][name] = b"<html>not a model</html>" * 10
    with pytest.raises(CorruptCheckpoint, match="header claims"):
        open_source(ID, headers_only=True)


def test_shard_missing_on_the_hub(hub: Hub) -> None:
    del hub.repos[ID]["model-00002-of-00002.safetensors"]
    with pytest.raises(IncompleteCheckpoint, match=r"names model-00002-of-00002\.safetensors, which the repository lacks"):
        open_source(ID)


@pytest.mark.parametrize("headers_only", [False, True])
def test_gated(hub: Hub, headers_only: bool) -> None:
    hub.gated[ID] = "hf_secret"
    with pytest.raises(GatedModel, match="gated") as caught:
        open_source(ID, headers_only=headers_only)
    assert "hf auth login" in caught.value.hint and caught.value.exit_code == 3
    with pytest.raises(GatedModel):
        open_source(ID, token="hf_wrong", headers_only=headers_only)
    assert len(open_source(ID, token="hf_secret", headers_only=headers_only).tensors) == 20


def test_token_from_the_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated[ID] = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(open_source(ID, headers_only=True).tensors) == 20
    with pytest.raises(GatedModel):
        open_source(ID, headers_only=True, token=False)


def test_absent(hub: Hub) -> None:
    with pytest.raises(ModelNotFound, match="no such model") as caught:
        open_source("acme/nothing")
    assert type(caught.value) is ModelNotFound and hub.url in caught.value.hint
    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        open_source(f"{ID}@v9")
    hub.status = 401  # what the real hub says of a repository that is private or absent
    with pytest.raises(ModelNotFound, match="answered 401") as caught:
        open_source(ID)
    assert type(caught.value) is ModelNotFound and "gated" not in str(caught.value)


def test_no_config_and_pickles_only(hub: Hub) -> None:
    hub.repos["acme/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(UnsupportedModel, match="never pickles"):
        open_source("acme/pickles")
    hub.repos["acme/adapter"] = {"adapter_model.safetensors": b"x"}
    with pytest.raises(UnsupportedModel, match=r"no config\.json; it has adapter_model\.safetensors"):
        open_source("acme/adapter")


def test_slow_is_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.delay = 0.6
    with pytest.raises(HubUnreachable, match="Timeout") as caught:
        open_source(ID)
    assert "gated" not in str(caught.value)


def test_slow_header_is_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_source(ID, headers_only=True).config
    assert config  # it is in the cache now, and what follows asks for headers
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.delay = 0.4
    with pytest.raises(HubUnreachable, match=r"model-0000\d-of-00002"):
        open_source(ID, headers_only=True)


def test_down_but_cached(hub: Hub) -> None:
    folder = open_source(ID).folder
    hub.status = 500
    assert open_source(ID).folder == folder
    hub.repos["acme/other"] = hub.repos[ID]
    with pytest.raises(HubUnreachable, match="answered 500"):
        open_source("acme/other")


def test_nobody_listens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="ConnectError"):
        open_source(ID)


def test_cut_off_and_resumed(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    name = "model-00001-of-00002.safetensors"
    hub.cuts[name] = [150_000]
    source = open_source(ID)
    # huggingface_hub takes up a download of the same run where it broke.
    assert hub.gets(name) == [None, "bytes=150000-"]
    assert source.folder is not None and (source.folder / name).read_bytes() == (model / name).read_bytes()


def test_cut_off_for_good_and_resumed_later(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    name = "model-00001-of-00002.safetensors"
    hub.cuts[name] = [150_000] + [0] * 20
    with pytest.raises(HubUnreachable, match=name):
        open_source(ID)
    cache = tmp_path / "cache"
    assert not list(cache.rglob("*.incomplete")), "nothing partial stays on disk"
    complete = {file.name for file in cache.rglob("*") if file.is_symlink()}
    hub.cuts.clear()
    hub.requests.clear()
    assert len(open_source(ID).tensors) == 20
    assert hub.gets(name) == [None] and not any(hub.gets(other) for other in complete), "only what was missing is fetched"


def test_header_cut_off_and_asked_again(hub: Hub) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.cuts[name] = [100]
    assert len(open_source(ID, headers_only=True).tensors) == 20
    assert len(hub.gets(name)) == 2
    hub.cuts[name] = [100] * 3
    with pytest.raises(HubUnreachable):
        open_source(ID, headers_only=True)


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated["acme/gated"] = "hf_secret"
    hub.repos["acme/gated"] = hub.repos[ID]
    folder = open_source(ID).folder
    hub.requests.clear()
    assert open_source(ID, local_files_only=True).folder == folder
    assert open_source(f"{ID}@{COMMIT}", local_files_only=True, headers_only=True).folder == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source(ID).folder == folder
    for name in ("acme/gated", "acme/nothing", "acme/nothing/x.gguf"):
        with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE") as caught:
            open_source(name)
        assert "is gated" not in str(caught.value) and "hf download" in caught.value.hint
    assert not hub.requests


def test_offline_with_a_part(hub: Hub) -> None:
    open_source(ID, headers_only=True)
    with pytest.raises(HubUnreachable, match=r"in part: model-00001-of-00002\.safetensors, model-00002"):
        open_source(ID, local_files_only=True)
    folder = open_source(ID).folder
    assert folder is not None
    (folder / "config.json").unlink()
    with pytest.raises(HubUnreachable, match=r"in part: config\.json"):
        open_source(ID, local_files_only=True)


def test_disk_full_and_read_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> None:
        def download(*args: object, **kwargs: object) -> str:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    fail(errno.ENOSPC)
    with pytest.raises(OutOfSpace, match=f"no space left for {ID}/"):
        open_source(ID)
    fail(errno.EROFS)
    with pytest.raises(QlazyError, match="cannot be written"):
        open_source(ID)


def test_interrupt_stops_downloads_on_their_way(hub: Hub, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(ID, on_progress=interrupt)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    repo = hub_client.Repository(ID, revision="main", token=None, cache_dir=None)
    repo._stop.set()
    repo.resolve()
    with pytest.raises(hub_client._Stopped):
        repo.download("config.json")


def test_gguf_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    from tests.unit.sources.test_gguf import write_gguf

    raw = write_gguf(tmp_path / "a.gguf").read_bytes()
    hub.repos["acme/one-GGUF"] = {"tiny-Q4_1.gguf": raw, "README.md": b"hello"}
    remote = open_source("acme/one-GGUF", headers_only=True)
    assert remote.kind == "gguf" and remote.folder is None and remote.config["model_type"] == "llama"
    source = open_source("acme/one-GGUF")
    assert source.gguf_file == "tiny-Q4_1.gguf" and source.tensors.keys() == remote.tensors.keys()
    assert open_source("acme/one-GGUF", local_files_only=True).gguf_file == "tiny-Q4_1.gguf"
    hub.repos["acme/two-GGUF"] = {"a.gguf": raw, "b.gguf": raw}
    with pytest.raises(ModelNotFound, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        open_source("acme/two-GGUF")
    assert open_source("acme/two-GGUF/b.gguf", headers_only=True).resolved == "acme/two-GGUF/b.gguf"
    assert open_source("acme/two-GGUF/b.gguf").gguf_file == "b.gguf"
    with pytest.raises(ModelNotFound, match=r"no file c\.gguf"):
        open_source("acme/two-GGUF/c.gguf")


def test_gguf_in_parts_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    from tests.unit.sources.test_gguf_parts import part, write

    folder = tmp_path / "parts"
    folder.mkdir()
    files = {path.name: path.read_bytes() for path in write(folder / "m.gguf", split_max_tensors=2).iterdir()}
    hub.repos["acme/parts-GGUF"] = files | {"README.md": b"hello"}
    for name in ("acme/parts-GGUF", f"acme/parts-GGUF/{part(2)}"):
        remote = open_source(name, headers_only=True)
        assert remote.folder is None and len(remote.tensors) == 5 and remote.config["tie_word_embeddings"] is False
    source = open_source(f"acme/parts-GGUF/{part(3)}")
    assert source.gguf_file == part(1) and {t.path.name for t in source.tensors.values()} == {part(1), part(2), part(3)}
    assert source.folder is not None and {*files} == {path.name for path in source.folder.iterdir()}
    for name in ("acme/parts-GGUF", f"acme/parts-GGUF/{part(2)}"):
        assert open_source(name, local_files_only=True).tensors == source.tensors
        assert open_source(name, headers_only=True).tensors == source.tensors  # of the cache
    (source.folder / part(2)).unlink()
    for name in ("acme/parts-GGUF", f"acme/parts-GGUF/{part(1)}"):
        with pytest.raises(HubUnreachable, match=f"in the cache only in part: {part(2)}"):
            open_source(name, local_files_only=True)
        assert len(open_source(name, headers_only=True).tensors) == 5  # of the cache and of the hub
    del hub.repos["acme/parts-GGUF"][part(2)]
    for name in ("acme/parts-GGUF", f"acme/parts-GGUF/{part(1)}"):
        with pytest.raises(IncompleteCheckpoint, match=f"1 of 3 parts of this model are missing: {part(2)}"):
            open_source(name)


def test_gguf_header_longer_than_the_first_request(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.sources.test_gguf import write_gguf

    raw = write_gguf(tmp_path / "a.gguf").read_bytes()
    hub.repos["acme/one-GGUF"] = {"tiny.gguf": raw}
    monkeypatch.setattr("qlazy.sources.hub.GGUF_BYTES", (64, 256, 1 << 20))
    assert open_source("acme/one-GGUF", headers_only=True).kind == "gguf"
    assert len(hub.gets("tiny.gguf")) == 3
    monkeypatch.setattr("qlazy.sources.hub.GGUF_BYTES", (64, 256))
    with pytest.raises(CorruptCheckpoint, match="longer than 256 bytes"):
        open_source("acme/one-GGUF", headers_only=True)


def test_environment_is_honoured(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, in a process of their own as they are read at import."""
    hub.gated[ID] = "hf_secret"
    script = f"""
import os
from qlazy.errors import GatedModel, HubUnreachable
from qlazy.sources.source import open_source
print(open_source({ID!r}).folder)
"""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.getcwd(),
    }
    environment.pop("HF_HUB_CACHE", None)
    for extra in ({}, {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], env=environment | extra, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(str(tmp_path / "home" / "hub" / "models--acme--tiny"))
        hub.status = 500  # offline, nobody asks
