"""Recipes: what a tensor is, told from its name, and which format it gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import transformers

from qlazy.errors import UsageError
from qlazy.formats import Codebook4, Int4, Int8
from qlazy.planning.recipe import REASONS, Kind, Recipe, guess_kind, make_recipe, matches

SQUARE = (64, 64)

KINDS = {
    "linear": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.11.mlp.gate_proj.weight",
        "model.layers.3.mlp.gate_up_proj.weight",
        "model.layers.3.mlp.shared_expert.gate_proj.weight",
        "model.layers.3.mlp.shared_experts.down_proj.weight",
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
        "transformer.h.0.attn.c_attn.weight",
        "h.0.mlp.c_fc.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "lm_head.dense.weight",
        "model.layers.61.lm_head.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "model.decoder.layers.0.fc1.weight",
        "transformer.blocks.0.ffn.up_proj.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_gate_shexp.weight",
    ],
    "embedding": [
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens_per_layer.weight",
        "transformer.wte.weight",
        "shared.weight",
        "bert.embeddings.word_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "transformer.tokens_embed.weight",
        "backbone.embeddings.weight",
        "tok_embeddings.weight",
        "token_embd.weight",
    ],
    "positions": [
        "wpe.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "model.decoder.embed_positions.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "position_embd.weight",
    ],
    "head": [
        "lm_head.weight",
        "model.lm_head.weight",
        "language_model.lm_head.weight",
        "generator_lm_head.weight",
        "lm_head.decoder.weight",
        "decoder.lm_heads.3.weight",
        "embed_out.weight",
        "cls.predictions.decoder.weight",
        "transformer.output_layer.weight",
        "output.weight",
    ],
    "task": [
        "score.weight",
        "classifier.weight",
        "qa_outputs.weight",
        "proj_out.weight",
        "model.output.weight",
        "head.weight",
    ],
    "router": [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
    ],
    "experts": [
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "blk.0.ffn_up_exps.weight",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_kind_is_told_from_the_name(kind, name):
    assert guess_kind(name, SQUARE) == kind


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (64,)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("vision.patch_embedding.weight", (64, 3, 14, 14)),
        ("model.layers.0.mixer.A_log", (64, 16)),
        ("model.visual.pos_table", (64, 64)),
        ("model.layers.0.conv1d.weight", (64, 1, 4)),
    ],
)
def test_what_is_no_matrix_of_weights_is_left_alone(name, shape):
    assert guess_kind(name, shape) == "other"


def test_layers_that_a_family_keeps_in_float32_are_known():
    """By the class itself, whose list the model's own plan goes by."""
    for model_type, cls in (
        ("t5", "T5ForConditionalGeneration"),
        ("umt5", "UMT5Model"),
    ):
        assert getattr(transformers, cls)._keep_in_fp32_modules == ["wo"]
        name = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
        assert guess_kind(name, SQUARE, model_type) == "listed" and guess_kind(name, SQUARE, "llama") == "linear"
        assert guess_kind("decoder.block.0.layer.2.DenseReluDense.wi.weight", SQUARE, model_type) == "linear"


def test_heads_that_the_models_own_code_reads_are_known():
    """Every model in transformers whose forward pass touches `lm_head.weight`."""
    reads = re.compile(r"^(?!.*init\.)[^\"'`#]*self\.lm_head\.weight", re.MULTILINE)
    models = Path(transformers.__file__).parent / "models"
    found = {file.parent.name for file in models.glob("*/modeling_*.py") if reads.search(file.read_text(encoding="utf-8"))}
    assert {"mamba", "falcon_mamba"} <= found
    for model_type in found:
        assert guess_kind("lm_head.weight", SQUARE, model_type) == "read", model_type
        assert guess_kind("backbone.layers.0.mixer.in_proj.weight", SQUARE, model_type) == "linear"
    assert Recipe().format_for("read", "lm_head.weight", 64, 64) == (None, REASONS["read"])


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("lm_head", "lm_head.weight", True),
        ("mlp.gate", "model.layers.0.mlp.gate.weight", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj.weight", False),
        ("gate_proj", "model.layers.0.mlp.gate_proj", True),
        ("proj", "model.layers.0.mlp.gate_proj", False),
        ("*_proj", "model.layers.0.mlp.gate_proj", True),
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("layers.[01].mlp", "model.layers.1.mlp.up_proj", True),
        ("layers.[01].mlp", "model.layers.2.mlp.up_proj", False),
        ("layers.*.down_proj", "model.layers.7.mlp.down_proj", True),
        ("layers.?.mlp", "model.layers.12.mlp.up_proj", False),
        ("", "model.layers.0.mlp.up_proj", False),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", True),
        ("Lm_Head", "lm_head.weight", False),
    ],
)
def test_patterns_match_whole_components(pattern, name, hit):
    assert matches(pattern, name) is hit


