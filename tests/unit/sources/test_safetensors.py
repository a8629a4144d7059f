"""Safetensors headers and indexes: against the safetensors package, and wrong in every way that a header can be."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, QlazyError, UnsupportedModel
from qlazy.sources.index import join_shards, listing, pick_weights, read_index
from qlazy.sources.safetensors import DTYPES, MAX_HEADER_BYTES, header_nbytes, load_json, parse_header, read_header, short


def write(path: Path, header: Any, data: int = 0, *, raw: bytes | None = None) -> Path:
    """A file with this header, as JSON or as it stands, and so many bytes of data."""
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    arrays = {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.ones((5,), np.float16),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 7), np.int64),
        "scalar": np.array(3.5, np.float64),
        "ключ": np.ones((2,), np.uint8),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    tensors = read_header(path)
    with safe_open(path, "np") as theirs:
        assert tensors.keys() == set(theirs.keys())
    for name, array in load_file(path).items():
        tensor = tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes) == (name, array.shape, array.dtype.name, array.nbytes)
        assert path.read_bytes()[tensor.offset : tensor.end] == array.tobytes()
    assert [t.offset for t in tensors.values()] == sorted(t.offset for t in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_torchs(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    name, itemsize = DTYPES[dtype]
    assert getattr(torch, name).itemsize == itemsize
    tensor = read_header(write(tmp_path / "x.safetensors", {"t": entry(dtype, [3], [0, 3 * itemsize])}, 3 * itemsize))["t"]
    assert (tensor.dtype, tensor.nbytes) == (name, 3 * itemsize)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (7, "not an object of dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [2, 3]}, "not an object of"),
        (entry() | {"strides": [3, 1]}, "not an object of"),
        (entry("F33"), "dtype 'F33' is none of F64, F32"),
        (entry(3), "dtype 3 is none of"),
        (entry(["F32"]), r"dtype \['F32'\] is none of"),
        (entry(shape="23"), "shape '23' is not"),
        (entry(shape=[2, -3]), r"shape \[2, -3\] is not"),
        (entry(shape=[True, 6]), r"shape \[True, 6\] is not"),
        (entry(shape=[2.0, 3]), r"shape \[2\.0, 3\] is not"),
        (entry(shape=[2**63, 0]), r"shape \[\d+, 0\] is not"),
        (entry(shape=[1] * 65), "is not a list of at most 64"),
        (entry(shape=[2**62, 2**62, 2**62]), r"takes about 2\*\*189 bytes but its offsets span 24"),
        (entry(shape=[2, 4]), r"F32 of shape \[2, 4\] takes 32 bytes but its offsets span 24"),
        (entry("F16"), "takes 12 bytes but its offsets span 24"),
        (entry(offsets=[0]), r"data_offsets \[0\] are not two numbers"),
        (entry(offsets=[0, 24, 24]), "are not two numbers"),
        (entry(offsets=[-1, 23]), "are not two numbers"),
        (entry(offsets=[0, "24"]), "are not two numbers"),
        (entry(offsets=[False, 24]), "are not two numbers"),
        (entry(offsets=None), "data_offsets None are not"),
        (entry(offsets=[24, 0]), "begins at 24 and ends before, at 0"),
        (entry(offsets=[8, 32]), "begins at byte .* but the header ends at .*, and nothing claims the bytes between"),
    ],
)
def test_wrong_entries(tensor: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00002.safetensors", {"layer.weight": tensor}, 24)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        read_header(path)
    assert "model-00001-of-00002.safetensors: tensor 'layer.weight'" in str(caught.value)
    assert caught.value.hint and caught.value.exit_code == 5


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_sub_byte_types_are_named(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"tensor 't' has dtype {dtype}"):
        read_header(write(tmp_path / "x.safetensors", {"t": entry(dtype)}, 24))


def test_overlap_hole_and_rest(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    a, b = entry(), entry(offsets=[24, 48])
    assert list(read_header(write(path, {"b": b, "a": a}, 48))) == ["a", "b"]
    with pytest.raises(CorruptCheckpoint, match="tensor 'b' overlaps tensor 'a'"):
        read_header(write(path, {"a": a, "b": entry(offsets=[20, 44])}, 44))
    with pytest.raises(CorruptCheckpoint, match="tensor 'b' overlaps tensor 'a'"):
        read_header(write(path, {"a": a, "b": a}, 24))
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'b' begins at byte .* but tensor 'a' ends at"):
        read_header(write(path, {"a": a, "b": entry(offsets=[28, 52])}, 52))
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'b' ends at byte .* nothing claims the rest"):
        read_header(write(path, {"a": a, "b": b}, 49))
    with pytest.raises(CorruptCheckpoint, match="the header ends at byte 10 but the file has 14"):
        read_header(write(path, {}, 4))
    empty = entry(shape=[0], offsets=[24, 24])
    assert len(read_header(write(path, {"a": a, "empty": empty, "b": b}, 48))) == 3


def test_truncated_names_tensor_and_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "model-00002-of-00005.safetensors", {"a": entry(), "x": entry(offsets=[24, 48])}, 40)
    size = path.stat().st_size
    message = rf"model-00002-of-00005\.safetensors: tensor 'x' ends at byte {size + 8:,} but the file has {size:,}"
    with pytest.raises(IncompleteCheckpoint, match=message):
        read_header(path)


def test_numbers_in_messages_have_separators(tmp_path: Path) -> None:
    header = json.dumps({"x": entry("F16", [2**31], [0, 2**32])}).encode()
    raw = struct.pack("<Q", len(header)) + header
    with pytest.raises(IncompleteCheckpoint, match=r"ends at byte 4,294,967,3.. but the file has 4,211,081,216"):
        parse_header(raw, file="model.safetensors", file_size=4_211_081_216, path=Path("model.safetensors"))


@pytest.mark.parametrize("size", range(0, 90, 7))
def test_truncated_anywhere(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, 24)
    whole = path.read_bytes()
    assert size < len(whole)
    path.write_bytes(whole[:size])
    with pytest.raises(IncompleteCheckpoint):
        read_header(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "begins with b'' instead of"),
        (b" {}", "begins with b' ' instead of"),
        (b"[]", "begins with"),
        (b"{", "is not valid JSON"),
        (b"{}{}", "is not valid JSON"),
        (b'{"a": \xff}', "is not valid JSON: 'utf-8' codec"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": {}, "a": {}}', "key 'a' occurs twice"),
        (b'{"a": {"dtype": 1, "dtype": 2}}', "key 'dtype' occurs twice"),
        (b'{"\\ud800": {}}', "is not valid JSON"),
        (b'{"' + b"n" * 20_000 + b'": {}}', "has 20,000 characters"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b'{"a":' * 200_000, "nested too deeply"),
        (b'{"__metadata__": 7}', "'__metadata__' is not a map of strings"),
        (b'{"__metadata__": {"format": 1}}', "'__metadata__' is not a map of strings"),
        (b'{"a": 1e999}', "not an object of"),
    ],
)
def test_wrong_json(raw: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        read_header(write(tmp_path / "x.safetensors", None, raw=raw))
    assert "x.safetensors" in str(caught.value) and len(str(caught.value)) < 1000


def test_header_length_is_checked_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CorruptCheckpoint, match=f"18,446,744,073,709,551,615 bytes; more than {MAX_HEADER_BYTES:,}"):
        read_header(path)
    with pytest.raises(IncompleteCheckpoint, match="header ends at byte 1,008 but the file has 10"):
        header_nbytes(struct.pack("<Q", 1000), file="x", file_size=10)
    with pytest.raises(IncompleteCheckpoint, match="only 8 came"):
        parse_header(struct.pack("<Q", 1000), file="x", file_size=2000, path=path)


def test_texts_for_messages() -> None:
    assert short("a\ud800\n") == r"'a\ud800\n'" and short(5) == "5" and len(short("x" * 1000)) == 80
    assert short(10**4000) == f"about 2**{(10**4000).bit_length()}"
    assert listing(["b", "a"]) == "a, b" and listing([]) == "nothing" and listing("fedcba") == "a, b, c, d, e and 1 more"
    with pytest.raises(CorruptCheckpoint, match="x is a JSON list instead of an object"):
        load_json(b"[]", file="x")


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({}, CorruptCheckpoint, "no 'weight_map'"),
        ({"weight_map": []}, CorruptCheckpoint, "no 'weight_map'"),
        ({"weight_map": {}}, CorruptCheckpoint, "no 'weight_map'"),
        ({"weight_map": {"a": 1}}, CorruptCheckpoint, "tensor 'a' is mapped to 1, which is no file name"),
        ({"weight_map": {"a": "../x.safetensors"}}, CorruptCheckpoint, r"'\.\./x\.safetensors', which is not a file right in"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": "..\\x.safetensors"}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": "C:x.safetensors"}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": ".."}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": ""}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": "x\0.safetensors"}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, CorruptCheckpoint, "not a file right in"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, UnsupportedModel, "which is not safetensors"),
    ],
)
def test_wrong_index(index: Any, error: type[QlazyError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_index(json.dumps(index).encode(), file="model.safetensors.index.json")


def test_join_shards(tmp_path: Path) -> None:
    one = read_header(write(tmp_path / "1.safetensors", {"a": entry(), "extra": entry(offsets=[24, 48])}, 48))
    two = read_header(write(tmp_path / "2.safetensors", {"b": entry()}, 24))
    headers = {"1.safetensors": one, "2.safetensors": two}
    joined = join_shards(headers, {"a": "1.safetensors", "b": "2.safetensors"}, index="index")
    assert list(joined) == ["a", "extra", "b"] and math.prod(joined["b"].shape) == 6
    with pytest.raises(IncompleteCheckpoint, match=r"index: tensor 'c' should be in 2\.safetensors, which does not hold it"):
        join_shards(headers, {"a": "1.safetensors", "c": "2.safetensors"}, index="index")
    with pytest.raises(CorruptCheckpoint, match=r"'a' should be in 2\.safetensors but lies in 1\.safetensors"):
        join_shards(headers, {"a": "2.safetensors"}, index="index")
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'a' lies in two shards: 1\.safetensors and 2\.safetensors"):
        join_shards({"1.safetensors": one, "2.safetensors": one}, {}, index="index")


def test_pick_weights() -> None:
    index = "model.safetensors.index.json"
    assert pick_weights(["model.safetensors", index], where="x") == "model.safetensors"
    assert pick_weights([index, "model-00001-of-00001.safetensors", "consolidated.safetensors"], where="x") == index
    assert pick_weights(["weights.safetensors", "consolidated.safetensors", "a.bin"], where="x") == "weights.safetensors"
    assert pick_weights(["README.md"], where="x") is None
    assert pick_weights(["a.gguf", "a.bin"], where="x") is None
    with pytest.raises(IncompleteCheckpoint, match=r"x: 2 safetensors files \(a\.safetensors, b\.safetensors\) and no model"):
        pick_weights(["a.safetensors", "b.safetensors"], where="x")
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"):
        with pytest.raises(UnsupportedModel, match="only safetensors and GGUF are read, never pickles") as caught:
            pick_weights([name, "config.json"], where="x")
        assert "save_pretrained" in caught.value.hint
