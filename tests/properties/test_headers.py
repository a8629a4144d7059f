"""Damage of every kind to a real small checkpoint: it is opened as what it is, or refused with one of our errors.

1,100 mutations of headers, indexes, configurations and whole files; each either gives tensors that lie within their files, do
not overlap and have as many bytes as their shape takes, or raises a QlazyError whose message can be printed. Nothing else.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qlazy.errors import QlazyError
from qlazy.sources.gguf import GGML_TYPES, TORCH_NAMES
from qlazy.sources.safetensors import DTYPES
from qlazy.sources.source import Source, open_source
from tests.unit.sources.test_gguf import write_gguf

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
BYTES = dict(DTYPES.values())
BLOCKS = {TORCH_NAMES.get(name, name): (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}

# The fixture folder is put back before each example, so that sharing it between examples is safe.
mutations = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    weight_map = {}
    for i, shard in enumerate(SHARDS):
        tensors = {
            f"model.layers.{i}.q_proj.weight": np.ones((4, 6), np.float32),
            f"model.layers.{i}.norm.weight": np.ones((6,), np.float16),
            f"model.layers.{i}.mask": np.ones((3,), np.bool_),
            f"model.layers.{i}.empty": np.ones((0, 5), np.int64),
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 246}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 6}))
    write_gguf(folder / "tiny.gguf")
    return folder


@pytest.fixture(scope="module")
def gguf_bytes(original: Path) -> bytes:
    return (original / "tiny.gguf").read_bytes()


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf"))
    return tmp_path / "model"


def check(path: Path) -> Source | None:
    """Open it; hold what came against the files, or the refusal against our manners."""
    try:
        source = open_source(path)
    except QlazyError as error:
        str(error).encode()
        assert error.message and error.exit_code in (3, 5)
        return None
    ends: dict[Path, int] = {}
    assert isinstance(source.config, dict) and source.tensors
    for name, tensor in sorted(source.tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        block, nbytes = BLOCKS[tensor.dtype] if source.kind == "gguf" else (1, BYTES[tensor.dtype])
        assert tensor.name == name and tensor.nbytes == math.prod(tensor.shape) // block * nbytes
        assert all(type(extent) is int and extent >= 0 for extent in tensor.shape)
        assert tensor.path.parent == source.folder and tensor.path.is_file()
        assert ends.get(tensor.path, 8) <= tensor.offset and tensor.end <= tensor.path.stat().st_size
        ends[tensor.path] = tensor.end
    return source


def edit_bytes(data: st.DataObject, raw: bytes, first: int) -> bytes:
    """Flip, cut out, insert, repeat or cut off, mostly among the first bytes."""
    at = data.draw(st.one_of(st.integers(0, min(first, len(raw) - 1)), st.integers(0, len(raw) - 1)), "at")
    kind = data.draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat", "truncate", "append", "number"]), "kind")
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << data.draw(st.integers(0, 7), "bit"))]) + raw[at + 1 :]
    if kind == "set":
        return raw[:at] + data.draw(st.binary(min_size=1, max_size=9), "bytes") + raw[at + 1 :]
    if kind == "insert":
        return raw[:at] + data.draw(st.one_of(st.binary(min_size=1, max_size=40), st.just(b"[" * 50_000)), "bytes") + raw[at:]
    if kind == "number":
        return raw[:at] + struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1), "number")) + raw[at + 8 :]
    count = data.draw(st.integers(1, 64), "count")
    if kind == "delete":
        return raw[:at] + raw[at + count :]
    if kind == "repeat":
        return raw[: at + count] + raw[at:]
    return raw[:at] if kind == "truncate" else raw + raw[:count]


numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-2, 200), st.floats(), st.booleans(), st.none(), st.text(max_size=5)
)
values = st.recursive(
    numbers,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


def edit_header(data: st.DataObject, header: dict[str, Any]) -> str:
    """Change one thing in a header and write it as JSON, keys twice where asked for."""
    names = [name for name in header if name != "__metadata__"]
    name, other = data.draw(st.sampled_from(names), "tensor"), data.draw(st.sampled_from(names), "other")
    tensor = header[name]
    kind = data.draw(
        st.sampled_from(["field", "dtype", "shape", "offset", "swap", "rename", "drop", "entry", "twice", "new", "meta"])
    )
    if kind == "field":
        tensor[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(values)
    elif kind == "dtype":
        tensor["dtype"] = data.draw(st.sampled_from([*DTYPES, "F4", "F6_E2M3", "bf16", ""]))
    elif kind == "shape":
        tensor["shape"] = data.draw(
            st.one_of(st.permutations(tensor["shape"]), st.lists(numbers, max_size=5), st.just([1] * 100))
        )
    elif kind == "offset":
        tensor["data_offsets"][data.draw(st.integers(0, 1))] = data.draw(numbers)
    elif kind == "swap":
        tensor["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], tensor["data_offsets"]
    elif kind == "rename":
        header[data.draw(st.one_of(st.text(max_size=8), st.just(other)))] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "entry":
        header[name] = data.draw(values)
    elif kind == "new":
        header["new"] = {"dtype": "U8", "shape": [4], "data_offsets": data.draw(st.sampled_from([[0, 4], [123, 127], [4, 0]]))}
    elif kind == "meta":
        header["__metadata__"] = data.draw(values)
    text = json.dumps(header)
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
    return text


@mutations
@given(data=st.data())
def test_bytes_of_a_shard(data: st.DataObject, original: Path, folder: Path) -> None:
    for shard in SHARDS:
        shutil.copyfile(original / shard, folder / shard)
    shard = data.draw(st.sampled_from(SHARDS))
    raw = (original / shard).read_bytes()
    (folder / shard).write_bytes(edit_bytes(data, raw, first=16))
    check(folder)


@mutations
@given(data=st.data())
def test_header_of_a_shard(data: st.DataObject, original: Path, folder: Path) -> None:
    for shard in SHARDS:
        shutil.copyfile(original / shard, folder / shard)
    shard = data.draw(st.sampled_from(SHARDS))
    raw = (original / shard).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = edit_header(data, json.loads(raw[8 : 8 + length])).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans(), "padded"):
        text += b" " * (-len(text) % 8)
    (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    check(folder)


@mutations
@given(data=st.data())
def test_index(data: st.DataObject, original: Path, folder: Path) -> None:
    index = json.loads((original / INDEX).read_text())
    weight_map = index["weight_map"]
    name = data.draw(st.sampled_from(list(weight_map)))
    kind = data.draw(st.sampled_from(["bytes", "shard", "elsewhere", "rename", "drop", "value", "map", "twice"]))
    if kind == "shard":
        weight_map[name] = data.draw(st.sampled_from([*SHARDS, "model-00003-of-00002.safetensors", "config.json", "a.bin"]))
    elif kind == "elsewhere":
        start = data.draw(st.sampled_from(["../", "/", "./", "sub/", "..\\", "C:\\", "\0", " ", "~/"]))
        weight_map[name] = start + data.draw(st.sampled_from(SHARDS))
    elif kind == "rename":
        weight_map[data.draw(st.text(max_size=8))] = weight_map.pop(name)
    elif kind == "drop":
        del weight_map[name]
    elif kind == "value":
        weight_map[name] = data.draw(values)
    elif kind == "map":
        index[data.draw(st.sampled_from(["weight_map", "metadata", "more"]))] = data.draw(values)
    raw = json.dumps(index).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        raw = edit_bytes(data, raw, first=len(raw) - 1)
    elif kind == "twice":
        raw = raw[:-2] + f', {json.dumps(name)}: "{SHARDS[1]}"}}}}'.encode()
    (folder / INDEX).write_bytes(raw)
    source = check(folder)
    if kind in ("elsewhere", "twice"):
        assert source is None
    if kind == "drop":
        assert source is not None and name in source.tensors


@settings(mutations, max_examples=100)
@given(data=st.data())
def test_config(data: st.DataObject, original: Path, folder: Path) -> None:
    (folder / "config.json").write_bytes(edit_bytes(data, (original / "config.json").read_bytes(), first=40))
    check(folder)


@mutations
@given(data=st.data())
def test_bytes_of_a_gguf_file(data: st.DataObject, gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    # Metadata lies before the vocabulary, tensor entries behind it: aim at both.
    index = gguf_bytes.index(b"token_embd.weight")
    cut = data.draw(st.sampled_from([0, index - 8]), "part")
    path.write_bytes(gguf_bytes[:cut] + edit_bytes(data, gguf_bytes[cut:], first=600 if cut == 0 else 190))
    check(path)


@settings(mutations, max_examples=200)
@given(data=st.data())
def test_any_bytes_at_all(data: st.DataObject, folder: Path) -> None:
    raw = data.draw(st.binary(max_size=200))
    kind = data.draw(st.sampled_from(["safetensors", "gguf", "index"]))
    if kind == "safetensors":
        header = data.draw(st.one_of(st.binary(max_size=60), values.map(lambda value: json.dumps(value).encode())))
        (folder / SHARDS[0]).write_bytes(struct.pack("<Q", len(header)) + header + raw)
        assert check(folder) is None
    elif kind == "index":
        (folder / INDEX).write_bytes(raw)
        assert check(folder) is None
    else:
        (folder / "x.gguf").write_bytes(b"GGUF\x03\0\0\0" + raw)
        assert check(folder / "x.gguf") is None


def test_the_original_is_whole(folder: Path, original: Path) -> None:
    source = check(folder)
    assert source is not None and len(source.tensors) == 8
    source = check(original / "tiny.gguf")
    assert source is not None and len(source.tensors) == 3
