"""Headers of quantized checkpoints with one thing wrong: a typed error, or read without touching what is not there."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qlazy.errors import QlazyError
from qlazy.reading.unpack import unpack_rows
from qlazy.sources.packed import PackedTensor
from qlazy.sources.quantized import join_parts
from qlazy.sources.safetensors import DTYPES, read_header

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "quantized").glob("*.safetensors"))
ITEMSIZE = {name: size for name, size in DTYPES.values() if hasattr(torch, name)}


@pytest.mark.parametrize("path", FIXTURES, ids=[path.stem for path in FIXTURES])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_tensor_of_another_shape_or_dtype(path, data):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
    tensors = {name: info for name, info in read_header(path).items() if not name.startswith("reference:")}
    name = data.draw(st.sampled_from(sorted(tensors)))
    info = tensors[name]
    dtype = data.draw(st.sampled_from([info.dtype, *sorted(ITEMSIZE)]))
    extents = st.sampled_from([0, 1, 2, 3, 7, 32, 64, 96, 128, *info.shape])
    shape = data.draw(st.one_of(st.just(info.shape), st.lists(extents, max_size=4).map(tuple)))
    # Where only headers are here nothing else is read: shapes must do.
    tensors = {key: dataclasses.replace(value, path=Path("m.safetensors")) for key, value in tensors.items()}
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    tensors[name] = dataclasses.replace(tensors[name], shape=shape, dtype=dtype, nbytes=nbytes)
    try:
        found = join_parts({"quantization_config": config}, tensors, where="m")
    except QlazyError as error:
        assert str(error)
        return
    for packed in found.values():
        if not isinstance(packed, PackedTensor):
            continue
        rows = math.prod(packed.shape[:-1])
        for start in range(0, rows, packed.row_block):
            stop = min(rows, start + packed.row_block)
            spans = {part.role: part.span(start, stop) for part in packed.parts}
            for part in packed.parts:
                begin, size = spans[part.role]
                assert part.stored.offset <= begin and begin + size <= part.stored.end
            parts = {role: torch.zeros(size, dtype=torch.uint8) for role, (_, size) in spans.items()}
            assert unpack_rows(packed, parts, start, stop).shape == (stop - start, packed.shape[-1])
