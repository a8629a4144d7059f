"""GGUF's block types, decoded as the `gguf` package does: the same bits, of any bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qlazy.errors import CorruptCheckpoint
from qlazy.reading.decode import decode, decoded_bytes
from qlazy.sources.gguf import GGML_TYPES, TORCH_NAMES
from qlazy.sources.safetensors import TensorInfo

OURS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


def dequantized() -> list[str]:
    """Types that the package dequantizes and torch does not have."""
    found = []
    for name, block, nbytes in GGML_TYPES.values():
        if name in TORCH_NAMES:
            continue
        try:
            gguf.dequantize(np.zeros((1, nbytes), np.uint8), gguf.GGMLQuantizationType[name])
        except (KeyError, NotImplementedError):
            continue
        assert block > 1
        found.append(name)
    return found


def stored(name: str, rows: int, columns: int) -> tuple[TensorInfo, np.ndarray]:
    block, nbytes = next((block, nbytes) for kind, block, nbytes in GGML_TYPES.values() if kind == name)
    data = np.random.default_rng(0).integers(0, 256, (rows, columns // block * nbytes), dtype=np.uint8)
    info = TensorInfo(name="w", shape=(rows, columns), dtype=name, path=Path("m.gguf"), offset=0, nbytes=data.nbytes)
    return info, data


@pytest.mark.parametrize("name", dequantized())
@pytest.mark.parametrize("shape", [(3, 512), (300, 1024)])
def test_values_are_those_of_the_gguf_package_bit_for_bit(name, shape):
    info, data = stored(name, *shape)
    with np.errstate(all="ignore"):  # any bytes: halves that are infinite or NaN too
        values = decode(torch.from_numpy(data.reshape(-1).copy()), info, shape[0])
        reference = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[name]))
    same = values.view(torch.int32) == reference.view(torch.int32)
    assert bool((same | (values.isnan() & reference.isnan())).all())


def test_the_types_that_files_are_of_take_less_memory():
    assert {name for name in dequantized() if decoded_bytes(name) < 24} == {*OURS}
    assert decoded_bytes("bfloat16") == 0 and len(dequantized()) >= 21


def test_decode_is_a_view():
    data = torch.arange(32, dtype=torch.uint8)
    info = TensorInfo(name="w", shape=(8, 2), dtype="bfloat16", path=Path("x"), offset=0, nbytes=32)
    made = decode(data, info, 8)
    assert made.data_ptr() == data.data_ptr() and made.shape == (8, 2) and made.dtype == torch.bfloat16


def test_decode_of_gguf_blocks_is_that_of_gguf():
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for kind in ("Q4_1", "Q8_0"):
        packed = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        info = TensorInfo(name="w", shape=(4, 64), dtype=kind, path=Path("x"), offset=0, nbytes=packed.nbytes)
        made = decode(torch.from_numpy(packed.reshape(-1).copy()), info, 4)
        assert np.array_equal(made.numpy(), gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]))
    unknown = TensorInfo(name="w", shape=(4, 64), dtype="Q9_9", path=Path("x.gguf"), offset=0, nbytes=8)
    with pytest.raises(CorruptCheckpoint, match=r"x\.gguf: tensor 'w' has type Q9_9"):
        decode(torch.zeros(8, dtype=torch.uint8), unknown, 4)
