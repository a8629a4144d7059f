"""What running a model takes beside its weights: KV cache and activations, from its config alone. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlazy.formats import ITEMSIZE


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model.

    Args:
        config: A config.json.
    Returns:
        Its `text_config`, `llm_config` or `decoder` where it nests one, with what that leaves out; else itself.
    """
    for key in ("text_config", "llm_config", "language_config", "decoder"):
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return {**_DEFAULTS.get(str(nested.get("model_type")), {}), **nested}
    return config


def kv_cache_bytes(config: Mapping[str, Any], max_model_len: int, dtype: str) -> int:
    """Bytes of keys and values for one sequence: the sum of `layer_kv_bytes`.

    Args:
        config: A config.json.
        max_model_len: Tokens.
        dtype: Dtype of the cache.
    Returns:
        Bytes; 0 where the config names no attention heads.
    """
    return sum(layer_kv_bytes(config, max_model_len, dtype))


def layer_kv_bytes(config: Mapping[str, Any], max_model_len: int, dtype: str) -> list[int]:
    """Bytes of keys and values of each layer, for one sequence.

    Key-value heads x (key + value dimension) x tokens x itemsize; layers with a sliding window hold at most the window, layers
    of linear attention a state of fixed size, decoders with cross-attention as much again for the encoder's tokens; of latent
    attention (DeepSeek) only the latents are cached. The small states of Mamba layers are not counted.

    Args:
        config: A config.json.
        max_model_len: Tokens.
        dtype: Dtype of the cache.
    Returns:
        One entry a layer; none where the config names no attention heads.
    """
    text = text_config(config)
    window = _first(text, "sliding_window", "attention_chunk_size")
    crossed = 2 if config.get("is_encoder_decoder") is True else 1
    found = []
    for kind, per_token in _layers(text, ITEMSIZE[dtype]):
        if "linear" in kind:
            found.append(_state_bytes(text, ITEMSIZE[dtype]))
        elif kind in ("conv", "mamba", "moe", "mlp"):
            found.append(0)
        else:
            found.append(crossed * per_token * (min(max_model_len, window) if _slides(kind, window) else max_model_len))
    return found


def layer_count(text: Mapping[str, Any]) -> int:
    """Layers that hold keys and values.

    Args:
        text: The part of a config that describes the language model.
    Returns:
        Their number; 0 where it does not say.
    """
    return _first(
        text, "decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"
    )


def activation_bytes(config: Mapping[str, Any], max_model_len: int, dtype: str) -> int:
    """Bytes of the largest transient of one forward pass over a whole prompt.

    Counted per token: the residual stream and its norm in float32, queries, keys, values and attention output, and the three
    products of a gated MLP; per vocabulary entry: last-token logits and their float32 copies while sampling. Layers with a
    sliding window add the rest of the prompt's keys and values: transformers keeps a view of them until the next token.

    Args:
        config: A config.json.
        max_model_len: Tokens of the prompt.
        dtype: Dtype of activations.
    Returns:
        Bytes.
    """
    text = text_config(config)
    hidden = _first(text, "hidden_size", "n_embd", "d_model") or 1024
    inner = _first(text, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    heads = _first(text, "num_attention_heads", "n_head", "num_heads") or 1
    head_dim = _first(text, "head_dim") or _first(text, "qk_nope_head_dim") + _first(text, "qk_rope_head_dim")
    attention = max(hidden, heads * head_dim)
    vocabulary = _first(text, "vocab_size") or _first(config, "vocab_size") or 32000
    size = ITEMSIZE[dtype]
    per_token = 3 * hidden * 4 + 4 * hidden * size + 8 * attention * size + 4 * inner * size
    window = _first(text, "sliding_window", "attention_chunk_size")
    slides = sum(kv for kind, kv in _layers(text, size) if _slides(kind, window))
    return max_model_len * per_token + 6 * vocabulary * 4 + max(0, max_model_len - window) * slides


def buffers(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, str]]:
    """Buffers that a model computes and no file holds, as far as the headers tell: a few hundred bytes, or a few KiB.

    Args:
        config: A config.json.
        shapes: Shape of every stored tensor, by name.
    Returns:
        Name to length and dtype. Learned positions come with integer ids where they are named as in BERT; all else is
        taken to be rotary.
    """
    learned = [(name, shape[0]) for name, shape in shapes.items() if _POSITIONS.search(name) and len(shape) == 2]
    if learned:
        longest = max((length for name, length in learned if "position_embedding" in name), default=0)
        return {name: (longest, "int64") for name in ("position_ids", "token_type_ids") if longest}
    text = text_config(config)
    heads = _first(text, "num_attention_heads", "n_head")
    head_dim = max(_first(text, "head_dim", "qk_rope_head_dim"), _first(text, "global_head_dim"))
    half = (head_dim or _first(text, "hidden_size", "n_embd") // max(1, heads)) // 2
    if not heads or not half or any("relative_attention_bias" in name for name in shapes):
        return {}
    # One set for each kind of layer, as full and sliding attention rotate at different rates.
    kinds = sorted({kind for kind, _ in _layers(text, 1) if "linear" not in kind})
    names = [f"{kind}_{leaf}" if len(kinds) > 1 else leaf for kind in kinds for leaf in ("inv_freq", "original_inv_freq")]
    scale = {"embed_scale": (1, "float32")} if str(text.get("model_type")).startswith("gemma") else {}
    return {f"rotary_emb.{name}": (half, "float32") for name in names} | scale


_POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings?|embed_positions|positions_embed|position_embd)\.weight$")

