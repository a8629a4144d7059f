"""Plans of mixtures of experts from headers alone, at the widths of real models: to the byte what the model's own plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights, no_tie_weights

from qlazy.errors import UnsupportedModel
from qlazy.lazy import lazy_build
from qlazy.match import match_tensors
from qlazy.planning.budget import Budget
from qlazy.planning.data import Entry
from qlazy.planning.entries import entries
from qlazy.planning.experts import stack_experts
from qlazy.planning.plan import make_plan
from qlazy.planning.recipe import make_recipe
from qlazy.sources.source import Source, TensorInfo
from qlazy.swap import swap_layers

PACKED = ("linear", "experts", "head", "embedding", "tied")
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, str, str] | None]] = {
    "mixtral-8x7b": ("MixtralForCausalLM", "MixtralConfig", {"num_hidden_layers": 2}, ("w1", "w3", "w2")),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {"num_hidden_layers": 3, "first_k_dense_replace": 1},
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "qwen3-30b": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_hidden_layers": 2}, ("gate_proj", "up_proj", "down_proj")),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {"num_hidden_layers": 2}, None),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {"num_hidden_layers": 2}, None),
    "dbrx": ("DbrxForCausalLM", "DbrxConfig", {"n_layers": 2, "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}}, None),
}


def placeholder(architecture: str, config: Any) -> PreTrainedModel:
    with no_init_weights(), no_tie_weights(), lazy_build():
        return getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-any-return]


def headers(model: PreTrainedModel, words: tuple[str, str, str] | None) -> Source:
    """The tensors of a checkpoint of this model, experts in a list where `words` name their matrices."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if words is None or not path.endswith("experts"):
            shapes[name] = tuple(tensor.shape)
            continue
        experts, rows, columns = tensor.shape
        path = path.replace("mlp", "block_sparse_moe") if words[0] == "w1" else path
        for expert in range(experts):
            if leaf == "down_proj":
                shapes[f"{path}.{expert}.{words[2]}.weight"] = (rows, columns)
            else:
                shapes |= {f"{path}.{expert}.{word}.weight": (rows // 2, columns) for word in words[:2]}
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.empty(shape, device="meta").numel()
        tensors[name] = TensorInfo(
            name=name, shape=shape, dtype="bfloat16", path=Path("a.safetensors"), offset=offset, nbytes=nbytes
        )
        offset += nbytes
    return Source(
        model_id="m",
        resolved="/m",
        revision=None,
        kind="safetensors",
        folder=None,
        gguf_file=None,
        config=model.config.to_dict(),
        tensors=tensors,
    )


@pytest.mark.parametrize("options", [{}, {"format": "nf4", "embedding_bits": 4}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_headers_tell_what_the_model_says(name, options):
    architecture, config_name, more, words = MODELS[name]
    model = placeholder(architecture, getattr(transformers, config_name)(**more))
    source = headers(model, words)
    free = {"cpu": 4 << 40}
    budget = Budget(devices=("cpu",), free_bytes=free, reserve_bytes=0, max_model_len=64, device_map=None)
    planned = make_plan(source, make_recipe(**options), budget, dtype="bfloat16")
    match = match_tensors(model, source)
    exact = swap_layers(model, planned, match, source)
    told, own = ({kind: sum(t.nbytes for t in p.tensors if t.kind == kind) for kind in PACKED} for p in (planned, exact))
    assert told == own and own["experts"] > 0
    assert {t.shape for t in planned.tensors if t.kind == "experts"} == {t.shape for t in exact.tensors if t.kind == "experts"}
    assert sum(t.source_nbytes for t in planned.tensors) == sum(t.source_nbytes for t in exact.tensors) == source.nbytes
    # Nothing larger than one expert is read as a whole, and the headers know how large that is.
    cpu, exactly = (next(d for d in p.devices if d.device == "cpu").staging_bytes for p in (planned, exact))
    assert exactly <= cpu
    largest = max(t.source_nbytes // t.shape[0] for t in exact.tensors if t.kind == "experts")
    assert match.largest_conversion in (0, largest)


def entry(name: str, *shape: int) -> Entry:
    return Entry(name=name, shape=shape, dtype="bfloat16", kind="experts", source_nbytes=7)


def test_experts_that_are_not_alike_stay_as_they_are():
    alike = [entry(f"a.experts.{e}.{w}.weight", 64, 32) for e in range(2) for w in ("gate_proj", "up_proj")]
    (one,) = stack_experts(alike, {})
    assert (one.name, one.shape, one.source_nbytes) == ("a.experts.gate_up_proj", (2, 128, 32), 28)
    for other in ([*alike, entry("a.experts.2.gate_proj.weight", 64, 32)], [*alike[:3], entry(alike[3].name, 32, 32)]):
        assert stack_experts(other, {}) == other
    down = [entry(f"a.experts.{e}.down_proj.weight", 32, 64) for e in range(2)]
    assert [e.shape for e in stack_experts(down, {})] == [(2, 32, 64)]


def test_an_expert_is_called_as_in_the_model():
    for down in ("w2", "fc2", "down_proj"):
        (one,) = stack_experts([entry(f"a.experts.{e}.{down}.weight", 32, 64) for e in range(2)], {})
        assert one.name == "a.experts.down_proj"


def test_a_gguf_file_with_experts_of_unknown_architecture_is_refused_before_the_load():
    info = TensorInfo(
        name="blk.0.ffn_up_exps.weight", shape=(4, 64, 32), dtype="Q4_0", path=Path("a.gguf"), offset=0, nbytes=4608
    )
    source = Source(
        model_id="a.gguf",
        resolved="/a.gguf",
        revision=None,
        kind="gguf",
        folder=None,
        gguf_file="a.gguf",
        config={"model_type": "deepseek2", "num_hidden_layers": 1},
        tensors={info.name: info},
    )
    with pytest.raises(UnsupportedModel, match=r"'blk\.0\.ffn_up_exps\.weight' of architecture 'deepseek2': experts of this"):
        entries(source, "bfloat16")


def test_stored_stacks_are_turned_by_the_width_of_the_model():
    config = {"hidden_size": 32}
    for name, stored, shape in (
        ("a.experts.gate_up_proj", (4, 32, 128), (4, 128, 32)),
        ("a.experts.gate_up_proj", (4, 128, 32), (4, 128, 32)),
        ("a.experts.down_proj", (4, 64, 32), (4, 32, 64)),
        ("a.experts.down_proj", (4, 32, 64), (4, 32, 64)),
        ("a.experts.down_proj", (4, 32, 32), (4, 32, 32)),
    ):
        assert stack_experts([entry(name, *stored)], config)[0].shape == shape
