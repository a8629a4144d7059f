"""qlazy as a transformers quantizer: the same layers as its own load, and a clear refusal of what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import qlazy
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel, UsageError
from qlazy.formats import Codebook4, Int4, Int8
from qlazy.hf import QlazyQuantizer
from qlazy.hf_config import QlazyConfig
from qlazy.layers.quant_linear import QuantLinear
from qlazy.planning.recipe import Recipe, make_recipe

KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Short parallel regions are slow on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=128, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    return folder


def load(folder: Path, config: QlazyConfig | None = None, **options: Any) -> Any:
    config = config or QlazyConfig(bits=4)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config, **options)


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


FORMATS: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 4, "group_size": 64, "symmetric": True},
    {"bits": 8},
    {"format": "nf4"},
    {"format": "fp4", "double_quant": False},
    {"bits": 4, "modules_to_not_convert": ["down_proj"]},
    {"bits": 4, "modules_to_not_convert": ["lm_head"]},
    {"format": "nf4", "head_bits": 4},
    {"bits": 4, "head_bits": 16},
]


DEVICES: list[Any] = ["cpu", {"": "cpu"}]


@pytest.mark.parametrize("options, device_map", [*((o, None) for o in FORMATS), *(({}, d) for d in DEVICES)], ids=str)
def test_same_bytes_and_logits_as_load_quantized(llama, options, device_map):
    theirs = load(llama, QlazyConfig(**options), device_map=device_map)
    ours = qlazy.load_quantized(llama, device_map="cpu", **options)
    assert set(layers(theirs)) == set(layers(ours)) and layers(ours)
    left, right = tensors(theirs), tensors(ours)
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert not any(parameter.is_meta for parameter in theirs.parameters())


def test_an_untied_head_has_8_bits_and_the_saved_config_says_so(llama, tmp_path):
    model = load(llama, QlazyConfig(format="nf4"))
    assert model.lm_head.format == Int8() and model.model.layers[0].mlp.up_proj.format == Codebook4()
    model.config.save_pretrained(tmp_path)
    saved = LlamaConfig.from_pretrained(tmp_path).quantization_config
    assert saved["head_bits"] == 8 and QlazyConfig.from_dict(saved).recipe() == make_recipe(format="nf4")
    kept = load(llama, QlazyConfig(modules_to_not_convert=["lm_head"]))
    stored = load_file(llama / "model.safetensors")["lm_head.weight"]
    assert type(kept.lm_head) is nn.Linear and torch.equal(kept.lm_head.weight, stored)


def test_a_head_that_is_in_no_file_is_an_error(llama, tmp_path):
    folder = damaged(llama, tmp_path / "headless", {})
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint, match=r"'lm_head.weight' is one"):
        load(folder)


def test_conv1d_and_ties(gpt2):
    theirs, ours = load(gpt2), qlazy.load_quantized(gpt2, device_map="cpu")
    assert set(layers(theirs)) == set(layers(ours)) and len(layers(ours)) == 4
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([[3, 4]])).logits, ours(torch.tensor([[3, 4]])).logits)


def test_an_auto_class_reads_the_options_from_a_dict(llama):
    config = {"quant_method": "qlazy", "bits": 8}
    made = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16, quantization_config=config)
    assert all(isinstance(layer.format, Int8) for layer in layers(made).values()) and len(layers(made)) == 15


def damaged(folder: Path, to: Path, values: dict[str, Tensor]) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    save_file(load_file(folder / "model.safetensors") | values, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [KEY, "model.norm.weight"])
@pytest.mark.parametrize("options", [{"bits": 4}, {"format": "nf4"}], ids=str)
def test_what_is_not_finite_is_named(llama, tmp_path, options, key, value):
    weight = load_file(llama / "model.safetensors")[key]
    weight.view(-1)[-1] = value
    with pytest.raises(CorruptCheckpoint, match=f"'{re.escape(key)}' holds a NaN or an infinity"):
        load(damaged(llama, tmp_path / "bad", {key: weight}), QlazyConfig(**options))


def test_a_saved_config_says_what_other_libraries_read(llama, tmp_path):
    model = load(llama)
    model.save_pretrained(tmp_path / "saved")
    said = LlamaConfig.from_pretrained(tmp_path / "saved").quantization_config
    assert said["quant_method"] == "compressed-tensors" and "_saved" not in said
    assert "_saved" not in QlazyConfig().to_dict() and QlazyConfig().to_dict()["quant_method"] == "qlazy"


def test_casting_the_model_is_refused(llama):
    model = qlazy.load_quantized(llama, device_map="cpu")
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="quantized"):
            cast()


def test_a_folder_saved_by_qlazy_is_refused(llama, tmp_path):
    folder = damaged(llama, tmp_path / "own", {})
    config = LlamaConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "qlazy", "bits": 4}
    config.save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="says quant_method 'qlazy'"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_marks_of_a_loaded_model(llama):
    model = qlazy.load_quantized(llama, device_map="cpu", format="nf4")
    assert model.is_quantized and model.quantization_method == "qlazy" and isinstance(model.hf_quantizer, QlazyQuantizer)
    assert model.config.quantization_config.recipe().format == Codebook4(kind="nf4")
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()


RECIPES = [
    Recipe(),
    Recipe(format=Int4(group_size=128, symmetric=True)),
    Recipe(format=Int4(group_size=-1)),
    Recipe(format=Int8(group_size=32), modules_to_not_convert=("a", "b.*")),
    Recipe(format=Codebook4(kind="fp4", double_quant=False)),
    Recipe(format=Codebook4(), head=None),
    Recipe(format=Int8(group_size=64), head=Int4()),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.format.name)
def test_config_and_recipe_are_two_forms_of_one_thing(recipe):
    config = QlazyConfig.of_recipe(recipe)
    assert config.recipe() == recipe
    assert QlazyConfig.from_dict(config.to_dict()).recipe() == recipe
    assert '"quant_method": "qlazy"' in config.to_json_string()


def test_config_refuses_what_cannot_be_meant():
    with pytest.raises(TypeError, match="'group'"):
        QlazyConfig(group=32)
    with pytest.raises(UsageError, match="bits is 5"):
        QlazyConfig(bits=5)


def test_transformers_knows_the_name():
    assert AUTO_QUANTIZER_MAPPING["qlazy"] is QlazyQuantizer and AUTO_QUANTIZATION_CONFIG_MAPPING["qlazy"] is QlazyConfig


def test_packed_embeddings_are_refused_in_place_of_left_out():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=0))
    quantizer = QlazyQuantizer(QlazyConfig(embedding_bits=8))
    with pytest.raises(UsageError, match="embedding_bits is 8") as caught:
        quantizer._process_model_before_weight_loading(model)
    assert "load_quantized" in str(caught.value.hint)


def test_experts_are_refused_in_place_of_left_in_16_bits(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"leaves 2 weights .* 'model\.layers\.0\.mlp\.experts\.gate_up_proj' is one"
    ) as caught:
        load(tmp_path)
    assert "load_quantized" in str(caught.value.hint) and "modules_to_not_convert" in str(caught.value.hint)
    kept = load(tmp_path, QlazyConfig(modules_to_not_convert=["experts"]))
    assert isinstance(kept.model.layers[0].self_attn.q_proj, QuantLinear)
    assert isinstance(kept.model.layers[0].mlp.experts.down_proj, nn.Parameter)


def test_a_table_that_module_bits_names_is_left_with_a_warning():
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    quantizer = QlazyQuantizer(QlazyConfig(module_bits={"embed_tokens": 8}))
    with pytest.warns(UserWarning, match=r"leaves 1 weights .* 'model\.embed_tokens\.weight' is one.*load_quantized"):
        quantizer._process_model_before_weight_loading(model)