_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 262208,
        "sliding_window": 4096,
    },
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "mistral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
}
"""What transformers' config classes take where a nested text_config leaves a key out, as published ones of these types do."""

_SLIDING_PATTERN = {"gemma2": 2, "gemma3_text": 6}
"""Every so many layers one attends to everything, where the config does not say."""

_ALL_SLIDING = ("mistral", "mixtral", "starcoder2", "phi3")
"""Types of which every layer slides where the config has a window."""


def _layers(text: Mapping[str, Any], itemsize: int) -> list[tuple[str, int]]:
    """Kind of each layer, and bytes of its keys and values for one token."""
    layers = layer_count(text)
    heads = _first(text, "decoder_attention_heads", "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    if not layers or not heads or not hidden:
        return []
    kv_heads = _per_layer(text, layers, "num_key_value_heads", "n_head_kv", "num_kv_heads") or [heads] * layers
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        kv_heads = [1] * layers
    head_dim = _first(text, "head_dim", "d_kv") or hidden // heads
    rank = _first(text, "kv_lora_rank")
    latent = rank + _first(text, "qk_rope_head_dim") + _first(text, "index_head_dim")
    found = []
    for kind, count in zip(_layer_kinds(text, layers), kv_heads, strict=True):
        wide = max(head_dim, _first(text, "global_head_dim")) if kind == "full_attention" else head_dim
        found.append((kind, (latent if rank else 2 * count * wide) * itemsize))
    return found


def _layer_kinds(text: Mapping[str, Any], layers: int) -> list[str]:
    """`full_attention`, `sliding_attention`, `linear_attention`, ... of each layer; full where the config does not tell."""
    for key in ("layer_types", "layers_block_type"):
        kinds = text.get(key)
        if isinstance(kinds, list) and len(kinds) == layers:
            return [str(kind) for kind in kinds]
    kind = text.get("model_type")
    if every := _first(text, "full_attention_interval"):
        return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if _first(text, "sliding_window") and text.get("use_sliding_window", True) is not False:
        if every := _first(text, "sliding_window_pattern", "_sliding_window_pattern") or _SLIDING_PATTERN.get(str(kind), 0):
            return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        if kind in _ALL_SLIDING:
            return ["sliding_attention"] * layers
    return ["full_attention"] * layers


def _slides(kind: str, window: int) -> bool:
    return window > 0 and ("sliding" in kind or "chunked" in kind)


def _state_bytes(text: Mapping[str, Any], itemsize: int) -> int:
    """What a layer of gated linear attention (Qwen3-Next) keeps: the last inputs of its convolution, and a matrix a head."""
    keys = _first(text, "linear_num_key_heads") * _first(text, "linear_key_head_dim")
    values = _first(text, "linear_num_value_heads") * _first(text, "linear_value_head_dim")
    convolution = (2 * keys + values) * _first(text, "linear_conv_kernel_dim") * itemsize
    return convolution + values * _first(text, "linear_key_head_dim") * ITEMSIZE["float32"]


def _per_layer(config: Mapping[str, Any], layers: int, *keys: str) -> list[int]:
    """The first of these keys that holds a number, or one for each layer; where a list has another length, its largest."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, int) and v >= 0 for v in value):
            return value
    found = _first(config, *keys)
    return [found] * layers if found else []


def _first(config: Mapping[str, Any], *keys: str) -> int:
    """The first of these keys that holds a positive number, else 0; lists (one value a layer) count with their largest."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
