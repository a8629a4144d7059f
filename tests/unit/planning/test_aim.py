"""A target: met and never exceeded, with one format for what engines merge, and a refusal that names what would do."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qlazy.errors import DoesNotFit, UsageError
from qlazy.formats import Format, Int4, Int8
from qlazy.planning.aim import aim, formats_of, merged, offered, weight_of
from qlazy.planning.budget import Budget
from qlazy.planning.data import Entry, Plan
from qlazy.planning.plan import allocate, entries, make_plan, to_json
from qlazy.planning.recipe import Kind, Recipe, make_recipe
from qlazy.planning.target import Target
from qlazy.report import plan_summary
from qlazy.save_api import save_recipe
from qlazy.sources.source import Source, TensorInfo

ROOMY = Budget(devices=("cpu",), free_bytes={"cpu": 1 << 50}, reserve_bytes=0, max_model_len=16)
HIDDEN, LAYERS, VOCABULARY = 256, 6, 512


def llama(*, layers: int = LAYERS, tied: bool = False) -> Source:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for i in range(layers):
        for part in ("q", "k", "v", "o"):
            shapes[f"model.layers.{i}.self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
        for part in ("gate", "up"):
            shapes[f"model.layers.{i}.mlp.{part}_proj.weight"] = (4 * HIDDEN, HIDDEN)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, 4 * HIDDEN)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        tensors[name] = TensorInfo(
            name=name, shape=shape, dtype="bfloat16", path=Path("m.safetensors"), offset=offset, nbytes=size
        )
        offset += size
    return Source(
        model_id="m",
        resolved="/m",
        revision=None,
        kind="safetensors",
        folder=Path("/m"),
        gguf_file=None,
        config=config,
        tensors=tensors,
    )


def planned(source: Source | None = None, **options: Any) -> Plan:
    return make_plan(source or llama(), make_recipe(**options), ROOMY)


def formats(plan: Plan) -> dict[str, Format | None]:
    return {tensor.name: tensor.format for tensor in plan.tensors if tensor.kind in ("linear", "head")}


def next_steps(plan: Plan) -> list[int]:
    """Bytes that each layer would take more in the next larger format, together with what shares its own."""
    symmetric = plan.recipe.format.symmetric
    order = [*(Int4(group_size=size, symmetric=symmetric) for size in (128, 64, 32)), Int8()]
    steps: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.format in order[:-1]:
            more = entry(tensor.name, tensor.kind, tensor.shape).stored_bytes(order[order.index(tensor.format) + 1], "bfloat16")
            steps[merged(tensor.name)] = steps.get(merged(tensor.name), 0) + more - tensor.nbytes
    return list(steps.values())


@pytest.mark.parametrize("bpw", [4.2, 4.3, 4.65, 5.5, 7.99])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bits_per_weight_are_met_to_one_step_and_never_exceeded(bpw, symmetric):
    plan = planned(target_bpw=bpw, symmetric=symmetric)
    quantized = [tensor for tensor in plan.tensors if tensor.format is not None]
    weights = sum(math.prod(tensor.shape) for tensor in quantized)
    nbytes = sum(tensor.nbytes for tensor in quantized)
    assert 8 * nbytes <= bpw * weights and plan.meets_target
    smaller = dataclasses.replace(plan.recipe, target=Target(bpw=plan.bits_per_weight() - 1e-6))
    assert not dataclasses.replace(plan, recipe=smaller).meets_target
    assert min(next_steps(plan)) > math.floor(bpw * weights / 8) - nbytes
    assert all(tensor.format.symmetric == symmetric for tensor in quantized if isinstance(tensor.format, Int4))


def test_bytes_are_those_of_all_weights():
    whole = planned().weight_bytes
    for nbytes in (int(0.95 * whole), whole, int(1.3 * whole)):
        plan = planned(target_size=nbytes)
        assert 0 <= nbytes - plan.weight_bytes < min(next_steps(plan))
    assert planned(target_size="1GiB").weight_bytes < 1 << 30
    # With room for all of it layers keep their 16 bits, and heads what the recipe gives them.
    kept = formats(planned(target_size="1GiB"))
    assert {name: fmt for name, fmt in kept.items() if fmt is not None} == {"lm_head.weight": Int8()}


def test_more_bytes_are_spent_where_more_is_lost():
    source = llama(tied=True)
    recipe = make_recipe(target_bpw=4.7)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(LAYERS)]
    worst = {fmt: float(fmt != Int8()) for fmt in FORMATS}
    target = dataclasses.replace(recipe.target, errors={names[3]: worst})
    plan = make_plan(source, dataclasses.replace(recipe, target=target), ROOMY)
    assert formats(plan)[names[3]] == Int8()
    assert plan.bits_per_weight() <= 4.7


FORMATS = (Int4(group_size=128), Int4(group_size=64), Int4(), Int8())


def test_what_engines_merge_shares_one_format():
    for bpw in torch.linspace(4.17, 8, 40).tolist():
        by_group: dict[str, set[Format | None]] = {}
        for name, fmt in formats(planned(target_bpw=bpw)).items():
            by_group.setdefault(merged(name), set()).add(fmt)
        assert all(len(found) == 1 for found in by_group.values())


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"], True),
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"], False),
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"], False),
        (["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"], True),
        (["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"], False),
        (["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"], True),
        (["model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.mlp.experts.7.w2.weight"], True),
        (["model.layers.0.mlp.shared_experts.down_proj.weight", "model.layers.0.mlp.experts.down_proj"], False),
        (["model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"], True),
        (["blk.0.attn_q.weight", "blk.0.attn_k.weight"], True),
        (["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"], True),
        (["bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.key.weight"], True),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.v.weight"], True),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.o.weight"], False),
    ],
)
def test_what_is_merged(names, shared):
    assert (merged(names[0]) == merged(names[1])) is shared


def test_single_modules_and_heads_stay_as_they_were_asked_for():
    plan = planned(
        target_bpw=5, head_bits=4, module_bits={"layers.2.mlp.down_proj": 8}, modules_to_not_convert=["layers.0.mlp.down_proj"]
    )
    got = formats(plan)
    assert got["model.layers.2.mlp.down_proj.weight"] == Int8()
    assert got["model.layers.0.mlp.down_proj.weight"] is None
    assert isinstance(got["lm_head.weight"], Int4)
    assert formats(planned(target_bpw=5, head_bits=16))["lm_head.weight"] is None


def test_the_same_is_chosen_every_time_and_again_from_what_was_chosen():
    recipe = make_recipe(target_bpw=4.5)
    plan = make_plan(llama(), recipe, ROOMY)
    again = make_plan(llama(), plan.recipe, ROOMY)
    assert plan.recipe.chosen and plan == again == make_plan(llama(), recipe, ROOMY)


@pytest.mark.parametrize("tied", [False, True])
def test_a_target_that_nothing_is_small_enough_for_names_one_that_is(tied):
    source = llama(tied=tied)
    for low in ({"target_bpw": 4.0}, {"target_size": "1MiB"}):
        with pytest.raises(DoesNotFit, match="more than the") as caught:
            planned(source, **low)
        assert caught.value.needed_bytes > caught.value.free_bytes
        flag, value = re.search(r"--(target-\w+) (\S+)", caught.value.hint).groups()
        named = float(value) if flag == "target-bpw" else value
        plan = planned(source, **{flag.replace("-", "_"): named})
        assert set(formats(plan).values()) == {Int4(group_size=128)}
    if not tied:
        assert "--embedding-bits 4" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"target_bpw": 4.5, "target_size": "1GiB"},
        {"target_bpw": 3.9},
        {"target_bpw": 16.1},
        {"target_size": 0},
        {"target_size": "5"},
        {"target_bpw": 4.5, "bits": 8},
        {"target_bpw": 4.5, "format": "nf4"},
        {"target_bpw": 4.5, "group_size": 64},
        {"target_bpw": "4.5"},
        {"target_bpw": True},
        {"target_bpw": float("nan")},
        {"target_size": 1e9},
        {"target_size": True},
    ],
)
def test_targets_that_cannot_be_meant(options):
    with pytest.raises(UsageError) as caught:
        make_recipe(**options)
    assert caught.value.hint


def test_a_group_size_may_stand_in_a_recipe_file():
    with pytest.raises(UsageError) as caught:
        make_recipe(target_bpw=4.5, group_size=32)
    assert "recipe file" in caught.value.hint


def test_bitsandbytes_has_no_room_for_a_target():
    for target in ({"target_bpw": 4.5}, {"target_size": "1GiB"}):
        with pytest.raises(UsageError, match="one format for all weights") as caught:
            save_recipe("bitsandbytes", **target)
        assert "--as compressed-tensors" in caught.value.hint
        assert save_recipe("gptq", **target).target is not None


def test_embeddings_in_low_bits_are_named_where_they_raise_what_is_least():
    hints = []
    for bits in (16, 8):
        with pytest.raises(DoesNotFit) as caught:
            planned(llama(tied=True), target_bpw=4.0, embedding_bits=bits)
        hints.append(caught.value.hint)
    assert "--embedding-bits" not in hints[0] and "leave --embedding-bits out" in hints[1]


def test_what_fits_for_a_target_is_never_a_group_size():
    recipe, source = make_recipe(target_bpw=4.5), llama()
    tight = dataclasses.replace(ROOMY, free_bytes={"cpu": 1 << 20})
    with pytest.raises(DoesNotFit, match=r"m for a target of 4\.5 bits per weight does not fit") as caught:
        make_plan(source, recipe, tight)
    assert "a smaller target" in caught.value.hint and "--group-size" not in caught.value.hint
    with pytest.raises(DoesNotFit, match="m in int4-g32-asym does not fit") as caught:
        make_plan(source, make_recipe(), tight)
    assert "a smaller model" in caught.value.hint


def test_what_names_tell_refuses_a_plan_but_not_a_load():
    """As of layers that only draft, which are stored and not loaded."""
    recipe = make_recipe(target_size="2.5MiB")
    with pytest.raises(DoesNotFit, match="weights, by their names, take"):
        make_plan(llama(), recipe, ROOMY)
    plan = make_plan(llama(), recipe, ROOMY, patient=True)
    assert set(formats(plan).values()) == {Int4(group_size=128)} and not plan.meets_target
    assert "More than a target of 2.5 MiB, by names" in plan_summary(plan)
    with pytest.raises(DoesNotFit) as caught:
        allocate(entries(llama(), "bfloat16"), llama(), recipe, ROOMY, dtype="bfloat16", exact=True, patient=True)
    assert "by their names" not in caught.value.message
    met = allocate(entries(llama(layers=2), "bfloat16"), llama(), plan.recipe, ROOMY, dtype="bfloat16", exact=True)
    assert met.weight_bytes <= 2.5 * (1 << 20) and met.meets_target


def test_a_loaded_models_plan_says_how_many_weights_were_not_measured():
    plan = planned(target_bpw=4.5)
    exact = dataclasses.replace(plan, exact=True)
    assert f"{len(plan.recipe.chosen)} tensors could not be measured" in plan_summary(exact)
    errors = {name: {} for name, _ in plan.recipe.chosen}
    recipe = dataclasses.replace(plan.recipe, target=dataclasses.replace(plan.recipe.target, errors=errors))
    assert "target" not in plan_summary(dataclasses.replace(exact, recipe=recipe))


def entry(name: str, kind: Kind, shape: tuple[int, ...]) -> Entry:
    return Entry(name=name, shape=shape, dtype="bfloat16", kind=kind, source_nbytes=0)


def test_formats_of_a_head_are_no_larger_than_the_recipes():
    head = entry("lm_head.weight", "head", (512, 256))
    recipe = make_recipe(target_size="1GiB", head_bits=4)
    assert formats_of(head, recipe) == list(FORMATS[:3])
    assert formats_of(head, make_recipe(target_size="1GiB")) == list(FORMATS)


def test_groups_that_do_not_divide_the_columns_are_not_offered():
    recipe = make_recipe(target_bpw=5)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert formats_of(entry(layer, "linear", (64, 576)), recipe) == [Int4(group_size=64), Int4(), Int8()]
    assert formats_of(entry(layer, "linear", (64, 40)), recipe) == [Int4(group_size=-1), Int8()]


@pytest.mark.parametrize("symmetric", [False, True])
def test_experts_whose_matrices_take_no_groups_in_common_get_four_bits_by_rows(symmetric):
    recipe = make_recipe(target_bpw=4.4, symmetric=symmetric)
    up = entry("model.layers.0.mlp.experts.gate_up_proj", "experts", (4, 80, 256))
    down = entry("model.layers.0.mlp.experts.down_proj", "experts", (4, 256, 40))
    rows = Int4(group_size=-1, symmetric=symmetric)
    assert offered([up, down], recipe) == {name: [rows, Int8()] for name in (up.name, down.name)}
    # Alone each has its own.
    assert offered([up], recipe)[up.name] == formats_of(up, recipe) != [rows, Int8()]
    found = aim([up, down], make_recipe(target_bpw=4.8, symmetric=symmetric), "bfloat16").chosen
    assert dict(found) == dict.fromkeys((up.name, down.name), rows)


@pytest.mark.parametrize(
    ("leaf", "as_leaf"),
    [
        ("attention.output.dense", "self_attn.o_proj"),
        ("attention.wo", "self_attn.o_proj"),
        ("crossattention.output.dense", "self_attn.o_proj"),
        ("output.dense", "mlp.down_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("DenseReluDense.wo", "mlp.down_proj"),
    ],
)
def test_what_attention_puts_out_is_no_down_projection(leaf, as_leaf):
    weights = [weight_of(entry(f"layers.29.{name}.weight", "linear", (64, 64)), {"layers.": 29}) for name in (leaf, as_leaf)]
    assert weights[0] == weights[1]


def test_middle_blocks_and_last_ones_matter_by_what_layers_do():
    def weight(number: int, leaf: str, *, kind: Kind = "linear") -> float:
        return weight_of(entry(f"model.layers.{number}.{leaf}.weight", kind, (64, 64)), {"model.layers.": 29})

    assert weight(15, "self_attn.v_proj") > 3 * weight(0, "self_attn.v_proj")
    assert weight(29, "mlp.down_proj") > weight(0, "mlp.down_proj") > weight(15, "mlp.down_proj")
    assert weight(29, "mlp.gate_proj") > weight(0, "mlp.gate_proj") == weight(15, "mlp.gate_proj")
    # As much as all layers of several blocks together.
    head = weight_of(entry("lm_head.weight", "head", (512, 64)), {"model.layers.": 29})
    assert head > 10 * weight(15, "self_attn.v_proj")


def test_json_names_the_target_and_no_format_for_all():
    for options, asked in (
        ({"target_bpw": 4.3}, {"weight_bytes": None, "bits_per_weight": 4.3}),
        ({"target_size": "1GiB"}, {"weight_bytes": 1 << 30, "bits_per_weight": None}),
    ):
        told = json.loads(json.dumps(to_json(planned(**options))))
        assert told["format"] is None and told["target"] == asked
        assert all(asked[figure] is None or told[figure] <= asked[figure] for figure in asked)
    assert to_json(planned())["format"] == "int4-g32-asym" and to_json(planned())["target"] is None


def test_a_recipe_without_a_target_is_left_alone():
    recipe = Recipe()
    assert aim([], recipe, "bfloat16") is recipe


def test_a_plan_says_that_nothing_was_measured_yet():
    assert "For a target of 4.3 bits per weight, by what layers like these" in plan_summary(planned(target_bpw=4.3))
    assert "target of 1.0 GiB" in plan_summary(planned(target_size="1GiB"))
    assert "target" not in plan_summary(planned())
