"""LoRA adapters of peft: added lazily they keep their exact init, and stay in full precision on top of low-bit layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlazy
from qlazy.layers.quant_linear import QuantLinear
from qlazy.lazy import lazy_build, materialize
from tests.lazy.compare import compare

peft = pytest.importorskip("peft", reason="needs peft: pip install --no-deps peft", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **options)


def lora_on_low_bits() -> Any:
    config = lora()
    # peft knows torch's layers by their class; its own LoRA of a linear layer takes any that has the shape of one.
    config._register_custom_module({QuantLinear: peft.tuners.lora.Linear})
    return config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_model_with_adapters_is_that_of_eager_construction(options: dict[str, Any]):
    result = compare(lambda: peft.get_peft_model(LlamaForCausalLM(CONFIG), lora(**options)))
    assert result.status == "equal" and not result.undetermined and not result.real, result


@pytest.mark.parametrize("format", ["int4", "nf4", "int8"])
def test_adapters_on_low_bit_layers(tmp_path: Path, format: str):
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path)

    def load() -> Any:
        return qlazy.load_quantized(tmp_path, format=format, device_map="cpu")

    base = load()
    before = {path: held(layer) for path, layer in base.named_modules() if isinstance(layer, QuantLinear)}
    torch.manual_seed(3)
    eager = dict(peft.get_peft_model(load(), lora_on_low_bits()).named_parameters())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with lazy_build():
        model = peft.get_peft_model(base, lora_on_low_bits())
    assert torch.equal(torch.get_rng_state(), state)
    adapters = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 12 and all(tensor.is_meta for tensor in adapters.values())
    materialize(model)
    for name, tensor in adapters.items():
        assert torch.equal(tensor, eager[name]) and tensor.requires_grad and tensor.is_floating_point()
        assert bool(tensor.any()) == ("lora_A" in name), name
    after = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert len(after) == len(before) and not any("lora_" in path for path in after)
    for path, layer in after.items():
        kept = before[path.removeprefix("base_model.model.").removesuffix(".base_layer")]
        assert all(torch.equal(tensor, kept[key]) for key, tensor in held(layer).items()), path
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, load()(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert all(tensor.grad is not None for tensor in adapters.values())
    assert any(bool(tensor.grad.any()) for name, tensor in adapters.items() if "lora_B" in name)


def held(layer: nn.Module) -> dict[str, Tensor]:
    found = layer.state_dict() | {key: value for key, value in vars(layer).items() if isinstance(value, Tensor)}
    return {key: value.clone() for key, value in found.items()}
