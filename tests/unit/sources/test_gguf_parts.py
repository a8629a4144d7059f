"""GGUF models in several files, as the gguf package splits them: whole, mixed up, with parts missing or of another model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, ModelNotFound, UnsupportedModel
from qlazy.sources.gguf_parts import models_among, part_names, read_gguf
from qlazy.sources.source import open_source


def write(path: Path, tensors: int = 5, *, kind: str = "Q8_0", **splits: Any) -> Path:
    """Matrices of growing height, a head last; `name.gguf` becomes `name-00001-of-...` where it is split."""
    writer = gguf.GGUFWriter(path, "llama", **splits)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_token_list([f"word{i}" for i in range(16)])
    for number in range(tensors):
        name = "output.weight" if number == tensors - 1 else f"blk.0.t{number}.weight"
        values = np.full((number + 1, 32), number, np.float32)
        writer.add_tensor(
            name, gguf.quantize(values, gguf.GGMLQuantizationType[kind]), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five tensors in three parts."""
    return write(tmp_path / "m.gguf", split_max_tensors=2)


def part(number: int, name: str = "m", count: int = 3) -> str:
    return f"{name}-{number:05d}-of-{count:05d}.gguf"


def test_any_part_or_the_folder_opens_all(folder: Path) -> None:
    opened = [open_source(path) for path in (folder, *(folder / part(number) for number in (1, 2, 3)))]
    for source in opened:
        assert source.gguf_file == part(1) and source.folder == folder
        assert source.config == opened[0].config and source.tensors == opened[0].tensors
    tensors = opened[0].tensors
    assert [t.path.name for t in tensors.values()] == [part(1), part(1), part(2), part(2), part(3)]
    # The head is in the last part, the vocabulary in the first.
    assert opened[0].config["tie_word_embeddings"] is False and opened[0].config["vocab_size"] == 16


def values_of(folder: Path) -> dict[str, bytes]:
    tensors = open_source(folder).tensors
    return {t.name: t.path.read_bytes()[t.offset : t.end] for t in tensors.values()}


@settings(max_examples=20, deadline=None)
@given(
    tensors=st.integers(2, 9),
    each=st.integers(1, 4),
    first_is_small=st.booleans(),
    kind=st.sampled_from(["F32", "F16", "Q4_0", "Q8_0"]),
)
def test_parts_hold_what_one_file_does(tensors: int, each: int, first_is_small: bool, kind: str) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        whole = write(Path(one) / "m.gguf", tensors, kind=kind)
        split = write(Path(many) / "m.gguf", tensors, kind=kind, split_max_tensors=each, small_first_shard=first_is_small)
        assert values_of(split) == values_of(whole)
        assert open_source(split).config == open_source(whole).config
        names = sorted(path.name for path in split.iterdir())
        assert models_among(names) == names[:1] and part_names(names[-1]) == names


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("given_as", ["folder", "file"])
def test_a_missing_part_is_named(folder: Path, missing: int, given_as: str) -> None:
    (folder / part(missing)).unlink()
    path = folder if given_as == "folder" else folder / part(missing % 3 + 1)
    with pytest.raises(IncompleteCheckpoint, match=f"1 of 3 parts of this model are missing: {part(missing)}") as caught:
        open_source(path)
    assert caught.value.hint and caught.value.exit_code == 5


def test_two_models_in_parts_are_two_models(folder: Path) -> None:
    write(folder / "n.gguf", split_max_tensors=3)
    with pytest.raises(ModelNotFound, match=f"2 GGUF files: {part(1)}, {part(1, 'n', 2)}"):
        open_source(folder)
    assert open_source(folder / part(2, "n", 2)).gguf_file == part(1, "n", 2)


def test_parts_in_each_others_place(folder: Path) -> None:
    first, second = folder / part(1), folder / part(2)
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)
    with pytest.raises(CorruptCheckpoint, match=f"{part(1)}: its header says part 1 of 3, counted from 0.* says 0 of 3"):
        open_source(folder)


def test_a_part_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(other / "m.gguf", 6, split_max_tensors=2)
    shutil.copy(other / part(3), folder / part(3))
    with pytest.raises(CorruptCheckpoint, match=f"{part(3)}: split.tensors.count is 6, but {part(1)} says 5"):
        open_source(folder)


def test_a_tensor_in_two_parts(folder: Path) -> None:
    raw = (folder / part(2)).read_bytes()
    (folder / part(2)).write_bytes(raw.replace(b"blk.0.t2.weight", b"blk.0.t1.weight"))
    with pytest.raises(CorruptCheckpoint, match=f"'blk.0.t1.weight' lies in two parts: {part(1)} and {part(2)}"):
        open_source(folder)


def test_fewer_tensors_than_said(folder: Path) -> None:
    for number in (1, 2, 3):
        path = folder / part(number)
        raw = path.read_bytes()
        said = b"split.tensors.count\x05\0\0\0\x05"
        assert raw.count(said) == 1
        path.write_bytes(raw.replace(said, said[:-1] + b"\x07"))
    with pytest.raises(CorruptCheckpoint, match="its 3 parts should hold 7 tensors but hold 5"):
        open_source(folder)


def test_a_part_without_its_name_and_a_name_without_a_part(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / part(2), tmp_path / "renamed.gguf")
    with pytest.raises(UnsupportedModel, match=r"renamed\.gguf is part 1 of 3, counted from 0, and its name does not tell"):
        read_gguf(tmp_path / "renamed.gguf")
    other = tmp_path / "other"
    other.mkdir()
    write(other / "m.gguf")
    for number in (1, 2):
        shutil.copy(other / "m.gguf", other / part(number, "w", 2))
    with pytest.raises(CorruptCheckpoint, match=r"its header says part 0 of 1.* its name says 0 of 2"):
        read_gguf(other / part(2, "w", 2))


def test_names() -> None:
    assert part_names("a.gguf") == ["a.gguf"] and part_names("a-00001-of-00001.gguf") == ["a-00001-of-00001.gguf"]
    for odd in ("a-00003-of-00002.gguf", "a-00000-of-00002.gguf", "a-1-of-2.gguf", "a-00001-of-00002.safetensors"):
        assert part_names(odd) == [odd]
    assert models_among([part(3), "b.gguf", part(2)]) == ["b.gguf", part(2)]


def test_a_plan_of_parts_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, qlazy\n"
        f"plan = qlazy.plan({str(folder / part(2))!r}, device_map='cpu')\n"
        "assert len([t for t in plan.tensors if t.source_nbytes]) == 5, plan.tensors\n"
        "assert not {'torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
