"""KV cache and activations: formulas against published numbers, and against what transformers really caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from qlazy.planning.demand import (
    _DEFAULTS,
    _SLIDING_PATTERN,
    activation_bytes,
    buffers,
    kv_cache_bytes,
    layer_kv_bytes,
    text_config,
)

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOKENS = 40

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TINY, "num_hidden_layers": 3}),
    "head_dim": ("Qwen3ForCausalLM", "Qwen3Config", {**TINY, "num_hidden_layers": 2, "head_dim": 32}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mla": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TINY,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 24,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "linear": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **TINY,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
        },
    ),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0},
    ),
}
SLIDING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TINY, "num_hidden_layers": 2, "sliding_window": 16}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**TINY, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 16},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**TINY, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 16},
    ),
}


def run(model: str, config: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Config as saved, and the cache after a forward pass of `TOKENS` tokens."""
    made = getattr(transformers, config)(**options)
    torch.manual_seed(0)
    built = getattr(transformers, model)(made).to(torch.bfloat16).eval()
    ids = torch.arange(TOKENS)[None] + 1
    inputs = {"input_ids": ids, "use_cache": True}
    if made.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return made.to_dict(), built(**inputs).past_key_values


def tensors(cache: Any) -> list[torch.Tensor]:
    """Every tensor that a cache holds, but for counters."""
    caches = [getattr(cache, name) for name in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, name)]
    found = []
    for layer in [layer for part in (caches or [cache]) for layer in part.layers]:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            found += [v for v in values if isinstance(v, torch.Tensor) and v.dim() > 1]
    return found


def test_llama_3_8b_at_8192_tokens_is_one_gibibyte():
    assert kv_cache_bytes(LLAMA_3_8B, 8192, "bfloat16") == 1 << 30
    assert kv_cache_bytes(LLAMA_3_8B, 8192, "float32") == 2 << 30
    assert layer_kv_bytes(LLAMA_3_8B, 8192, "bfloat16") == [32 << 20] * 32


@pytest.mark.parametrize("name", MODELS)
def test_cache_is_what_transformers_holds(name):
    config, cache = run(*MODELS[name])
    assert kv_cache_bytes(config, TOKENS, "bfloat16") == sum(t.nbytes for t in tensors(cache))


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_keep_one_token_less_than_their_window(name):
    config, cache = run(*SLIDING[name])
    per_token = layer_kv_bytes(config, 1, "bfloat16")
    sliding = [layer.is_sliding for layer in cache.layers]
    assert any(sliding)
    expected = [kv * (15 if slides else TOKENS) for kv, slides in zip(per_token, sliding, strict=True)]
    assert [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers] == expected
    assert layer_kv_bytes(config, TOKENS, "bfloat16") == [
        kv * (16 if slides else TOKENS) for kv, slides in zip(per_token, sliding, strict=True)
    ]


@pytest.mark.parametrize("name", SLIDING)
def test_what_sliding_layers_hold_after_a_prompt_is_planned(name):
    """They keep a view, and with it the keys and values of the whole prompt, until the next token."""
    config, cache = run(*SLIDING[name])
    held = sum(t.untyped_storage().nbytes() for t in tensors(cache))
    per_token = sum(layer_kv_bytes(config, 1, "bfloat16"))
    assert held == per_token * TOKENS > kv_cache_bytes(config, TOKENS, "bfloat16")
    without = {**config, "sliding_window": None}
    extra = activation_bytes(config, TOKENS, "bfloat16") - activation_bytes(without, TOKENS, "bfloat16")
    assert kv_cache_bytes(config, TOKENS, "bfloat16") + extra == held


