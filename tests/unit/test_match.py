"""Matching a checkpoint with a model, on names and shapes alone: no file is opened here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.initialization import no_init_weights, no_tie_weights

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.lazy import lazy_build
from qlazy.match import Match, match_tensors
from qlazy.matching.gguf import _closed_block, _row_order
from qlazy.sources.source import Source, TensorInfo

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def placeholder(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with no_init_weights(), no_tie_weights(), lazy_build():
        return cls._from_config(config, dtype=torch.bfloat16)


@pytest.fixture
def llama() -> PreTrainedModel:
    return placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False))


@pytest.fixture
def tied() -> PreTrainedModel:
    return placeholder(LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True))


@pytest.fixture
def bert() -> PreTrainedModel:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return placeholder(BertForSequenceClassification, config)


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def source_of(shapes: dict[str, tuple[int, ...]], *, kind: Any = "safetensors", dtypes: dict[str, str] | None = None) -> Source:
    """A source of these tensors, in this order, spread over two files."""
    tensors, offset = {}, 0
    for number, (name, shape) in enumerate(shapes.items()):
        nbytes = 2 * torch.empty(shape, device="meta").numel()
        file = f"model-0000{1 + (2 * number >= len(shapes))}-of-00002.{kind}"
        dtype = (dtypes or {}).get(name, "bfloat16")
        tensors[name] = TensorInfo(name=name, shape=shape, dtype=dtype, path=Path(file), offset=offset, nbytes=nbytes)
        offset += nbytes
    return Source(
        model_id="tiny", resolved="/tiny", revision=None, kind=kind, folder=None, gguf_file=None, config={}, tensors=tensors
    )


def targets(match: Match) -> set[str]:
    return {target for fill in match.fills for target in fill.targets}


def test_same_names_go_straight_in_file_order(llama):
    shapes = shapes_of(llama)
    source = source_of(dict(reversed(shapes.items())))
    match = match_tensors(llama, source)
    assert targets(match) == set(shapes) and not match.missing and not match.unexpected
    assert all(fill.convert is None and fill.row_order is None and len(fill.sources) == 1 for fill in match.fills)
    assert [fill.sources[0] for fill in match.fills] == list(source.tensors.values())
    assert sum(fill.nbytes for fill in match.fills) == source.nbytes
    assert match.largest_conversion == 0


def test_prefix_of_the_base_model_is_added_and_taken_away(llama):
    base = placeholder(LlamaModel, LlamaConfig(**SMALL))
    bare = shapes_of(base)
    with_head = {"lm_head.weight": (32, 16), **bare}
    assert targets(match_tensors(llama, source_of(with_head))) == set(shapes_of(llama))
    prefixed = {f"model.{name}": shape for name, shape in bare.items()}
    assert targets(match_tensors(base, source_of(prefixed))) == set(bare)


def test_names_that_transformers_renames(bert):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): shape
        for name, shape in shapes_of(bert).items()
    }
    assert any(name.endswith("gamma") for name in old)
    assert targets(match_tensors(bert, source_of(old))) == set(shapes_of(bert))


def test_one_dimension_of_conv1d_is_not_swapped():
    model = placeholder(GPT2LMHeadModel, GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    match = match_tensors(model, source_of(shapes_of(model)))
    whole = {fill.targets[0] for fill in match.fills if fill.convert is not None}
    assert whole == {f"transformer.h.0.{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_missing_tensors_are_named_and_counted(llama):
    shapes = shapes_of(llama)
    for name in [name for name in shapes if "layers.1.self_attn" in name]:
        del shapes[name]
    with pytest.raises(IncompleteCheckpoint) as caught:
        match_tensors(llama, source_of(shapes))
    text = str(caught.value)
    assert "tiny: 4 tensors that LlamaForCausalLM needs" in text and "'model.layers.1.self_attn.k_proj.weight'" in text
    assert "and 1 more" in text and "strict=False" in text
    match = match_tensors(llama, source_of(shapes), strict=False)
    assert match.missing == tuple(f"model.layers.1.self_attn.{p}_proj.weight" for p in "koqv")


def test_unexpected_tensors_are_named(llama):
    shapes = shapes_of(llama) | {"model.layers.0.mlp.extra_proj.weight": (4, 4)}
    with pytest.raises(CorruptCheckpoint) as caught:
        match_tensors(llama, source_of(shapes))
    assert "1 stored tensor" in str(caught.value) and "'model.layers.0.mlp.extra_proj.weight'" in str(caught.value)
    assert not isinstance(caught.value, IncompleteCheckpoint)
    match = match_tensors(llama, source_of(shapes), strict=False)
    assert match.unexpected == ("model.layers.0.mlp.extra_proj.weight",)


def test_what_transformers_ignores_is_only_reported(llama):
    ignored = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (4,) for n in range(2)}
    match = match_tensors(llama, source_of(shapes_of(llama) | ignored))
    assert set(match.unexpected) == set(ignored) and not set(ignored) & targets(match)


def test_it_ignores_them_only_where_the_model_has_such_a_buffer(llama, bert):
    with pytest.raises(CorruptCheckpoint, match=r"'embeddings\.position_ids'"):
        match_tensors(llama, source_of(shapes_of(llama) | {"embeddings.position_ids": (1, 8)}))
    with pytest.raises(CorruptCheckpoint, match=r"'bert\.rotary_emb\.inv_freq'"):
        match_tensors(bert, source_of(shapes_of(bert) | {"bert.rotary_emb.inv_freq": (4,)}))
    old = {"bert.embeddings.position_ids": (1, 8)}
    assert match_tensors(bert, source_of(shapes_of(bert) | old)).unexpected == tuple(old)


@pytest.mark.parametrize(
    "held", [{"model.embed_tokens.weight"}, {"lm_head.weight"}, {"model.embed_tokens.weight", "lm_head.weight"}]
)
def test_either_end_of_a_tie_is_enough(tied, held):
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    shapes = {name: shape for name, shape in shapes_of(tied).items() if name not in ends - held}
    match = match_tensors(tied, source_of(shapes))
    assert not match.missing and targets(match) & ends == held


def test_a_tie_with_neither_end_is_missing(tied):
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    shapes = {name: shape for name, shape in shapes_of(tied).items() if name not in ends}
    with pytest.raises(IncompleteCheckpoint, match="2 tensors"):
        match_tensors(tied, source_of(shapes))


def test_wrong_shape_names_both_shapes_the_file_and_the_tensor(llama):
    shapes = shapes_of(llama) | {"model.norm.weight": (17,)}
    with pytest.raises(CorruptCheckpoint) as caught:
        match_tensors(llama, source_of(shapes), strict=False)
    assert str(caught.value).startswith("model-00002-of-00002.safetensors: tensor 'model.norm.weight' has shape [17]")
    assert "[16]" in str(caught.value)


@pytest.mark.parametrize("shape", [(16, 32), (512,), (32, 16, 1)], ids=str)
def test_as_many_elements_in_another_shape_are_wrong_too(llama, shape):
    with pytest.raises(CorruptCheckpoint, match="has shape"):
        match_tensors(llama, source_of(shapes_of(llama) | {"lm_head.weight": shape}))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool"])
def test_integers_in_place_of_a_weight(llama, dtype):
    source = source_of(shapes_of(llama), dtypes={"model.layers.0.mlp.up_proj.weight": dtype})
    with pytest.raises(CorruptCheckpoint) as caught:
        match_tensors(llama, source)
    assert f"'model.layers.0.mlp.up_proj.weight' is stored as {dtype}" in str(caught.value)
    assert "torch.bfloat16" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_other_float_dtypes_are_converted(llama, dtype):
    shapes = shapes_of(llama)
    assert targets(match_tensors(llama, source_of(shapes, dtypes=dict.fromkeys(shapes, dtype)))) == set(shapes)


@pytest.fixture
def mixtral() -> PreTrainedModel:
    return placeholder(MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=12))


def mixtral_shapes(model: PreTrainedModel, *, experts: int = 12, width: int = 24) -> dict[str, tuple[int, ...]]:
    """Under the names and in the pieces of the original checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes_of(model).items():
        path = name.replace(".mlp.", ".block_sparse_moe.")
        if ".experts." not in name:
            shapes[path] = shape
            continue
        block = path.partition("experts.")[0]
        for expert in range(experts):
            if name.endswith("down_proj"):
                shapes[f"{block}experts.{expert}.w2.weight"] = (16, width)
            else:
                shapes |= {f"{block}experts.{expert}.{w}.weight": (width, 16) for w in ("w1", "w3")}
    return shapes


