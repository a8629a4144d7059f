"""Plans of any model on any machine: bytes are conserved, order does not matter, and more memory never hurts."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlazy.planning.budget import Budget
from qlazy.planning.plan import Plan, allocate, block_of, entries, to_json
from qlazy.planning.recipe import Recipe, make_recipe
from qlazy.sources.source import Source, TensorInfo

MIB = 1 << 20
GIB = 1 << 30
LEAVES = [
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "mlp.gate_proj.weight",
    "mlp.gate.weight",
    "mlp.experts.0.w1.weight",
    "norm.weight",
    "position_ids",
]
OUTER = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "projector.weight", "²", "x.1²", "a.²b.7.weight"]
TOWERS = ["model.layers", "h", "model.vision_tower.encoder.layers", "decoder.block", "مدل.layers"]

shapes = st.one_of(
    st.tuples(st.integers(1, 4096)),
    st.tuples(st.integers(1, 1500), st.integers(1, 1500)),
    st.tuples(st.sampled_from([64, 128, 1024, 4096]), st.sampled_from([64, 128, 1024, 2048])),
    st.tuples(st.integers(1, 8), st.integers(1, 64), st.integers(1, 64)),
    st.just(()),
)
recipes = st.builds(
    lambda options, names: make_recipe(**options, modules_to_not_convert=names),
    st.sampled_from(
        [{}, {"group_size": 128, "symmetric": True}, {"bits": 8}, {"format": "nf4"}, {"bits": 8, "group_size": 32}]
    ),
    st.lists(st.sampled_from(["mlp", "q_proj", "layers.1", "*.experts"]), max_size=2),
)


@st.composite
def sources(draw: Any) -> Source:
    names = draw(st.lists(st.sampled_from(OUTER), unique=True, min_size=1))
    for tower in draw(st.lists(st.sampled_from(TOWERS), unique=True, max_size=2)):
        for block in range(draw(st.integers(1, 12))):
            names += [f"{tower}.{block}.{leaf}" for leaf in draw(st.lists(st.sampled_from(LEAVES), unique=True, min_size=1))]
    tensors, offset = {}, 0
    for name in names:
        shape = draw(shapes)
        nbytes = 2
        for extent in shape:
            nbytes *= extent
        dtype = "int64" if name.endswith("_ids") else draw(st.sampled_from(["bfloat16", "float32"]))
        path = Path(draw(st.sampled_from(["a.safetensors", "b.safetensors"])))
        tensors[name] = TensorInfo(name=name, shape=shape, dtype=dtype, path=path, offset=offset, nbytes=nbytes)
        offset += nbytes
    config = {
        "model_type": draw(st.sampled_from(["llama", "gpt2", "t5", "mistral", "gemma2"])),
        "hidden_size": 512,
        "num_hidden_layers": draw(st.integers(1, min(12, len(tensors)))),
        "num_attention_heads": draw(st.sampled_from([0, 8])),
        "sliding_window": draw(st.sampled_from([None, 32])),
    }
    return Source(
        model_id="m",
        resolved="/m",
        revision=None,
        kind="safetensors",
        folder=None,
        gguf_file=None,
        config=config,
        tensors=tensors,
    )


@st.composite
def budgets(draw: Any) -> Budget:
    devices = draw(st.lists(st.sampled_from(["cuda:0", "cuda:1", "cuda:2", "cpu"]), unique=True, min_size=1))
    # Around what takes effect: fixed costs are some 250 MiB on the host and 700 on a GPU.
    free = {d: draw(st.integers(200 * MIB, 500 * MIB) | st.integers(650 * MIB, 800 * MIB) | st.just(GIB)) for d in devices}
    return Budget(
        devices=tuple(devices),
        free_bytes={"cpu": GIB, **free},
        reserve_bytes=draw(st.sampled_from([0, MIB, 100 * MIB])),
        max_model_len=draw(st.sampled_from([1, 100, 1000])),
    )


def planned(source: Source, recipe: Recipe, budget: Budget) -> Plan:
    return allocate(entries(source, "bfloat16"), source, recipe, budget, dtype="bfloat16", exact=False)


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@many
@given(sources(), recipes, budgets())
def test_bytes_are_conserved_and_every_tensor_has_one_device(source, recipe, budget):
    plan = planned(source, recipe, budget)
    assert plan.weight_bytes == sum(t.nbytes for t in plan.tensors)
    assert plan.total_bytes == sum(d.total_bytes for d in plan.devices)
    assert len(plan.device_map) == len(plan.tensors)
    alone = {name for name in source.tensors if ".experts." not in name}  # those of experts are planned as one stack
    assert alone <= set(plan.device_map) and len(plan.tensors) >= len(alone)
    assert set(plan.device_map.values()) <= set(budget.devices)
    on_host = planned(source, recipe, dataclasses.replace(budget, devices=("cpu",)))
    assert sum(d.kv_cache_bytes for d in plan.devices) == sum(d.kv_cache_bytes for d in on_host.devices)
    for device in plan.devices:
        assert device.weight_bytes == sum(t.nbytes for t in plan.tensors if t.device == device.device)
    blocks: dict[str, set[str]] = {}
    for t in plan.tensors:
        if block_of(t.name):
            blocks.setdefault(block_of(t.name), set()).add(t.device)
    assert all(len(devices) == 1 for devices in blocks.values())
    assert plan.fits == (min(d.left_bytes for d in plan.devices) >= 0)


@many
@given(sources(), recipes, budgets(), st.randoms(use_true_random=False))
def test_the_order_of_tensors_in_the_source_does_not_matter(source, recipe, budget, order: random.Random):
    items = list(source.tensors.items())
    order.shuffle(items)
    shuffled = dataclasses.replace(source, tensors=dict(items))
    assert to_json(planned(shuffled, recipe, budget)) == to_json(planned(source, recipe, budget))


@many
@given(sources(), recipes, budgets(), st.data())
def test_more_memory_never_hurts(source, recipe, budget, data):
    if not planned(source, recipe, budget).fits:
        # A plan that fits in between is as good a start.
        budget = dataclasses.replace(budget, free_bytes={d: n + 300 * MIB for d, n in budget.free_bytes.items()})
    more = {d: n + data.draw(st.integers(0, 200 * MIB), label=d) for d, n in budget.free_bytes.items()}
    if planned(source, recipe, budget).fits:
        assert planned(source, recipe, dataclasses.replace(budget, free_bytes=more)).fits


@many
@given(sources(), recipes, budgets())
def test_a_low_bit_plan_is_never_larger_than_none(source, recipe, budget):
    """Beyond the few weights that are smaller than their scales."""
    nothing = dataclasses.replace(recipe, modules_to_not_convert=("*",))
    low, full = (planned(source, r, dataclasses.replace(budget, devices=("cpu",))) for r in (recipe, nothing))
    assert all(t.format is None for t in full.tensors)
    slack = sum(64 + 8 * t.shape[0] for t in low.tensors if t.format is not None)
    assert low.weight_bytes <= full.weight_bytes + slack
