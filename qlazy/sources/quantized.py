"""Checkpoints that are quantized already: `quantization_config` and the headers say which tensors make up which weight.

Everything is checked on shapes and dtypes here, before a byte of weights is read. What is not known by name or does not add up
is an error that says so. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlazy.errors import CorruptCheckpoint, UnsupportedModel
from qlazy.sources.bitsandbytes import join_bitsandbytes
from qlazy.sources.compressed import join_compressed
from qlazy.sources.float8 import join_float8, join_modelopt, join_mxfp4
from qlazy.sources.gptq import join_auto_round, join_awq, join_gptq
from qlazy.sources.packed import PackedTensor
from qlazy.sources.parts import Settings
from qlazy.sources.safetensors import TensorInfo, short

Join = Callable[[dict[str, TensorInfo], Settings], Iterator[PackedTensor]]

METHODS: dict[str, Join] = {
    "auto-round": join_auto_round,
    "awq": join_awq,
    "bitsandbytes": join_bitsandbytes,
    "compressed-tensors": join_compressed,
    "fbgemm_fp8": join_float8,
    "fp8": join_float8,
    "gptq": join_gptq,
    "modelopt": join_modelopt,
    "mxfp4": join_mxfp4,
}
"""What is read, by `quant_method`."""

_KEYS = ("quantization_config", "compression_config", "quantization")
_MODEL_DTYPES = ("float32", "float16", "bfloat16")


def join_parts(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, where: str) -> dict[str, TensorInfo]:
    """Put one `PackedTensor` in the place of the stored tensors that make up a weight.

    Args:
        config: A config.json.
        tensors: All stored tensors.
        where: What to call the checkpoint in messages.

    Returns:
        The tensors as a model knows them, in file order; those of an unquantized checkpoint as they are.

    Raises:
        UnsupportedModel: If the method, or what it does, is not known.
        CorruptCheckpoint: If shapes, dtypes and config contradict each other.
        IncompleteCheckpoint: If a part of a weight is missing.

    Memory: the headers. Of compressed-tensors and bitsandbytes 16 and a few hundred bytes for each weight are read.
    """
    said = quantization(config)
    if said is None:
        return dict(tensors)
    method = quant_method(said)
    if method not in METHODS:
        raise UnsupportedModel(
            f"{where} is quantized already, with {method} in its config.json; what is read is {', '.join(METHODS)}, GGUF, and "
            "weights in 16 or 32 bits.",
            hint="Name the original model in 16 bits.",
        )
    left = dict(tensors)
    settings = Settings(where=where, config=said, dtype=_dtype(config))
    joined = {packed.name: packed for packed in METHODS[method](left, settings)}
    if tensors and not joined:
        raise CorruptCheckpoint(
            f"{where}: config.json says that weights are quantized with {method}, but none of {len(tensors):,} tensors are.",
            hint="Take quantization_config out of config.json if the weights are in 16 bits.",
        )
    found = left | joined
    return dict(sorted(found.items(), key=lambda item: (str(item[1].path), item[1].offset)))


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json, or the part of it for the text model, says of quantized weights.

    Args:
        config: A config.json.

    Returns:
        Its `quantization_config`, or None.
    """
    inner = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    for holder in (config, *(value for value in inner if "quant_method" not in value)):
        for key in _KEYS:
            found = holder.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def quant_method(said: Mapping[str, Any]) -> str:
    """The name of the method in a `quantization_config`.

    Args:
        said: The config.

    Returns:
        `quant_method`, or what the other keys tell; printable.
    """
    by_keys = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & said.keys() else "a method that it does not name"
    if "config_groups" in said and "format" in said:
        by_keys = "compressed-tensors"
    named = said.get("quant_method") or said.get("quant_algo") or by_keys
    return named if isinstance(named, str) and named.isprintable() and len(named) < 80 else short(named)


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype that the model was trained in, in which weights come out where a scheme leaves that open."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    for holder in (config, *inner):
        for key in ("dtype", "torch_dtype"):
            name = str(holder.get(key)).removeprefix("torch.")
            if name in _MODEL_DTYPES:
                return name
    return "bfloat16"
