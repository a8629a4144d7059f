"""What the metadata of a GGUF file tells of a model, under the hub's names; and which mixtures of experts are known.

transformers reads the metadata too (`gguf_head.py`), but not how positions are scaled. Of mixtures it does not read how wide
experts are, takes Mixtral for Llama, and fails over gpt-oss: their whole config is told here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlazy.errors import CorruptCheckpoint, UnsupportedModel
from qlazy.sources.gguf import GgufHeader, Vocabulary
from qlazy.sources.safetensors import TensorInfo

CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Metadata keys without the architecture's prefix: the hub's name in config.json."""

SCALING_KEYS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""The same after `rope.scaling.`, for `rope_parameters`."""

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)(?:_exps|\.(\d+))\.(weight|bias)")
"""Tensors of experts: all of a layer in one, or, as files of before April 2024 have them, one for each."""


HUB_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
"""What most model classes call the weights of a block."""

_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How transformers calls what a mixture of experts is told by."""

    model_type: str
    """Its own."""
    experts: str
    """Key for the number of experts."""
    width: str
    """Key for the rows of an expert's gate."""
    turned: bool = False
    """Whether its model holds experts the other way round than the file, so that one is turned as a whole."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What llama.cpp takes for granted and the config class does not."""


MIXTURES = {
    "llama": Mixture(model_type="mixtral", experts="num_local_experts", width="intermediate_size"),
    "qwen2moe": Mixture(model_type="qwen2_moe", experts="num_experts", width="moe_intermediate_size"),
    "qwen3moe": Mixture(
        model_type="qwen3_moe", experts="num_experts", width="moe_intermediate_size", fixed={"norm_topk_prob": True}
    ),
    "gpt-oss": Mixture(model_type="gpt_oss", experts="num_local_experts", width="intermediate_size", turned=True),
    "minimax-m2": Mixture(model_type="minimax_m2", experts="num_local_experts", width="intermediate_size"),
}
"""Mixtures of experts that are read, by llama.cpp's name of the architecture."""

CONVERTED = ("qwen35", "qwen35moe")
"""Architectures whose config and tensors are read by transformers' converters, experts too."""


def hub_names(name: str) -> tuple[str, ...]:
    """The names by which a user may mean a tensor.

    Args:
        name: Its own, in a GGUF file or not.
    Returns:
        It, and where it is a weight of a block of a GGUF file what most model classes call that.
    """
    found = _IN_BLOCK.fullmatch(name) if name.startswith("blk.") else None
    if found is None or found[2] not in HUB_NAMES:
        return (name,)
    return name, f"model.layers.{found[1]}.{HUB_NAMES[found[2]]}.weight"


def config_of(header: GgufHeader, *, file: str) -> dict[str, Any]:
    """What a header tells of the model.

    Args:
        header: Of a whole model.
        file: Name for messages.
    Returns:
        The hub's keys; `model_type` is llama.cpp's name of the architecture.
    Raises:
        CorruptCheckpoint: If it does not name one.
    """
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CorruptCheckpoint(f"{file}: the metadata has no 'general.architecture'", hint="Is it a model?")
    config: dict[str, Any] = {"model_type": architecture}
    for key, name in CONFIG_KEYS.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None and not isinstance(value, Vocabulary):
            config[name] = value
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = metadata.get(f"tokenizer.ggml.{name.replace('pad_', 'padding_')}")
        if isinstance(number, int):
            config[name] = number
    words = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in config and isinstance(words, Vocabulary | list):
        config["vocab_size"] = words.length if isinstance(words, Vocabulary) else len(words)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    scaling = metadata.get(f"{architecture}.rope.scaling.type")
    if scaling in ("linear", "yarn"):
        told = {name: metadata.get(f"{architecture}.rope.scaling.{key}") for key, name in SCALING_KEYS.items()}
        config["rope_scaling"] = {"rope_type": scaling} | {name: value for name, value in told.items() if value is not None}
    if architecture == "minimax-m2" and (turned := metadata.get("minimax-m2.rope.dimension_count")):
        config["rotary_dim"] = turned
    return config | _experts_of(config, tensors)


def _experts_of(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What tensors tell of experts: their number and sizes, which older metadata leaves out."""
    found: dict[str, Any] = {}
    numbers = set()
    for name, info in tensors.items():
        one = EXPERTS.fullmatch(name)
        if one and one[2] == "down" and one[4] == "weight" and len(info.shape) == (2 if one[3] else 3):
            numbers.add(int(one[3] or 0))
            found |= {"num_experts": info.shape[0] if one[3] is None else len(numbers), "moe_intermediate_size": info.shape[-1]}
        elif name.endswith("ffn_down_shexp.weight") and len(info.shape) == 2:
            found["shared_expert_intermediate_size"] = info.shape[1]
    if found and config["model_type"] == "gpt-oss":
        layers = config.get("num_hidden_layers")
        kinds = ("sliding_attention", "full_attention")
        found["layer_types"] = [kinds[number % 2] for number in range(layers if isinstance(layers, int) else 0)]
    return found


def require_known_experts(architecture: str, tensors: Iterable[TensorInfo]) -> None:
    """Refuse experts of an architecture of which it is not known how they lie.

    Args:
        architecture: llama.cpp's name.
        tensors: Those of a GGUF file.
    Raises:
        UnsupportedModel: with the first tensor of them.
    """
    for info in tensors:
        known = EXPERTS.fullmatch(info.name)
        if (known and architecture not in (*MIXTURES, *CONVERTED)) or ("exps." in info.name and not known):
            what = "experts of this architecture" if known else "such tensors of experts"
            raise UnsupportedModel(
                f"{info.path.name}: {info.name!r} of architecture {architecture!r}: {what} are not read from GGUF files; those "
                f"of {', '.join(MIXTURES)} and qwen35moe are.",
                hint="Use the model's safetensors files.",
            )


def mixture_config(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of a mixture of experts.

    Args:
        told: What `config_of` says.
    Returns:
        Keys for the config class of the `model_type` in it; None for a model without experts, or with such that are not known.
    """
    mixture = MIXTURES.get(told["model_type"]) if "moe_intermediate_size" in told else None
    if mixture is None:
        return None
    ours = {key: value for key, value in told.items() if key not in ("num_experts", "moe_intermediate_size")}
    ours |= {mixture.width: told["moe_intermediate_size"], mixture.experts: told["num_experts"], **mixture.fixed}
    return scaled_config(ours | {"model_type": mixture.model_type}, told)


def scaled_config(config: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """A config with positions scaled as the metadata says.

    Args:
        config: Of a mixture, or as transformers makes it.
        told: What `config_of` says.
    Returns:
        Keys for the config class of the `model_type` in it.
    """
    if "rope_scaling" not in told:
        return dict(config)
    # gpt-oss does not round where its frequencies begin to be scaled; llama.cpp's metadata has no word for it.
    rope = told["rope_scaling"] | ({"truncate": False} if told["model_type"] == "gpt-oss" else {})
    kept = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    theta = config.get("rope_theta", told.get("rope_theta"))
    return kept | {"rope_parameters": rope | ({"rope_theta": theta} if theta is not None else {})}
