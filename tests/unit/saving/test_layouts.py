"""Packed weights on disk: int8 has the bytes that it has in memory, those of compressed-tensors' own packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlazy.formats import Int8
from qlazy.saving.layouts import from_stored, to_stored
from qlazy.sources.packed import BitsAndBytes8, Gptq, Integers, PackedTensor

ROLES = {
    "compressed-tensors": {"weight_packed": "weight", "weight_scale": "scale"},
    "bitsandbytes": {"weight": "weight", "SCB": "scale"},
    "gptq": {"qweight": "weight", "scales": "scale", "qzeros": "zero", "g_idx": "g_idx"},
}
SCHEMES: dict[str, Any] = {
    "compressed-tensors": Integers(bits=8, group_size=-1, symmetric=True, packed=True),
    "bitsandbytes": BitsAndBytes8(),
    "gptq": Gptq(bits=8, group_size=-1, zero_offset=1),
}


def held(rows: int, columns: int) -> dict[str, Tensor]:
    codes = torch.randint(1, 256, (rows, columns), generator=torch.Generator().manual_seed(columns)).to(torch.uint8)
    return {"weight_packed": codes, "weight_scale": 2.0 ** -torch.arange(8.0, 8.0 + rows).view(-1, 1)}


def reopened(layout: str, stored: dict[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    info = PackedTensor(
        name="layer.weight",
        shape=(rows, columns),
        dtype="float32",
        path=Path("model.safetensors"),
        offset=0,
        nbytes=0,
        row_block=1,
        scheme=SCHEMES[layout],
        parts=(),
    )
    parts = {role: stored[name] for name, role in ROLES[layout].items()}
    return from_stored(Int8(), info, parts, columns, torch.float32)


@pytest.mark.parametrize("layout", ["compressed-tensors", "bitsandbytes", "gptq"])
def test_int8_goes_there_and_back(layout):
    weight = held(8, 64)
    stored = to_stored(layout, Int8(), weight, 8, 64, torch.float32)
    back = reopened(layout, stored, 8, 64)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in weight.items())


def test_int8_in_words_is_the_same_memory():
    weight = held(8, 64)
    stored = to_stored("compressed-tensors", Int8(), weight, 8, 64, torch.float32)
    back = reopened("compressed-tensors", stored, 8, 64)
    assert {t.data_ptr() for t in (stored["weight_packed"], back["weight_packed"])} == {weight["weight_packed"].data_ptr()}


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 30, 63])
def test_int8_words_are_those_of_compressed_tensors(columns):
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = held(5, columns)
    stored = to_stored("compressed-tensors", Int8(), weight, 5, columns, torch.float32)
    q = (weight["weight_packed"].to(torch.int16) - 128).to(torch.int8)
    assert torch.equal(base.unpack_from_int32(stored["weight_packed"], 8, torch.Size((5, columns))), q)
    assert torch.equal(reopened("compressed-tensors", stored, 5, columns)["weight_packed"], weight["weight_packed"])


def test_bytes_of_int8_by_hand():
    weight = {"weight_packed": torch.tensor([[1, 128, 129, 255, 255]], dtype=torch.uint8), "weight_scale": torch.ones(1, 1)}
    words = to_stored("compressed-tensors", Int8(), weight, 1, 5, torch.float32)["weight_packed"]
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0xFF818001, 0x000000FF]
    signed = to_stored("bitsandbytes", Int8(), weight, 1, 5, torch.float32)["weight"]
    assert signed.dtype == torch.int8 and signed.tolist() == [[-127, 0, 1, 127, 127]]
