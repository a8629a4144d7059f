"""What the metadata and tensors of GGUF files tell of a model, and which experts are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlazy.errors import CorruptCheckpoint, UnsupportedModel
from qlazy.sources.gguf import GgufHeader
from qlazy.sources.gguf_config import MIXTURES, config_of, mixture_config, require_known_experts, scaled_config
from qlazy.sources.safetensors import TensorInfo


def tensors(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {
        name: TensorInfo(name=name, shape=shape, dtype="Q4_0", path=Path("m.gguf"), offset=0, nbytes=0)
        for name, shape in named.items()
    }


def told(architecture: str, shapes: dict[str, tuple[int, ...]], **metadata: Any) -> dict[str, Any]:
    said = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    header = GgufHeader(metadata={"general.architecture": architecture, **said}, tensors=tensors(**shapes))
    return config_of(header, file="m.gguf")


DOWN = {"blk__0__ffn_down_exps__weight": (8, 64, 96)}


@settings(max_examples=30, deadline=None)
@given(
    architecture=st.sampled_from(sorted(MIXTURES)),
    experts=st.integers(1, 300),
    width=st.integers(1, 4096),
    one_by_one=st.booleans(),
    said=st.booleans(),
)
def test_sizes_of_experts_are_those_of_the_tensors(
    architecture: str, experts: int, width: int, one_by_one: bool, said: bool
) -> None:
    """Older metadata leaves them out, and transformers takes those of one model for them."""
    shapes: dict[str, tuple[int, ...]] = {f"blk__{n}__ffn_down_exps__weight": (experts, 64, width) for n in (0, 1)}
    if one_by_one:
        shapes = {f"blk__{n}__ffn_down__{e}__weight": (64, width) for n in (0, 1) for e in range(experts)}
    metadata = {"expert_count": experts, "expert_feed_forward_length": width} if said else {}
    config = told(architecture, shapes, block_count=2, feed_forward_length=7, **metadata)
    mixture, made = MIXTURES[architecture], mixture_config(config)
    assert made is not None and made["model_type"] == mixture.model_type
    assert made[mixture.experts] == experts and made[mixture.width] == width
    assert made["intermediate_size"] == (7 if mixture.width != "intermediate_size" else width)


def test_a_model_without_experts_is_no_mixture() -> None:
    for config in (told("llama", {}, expert_count=0), told("qwen3", {})):
        assert mixture_config(config) is None
        assert scaled_config({"model_type": config["model_type"], "vocab_size": 8}, config) == {
            "model_type": config["model_type"],
            "vocab_size": 8,
        }


def test_shared_experts_and_what_llama_cpp_takes_for_granted() -> None:
    made = mixture_config(told("qwen2moe", DOWN | {"blk__0__ffn_down_shexp__weight": (64, 128)}))
    assert made is not None and made["shared_expert_intermediate_size"] == 128 and "norm_topk_prob" not in made
    made = mixture_config(told("qwen3moe", DOWN))
    assert made is not None and made["norm_topk_prob"] is True
    made = mixture_config(told("minimax-m2", DOWN, rope__dimension_count=64))
    assert made is not None and made["rotary_dim"] == 64
    made = mixture_config(told("gpt-oss", DOWN, block_count=3))
    assert made is not None and made["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "gpt-oss"])
def test_positions_are_scaled(architecture: str) -> None:
    shapes = {} if architecture == "llama" else DOWN
    scaling = {"factor": 4.0, "original_context_length": 4096, "yarn_beta_fast": 16.0, "attn_factor": 1.0}
    metadata = {f"rope__scaling__{key}": value for key, value in scaling.items()}
    config = told(architecture, shapes, rope__freq_base=1e6, rope__scaling__type="yarn", **metadata)
    made = mixture_config(config) or scaled_config({"model_type": "llama", "rope_theta": 1e6, "rope_scaling": "?"}, config)
    assert "rope_theta" not in made and "rope_scaling" not in made
    rope = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0}
    assert made["rope_parameters"] == rope | ({"truncate": False} if architecture == "gpt-oss" else {})
    plain = told(architecture, shapes, rope__freq_base=1e6, rope__scaling__type="none")
    assert "rope_scaling" not in plain


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("deepseek2", "blk__1__ffn_gate_exps__weight", "experts of this architecture are not read"),
        ("grok", "blk__1__ffn_gate__3__weight", "experts of this architecture are not read"),
        ("qwen3moe", "blk__1__ffn_gate_exps__scale", "such tensors of experts are not read"),
        ("grovemoe", "blk__1__ffn_gate_chexps__weight", "such tensors of experts are not read"),
        ("qwen3moe", "blk__1__ffn_gate_exps__weight", None),
        ("deepseek2", "blk__1__ffn_gate_shexp__weight", None),
        ("nomic-bert", "blk__1__ffn_gate__weight", None),
    ],
)
def test_experts_that_are_not_known_are_refused(architecture: str, name: str, message: str | None) -> None:
    held = tensors(**{name: (2, 8, 8)}).values()
    if message is None:
        require_known_experts(architecture, held)
        return
    with pytest.raises(UnsupportedModel, match=message) as caught:
        require_known_experts(architecture, held)
    assert name.replace("__", ".") in str(caught.value) and architecture in str(caught.value) and caught.value.hint


def test_metadata_without_architecture() -> None:
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf: the metadata has no 'general\.architecture'"):
        config_of(GgufHeader(metadata={}, tensors={}), file="m.gguf")
