"""GGUF files of tiny mixtures of experts, as llama.cpp's converter lays them out, and the values that they hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "rope_parameters": ROPE}),
    "qwen2_moe": (
        "qwen2moe",
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    ),
    # An expert's gate ends within a block of 64 rows, and heads are wider than the hidden size has room for.
    "qwen3_moe": (
        "qwen3moe",
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 96, "head_dim": 32, "norm_topk_prob": True},
    ),
    # Gate and up alternate, all is turned, with biases and sinks.
    "gpt_oss": (
        "gpt-oss",
        "GptOss",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_parameters": {**YARN, "rope_theta": 10000.0, "truncate": False},
        },
    ),
    # Half of each head is rotated, and experts are chosen with a bias.
    "minimax_m2": (
        "minimax-m2",
        "MiniMaxM2",
        {"num_local_experts": 4, "head_dim": 16, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    ),
}
"""By transformers' name: llama.cpp's, the class, and options."""


def build(family: str, **more: Any) -> PreTrainedModel:
    """A tiny model whose experts differ enough that a wrong one shows."""
    _, name, options = FAMILIES[family]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**(BASE | options | more))
    )
    with torch.no_grad():
        for parameter in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)]:
            parameter.normal_(0.0, 0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    return model.eval()


def write(path: Path, model: PreTrainedModel, kinds: dict[str, str], *, one_by_one: bool = False, **splits: Any) -> None:
    """Write a model as a GGUF file, and give it the values that the file holds.

    Args:
        path: The file; of several parts the name without their numbers.
        model: From `build`.
        kinds: ggml's type by part of llama.cpp's name; F32 for what none is part of.
        one_by_one: A tensor for each expert, as old files have them.
        **splits: As `GGUFWriter`'s.
    """
    family = model.config.model_type
    arch = FAMILIES[family][0]
    writer = gguf.GGUFWriter(path, arch, **splits)
    _write_config(writer, model.config, arch)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[arch], model.config.num_hidden_layers)
    for name, held in model.state_dict().items():
        for key, view in _parts(name, held, table, family, one_by_one):
            values = view
            if arch == "llama" and key.endswith(("attn_q.weight", "attn_k.weight")):
                heads = model.config.num_attention_heads if "attn_q" in key else model.config.num_key_value_heads
                values = view.view(heads, 2, -1, view.shape[1]).transpose(1, 2).reshape(view.shape)
            kind = gguf.GGMLQuantizationType[next((k for part, k in kinds.items() if part in key), "F32")]
            packed = _packed(values.contiguous().numpy(), kind)
            back = torch.from_numpy(gguf.dequantize(packed, kind)).view(values.shape)
            if values is not view:
                heads = model.config.num_attention_heads if "attn_q" in key else model.config.num_key_value_heads
                back = back.view(heads, -1, 2, view.shape[1]).transpose(1, 2).reshape(view.shape)
            view.copy_(back)
            writer.add_tensor(key, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _packed(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """Values in a type; of those that the package does not write, any blocks with small scales."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(0)
        raw = random.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, nbytes), np.uint8)
        assert kind.name == "Q4_K"
        raw[..., :4] = np.array([0.001, 0.01], np.float16).view(np.uint8)
        return raw.reshape(*values.shape[:-1], -1)


def _parts(name: str, held: Tensor, table: Any, family: str, one_by_one: bool) -> list[tuple[str, Tensor]]:
    """llama.cpp's tensors that one of the model's becomes: names, and views of it."""
    experts = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", name)
    if experts is not None:
        layer, role, is_bias = experts.groups()
        if family == "gpt_oss" and not is_bias:
            held = held.transpose(1, 2)
        if role == "down":
            views = {"down": held}
        elif family == "gpt_oss":
            views = {"gate": held[:, 0::2], "up": held[:, 1::2]}
        else:
            views = dict(zip(("gate", "up"), held.chunk(2, dim=1), strict=True))
        leaf = "bias" if is_bias else "weight"
        if one_by_one:
            return [(f"blk.{layer}.ffn_{part}.{e}.{leaf}", view[e]) for part, view in views.items() for e in range(len(view))]
        return [(f"blk.{layer}.ffn_{part}_exps.{leaf}", view) for part, view in views.items()]
    path, _, leaf = name.rpartition(".")
    if name.endswith("e_score_correction_bias"):
        return [(f"blk.{name.split('.')[2]}.exp_probs_b.bias", held)]
    if leaf == "sinks":
        return [(f"{table.get_name(name)}.weight", held)]
    if name.endswith("shared_expert_gate.weight"):
        held = held[0]
    return [(f"{table.get_name(path)}.{leaf}", held)]