def test_layers_without_types_in_an_old_config_are_those_of_the_class():
    for model_type, every in _SLIDING_PATTERN.items():
        cls = {"gemma2": transformers.Gemma2Config, "gemma3_text": transformers.Gemma3TextConfig}[model_type]
        made = cls(num_hidden_layers=13, sliding_window=16)
        old = {key: value for key, value in made.to_dict().items() if key not in ("layer_types", "_sliding_window_pattern")}
        assert layer_kv_bytes(old, 100, "bfloat16") == layer_kv_bytes(made.to_dict(), 100, "bfloat16"), every
    made = transformers.Qwen3NextConfig(num_hidden_layers=8)
    old = {key: value for key, value in made.to_dict().items() if key != "layer_types"} | {"full_attention_interval": 4}
    assert layer_kv_bytes(old, 5000, "bfloat16") == layer_kv_bytes(made.to_dict(), 5000, "bfloat16")


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        # A window that is switched off, or that this type of model does not slide by, counts for nothing.
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False}, 8192),
        ({"model_type": "llama", "sliding_window": 1024}, 8192),
        ({"model_type": "mistral", "sliding_window": None}, 8192),
        ({"model_type": "mistral", "sliding_window": 1024}, 1024),
        ({"model_type": "phi3", "sliding_window": 1024}, 1024),
        ({"model_type": "mistral", "sliding_window": 1 << 20}, 8192),
        ({"layer_types": ["chunked_attention"] * 32, "attention_chunk_size": 2048}, 2048),
        ({"layer_types": ["full_attention"] * 31, "sliding_window": 1024}, 8192),
    ],
)
def test_windows(more, tokens):
    assert kv_cache_bytes({**LLAMA_3_8B, **more}, 8192, "bfloat16") == tokens * (1 << 17)


@pytest.mark.parametrize(
    ("more", "heads"),
    [
        ({"num_key_value_heads": [2] * 16 + [4] * 16}, 96),
        ({"num_key_value_heads": [8] * 31 + [0]}, 248),
        # A list of another length: its largest, for each layer.
        ({"num_key_value_heads": [2, 4]}, 128),
        ({"num_key_value_heads": None}, 1024),
        ({"num_key_value_heads": None, "multi_query": True}, 32),
        ({"num_key_value_heads": None, "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8}, 256),
        ({"layer_types": ["mamba"] * 24 + ["full_attention"] * 8}, 64),
    ],
)
def test_heads_may_differ_by_layer(more, heads):
    assert kv_cache_bytes({**LLAMA_3_8B, **more}, 100, "bfloat16") == heads * 2 * 128 * 2 * 100


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config", "decoder"])
def test_the_language_model_may_be_nested(key):
    nested = {"model_type": "vlm", "vision_config": {"hidden_size": 8, "num_hidden_layers": 2}, key: LLAMA_3_8B}
    assert kv_cache_bytes(nested, 8192, "bfloat16") == 1 << 30
    assert activation_bytes(nested, 8192, "bfloat16") == activation_bytes(LLAMA_3_8B, 8192, "bfloat16")


def test_what_a_nested_config_leaves_out_is_what_its_class_takes():
    classes = {
        "gemma3_text": transformers.Gemma3TextConfig,
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
    }
    assert classes.keys() == _DEFAULTS.keys()
    for model_type, cls in classes.items():
        made = cls().to_dict()
        assert {key: made[key] for key in _DEFAULTS[model_type]} == _DEFAULTS[model_type]
        short = {"text_config": {"model_type": model_type, "sliding_window": None}}
        assert kv_cache_bytes(short, 64, "bfloat16") == kv_cache_bytes({**made, "sliding_window": None}, 64, "bfloat16") > 0
    assert text_config({"text_config": {"model_type": "llama", "hidden_size": 5}})["hidden_size"] == 5


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 2}, {**LLAMA_3_8B, "num_attention_heads": "many"}])
def test_a_config_without_heads_has_no_cache(config):
    assert kv_cache_bytes(config, 100, "bfloat16") == 0
    assert activation_bytes(config, 100, "bfloat16") > 0


def test_activations_grow_with_the_prompt():
    sizes = [activation_bytes(LLAMA_3_8B, length, "bfloat16") for length in (1, 1024, 8192)]
    assert sizes == sorted(sizes) and sizes[2] > 4 * sizes[1]


def test_buffers_of_positions():
    shapes = {"model.embed_tokens.weight": (10, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4)}
    assert buffers(LLAMA_3_8B, shapes) == {
        "rotary_emb.inv_freq": (64, "float32"),
        "rotary_emb.original_inv_freq": (64, "float32"),
    }
    assert buffers(LLAMA_3_8B, {"transformer.wpe.weight": (1024, 64)}) == {}
    assert buffers(LLAMA_3_8B, {"embeddings.position_embeddings.weight": (512, 64)}) == {
        "position_ids": (512, "int64"),
        "token_type_ids": (512, "int64"),
    }
    assert buffers(LLAMA_3_8B, {"a.relative_attention_bias.weight": (32, 8)}) == {} == buffers({}, shapes)
