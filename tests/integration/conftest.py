"""Tiny checkpoints of many kinds of model, made once a session, and copies of them to damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def _decoder(**more: Any) -> dict[str, Any]:
    """Options that decoders of the Llama family share."""
    return {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _decoder(tie_word_embeddings=False)),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _decoder(tie_word_embeddings=True)),
    "llama-head": ("LlamaForSequenceClassification", "LlamaConfig", _decoder(num_labels=3)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _decoder(tie_word_embeddings=False)),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _decoder(head_dim=32, layer_types=["sliding_attention", "full_attention"], sliding_window=64),
    ),
    # Every expert takes every token, so that rounding cannot change the choice.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _decoder(num_local_experts=4, num_experts_per_tok=4)),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _decoder(num_experts=4, num_experts_per_tok=4, moe_intermediate_size=64, shared_expert_intermediate_size=128),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {
            "vocab_size": 256,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_labels": 3,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 256,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": {
                "vocab_size": 256,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
                "projection_size": 128,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
        },
    ),
}


_ENCODER = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Their checkpoints join layers that the model has apart.
    "nomic_bert": ("NomicBertForMaskedLM", "NomicBertConfig", _ENCODER),
    "gte": ("GteForMaskedLM", "GteConfig", _ENCODER),
    # Its checkpoints have other names for the head and all that is text.
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_decoder(tie_word_embeddings=False)},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "image_token_index": 1,
            "tie_word_embeddings": False,
        },
    ),
}
"""What not every test is run with."""


def inputs_of(name: str, tokens: int = 6) -> dict[str, Tensor]:
    """Something to feed a model of `MODELS`."""
    generator = torch.Generator().manual_seed(7)
    # A classifier gives three numbers for a sequence, too few to judge an error by.
    sequences = 16 if name in ("llama-head", "bert") else 1
    ids = torch.randint(3, 256, (sequences, tokens), generator=generator)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    if name == "siglip":
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}
    return {"input_ids": ids}


def make(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Saves a random model in several shards; norms and biases are no ones and zeros, so that a swapped pair shows."""
    architecture, config_name, options = (MODELS | OTHERS)[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Short parallel regions are slow on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `MODELS`, by name; not to be changed."""
    made: dict[str, Path] = {}
    base = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(name, base / name)
        return made[name]

    return get


@pytest.fixture
def copied(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint that a test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / name))

    return copy


@pytest.fixture
def rewrite() -> Callable[..., Path]:
    """Changes stored tensors of a folder: a value of None takes one away, a new key adds one to the first shard."""

    def change(folder: Path, changes: dict[str, Tensor | None]) -> Path:
        index_file = folder / "model.safetensors.index.json"
        index = json.loads(index_file.read_text())
        weight_map: dict[str, str] = index["weight_map"]
        first = sorted(set(weight_map.values()))[0]
        for shard in sorted({weight_map.get(key, first) for key in changes}):
            tensors = load_file(folder / shard)
            for key, value in changes.items():
                if weight_map.get(key, first) != shard:
                    continue
                tensors.pop(key, None)
                if value is not None:
                    tensors[key] = value
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        for key, value in changes.items():
            if value is None:
                del weight_map[key]
            else:
                weight_map.setdefault(key, first)
        index_file.write_text(json.dumps(index))
        return folder

    return change


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own, in an empty folder."""

    def run(script: str, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run
