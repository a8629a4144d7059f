"""How Llama 3.1 and its kin scale positions, which a GGUF file says by a tensor of divisors. No torch here."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping
from typing import Any

from qlazy.errors import CorruptCheckpoint, UnsupportedModel
from qlazy.sources.safetensors import TensorInfo

DIVISORS = "rope_freqs.weight"
"""The tensor: float32, one divisor for each pair of rotated columns."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all of these models have in common; the largest divisor is the factor."""

_THETA = 10000.0
"""Where metadata has no base of frequencies, llama.cpp takes this."""

_TOLERANCE = 1e-3
"""Part of a divisor. They are rounded to float32 once; another kind of scaling is off by far more."""


def with_stored_scaling(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What headers tell of a model, and the scaling of its positions where a tensor has it.

    Args:
        config: As `config_of` makes it.
        tensors: Those of a local GGUF file.
    Returns:
        The config; with `rope_scaling` where there are divisors other than 1.
    Raises:
        CorruptCheckpoint: If they are not float32, or none.
        UnsupportedModel: If they are not those of Llama 3, so that positions would be taken for others than they are.

    Memory: four bytes for each divisor.
    """
    info = tensors.get(DIVISORS)
    if info is None or "rope_scaling" in config:
        return dict(config)
    found = _read(info)
    factor = max(found)
    if factor == min(found) == 1:
        return dict(config)
    wanted = llama3_divisors(len(found), theta=float(config.get("rope_theta", _THETA)), factor=factor)
    if not all(abs(one - other) <= _TOLERANCE * other for one, other in zip(found, wanted, strict=True)):
        raise UnsupportedModel(
            f"{info.path.name}: {DIVISORS!r} scales positions in another way than Llama 3, by up to {factor:g}.",
            hint="Use the model's safetensors files.",
        )
    return {**config, "rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3}}


def llama3_divisors(count: int, *, theta: float, factor: float) -> list[float]:
    """What Llama 3 divides its frequencies by: short waves by 1, long ones by the factor, the others between.

    Args:
        count: Pairs of rotated columns.
        theta: Base of the frequencies.
        factor: Of long waves.
    Returns:
        One divisor a pair (`_compute_llama3_parameters` of transformers, and the converter of llama.cpp).
    """
    low, high, length = LLAMA3.values()
    divisors = []
    for pair in range(count):
        turns = length * theta ** (-pair / count) / (2 * math.pi)  # within the length of the first training
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _read(info: TensorInfo) -> array[float]:
    if info.dtype != "float32" or not info.nbytes:
        raise CorruptCheckpoint(
            f"{info.path.name}: {info.name!r} is {info.dtype} {list(info.shape)} instead of float32 numbers.",
            hint="The file is damaged; fetch it again.",
        )
    found = array("f")
    with info.path.open("rb") as file:
        file.seek(info.offset)
        found.frombytes(file.read(info.nbytes))
    if sys.byteorder == "big":
        found.byteswap()
    return found
