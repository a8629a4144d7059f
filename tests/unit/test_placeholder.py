"""The placeholder: the class that the config names, no storage, real buffers, and an error that names what is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlazy.errors import UnsupportedModel
from qlazy.placeholder import build_placeholder, load_config
from qlazy.sources.source import Source

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
}


def source_of(folder: Path, config: dict[str, Any]) -> Source:
    (folder / "config.json").write_text(json.dumps(config))
    return Source(
        model_id="tiny",
        resolved=str(folder),
        revision=None,
        kind="safetensors",
        folder=folder,
        gguf_file=None,
        config=config,
        tensors={},
    )


def build(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **options: Any) -> PreTrainedModel:
    return build_placeholder(source_of(folder, config), dtype, **options)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"]
)
def test_class_is_the_one_that_the_config_names(tmp_path, architecture):
    model = build(tmp_path, LLAMA | {"architectures": [architecture]})
    assert type(model).__name__ == architecture


def test_first_known_class_is_taken_and_the_causal_one_where_none_is_named(tmp_path):
    assert type(build(tmp_path, LLAMA | {"architectures": ["Fancy", "LlamaModel"]})).__name__ == "LlamaModel"
    assert type(build(tmp_path, LLAMA | {"architectures": None})).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["FancyForCausalLM", "LlamaConfig", "AutoModel", "pipeline"])
def test_a_name_that_is_no_model_of_transformers(tmp_path, name):
    with pytest.raises(UnsupportedModel, match=rf"tiny: transformers 5\.\S+ has no architecture {name}"):
        build(tmp_path, LLAMA | {"architectures": [name]})


def test_parameters_have_no_storage_and_buffers_are_those_of_eager_building(tmp_path):
    model = build(tmp_path, LLAMA)
    eager = LlamaForCausalLM._from_config(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}))
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not model.training
    wanted = dict(eager.named_buffers())
    assert wanted and {name for name, _ in model.named_buffers()} == set(wanted)
    assert all(buffer.dtype == torch.float32 and torch.equal(buffer, wanted[name]) for name, buffer in model.named_buffers())


def test_ties_are_not_made_yet(tmp_path):
    names = set(build(tmp_path, LLAMA | {"tie_word_embeddings": True}).state_dict())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names


def test_what_the_class_keeps_in_float32_is_so_by_its_own_rule(tmp_path):
    for dtype, kept in [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]:
        model = build(tmp_path, T5, dtype)
        dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in model.named_parameters()}
        assert dtypes["wo"] == kept and dtypes["wi"] == dtype
        assert all(parameter.is_meta for parameter in model.parameters())


def test_default_dtype_and_random_state_are_left_as_they_were(tmp_path):
    before = torch.random.get_rng_state()
    build(tmp_path, LLAMA)
    assert torch.get_default_dtype() == torch.float32 and torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UnsupportedModel):
        build(tmp_path, LLAMA | {"hidden_size": -16})
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.nn.init.ones_(torch.zeros(2)), torch.ones(2)), "transformers' stand-ins are gone"


def test_attention_is_as_asked_and_an_unknown_one_is_named(tmp_path):
    assert build(tmp_path, LLAMA, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(UnsupportedModel, match=r"cannot build LlamaForCausalLM.*fancy"):
        build(tmp_path, LLAMA, attn_implementation="fancy")


@pytest.mark.parametrize(
    "changes", [{"model_type": "fancy"}, {"hidden_size": "many"}, {"num_attention_heads": 0}, {"rope_parameters": 3}], ids=str
)
def test_a_config_that_transformers_cannot_read(tmp_path, changes):
    config = LLAMA | changes
    with pytest.raises(UnsupportedModel, match=rf"cannot read the config of model type '{config['model_type']}': ."):
        load_config(source_of(tmp_path, config))


def test_code_of_the_folder_is_not_run_unasked(tmp_path):
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('it was run')")
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    with pytest.raises(UnsupportedModel, match="trust_remote_code"):
        build(tmp_path, config)


OWN = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width=4, **more):
        super().__init__(**more)
        self.width = width


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.width, config.width)
        self.post_init()
"""


def test_code_of_the_folder_is_run_when_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(OWN)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes, "width": 6}
    model = build(folder, config, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel" and model.linear.weight.is_meta and model.linear.weight.shape == (6, 6)
