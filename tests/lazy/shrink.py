"""Tiny versions of transformers configs: few layers, narrow, small vocabularies, whatever the model type.

Widths are divided by one factor, so that "heads times head size is hidden size" and equal widths on both sides of a connection
stay true; counts of layers, experts and tokens are cut. Where a constructor refuses a factor, take the next smaller one.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

FACTORS = (32, 16, 8, 4, 1)
LAYERS = 2
VOCABULARY = 128
POSITIONS = 64
EXPERTS = 4

_LAYERS = re.compile(
    r"(^|_)(n|num)_.*(layers?|blocks)$|(^|_)(layers|n_layer|depth|num_layers|n_blocks)$|^(encoder|decoder)_layers$"
)
_DEPTHS = re.compile(r"(^|_)(depths|layers|num_blocks|num_layers|layer_depths)$")
_VOCABULARY = re.compile(r"vocab|num_embeddings$|codebook_size$|num_codebook_vectors|num_classes$")
_TOKEN = re.compile(r"(token|_id|_idx|_index|_ids)(_id|_index|_idx)?$|token_id|_token_index")
_POSITIONS = re.compile(
    r"max_.*position|n_positions|n_ctx$|max_seq|max_length$|context_length$|max_source_positions|max_target_positions"
)
_EXPERTS = re.compile(r"(num|n)_(local_|routed_|total_)?experts$|moe_num_experts$|^num_experts$|^n_experts$")
_WIDTH = re.compile(
    r"hidden|dim|channels|embed|d_model|d_ff|ffn|intermediate|width|rank|inner|n_embd|features|filter|d_kv|d_inner|projection|_size$"
)
_NO_WIDTH = re.compile(
    r"^num_(?!filters)|^n_(?!embd|inner|hidden)|layers|heads|image|patch|kernel|stride|window|vocab|pool|crop|chunk|length|ratio|drop|prob|scale"
    r"|batch|frame|grid|block_size|spatial|temporal|mask|group|position|downsample|in_channels|(?<!_in)_channels_in|input_channels|num_channels"
    r"|sampling|dilation|pad|shape|resolution|tile|max_|min_|segment|temperature|theta|iteration"
)


_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_NEEDED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8, "context_length": 8},
    "informer": {"prediction_length": 8, "context_length": 8},
    "time_series_transformer": {"prediction_length": 8, "context_length": 8},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "cohere_compass": {"text_config.rope_parameters": _ROPE},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "neomme": {"layer_types": ["full_attention", "full_attention"]},
    "reformer": {"is_decoder": True},
    "timm_backbone": {"backbone": "resnet18"},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "gemma3n": {"text_config.num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "4/8"},
    "hiera": {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 16},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
}
"""What a constructor asks for and default configs do not say."""


def tiny_config(model_type: str, factor: int, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config of a model type with its numbers made small.

    Args:
        model_type: A key of `CONFIG_MAPPING`.
        factor: What widths are divided by.
        config_class: The class of config that the model wants: the type's own, or that of a part of it.

    Returns:
        A config of its own.
    """
    own = CONFIG_MAPPING[model_type]
    config = shrink((own if issubclass(own, config_class) else config_class)(), factor)
    for path, value in _NEEDED.get(model_type, {}).items():
        *parts, name = path.split(".")
        setattr(functools.reduce(getattr, parts, config), name, value)
    return config


def shrink(config: PreTrainedConfig, factor: int) -> PreTrainedConfig:
    """Make a config's numbers small, those of nested configs too, in place."""
    values = vars(config)
    width = values.get("hidden_size")
    layers = {value for name, value in values.items() if isinstance(value, int) and _LAYERS.search(name) and value > LAYERS}
    for name, value in list(values.items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, PreTrainedConfig):
            shrink(value, factor)
        elif isinstance(value, int):
            # What equals the width, such as the groups of a depthwise convolution, stays equal to it.
            _set(config, name, _small("hidden_size" if value == width else name, value, factor))
        elif isinstance(value, (list, tuple)) and value:
            _set(config, name, _small_list(name, value, factor, layers))
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, PreTrainedConfig):
                    shrink(inner, factor)
                elif isinstance(inner, int) and not isinstance(inner, bool) and isinstance(key, str):
                    value[key] = _small(key, inner, factor)
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int):
        if hidden % heads and "head_dim" not in values:
            _set(config, "num_attention_heads", math.gcd(hidden, heads))
        for name, value in {"head_dim": hidden // heads, "num_key_value_heads": heads}.items():
            if values.get(name, value) is None:
                _set(config, name, value)
    if values.get("vocab_size", 0) is None:
        _set(config, "vocab_size", VOCABULARY)
    return config


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, ValueError, TypeError):
        # A property without a setter, or a value that the config refuses: it stays as it is.
        return


def _small(name: str, value: int, factor: int) -> int:
    if _VOCABULARY.search(name):
        return min(value, VOCABULARY)
    if _TOKEN.search(name):
        return min(value, VOCABULARY - 1)
    if _EXPERTS.search(name):
        return min(value, EXPERTS)
    if _POSITIONS.search(name):
        return min(value, POSITIONS)
    if _LAYERS.search(name):
        return min(value, LAYERS)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value % factor == 0:
        return value // factor
    return value


def _small_list(name: str, value: Any, factor: int, layers: set[int]) -> Any:
    if all(isinstance(item, PreTrainedConfig) for item in value):
        for item in value:
            shrink(item, factor)
        return value
    if len(value) in layers and (len(value) > 4 or "layer" in name):
        value = value[:LAYERS]
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        # A list even where the class has a tuple, as a config that was read from JSON has.
        return [min(item, 1) if _DEPTHS.search(name) else _small(name, item, factor) for item in value]
    return value
