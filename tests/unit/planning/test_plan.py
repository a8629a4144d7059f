"""Plans: exact bytes, which device gets what, and refusals whose numbers and hints are true."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import qlazy
from qlazy.errors import CorruptCheckpoint, DoesNotFit, UnsupportedModel, UsageError
from qlazy.planning.budget import Budget, make_budget
from qlazy.planning.devices import kv_by_block, natural
from qlazy.planning.entries import own_dtype
from qlazy.planning.plan import Plan, allocate, block_of, entries, make_plan, require_fit, resolve_dtype, to_json
from qlazy.planning.recipe import Recipe, make_recipe
from qlazy.sizes import format_bytes, parse_bytes
from qlazy.sources.source import Source, TensorInfo, open_source

MIB, GIB = 1 << 20, 1 << 30

DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**DECODER, "num_hidden_layers": 6, "head_dim": 32, "sliding_window": 16},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}),
    # 96 columns are no whole groups of 64 or 128, and rows and columns of its layers are stored the other way round.
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 96, "n_layer": 2, "n_head": 4, "vocab_size": 384, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 384,
            "max_position_embeddings": 128,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 128,
            "d_ff": 320,
            "d_kv": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 384,
            "decoder_start_token_id": 0,
        },
    ),
}
RECIPES: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4-g128": {"group_size": 128, "symmetric": True},
    "int8": {"bits": 8},
    "nf4": {"format": "nf4"},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny model with random bfloat16 weights, as transformers saves it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            model, config, options = MODELS[name]
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            built = getattr(transformers, model)(getattr(transformers, config)(**options))
            built.to(torch.bfloat16).save_pretrained(made[name])
        return made[name]

    return folder


def llama(layers: int = 12, hidden: int = 512, vocabulary: int = 2048, **config: Any) -> Source:
    """Headers of a Llama that does not exist."""
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{part}.weight"] = (hidden, hidden)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (4 * hidden, hidden)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
    text = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "vocab_size": vocabulary,
    }
    return source_of(shapes, {**text, **config})


def source_of(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], dtype: str = "bfloat16", **more: Any) -> Source:
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        tensors[name] = TensorInfo(name=name, shape=shape, dtype=dtype, path=Path("m.safetensors"), offset=offset, nbytes=size)
        offset += size
    fields: dict[str, Any] = {"kind": "safetensors", "gguf_file": None, "revision": None, "folder": Path("/m")} | more
    return Source(model_id="m", resolved="/m", config=config, tensors=tensors, **fields)


def budget_of(free: dict[str, int], *, reserve: int = 0, length: int = 256, device_map: dict[str, str] | None = None) -> Budget:
    devices = tuple(name for name in free if name != "cpu" or len(free) == 1)
    free = {"cpu": 64 * GIB, **free}
    return Budget(devices=devices, free_bytes=free, reserve_bytes=reserve, max_model_len=length, device_map=device_map)


def planned(source: Source, budget: Budget, recipe: Recipe | None = None, *, exact: bool = True) -> Plan:
    dtype = resolve_dtype(source, "auto", budget)
    return allocate(entries(source, dtype), source, recipe or Recipe(), budget, dtype=dtype, exact=exact)


def split(source: Source, first_layers: int, devices: int = 2, **options: Any) -> Plan:
    """A plan over GPUs of which the first has room for the embedding and so many layers, to the byte."""
    whole = planned(source, budget_of({"cuda:0": 64 * GIB}, **options))
    (gpu, _) = whole.devices
    layer = sum(t.nbytes for t in whole.tensors if t.name.startswith("model.layers.0.")) + gpu.kv_cache_bytes // 12
    embedding = sum(t.nbytes for t in whole.tensors if t.name == "model.embed_tokens.weight")
    fixed = gpu.total_bytes - gpu.weight_bytes - gpu.kv_cache_bytes
    room = fixed + gpu.reserve_bytes + embedding + first_layers * layer
    return planned(source, budget_of({"cuda:0": room} | {f"cuda:{i}": 64 * GIB for i in range(1, devices)}, **options))


# The headers against the model itself, and both against what is measured.


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_headers_tell_the_bytes_of_the_loaded_model(checkpoint, name, recipe):
    folder = checkpoint(name)
    headers = qlazy.plan(folder, device_map="cpu", max_model_len=64, **RECIPES[recipe])
    report = qlazy.load_quantized(folder, device_map="cpu", max_model_len=64, **RECIPES[recipe]).qlazy_report
    exact = report.plan
    assert not headers.exact and exact.exact
    assert exact.weight_bytes == sum(report.device_bytes.values())
    assert exact.weight_bytes <= headers.weight_bytes <= 1.01 * exact.weight_bytes
    assert exact.total_bytes <= headers.total_bytes <= 1.01 * exact.total_bytes
    assert exact.devices[0].staging_bytes == headers.devices[0].staging_bytes
    # Tensors that keep their name are the same tensors.
    mine, theirs = ({t.name: t for t in plan.tensors} for plan in (headers, exact))
    for key in mine.keys() & theirs.keys():
        assert (mine[key].format, mine[key].shape, mine[key].nbytes) == (
            theirs[key].format,
            theirs[key].shape,
            theirs[key].nbytes,
        )
    assert any(t.format is not None for t in exact.tensors)


def test_modules_to_not_convert_cost_what_they_are(checkpoint):
    folder = checkpoint("llama")
    recipe = make_recipe(modules_to_not_convert=["mlp.down_proj"])
    source, budget = open_source(folder), make_budget("cpu")
    more = planned(source, budget, recipe).weight_bytes - planned(source, budget).weight_bytes
    down = [t for t in planned(source, budget).tensors if t.name.endswith("down_proj.weight")]
    assert len(down) == 2 and more == sum(t.source_nbytes - t.nbytes for t in down)


def heads_of(config: dict[str, Any], **more: Any) -> Any:
    shapes = {"lm_head.weight": (384, 128), "model.embed_tokens.weight": (384, 128)}
    source = source_of(shapes, config, **more)
    (head,) = [t for t in planned(source, budget_of({"cpu": GIB}), exact=False).tensors if t.name == "lm_head.weight"]
    return head


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, True),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma"}, True),
        ({"model_type": "falcon"}, True),
        ({"model_type": "mt5", "tie_word_embeddings": False}, True),
        ({"model_type": "of tomorrow"}, True),
        ({}, True),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": False}}, False),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 1}}, False),
        ({"model_type": "mistral3", "text_config": {"tie_word_embeddings": False}}, True),
        ({"model_type": "gemma3", "tie_word_embeddings": False, "text_config": {"vocab_size": 384}}, False),
        ({"tie_word_embeddings": None, "model_type": "llama"}, False),
    ],
    ids=str,
)
def test_a_head_is_untied_where_the_config_says_so_or_the_family_has_it_so(config, tied):
    head = heads_of(config)
    assert (head.format is None, head.kind) == (tied, "tied" if tied else "head")
    assert tied == ("tied to the embedding" in head.reason)


def test_families_that_leave_the_head_untied_are_those_of_transformers():
    from qlazy.planning.entries import _TIED, _UNTIED

    configs = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    names = [name for name in configs if _UNTIED.fullmatch(name)]
    assert {"llama", "mistral", "qwen2_moe", "qwen2_5_vl", "gpt_neox", "olmo", "olmo3"} <= set(names)
    assert not [name for name in names if configs[name]().tie_word_embeddings is not False]
    assert all(configs[name](tie_word_embeddings=False).tie_word_embeddings for name in _TIED if name in configs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_head_in_8_bits_costs_what_it_is(checkpoint, recipe):
    source, budget = open_source(checkpoint("llama")), make_budget("cpu")
    small, kept = (
        planned(source, budget, make_recipe(**RECIPES[recipe], modules_to_not_convert=listed)) for listed in ([], ["lm_head"])
    )
    assert kept.weight_bytes - small.weight_bytes == 384 * 128 * 2 - (384 * 128 + 384 * 2)
    assert small.devices[0].activation_bytes == kept.devices[0].activation_bytes


def test_planning_imports_no_torch(checkpoint, tmp_path):
    folder = checkpoint("llama")
    code = (
        "import sys, qlazy\n"
        f"assert qlazy.plan({str(folder)!r}, device_map='cpu').fits\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("width", "staged"), [(64, 0), (96, 2 * 2 * 96 * 128 * 2)])
def test_experts_are_never_staged_as_a_layer_and_one_alone_where_it_ends_within_a_block(width, staged):
    parts = {
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight": (width, 128)
        for i in range(2)
        for e in range(8)
        for p in ("gate", "up")
    }
    down = {f"model.layers.{i}.mlp.experts.{e}.down_proj.weight": (128, width) for i in range(2) for e in range(8)}
    plan = planned(source_of({**parts, **down}, {}), budget_of({"cpu": GIB}))
    # Gate and up of one expert, before and after.
    assert plan.devices[0].staging_bytes - planned(llama(), budget_of({"cpu": GIB})).devices[0].staging_bytes == staged
    stacks = {t.name: t.shape for t in plan.tensors if t.kind == "experts"}
    assert stacks == {
        f"model.layers.{i}.mlp.experts.{name}": shape
        for i in range(2)
        for name, shape in {"gate_up_proj": (8, 2 * width, 128), "down_proj": (8, 128, width)}.items()
    }


# What cannot be quantized again.


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "hqq"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"quant_method": ["awq"]}}, "['awq']"),
        ({"quantization_config": {"quant_method": "qlazy", "bits": 4}}, "qlazy"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": {"w_bit": 4}}, "a method that it does not name"),
        ({"compression_config": {"quant_method": "quark"}}, "quark"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "a method that it does not name"),
        ({"text_config": {"quantization_config": {"quant_method": "aqlm"}}}, "aqlm"),
    ],
    ids=str,
)
def test_a_quantized_checkpoint_is_refused_by_the_name_of_its_method(config, method):
    with pytest.raises(UnsupportedModel, match=re.escape(f"quantized already, with {method}")) as caught:
        make_plan(llama(**config), Recipe(), budget_of({"cpu": GIB}))
    assert caught.value.exit_code == 3 and "16 bits" in caught.value.hint


@pytest.mark.parametrize("value", [None, {}, "none"])
def test_an_empty_quantization_config_means_nothing(value):
    assert make_plan(llama(quantization_config=value), Recipe(), budget_of({"cpu": GIB})).fits


def test_eight_bit_floats_are_refused_by_name_whether_planned_or_loaded(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    weight = torch.zeros(8, 8).to(torch.float8_e4m3fn)
    save_file({"model.layers.0.mlp.up_proj.weight": weight, "model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    for call in (qlazy.plan, qlazy.load_quantized):
        with pytest.raises(
            UnsupportedModel, match=r"model.safetensors holds 'model.layers.0.mlp.up_proj.weight' in float8_e4m3fn"
        ):
            call(tmp_path, device_map="cpu")


@pytest.mark.parametrize("call", [qlazy.plan, qlazy.load_quantized])
def test_a_quantized_folder_is_refused_before_weights_are_read(checkpoint, tmp_path, call):
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq", "bits": 4}}))
    (tmp_path / "model.safetensors").symlink_to(checkpoint("llama") / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="with hqq"):
        call(tmp_path, device_map="cpu")


def test_a_config_of_more_layers_than_there_are_tensors_is_refused_at_once():
    with pytest.raises(CorruptCheckpoint, match="1,000,000,000 layers, but its files hold 17 tensors") as caught:
        make_plan(llama(2, num_hidden_layers=10**9), Recipe(), budget_of({"cpu": GIB}))
    assert caught.value.hint


def test_blocks_of_gguf_are_decoded_and_not_refused():
    shapes = {"token_embd.weight": (64, 32), "blk.0.attn_q.weight": (32, 32), "blk.0.ffn_gate_inp.weight": (4, 32)}
    source = source_of(shapes, {"model_type": "llama"}, dtype="Q4_1", kind="gguf", gguf_file="m.gguf")
    plan = make_plan(source, Recipe(), budget_of({"cpu": GIB}))
    assert [t.format is not None for t in plan.tensors] == [False, True, False] and plan.dtype == "bfloat16"


# Dtypes.


@pytest.mark.parametrize(
    ("config", "stored", "devices", "dtype"),
    [
        ({"dtype": "bfloat16"}, "float32", ("cpu",), "bfloat16"),
        ({"torch_dtype": "float16"}, "float16", ("cuda:0",), "float16"),
        ({"torch_dtype": "float16"}, "float16", ("cpu",), "bfloat16"),
        ({"torch_dtype": "torch.float32"}, "bfloat16", ("cpu",), "float32"),
        ({"text_config": {"torch_dtype": "float32"}}, "bfloat16", ("cpu",), "float32"),
        ({}, "float16", ("cuda:0",), "float16"),
        ({}, "float64", ("cpu",), "bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "bfloat16", ("cuda:0",), "bfloat16"),
        ({"dtype": None}, "Q4_K", ("cuda:0",), "bfloat16"),
    ],
    ids=str,
)
def test_auto_dtype(config, stored, devices, dtype):
    source = source_of({"a.weight": (64, 64), "b.weight": (4,)}, config, dtype=stored)
    assert resolve_dtype(source, "auto", budget_of(dict.fromkeys(devices, GIB))) == dtype


@pytest.mark.parametrize(
    ("config", "stored", "dtype", "own"),
    [
        ({"torch_dtype": "float16"}, "float32", "auto", "float16"),
        ({}, "float16", "auto", "float16"),
        ({}, "Q4_K", "auto", "bfloat16"),
        ({"torch_dtype": "float16"}, "float16", "float32", "float32"),
    ],
    ids=str,
)
def test_what_is_written_and_what_is_kept_asks_for_no_device(config, stored, dtype, own):
    assert own_dtype(source_of({"a.weight": (64, 64)}, config, dtype=stored), dtype) == own


def test_auto_dtype_is_that_of_most_bytes_whatever_their_order():
    router = TensorInfo(name="blk.0.ffn_gate_inp.weight", shape=(4, 8), dtype="float32", path=Path("m"), offset=0, nbytes=128)
    weight = TensorInfo(name="blk.0.attn_q.weight", shape=(64, 64), dtype="Q4_K", path=Path("m"), offset=128, nbytes=2304)
    for tensors in ([router, weight], [weight, router]):
        source = dataclasses.replace(llama(), config={}, tensors={t.name: t for t in tensors})
        assert resolve_dtype(source, "auto", budget_of({"cuda:0": GIB})) == "bfloat16"


@pytest.mark.parametrize("dtype", ["float8", "int8", "float64", "", "fp16"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match=f"no model dtype '{dtype}'"):
        make_plan(llama(), Recipe(), budget_of({"cpu": GIB}), dtype=dtype)


def test_integers_stay_integers():
    source = source_of({"a.position_ids": (1, 512)}, {}, dtype="int64")
    (entry,) = entries(source, "bfloat16")
    assert (entry.dtype, entry.kind) == ("int64", "other")
    assert planned(source, budget_of({"cpu": GIB})).tensors[0].nbytes == 512 * 8


# Several devices.


@pytest.mark.parametrize("first_layers", [0, 1, 2, 3, 10, 11])
def test_blocks_stay_whole_and_in_order(first_layers):
    plan = split(llama(), first_layers, length=300)
    assert plan.fits
    places = plan.device_map
    by_layer = [{d for name, d in places.items() if block_of(name) == f"model.layers.{i}"} for i in range(12)]
    assert by_layer == [{"cuda:0"}] * first_layers + [{"cuda:1"}] * (12 - first_layers)
    assert places["model.embed_tokens.weight"] == "cuda:0"
    assert places["lm_head.weight"] == places["model.norm.weight"] == "cuda:1"
    first, second, host = plan.devices
    # The first is filled to the byte: one byte less, and a layer moves.
    assert (first.device, second.device, host.device, first.left_bytes) == ("cuda:0", "cuda:1", "cpu", 0)
    assert host.weight_bytes == host.kv_cache_bytes == host.activation_bytes == host.reserve_bytes == 0 < host.staging_bytes


def test_bytes_are_conserved_over_devices():
    plan = split(llama(), 5, devices=3, reserve=MIB)
    one = planned(llama(), budget_of({"cuda:0": 64 * GIB}))
    assert plan.weight_bytes == sum(t.nbytes for t in plan.tensors) == one.weight_bytes
    assert sum(d.kv_cache_bytes for d in plan.devices) == sum(d.kv_cache_bytes for d in one.devices) == 12 * 2 * 512 * 2 * 256
    assert [t.name for t in plan.tensors] == [t.name for t in one.tensors]
    assert plan.source_bytes == llama().nbytes
    for device in plan.devices:
        here = [t for t in plan.tensors if t.device == device.device]
        assert device.quantized_bytes == sum(t.nbytes for t in here if t.format)
        assert device.unquantized_bytes == sum(t.nbytes for t in here if not t.format)
        assert device.total_bytes == sum(
            getattr(device, f"{part}_bytes") for part in ("weight", "kv_cache", "activation", "staging", "runtime")
        )


def test_a_device_that_holds_nothing_is_no_part_of_the_plan():
    # Its free memory is less than the reserve, which must not make the plan fail.
    plan = planned(llama(), budget_of({"cuda:0": 64 * GIB, "cuda:1": MIB}, reserve=GIB))
    assert [d.device for d in plan.devices] == ["cuda:0", "cpu"] and plan.fits


def test_a_full_first_device_is_passed_over():
    plan = planned(llama(), budget_of({"cuda:0": 600 * MIB, "cuda:1": 64 * GIB}))
    assert set(plan.device_map.values()) == {"cuda:1"} and plan.fits


def test_the_host_may_take_what_is_left():
    """The bytes are the same everywhere; the host has other fixed costs than a GPU."""
    source = llama()
    gpu = planned(source, budget_of({"cuda:0": 64 * GIB})).weight_bytes
    host = planned(source, budget_of({"cpu": 64 * GIB})).weight_bytes
    assert host == gpu
    whole = split(source, 4)
    limit = whole.budget.free_bytes["cuda:0"]
    budget = Budget(devices=("cuda:0", "cpu"), free_bytes={"cuda:0": limit, "cpu": 8 * GIB}, reserve_bytes=0, max_model_len=256)
    plan = planned(source, budget)
    assert plan.fits and {d for n, d in plan.device_map.items() if n.startswith("model.layers.3.")} == {"cuda:0"}
    assert {d for n, d in plan.device_map.items() if n.startswith("model.layers.4.")} == {"cpu"}
    assert plan.weight_bytes == host


def test_sliding_layers_weigh_what_they_hold_where_they_are():
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    plan = split(llama(layer_types=kinds, sliding_window=16), 4, length=512)
    per_token = 2 * 512 * 2
    places = [plan.device_map[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(12)]
    for device in plan.devices[:2]:
        tokens = sum(
            (16 if kind[0] == "s" else 512) for kind, place in zip(kinds, places, strict=True) if place == device.device
        )
        assert device.kv_cache_bytes == tokens * per_token


def test_kv_goes_to_the_decoder_of_a_model_with_several_towers():
    vision = [f"model.vision_tower.encoder.layers.{i}" for i in range(2)]
    text = [f"model.language_model.layers.{i}" for i in range(2)]
    assert kv_by_block([*vision, *text], [5, 7]) == dict(zip(text, [5, 7], strict=True))
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert kv_by_block(blocks, [5, 7]) == {"decoder.block.0": 5, "decoder.block.1": 7}
    assert kv_by_block(["a.10", "a.2", "a.1"], [5]) == {"a.1": 2, "a.2": 2, "a.10": 1}
    assert kv_by_block([], [5, 7]) == {"": 12}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.10.block_sparse_moe.experts.7.w1.weight", "model.layers.10"),
        ("h.0.attn.c_attn.weight", "h.0"),
        ("blk.12.attn_q.weight", "blk.12"),
        ("0.weight", "0"),
        ("lm_head.weight", ""),
        ("model.layer2.weight", ""),
        ("a.b.3", ""),
    ],
)
def test_block_of(name, block):
    assert block_of(name) == block


def test_two_comes_before_ten():
    names = ["layers.10", "layers.2", "layers.1", "a.10.b.9", "a.10.b.10", "a.9", "٣.x", "²"]
    assert sorted(names, key=natural)[:6] == ["a.9", "a.10.b.9", "a.10.b.10", "layers.1", "layers.2", "layers.10"]


# Device maps.


def test_device_map_is_followed():
    device_map = {"model.layers.1": "cuda:1", "model.layers": "cuda:0", "": "cpu"}
    budget = Budget(
        devices=("cuda:1", "cuda:0", "cpu"),
        free_bytes={"cuda:0": 64 * GIB, "cuda:1": 64 * GIB, "cpu": 64 * GIB},
        reserve_bytes=0,
        max_model_len=64,
        device_map=device_map,
    )
    places = planned(llama(), budget).device_map
    assert {d for n, d in places.items() if n.startswith("model.layers.1.")} == {"cuda:1"}
    assert {d for n, d in places.items() if n.startswith(("model.layers.10.", "model.layers.0."))} == {"cuda:0"}
    assert places["lm_head.weight"] == "cpu"


@pytest.mark.parametrize("exact", [True, False])
def test_device_map_must_name_everything(exact):
    budget = budget_of({"cuda:0": 64 * GIB}, device_map={"model": "cuda:0"})
    with pytest.raises(UsageError, match=r"no entry for 'lm_head.weight'") as caught:
        planned(llama(), budget, exact=exact)
    assert '""' in caught.value.hint


def test_buffers_that_headers_only_guess_need_no_entry():
    budget = budget_of({"cuda:0": 64 * GIB}, device_map={"model": "cuda:0", "lm_head": "cuda:0"})
    assert set(planned(llama(), budget, exact=False).device_map.values()) == {"cuda:0"}


def test_device_map_in_the_models_words_for_a_file_with_others():
    """GPT-2's file says `h.0`, a GGUF file `blk.0`: the headers take the map on trust, the model's own plan does not."""
    shapes = {"wte.weight": (384, 96), "h.0.attn.c_attn.weight": (96, 288)}
    source = source_of(shapes, {"model_type": "gpt2"})
    budget = budget_of({"cuda:0": 64 * GIB, "cuda:1": 65 * GIB}, device_map={"transformer": "cuda:0", "lm_head": "cuda:1"})
    assert set(planned(source, budget, exact=False).device_map.values()) == {"cuda:1"}
    with pytest.raises(UsageError, match=r"no entry for 'wte.weight'"):
        planned(source, budget, exact=True)


# Refusals.


def test_does_not_fit_names_the_device_with_numbers():
    source = llama()
    (gpu, _) = planned(source, budget_of({"cuda:0": 64 * GIB})).devices
    # A third of the weights on each of two.
    free = MIB + gpu.total_bytes - gpu.weight_bytes - gpu.kv_cache_bytes + gpu.weight_bytes // 3
    budget = budget_of({"cuda:0": free, "cuda:1": free}, reserve=MIB)
    (short,) = [d for d in planned(source, budget).devices if d.left_bytes < 0]
    assert short.device == "cuda:1"
    with pytest.raises(DoesNotFit) as caught:
        make_plan(source, Recipe(), budget)
    numbers = (
        f"needs {format_bytes(short.total_bytes)}, and {format_bytes(MIB)} kept free, where {format_bytes(free)} may be used"
    )
    assert f"{numbers}; cuda:1 is short by " in caught.value.message and "cuda:0" not in caught.value.message
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (short.total_bytes, free - MIB)
    assert caught.value.exit_code == 4 and isinstance(caught.value, MemoryError)


def test_the_host_may_be_what_is_short():
    free = {"cuda:0": 64 * GIB, "cpu": MIB}
    budget = Budget(devices=("cuda:0",), free_bytes=free, reserve_bytes=GIB, max_model_len=64)
    with pytest.raises(DoesNotFit, match="cpu is short by"):
        make_plan(llama(), Recipe(), budget)


def follow(hint: str, recipe: Recipe, budget: Budget) -> tuple[Recipe, Budget]:
    """What a user does who types what a hint says."""
    if length := re.search(r"--max-model-len (\d+)", hint):
        budget = dataclasses.replace(budget, max_model_len=int(length.group(1)))
    if "--bits 4" in hint:
        recipe = dataclasses.replace(recipe, format=make_recipe(bits=4).format)
    if group := re.search(r"--group-size (\d+)", hint):
        recipe = dataclasses.replace(recipe, format=dataclasses.replace(recipe.format, group_size=int(group.group(1))))
    free = dict(budget.free_bytes)
    for size, device in re.findall(r"([\d.]+ [KMG]iB) free on ([\w:]+)", hint):
        free[device] = parse_bytes(size)
        budget = dataclasses.replace(budget, free_bytes=free, devices=budget.devices[:1], device_map=None)
    return recipe, budget


@pytest.mark.parametrize("free", [1 * MIB, 300 * MIB, 330 * MIB, 420 * MIB, 640 * MIB, 700 * MIB, 760 * MIB])
@pytest.mark.parametrize("length", [512, 3000, 60000])
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"format": "nf4"}, {"modules_to_not_convert": ["mlp"]}], ids=str)
@pytest.mark.parametrize("devices", [("cpu",), ("cuda:0", "cuda:1")], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_hints_are_true(free, length, options, devices, exact):
    source, recipe = llama(), make_recipe(**options)
    budget = budget_of(dict.fromkeys(devices, free), reserve=MIB, length=length)
    tensors = entries(source, "bfloat16")
    plan = allocate(tensors, source, recipe, budget, dtype="bfloat16", exact=exact, extra_bytes=MIB)
    try:
        require_fit(plan, source)
    except DoesNotFit as error:
        assert not plan.fits
        recipe, budget = follow(error.hint, recipe, budget)
        again = allocate(tensors, source, recipe, budget, dtype="bfloat16", exact=exact, extra_bytes=MIB)
        assert again.fits, error.hint
    else:
        assert plan.fits


@pytest.mark.parametrize(
    ("options", "free", "length", "hint"),
    [
        ({}, 850, 20000, "This would fit: --max-model-len 8192."),
        ({"bits": 8}, 325, 1024, "This would fit: --bits 4."),
        ({}, 1, 60000, "No shorter context or coarser format fits here. It takes "),
    ],
)
def test_the_hint_is_the_smallest_change(options, free, length, hint):
    with pytest.raises(DoesNotFit) as caught:
        make_plan(llama(), make_recipe(**options), budget_of({"cpu": free * MIB}, length=length))
    assert caught.value.hint.startswith(hint)


def test_fitting_is_to_the_byte():
    plan = planned(llama(), budget_of({"cpu": 64 * GIB}, reserve=7))
    need = plan.total_bytes + 7
    assert make_plan(llama(), Recipe(), budget_of({"cpu": need}, reserve=7)).devices[0].left_bytes == 0
    with pytest.raises(DoesNotFit):
        make_plan(llama(), Recipe(), budget_of({"cpu": need - 1}, reserve=7))


# JSON.


def test_json_is_plain_and_adds_up():
    plan = split(llama(), 5)
    data = json.loads(json.dumps(to_json(plan)))
    assert data["schema"] == 1 and data["fits"] is True and data["exact"] is True
    assert data["weight_bytes"] == sum(d["weight_bytes"] for d in data["devices"]) == sum(t["nbytes"] for t in data["tensors"])
    assert data["total_bytes"] == sum(d["total_bytes"] for d in data["devices"])
    assert data["source_bytes"] == sum(t["source_nbytes"] for t in data["tensors"])
    assert all((t["format"] == "int4-g32-asym") == (not t["reason"]) for t in data["tensors"])
    (head,) = [t for t in data["tensors"] if t["name"] == "lm_head.weight"]
    assert (head["format"], head["reason"], head["nbytes"]) == ("int8-channel", "output head", 2048 * 512 + 2048 * 2)
    rest = 12 * (4 * 512 * 512 + 8 * 512 * 512)
    bits = (4.625 * rest + 8 * head["nbytes"]) / (rest + 2048 * 512)
    assert data["bits_per_weight"] == pytest.approx(bits, abs=1e-4)
    assert data["format"] == "int4-g32-asym" and data["max_model_len"] == 256


def test_bits_per_weight_of_nothing_is_nothing():
    plan = planned(source_of({"model.norm.weight": (64,)}, {}), budget_of({"cpu": GIB}))
    assert plan.bits_per_weight() == 0 and plan.weight_bytes == 128
