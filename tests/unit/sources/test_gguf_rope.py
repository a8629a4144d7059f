"""The scaling of positions that a GGUF file has as a tensor, held against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlazy.errors import CorruptCheckpoint, UnsupportedModel
from qlazy.sources.gguf_rope import DIVISORS, LLAMA3, llama3_divisors, with_stored_scaling
from qlazy.sources.safetensors import TensorInfo

CONFIG = {"model_type": "llama", "rope_theta": 500000.0}


def tensors(path: Path, values: np.ndarray, dtype: str = "float32") -> dict[str, TensorInfo]:
    path.write_bytes(b"before" + values.tobytes())
    info = TensorInfo(name=DIVISORS, shape=values.shape, dtype=dtype, path=path, offset=6, nbytes=values.nbytes)
    return {DIVISORS: info}


@pytest.mark.parametrize(("head_dim", "theta", "factor"), [(128, 5e5, 8.0), (64, 5e5, 32.0), (32, 1e4, 8.0)])
def test_divisors_are_those_of_transformers(head_dim, theta, factor):
    scaling = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    assert np.allclose(llama3_divisors(head_dim // 2, theta=theta, factor=factor), plain / scaled.double().numpy(), rtol=1e-5)


def test_scaling_is_told_by_the_divisors(tmp_path):
    divisors = np.array(llama3_divisors(64, theta=5e5, factor=8.0), np.float32)
    found = with_stored_scaling(CONFIG, tensors(tmp_path / "x", divisors))
    assert found == CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}}
    assert with_stored_scaling(CONFIG, {}) == CONFIG
    assert with_stored_scaling(CONFIG, tensors(tmp_path / "x", np.ones(64, np.float32))) == CONFIG
    said = CONFIG | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert with_stored_scaling(said, tensors(tmp_path / "x", divisors)) == said


def test_other_divisors_are_refused(tmp_path):
    divisors = np.array(llama3_divisors(64, theta=5e5, factor=8.0), np.float32)
    for wrong in (
        np.full(64, 2, np.float32),
        divisors[::-1].copy(),
        divisors * np.float32(1.01),
        np.full(64, np.nan, np.float32),
    ):
        with pytest.raises(UnsupportedModel, match="in another way than Llama 3"):
            with_stored_scaling(CONFIG, tensors(tmp_path / "x", wrong))
    with pytest.raises(CorruptCheckpoint, match="is float16"):
        with_stored_scaling(CONFIG, tensors(tmp_path / "x", divisors, dtype="float16"))
