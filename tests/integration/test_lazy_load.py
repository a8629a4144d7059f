"""What a load does not read has the values that building the model eagerly under the same seed gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qlazy
from qlazy.errors import IncompleteCheckpoint
from qlazy.hf import QlazyConfig  # noqa: F401  # registers the quantizer

MISSING = ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight", "model.norm.weight"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_bias=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(99)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in MISSING:
        del stored[name]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_missing_tensors_have_eager_values(folder: Path):
    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(7)
    eager = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = qlazy.load_quantized(folder, device_map="cpu", strict=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(model.qlazy_report.initialized) == sorted(MISSING)
    made = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in MISSING:
        assert torch.equal(made[name], eager.get_parameter(name)), name
    assert torch.equal(model.model.rotary_emb.inv_freq, eager.model.rotary_emb.inv_freq)


def test_missing_tensors_are_an_error_that_names_them(folder: Path):
    with pytest.raises(IncompleteCheckpoint, match=r"4 tensors that LlamaForCausalLM needs"):
        qlazy.load_quantized(folder, device_map="cpu")


def test_a_buffer_that_is_drawn_has_eager_values(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Drawing(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.register_buffer("noise", torch.randn(5), persistent=False)
            self.plain = nn.Linear(2, 2).weight.detach().clone()

    import transformers

    monkeypatch.setattr(transformers, "LlamaForCausalLM", Drawing)
    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(3)
    eager = Drawing._from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(3)
    model = qlazy.load_quantized(folder, device_map="cpu", strict=False)
    assert torch.equal(model.noise, eager.noise) and torch.equal(model.plain, eager.plain)