def test_each_expert_has_its_own_fills_and_nothing_is_stacked(mixtral):
    match = match_tensors(mixtral, source_of(mixtral_shapes(mixtral)))
    assert targets(match) == set(shapes_of(mixtral))
    fills = [f for f in match.fills if f.targets == ("model.layers.1.mlp.experts.down_proj",)]
    assert len(fills) == 12 and all(fill.convert is None for fill in fills)
    assert all(fill.target_row == 16 * int(fill.sources[0].name.split(".")[5]) for fill in fills)
    # 24 rows of gate and 24 of up do not end on a block of 64: these come together, but of one expert only.
    pairs = [f for f in match.fills if f.targets == ("model.layers.1.mlp.experts.gate_up_proj",)]
    assert len(pairs) == 12
    for fill in pairs:
        expert = int(fill.sources[0].name.split(".")[5])
        assert [info.name.split(".")[6] for info in fill.sources] == ["w1", "w3"] and fill.target_row == 48 * expert
        assert fill.convert is not None
        made: Tensor = fill.convert([torch.full(info.shape, float(i)) for i, info in enumerate(fill.sources)])[fill.targets[0]]
        assert made[:, 0].tolist() == [0.0] * 24 + [1.0] * 24
    assert match.largest_conversion == 2 * 24 * 16 * 2