def test_modules_to_not_convert_adds_to_the_defaults():
    recipe = make_recipe(modules_to_not_convert=["mlp.down_proj"])
    down, up = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert recipe.format_for("linear", down, 64, 64) == (None, REASONS["listed"])
    assert recipe.format_for("linear", up, 64, 64) == (Int4(), "")
    for kind in get_args(Kind):
        if kind in ("linear", "experts", "head"):
            continue
        fmt, reason = recipe.format_for(kind, up, 64, 64)
        assert fmt is None and reason == REASONS[kind]


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"bits": 8, "group_size": 64}, {"format": "nf4"}, {"format": "fp4"}])
def test_an_output_head_has_8_bits_under_every_recipe(options):
    recipe = make_recipe(**options)
    assert recipe.format_for("head", "lm_head.weight", 100, 64) == (Int8(), REASONS["head"])
    assert recipe.format_for("linear", "a.b.weight", 100, 64)[1] == ""


@pytest.mark.parametrize(("bits", "fmt"), [(4, Int4()), (8, Int8()), (16, None)])
def test_bits_of_the_head(bits, fmt):
    recipe = make_recipe(format="nf4", head_bits=bits)
    assert recipe == Recipe(format=Codebook4(), head=fmt)
    assert recipe.format_for("head", "lm_head.weight", 100, 64) == (fmt, REASONS["head"])
    assert recipe.format_for("linear", "a.b.weight", 100, 64) == (Codebook4(), "")


def test_a_group_that_does_not_divide_the_columns_of_a_head_becomes_the_row():
    assert make_recipe(head_bits=4).format_for("head", "lm_head.weight", 100, 40)[0] == Int4(group_size=-1)


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_out.weight", "output.weight", "decoder.lm_heads.0.weight"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_modules_to_not_convert_wins_over_the_head_whatever_it_is_called(name, bits):
    recipe = make_recipe(head_bits=bits, modules_to_not_convert=["lm_head"])
    assert recipe.format_for("head", name, 100, 64) == (None, REASONS["listed"])
    assert recipe.format_for("linear", "model.layers.0.mlp.up_proj.weight", 64, 64)[0] == Int4()
    by_its_name = make_recipe(head_bits=bits, modules_to_not_convert=[name.removesuffix(".weight")])
    assert by_its_name.format_for("head", name, 100, 64) == (None, REASONS["listed"])


@pytest.mark.parametrize(
    ("options", "fmt"),
    [
        ({}, Int4(group_size=32, symmetric=False)),
        ({"bits": 8}, Int8(group_size=-1)),
        ({"bits": 8, "group_size": 64}, Int8(group_size=64)),
        ({"format": "int8", "bits": 4}, Int8()),
        ({"format": "int8"}, Int8()),
        ({"group_size": 128, "symmetric": True}, Int4(group_size=128, symmetric=True)),
        ({"group_size": -1}, Int4(group_size=-1)),
        ({"symmetric": False}, Int4()),
        ({"format": "nf4"}, Codebook4(kind="nf4", double_quant=True)),
        ({"format": "nf4", "group_size": 64}, Codebook4()),
        ({"format": "fp4", "double_quant": False}, Codebook4(kind="fp4", double_quant=False)),
    ],
)
def test_options_make_a_format(options, fmt):
    assert make_recipe(**options) == Recipe(format=fmt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"bits": 16}, "bits is 16"),
        ({"format": "int5"}, "no format 'int5'"),
        ({"group_size": 16}, "group_size is 16"),
        ({"group_size": 0}, "group_size is 0"),
        ({"format": "nf4", "group_size": 32}, "nf4 takes 64"),
        ({"format": "fp4", "group_size": -1}, "fp4 takes 64"),
        ({"bits": 8, "symmetric": True}, "symmetric belongs to int4"),
        ({"bits": 8, "format": "nf4"}, "bits is 8, but nf4 has 4"),
        ({"format": "nf4", "symmetric": False}, "symmetric belongs to int4"),
        ({"head_bits": 2}, "head_bits is 2"),
        ({"head_bits": 0}, "head_bits is 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_with_what_can(options, words):
    with pytest.raises(UsageError, match=words) as caught:
        make_recipe(**options)
    assert caught.value.hint


def test_a_group_that_does_not_divide_the_columns_becomes_the_row():
    recipe = make_recipe(group_size=64)
    assert recipe.format_for("linear", "a.weight", 64, 128)[0] == Int4(group_size=64)
    assert recipe.format_for("linear", "a.weight", 64, 96)[0] == Int4(group_size=-1)
    assert make_recipe(bits=8, group_size=32).format_for("linear", "a.weight", 64, 33)[0] == Int8()
