"""Random initialization straight into packed storage: the bytes are those of the eager model, quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config

import qlazy
from qlazy.errors import ModelNotFound
from qlazy.quant_linear import QuantLinear

TINY = {"vocab_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**TINY, hidden_size=128, intermediate_size=192, tie_word_embeddings=False),
    "tied, with biases": Qwen2Config(
        **TINY, num_key_value_heads=2, hidden_size=128, intermediate_size=192, tie_word_embeddings=True
    ),
    "mixtral": MixtralConfig(**TINY, hidden_size=128, intermediate_size=192, num_key_value_heads=2, num_local_experts=4),
}


@pytest.mark.parametrize("format", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_eager_model_quantized(tmp_path: Path, name: str, format: str):
    config: PretrainedConfig = CONFIGS[name]
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path / "config")
    torch.manual_seed(11)
    eager = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    eager.save_pretrained(tmp_path / "eager")
    wanted = qlazy.load_quantized(tmp_path / "eager", device_map="cpu", format=format)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    made = qlazy.load_quantized(tmp_path / "config", device_map="cpu", format=format, random_init=True)
    assert torch.equal(torch.get_rng_state(), state)
    one, other = tensors(wanted), tensors(made)
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
    layers = [path for path, layer in made.named_modules() if isinstance(layer, QuantLinear)]
    assert layers and layers == [path for path, layer in wanted.named_modules() if isinstance(layer, QuantLinear)]
    assert torch.equal(wanted(torch.tensor([[3, 4]])).logits, made(torch.tensor([[3, 4]])).logits)


def test_a_folder_without_a_config(tmp_path: Path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        qlazy.load_quantized(tmp_path, random_init=True)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything with memory: parameters, buffers, and what low-bit layers keep as plain attributes."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, layer in model.named_modules():
        found |= {f"{path}.{key}": value for key, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    return found
