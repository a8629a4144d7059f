"""Tied weights are what transformers makes of the same files: one, the other, or both of a pair may be stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qlazy
from qlazy.finish import _module_map
from qlazy.formats import Int8
from qlazy.layers.linear import Int8Linear

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def checkpoint(folder: Path, stored: set[str], *, different: bool = True) -> Path:
    """A Llama whose config says that head and embedding are tied, and whose file holds those of the two that are asked for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 264, "num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16", **sizes)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in {HEAD, EMBEDDING} - stored}
    if stored == {HEAD, EMBEDDING} and different:
        tensors[HEAD] = torch.randn_like(tensors[HEAD])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", [{EMBEDDING}, {HEAD}, {HEAD, EMBEDDING}], ids=["embedding", "head", "both, the same"])
def test_head_and_embedding_are_those_of_transformers(tmp_path: Path, stored: set[str]) -> None:
    folder = checkpoint(tmp_path, stored, different=False)
    ours = qlazy.load_quantized(folder, device_map="cpu")
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    headers = qlazy.plan(folder, device_map="cpu")
    for plan in (headers, ours.qlazy_report.plan):
        ends = {t.name: t for t in plan.tensors if t.name in (HEAD, EMBEDDING)}
        assert set(ends) == stored and all(t.format is None for t in ends.values())
        assert HEAD not in ends or "tied" in ends[HEAD].reason
    # 264 rows leave a block of 8, whose zeros are one word a column.
    assert torch.isfinite(ours(torch.arange(8).unsqueeze(0)).logits).all()


def test_a_head_of_its_own_is_packed_though_the_config_calls_it_tied(tmp_path: Path) -> None:
    """transformers finds out that they differ when both are read, qlazy from a few samples before."""
    folder = checkpoint(tmp_path, {HEAD, EMBEDDING})
    ours = qlazy.load_quantized(folder, device_map="cpu", head_bits=8)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    packed = Int8Linear(64, 96, format=Int8(), dtype=torch.bfloat16, bias=None)
    packed.allocate("cpu")
    packed.fill(theirs.lm_head.weight)
    assert torch.equal(ours.lm_head.weight_packed, packed.weight_packed)
    assert torch.equal(ours.lm_head.weight_scale, packed.weight_scale)
    assert HEAD not in ours.all_tied_weights_keys
    report = ours.qlazy_report
    assert report.device_bytes["cpu"] == report.plan.weight_bytes
    # Headers do not tell, so that the plan from them has the larger number.
    (head,) = [t for t in qlazy.plan(folder, device_map="cpu").tensors if t.name == HEAD]
    assert head.format is None and "tied" in head.reason
    kept = qlazy.load_quantized(folder, device_map="cpu", modules_to_not_convert=["lm_head"])
    assert torch.equal(kept.lm_head.weight, theirs.lm_head.weight)


def test_blocks_and_tied_modules_have_a_device(tmp_path: Path) -> None:
    model = qlazy.load_quantized(checkpoint(tmp_path, {EMBEDDING}), device_map="cpu")
    places = _module_map(model, model.qlazy_report.plan)
    assert {"model.layers.0", "model.layers.1", "model.embed_tokens", "lm_head", "model.norm"} <= set(places)
    assert not any(path.startswith("model.layers.0.") for path in places)
