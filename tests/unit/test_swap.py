"""The swap: which layers become low-bit ones, without storage, and a plan that counts every tensor of the model once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PreTrainedModel,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.pytorch_utils import Conv1D

from qlazy.formats import Codebook4, Int4, Int8
from qlazy.layers.linear import Int4Linear, Int8Linear
from qlazy.layers.quant_linear import QuantLinear
from qlazy.layers.quant_weight import QuantWeight
from qlazy.lazy import lazy_build
from qlazy.model_entries import entries_of
from qlazy.swap import is_replaced, quant_layer, swap_parameter

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def placeholder(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with no_init_weights(), no_tie_weights(), lazy_build():
        return cls._from_config(config, dtype=torch.bfloat16)


def entries(model: PreTrainedModel, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    read = {name: 1 for name in model.state_dict() if name not in without}
    found = entries_of(model, read)
    assert len({entry.name for entry in found}) == len(found)
    return {entry.name: entry for entry in found}


def test_kinds_of_a_llama():
    found = entries(placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False)))
    linear = {name for name, entry in found.items() if entry.kind == "linear"}
    assert len(linear) == 14 and all(name.endswith("_proj.weight") for name in linear)
    assert found["lm_head.weight"].kind == "head" and found["model.embed_tokens.weight"].kind == "embedding"
    assert found["model.norm.weight"].kind == "other"
    buffer = found["model.rotary_emb.inv_freq"]
    assert (buffer.kind, buffer.dtype, buffer.source_nbytes) == ("other", "float32", 0)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tie_is_counted_once_under_the_name_that_is_read(absent):
    model = placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True))
    found = entries(model, without=(absent,))
    kept = {"lm_head.weight", "model.embed_tokens.weight"} - {absent}
    assert kept <= set(found) and absent not in found
    assert found[kept.pop()].kind == ("embedding" if absent == "lm_head.weight" else "tied")


def test_a_tie_that_is_stored_twice_is_left_until_it_is_known_whether_both_are_the_same():
    found = entries(placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)))
    assert (found["lm_head.weight"].kind, found["model.embed_tokens.weight"].kind) == ("tied", "embedding")


def test_an_output_head_is_told_by_the_model_and_not_by_its_name():
    model = placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False))
    model.add_module("to_words", model.lm_head)
    del model.lm_head
    assert entries(model)["to_words.weight"].kind == "linear"
    model.get_output_embeddings = lambda: model.to_words
    assert entries(model)["to_words.weight"].kind == "head"
    assert entries(model, without=("to_words.weight",))["to_words.weight"].kind == "other"


def test_several_output_heads_are_each_one():
    sizes = {"vocab_size": 32, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = entries(placeholder(MusicgenForCausalLM, MusicgenDecoderConfig(**sizes, num_codebooks=3)))
    assert [name for name, entry in found.items() if entry.kind == "head"] == [f"lm_heads.{i}.weight" for i in range(3)]


def test_heads_of_other_kinds():
    """Of a task: small, left alone. Of an encoder: as any output head, where it is not tied. One that the code reads: left."""
    shape = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    score = entries(placeholder(LlamaForSequenceClassification, LlamaConfig(**SMALL, pad_token_id=0)))["score.weight"]
    assert score.kind == "task"
    for tied, kind in ((True, "tied"), (False, "head")):
        found = entries(placeholder(BertForMaskedLM, BertConfig(**shape, tie_word_embeddings=tied)))
        assert found["cls.predictions.decoder.weight"].kind == kind
    neox = placeholder(GPTNeoXForCausalLM, GPTNeoXConfig(**shape, tie_word_embeddings=False))
    (head,) = [name for name, entry in entries(neox).items() if entry.kind == "head"]
    assert neox.get_submodule(head.removesuffix(".weight")) is neox.get_output_embeddings()
    mamba = placeholder(
        MambaForCausalLM, MambaConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1, tie_word_embeddings=False)
    )
    assert entries(mamba)["lm_head.weight"].kind == "read"


def test_a_head_of_a_class_of_its_own_is_a_head_and_the_output_of_torchs_attention_is_left_alone():
    class Special(nn.Linear):
        pass

    model = placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False))
    model.lm_head = Special(64, 32, bias=False, device="meta")
    assert entries(model)["lm_head.weight"].kind == "head"
    model.model.layers[0].mlp = nn.MultiheadAttention(64, 2, device="meta")
    assert entries(model)["model.layers.0.mlp.out_proj.weight"].kind == "other"


def test_a_weight_that_is_in_no_file_is_left_for_transformers():
    model = placeholder(LlamaForCausalLM, LlamaConfig(**SMALL))
    name = "model.layers.0.mlp.up_proj.weight"
    assert entries(model)[name].kind == "linear"
    assert entries(model, without=(name,))[name].kind == "other"


def test_conv1d_is_counted_by_rows_and_columns():
    found = entries(placeholder(GPT2LMHeadModel, GPT2Config(vocab_size=32, n_positions=8, n_embd=64, n_layer=1, n_head=2)))
    entry = found["transformer.h.0.attn.c_attn.weight"]
    assert (entry.kind, entry.shape) == ("linear", (192, 64))


def test_what_the_model_keeps_in_float32_is_left_alone():
    found = entries(placeholder(T5, T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=2)))
    kept = {name for name, entry in found.items() if ".wo." in name}
    assert len(kept) == 2 and all(found[name].kind == "listed" for name in kept)
    assert found["encoder.block.0.layer.1.DenseReluDense.wi.weight"].kind == "linear"


def test_a_subclass_of_linear_stays_and_has_its_weight_packed():
    class Special(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * (x @ self.weight.T)

    model = placeholder(LlamaForCausalLM, LlamaConfig(**SMALL))
    special = model.model.layers[0].mlp.up_proj = Special(64, 96, bias=False, device="meta")
    found = entries(model)
    special_entry, plain_entry = (found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2))
    assert special_entry.kind == plain_entry.kind == "linear"
    assert not is_replaced(model, special_entry) and is_replaced(model, plain_entry)
    swap_parameter(model, special_entry.name, Int8(), torch.float32)
    assert isinstance(special.weight, QuantWeight) and not list(special.parameters())
    special.weight.allocate("cpu")
    special.weight.fill(torch.randn(96, 64))
    x = torch.randn(3, 64)
    torch.testing.assert_close(special(x), 2 * (x @ special.weight.dequantize().T), rtol=1e-4, atol=1e-4)


def test_linear_layers_that_share_a_weight_share_the_packed_one():
    model = placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False))
    one, other = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    model.all_tied_weights_keys = {other: one}
    found = entries(model, without=(other,))
    assert found[one].kind == "linear" and other not in found and not is_replaced(model, found[one])
    swap_parameter(model, one, Int4(), torch.bfloat16)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    assert first.weight is second.weight and not model.all_tied_weights_keys


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_quant_layer_of_a_linear(bias, training):
    linear = nn.Linear(64, 128, bias=bias, device="meta").train(training)
    layer = quant_layer(linear, Int4(), torch.bfloat16)
    assert type(layer) is Int4Linear and (layer.in_features, layer.out_features) == (64, 128)
    assert layer.bias is linear.bias and layer.training is training and not layer.transposed
    assert all(buffer.is_meta for buffer in layer.buffers())


def test_quant_layer_of_a_conv1d():
    with torch.device("meta"):
        conv = Conv1D(128, 64)
    layer = quant_layer(conv, Int8(), torch.bfloat16)
    assert type(layer) is Int8Linear and (layer.in_features, layer.out_features) == (64, 128)
    assert layer.transposed and layer.bias is conv.bias


def test_no_format_takes_storage_before_it_is_told():
    for fmt in (Int4(), Int8(), Codebook4()):
        layer = quant_layer(nn.Linear(64, 128, device="meta"), fmt, torch.bfloat16)
        assert isinstance(layer, QuantLinear) and all(tensor.is_meta for tensor in layer.state_dict().values())