def _write_config(writer: gguf.GGUFWriter, config: PretrainedConfig, arch: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if arch == "minimax-m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def write_qwen35(path: Path, *, experts: int = 0) -> None:
    """A tiny Qwen3.5 of random values, with or without experts, as llama.cpp names and shapes its tensors.

    Args:
        path: The file.
        experts: How many; 0 = a dense model.
    """
    arch, hidden, layers, heads, head_dim = "qwen35moe" if experts else "qwen35", 64, 2, 4, 16
    writer = gguf.GGUFWriter(path, arch)
    for key, number in {
        "context_length": 64,
        "embedding_length": hidden,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": 2,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": 8,
        "full_attention_interval": layers,
        "ssm.conv_kernel": 4,
        "ssm.state_size": head_dim,
        "ssm.group_count": 2,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * head_dim,
        "feed_forward_length": 96,
        "expert_count": experts,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
        "expert_shared_feed_forward_length": 96,
    }.items():
        writer.add_uint32(f"{arch}.{key}", number)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_array(f"{arch}.rope.dimension_sections", [2, 1, 1, 0])
    writer.add_token_list([f"word{i}" for i in range(96)])
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: str = "F32") -> None:
        values = random.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        values += 1 if name.endswith("norm.weight") else 0
        values = -np.abs(values) - 0.1 if name.endswith("ssm_a") else values
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values.astype(np.float32), type_), raw_dtype=type_)

    add("token_embd.weight", 96, hidden, kind="Q8_0")
    add("output.weight", 96, hidden, kind="Q8_0")
    add("output_norm.weight", hidden)
    inner, mixed = heads * head_dim, 2 * 2 * head_dim + heads * head_dim
    linear = {"attn_qkv": (mixed, hidden), "attn_gate": (inner, hidden), "ssm_out": (hidden, inner)}
    linear |= {"ssm_alpha": (heads, hidden), "ssm_beta": (heads, hidden), "ssm_conv1d": (mixed, 4), "ssm_norm": (head_dim,)}
    full = {"attn_q": (2 * inner, hidden), "attn_k": (inner // 2, hidden), "attn_v": (inner // 2, hidden)}
    full |= {"attn_output": (hidden, inner), "attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    for layer in range(layers):
        held = {"attn_norm": (hidden,), "post_attention_norm": (hidden,)} | (full if layer + 1 == layers else linear)
        suffix = "_shexp" if experts else ""
        held |= {f"ffn_{part}{suffix}": (96, hidden) for part in ("gate", "up")} | {f"ffn_down{suffix}": (hidden, 96)}
        if experts:
            held |= {"ffn_gate_inp": (experts, hidden), "ffn_gate_inp_shexp": (hidden,)}
            held |= {f"ffn_{part}_exps": (experts, 64, hidden) for part in ("gate", "up")}
            held |= {"ffn_down_exps": (experts, hidden, 64)}
        for name, shape in held.items():
            whole = len(shape) < 2 or shape[-1] % 32 or name.startswith(("ssm_a", "ssm_b", "ffn_gate_inp"))
            add(f"blk.{layer}.{name}.weight", *shape, kind="F32" if whole else "Q4_0" if "exps" in name else "Q8_0")
        if held.keys() >= linear.keys():
            add(f"blk.{layer}.ssm_a", heads)
            add(f"blk.{layer}.ssm_dt.bias", heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
