"""Our safetensors files are what the safetensors library reads, with tensors on boundaries."""

from __future__ import annotations

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from qlazy.saving.shards import ALIGNMENT, StoredTensor, index_json, shard_names, shard_pieces
from qlazy.sources.safetensors import parse_header

DTYPES = ["bfloat16", "float16", "float32", "int8", "uint8", "int32", "int64"]


def make(shapes: list[tuple[tuple[int, ...], str]]) -> dict[str, torch.Tensor]:
    return {
        f"layer.{number}.é": torch.arange(torch.Size(shape).numel()).to(getattr(torch, dtype)).view(shape)
        for number, (shape, dtype) in enumerate(shapes)
    }


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    stored = [
        StoredTensor(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            data=tensor.reshape(-1).view(torch.uint8).numpy().data,
        )
        for name, tensor in tensors.items()
    ]
    return b"".join(shard_pieces(stored, {"format": "pt"}))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=8))
def test_the_library_and_our_parser_read_them(shapes):
    tensors = make(shapes)
    raw = written(tensors)
    for name, tensor in load(raw).items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
    from pathlib import Path

    infos = parse_header(raw, file="x", file_size=len(raw), path=Path("x"))
    assert set(infos) == set(tensors)
    for info in infos.values():
        itemsize = tensors[info.name].itemsize
        assert info.offset % min(ALIGNMENT, max(itemsize, info.nbytes & -info.nbytes or ALIGNMENT)) == 0


def test_equal_sizes_keep_their_order():
    tensors = make([((16, 4), "float32"), ((3,), "uint8"), ((16, 4), "int32"), ((16, 4), "float32")])
    raw = written(tensors)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    offsets = {name: told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}
    assert [offsets[name] for name in tensors] == [0, 768, 256, 512]


def test_names_and_index():
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads(index_json({"a": ["x", "y"], "b": ["z"]}, 7))
    assert index == {"metadata": {"total_size": 7}, "weight_map": {"x": "a", "y": "a", "z": "b"}}
