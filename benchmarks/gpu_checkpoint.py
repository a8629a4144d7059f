"""Llama-shaped checkpoints of any size in seconds: a piece of random weights over and over, or holes that take no disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from checkpoint import llama_tensors

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {
    "tiny": dict(zip(_SIZES, (256, 768, 2, 4, 2, 512), strict=True)),
    "8b": dict(zip(_SIZES, (4096, 14336, 32, 32, 8, 128256), strict=True)),
    "70b": dict(zip(_SIZES, (8192, 28672, 80, 64, 8, 128256), strict=True)),
}
"""Configs by name: Llama 3's of 8B and 70B; heads are not tied."""

SHARD_BYTES = 5 << 30
PIECE_ELEMENTS = 1 << 25
"""Random weights that are written over and over: 64 MiB."""


def tensors(shape: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor."""
    return llama_tensors(**SHAPES[shape])


def nbytes(shape: str) -> int:
    """Bytes of all tensors in bfloat16."""
    return sum(2 * math.prod(dims) for dims in tensors(shape).values())


def write(folder: Path, shape: str, *, holes: bool = False) -> Path:
    """Write a bfloat16 checkpoint; one that is complete is kept.

    Args:
        folder: Where.
        shape: A name of `SHAPES`.
        holes: Leave every weight a hole of the file: it reads as zeros and takes no disk.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    size = SHAPES[shape]
    config = {
        **size,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dims in tensors(shape).items():
        if sum(2 * math.prod(other) for other in shards[-1].values()) + 2 * math.prod(dims) > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = dims
    if not holes and shutil.disk_usage(folder).free < nbytes(shape) + (1 << 30):
        raise RuntimeError(f"{folder} has no room for {nbytes(shape) / 1e9:.0f} GB")
    generator = torch.Generator().manual_seed(0)
    piece = b"" if holes else _bytes(torch.randn(PIECE_ELEMENTS, generator=generator).mul_(0.02))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: _write_shard(folder / job[0], job[1], piece), zip(names, shards, strict=True)))
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index.write_text(json.dumps({"metadata": {"total_size": nbytes(shape)}, "weight_map": places}))
    return folder


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], piece: bytes) -> None:
    header, at = {}, 0
    for name, dims in shard.items():
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + 2 * math.prod(dims)]}
        at += 2 * math.prod(dims)
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(begin + at)
        if not piece:
            return
        view, done = memoryview(piece), 0
        while done < at:
            done += file.write(view[: at - done])
        for name, dims in shard.items():
            if len(dims) == 1:  # norms of a model that shall run
                os.pwrite(file.fileno(), _bytes(torch.ones(dims)), begin + header[name]["data_offsets"][0])


def _bytes(values: torch.Tensor) -> bytes:
    return values.bfloat16().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    write(Path(sys.argv[2]), sys.argv[1], holes="--holes" in sys.argv)
    print("{}")