def test_experts_whose_rows_are_whole_blocks_are_converted_nowhere():
    model = placeholder(MixtralForCausalLM, MixtralConfig(**{**SMALL, "intermediate_size": 64}, num_local_experts=3))
    shapes = mixtral_shapes(model, experts=3, width=64)
    match = match_tensors(model, source_of(shapes))
    assert match.largest_conversion == 0 and sum(fill.nbytes for fill in match.fills) == source_of(shapes).nbytes
    rows = sorted(
        (fill.target_row, fill.sources[0].name.split(".", 4)[4])
        for fill in match.fills
        if fill.targets == ("model.layers.0.mlp.experts.gate_up_proj",)
    )
    assert rows == [(128 * e + 64 * i, f"experts.{e}.{w}.weight") for e in range(3) for i, w in enumerate(("w1", "w3"))]


def test_stored_stacks_are_read_by_expert(mixtral):
    match = match_tensors(mixtral, source_of(shapes_of(mixtral)))
    fills = [f for f in match.fills if f.targets == ("model.layers.0.mlp.experts.gate_up_proj",)]
    assert [(f.spans, f.target_row, f.convert) for f in fills] == [(((48 * e, 48 * e + 48),), 48 * e, None) for e in range(12)]
    assert sum(fill.nbytes for fill in fills) == 12 * 48 * 16 * 2


@pytest.mark.parametrize("gone", ["experts.11.w2", "experts.3.w1"])
def test_a_missing_expert_is_no_smaller_mixture(mixtral, gone):
    shapes = {name: shape for name, shape in mixtral_shapes(mixtral).items() if gone not in name}
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.0"):
        match_tensors(mixtral, source_of(shapes))


def test_experts_of_another_size(mixtral):
    shapes = {name: (16, 25) if "w2" in name else shape for name, shape in mixtral_shapes(mixtral).items()}
    with pytest.raises(CorruptCheckpoint, match=r"\[12, 16, 25\].*\[12, 16, 24\]"):
        match_tensors(mixtral, source_of(shapes))


@pytest.mark.parametrize("experts", [1, 3])
def test_stored_stacks_that_are_turned_are_turned_without_a_look_at_the_parameter(experts):
    """Qwen3-VL's are stored (E, K, N); when they are read, the parameter that says so has been replaced by a packed one."""
    text = {**SMALL, "head_dim": 8, "num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    model = placeholder(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    shapes = shapes_of(model)
    stacks = [name for name in shapes if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacks) == 4
    match = match_tensors(model, source_of({name: (s[0], s[2], s[1]) if name in stacks else s for name, s in shapes.items()}))
    for name in stacks:
        path, _, leaf = name.rpartition(".")
        del model.get_submodule(path)._parameters[leaf]
        fills = [fill for fill in match.fills if fill.targets == (name,)]
        assert len(fills) == experts
        _, rows, columns = shapes[name]
        stored = torch.randn(columns, rows)
        for fill in fills:
            assert fill.convert is not None
            # As a stream gives it: in its own shape where these are all of its rows.
            made = fill.convert([stored.unsqueeze(0) if experts == 1 else stored])[name]
            assert torch.equal(made, stored.t())


def gguf_processor(arch: str, **config: Any) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config)


def info_of(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype="float32", path=Path("x.gguf"), offset=0, nbytes=0)


def test_rows_that_llama_cpp_moved_are_moved_back_within_heads():
    processor = gguf_processor("llama", num_attention_heads=4, num_key_value_heads=2)
    order = _row_order(processor, "blk.0.attn_q.weight", info_of("blk.0.attn_q.weight", 64, 64))
    assert order is not None and not torch.equal(order, torch.arange(64)) and _closed_block(order) == 16
    rows = torch.randn(64, 8)
    made = processor.process(rows.numpy(), "blk.0.attn_q.weight").weights
    back = torch.empty_like(rows)
    back[order] = rows
    assert torch.equal(back, torch.from_numpy(made))
    straight = _row_order(processor, "blk.0.ffn_up.weight", info_of("blk.0.ffn_up.weight", 24, 64))
    assert straight is not None and torch.equal(straight, torch.arange(24)) and _closed_block(straight) == 1


def test_values_that_llama_cpp_changed_are_no_row_order():
    processor = gguf_processor("gemma2")
    assert _row_order(processor, "blk.0.attn_norm.weight", info_of("blk.0.attn_norm.weight", 64)) is None


def test_an_architecture_without_gguf_names_is_refused(mixtral):
    source = source_of({"token_embd.weight": (32, 16)}, kind="gguf")
    source.config["model_type"] = "mixtral"
    with pytest.raises(UnsupportedModel, match="tensor names of model type 'mixtral'"):
        match_tensors(mixtral, source)
