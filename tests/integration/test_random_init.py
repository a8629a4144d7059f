"""Random initialization straight into packed storage: the bytes are those of the eager model, quantized."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

import qlazy
from qlazy.errors import ModelNotFound
from qlazy.layers.quant_linear import QuantLinear
from qlazy.place import Placer

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


EXPERTS: dict[str, PretrainedConfig] = {
    # Flat stacks whose experts end within a block of 64 rows; w2 is transposed.
    "dbrx": DbrxConfig(
        vocab_size=256,
        d_model=64,
        n_heads=2,
        n_layers=1,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    ),
    # (E, K, N).
    "gpt_oss": GptOssConfig(
        **TINY, hidden_size=64, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, head_dim=32
    ),
    "mixtral": MixtralConfig(**TINY, hidden_size=64, intermediate_size=96, num_key_value_heads=2, num_local_experts=4),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_come_in_pieces(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    config = EXPERTS[name]
    config.save_pretrained(tmp_path / "config")
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "eager")
    options: dict[str, Any] = {"device_map": "cpu", "format": "nf4", "dtype": "bfloat16"}
    wanted = tensors(qlazy.load_quantized(tmp_path / "eager", **options))
    pieces: list[tuple[str, int]] = []
    place = Placer.place
    monkeypatch.setattr("qlazy.load.host_chunk_bytes", lambda workers, compiled: 64 * 64 * 2)

    def placed(self: Placer, chunk: Any, values: list[torch.Tensor]) -> None:
        pieces.append((chunk.fill.targets[0], values[0].nbytes))
        place(self, chunk, values)

    monkeypatch.setattr(Placer, "place", placed)
    torch.manual_seed(11)
    made = tensors(qlazy.load_quantized(tmp_path / "config", random_init=True, **options))
    assert list(made) == list(wanted) and all(torch.equal(tensor, wanted[key]) for key, tensor in made.items())
    # 64 rows of 64, or 96, in bfloat16; of a transposed matrix all.
    largest = max(nbytes for target, nbytes in pieces if "experts" in target)
    assert largest <= (64 * 128 * 2 if name == "gpt_oss" else 64 * 96 * 2)


def test_threads_that_are_started_later_have_as_many_as_before(tmp_path: Path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        qlazy.load_quantized(tmp_path, device_map="cpu", random_init=True)
        found: list[int] = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)


def test_a_folder_without_a_config(tmp_path: Path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        qlazy.load_quantized(tmp_path, random_init=True)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything with memory: parameters, buffers, and what low-bit layers keep as plain attributes."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, layer in model.named_modules():
        found |= {f"{path}.{key}": value for key, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    return found
