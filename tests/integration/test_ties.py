"""Tied weights are what transformers makes of the same files: one, the other, or both of a pair may be stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qlazy
from qlazy.finish import _module_map

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def checkpoint(folder: Path, stored: set[str]) -> Path:
    """A Llama whose config says that head and embedding are tied, and whose file holds those of the two that are asked for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 264, "num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16", **sizes)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in {HEAD, EMBEDDING} - stored}
    if stored == {HEAD, EMBEDDING}:
        tensors[HEAD] = torch.randn_like(tensors[HEAD])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", [{EMBEDDING}, {HEAD}, {HEAD, EMBEDDING}], ids=["embedding", "head", "both, different"])
def test_head_and_embedding_are_those_of_transformers(tmp_path: Path, stored: set[str]) -> None:
    folder = checkpoint(tmp_path, stored)
    ours = qlazy.load_quantized(folder, device_map="cpu")
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (stored != {HEAD, EMBEDDING})
    # 264 rows leave a block of 8, whose zeros are one word a column.
    assert torch.isfinite(ours(torch.arange(8).unsqueeze(0)).logits).all()


def test_blocks_and_tied_modules_have_a_device(tmp_path: Path) -> None:
    model = qlazy.load_quantized(checkpoint(tmp_path, {EMBEDDING}), device_map="cpu")
    places = _module_map(model, model.qlazy_report.plan)
    assert {"model.layers.0", "model.layers.1", "model.embed_tokens", "lm_head", "model.norm"} <= set(places)
    assert not any(path.startswith("model.layers.0.") for path in places)
