"""What running a model takes beside its weights: KV cache and activations, from its config alone. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlazy.formats import ITEMSIZE


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model.

    Args:
        config: A config.json.
    Returns:
        Its `text_config`, `llm_config` or `decoder` where it nests one, else itself.
    """
    for key in ("text_config", "llm_config", "language_config", "decoder"):
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return nested
    return config


def kv_cache_bytes(config: Mapping[str, Any], max_model_len: int, dtype: str) -> int:
    """Bytes of keys and values for one sequence.

    2 x layers x key-value heads x head dimension x tokens x itemsize; layers with a sliding window hold at most the window,
    layers of linear attention none; latent attention (DeepSeek) is counted as transformers caches it, decompressed.

    Args:
        config: A config.json.
        max_model_len: Tokens.
        dtype: Dtype of the cache.
    Returns:
        Bytes; 0 where the config names no attention heads.
    """
    text = text_config(config)
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
    heads = _first(text, "num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    if not layers or not heads or not hidden:
        return 0
    kv_heads = _first(text, "num_key_value_heads", "n_head_kv", "num_kv_heads") or heads
    head_dim = _first(text, "head_dim", "d_kv") or hidden // heads
    key_dim = value_dim = head_dim
    if _first(text, "kv_lora_rank"):
        key_dim = _first(text, "qk_nope_head_dim") + _first(text, "qk_rope_head_dim")
        value_dim = _first(text, "v_head_dim") or key_dim
        kv_heads = heads
    per_token = kv_heads * (key_dim + value_dim) * ITEMSIZE[dtype]
    window = _first(text, "sliding_window")
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        everywhere = bool(window) and text.get("use_sliding_window", True) is not False and not isinstance(kinds, list)
        kinds = [
            "sliding_attention" if everywhere and text.get("model_type") in ("mistral", "starcoder2") else "full_attention"
        ] * layers
    total = 0
    for kind in kinds:
        if "linear" in str(kind) or "conv" in str(kind) or "mamba" in str(kind):
            continue
        length = min(max_model_len, window) if window and "sliding" in str(kind) else max_model_len
        total += per_token * length
    return total


def activation_bytes(config: Mapping[str, Any], max_model_len: int, dtype: str) -> int:
    """Bytes of the largest transient of one forward pass over a whole prompt.

    Counted per token: the residual stream and its norm in float32, queries, keys, values and attention output, and the three
    products of a gated MLP; per vocabulary entry: last-token logits and their float32 copies while sampling.

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
    attention = max(hidden, heads * (_first(text, "head_dim") or 0))
    vocabulary = _first(text, "vocab_size") or _first(config, "vocab_size") or 32000
    size = ITEMSIZE[dtype]
    per_token = 3 * hidden * 4 + 4 * hidden * size + 8 * attention * size + 4 * inner * size
    return max_model_len * per_token + 6 * vocabulary * 4


def _first(config: Mapping[str, Any], *keys: str) -> int:
    """The first of these keys that holds a positive number, else 0; lists (one value a layer) count with their largest."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
