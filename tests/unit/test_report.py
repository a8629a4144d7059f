"""The report: every number in it is one of the plan's or of the measurement's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlazy.planning.budget import Budget
from qlazy.planning.plan import allocate, entries, to_json
from qlazy.planning.recipe import make_recipe
from qlazy.report import (
    LoadReport,
    align,
    comparisons,
    measured_table,
    plan_summary,
    plan_table,
    quantized,
    report_to_json,
    timings,
    unquantized,
)
from qlazy.sources.source import Source, TensorInfo

MIB, GIB = 1 << 20, 1 << 30


def tensors():
    shapes = {"model.embed_tokens.weight": (1024, 512), "lm_head.weight": (1024, 512), "model.norm.weight": (512,)}
    for layer in range(4):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (1024, 512)
        shapes[f"model.layers.{layer}.norm.weight"] = (512,)
    offset = 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        yield TensorInfo(name=name, shape=shape, dtype="bfloat16", path=Path("m.safetensors"), offset=offset, nbytes=nbytes)
        offset += nbytes


def make(devices=("cpu",), free=GIB, device_map=None, **recipe):
    config = {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1024,
        "vocab_size": 1024,
    }
    source = Source(
        model_id="m",
        resolved="/m",
        revision=None,
        kind="safetensors",
        folder=Path("/m"),
        gguf_file=None,
        config=config,
        tensors={t.name: t for t in tensors()},
    )
    budget = Budget(
        devices=devices,
        free_bytes=dict.fromkeys([*devices, "cpu"], free),
        reserve_bytes=MIB,
        max_model_len=128,
        device_map=device_map,
    )
    return allocate(entries(source, "bfloat16"), source, make_recipe(**recipe), budget, dtype="bfloat16", exact=True)


def cells(table, label):
    (line,) = [line for line in table.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split("  ")


def test_align_puts_labels_left_and_numbers_right():
    assert (
        align([["", "a", "bb"], ["long", "1", "22222"], ["x", "", "3"]])
        == "        a     bb\n  long  1  22222\n  x            3"
    )


def test_plan_table_has_a_column_a_device_that_adds_up():
    plan = make(devices=("cuda:0", "cuda:1"), device_map={"": "cuda:0", "model.layers.3": "cuda:1", "lm_head": "cuda:1"})
    table = plan_table(plan, {"cuda:0": "RTX 3090"})
    assert table.splitlines()[0].split("  ")[-3:] == ["cuda:0 (RTX 3090)", "cuda:1", "    cpu"] or "cuda:0 (RTX 3090)" in table
    for device in plan.devices:
        kept = sum(t.nbytes for t in plan.tensors if t.format is None and t.device == device.device)
        assert kept == device.unquantized_bytes
    assert "1.0 MiB" in table and "-" in table
    assert "bfloat16 embedding" in table and "bfloat16 norm" in table
    assert [c.strip() for c in cells(table, "int8-channel output head with scales") if c.strip()] == ["-", "514 KiB", "-"]
    assert "output head" not in plan_table(make(modules_to_not_convert=["lm_head"]))
    assert cells(plan_table(make(head_bits=16)), "bfloat16 output head")[-1].strip() == "1.0 MiB"


def test_plan_table_leaves_out_rows_without_bytes():
    table = plan_table(make())
    assert "fused experts" not in table and "router" not in table and "int4" in table


def test_plan_table_shows_what_is_missing():
    table = plan_table(make(free=MIB))
    assert "-" in [c.strip()[0] for c in cells(table, "left") if c.strip()]
    assert plan_summary(make(free=MIB)).splitlines()[-1].startswith("Does not fit.")


def test_summary_says_what_is_kept_and_why():
    text = plan_summary(make(modules_to_not_convert=["model.layers.0"]))
    assert "Quantized: 4 tensors" in text
    assert "Of these in int8-channel: 1 tensor, 514 KiB (output head)." in text
    assert "Kept in bfloat16: 1 tensor, 1.0 MiB (listed in modules_to_not_convert" in text
    assert text.splitlines()[-1].startswith("Fits. Reads 6.0 MiB once")


def test_summary_of_a_head_in_16_bits():
    assert "Kept in bfloat16: 1 tensor, 1.0 MiB (output head)." in plan_summary(make(head_bits=16))
    listed = plan_summary(make(modules_to_not_convert=["lm_head"]))
    assert "output head" not in listed and "Kept in bfloat16: 1 tensor, 1.0 MiB (listed in modules_to_not_convert" in listed


def test_quantized_and_unquantized_are_all_there_is_and_the_recipes_own_format_comes_first():
    plan = make()
    groups = quantized(plan)
    assert list(groups) == [("int4-g32-asym", ""), ("int8-channel", "output head")]
    assert [t.name for t in groups["int8-channel", "output head"]] == ["lm_head.weight"]
    assert sum(len(held) for held in [*groups.values(), *unquantized(plan).values()]) == len(plan.tensors)


def test_unquantized_is_all_that_has_no_format_largest_first():
    plan = make()
    groups = unquantized(plan)
    assert sum(len(kept) for kept in groups.values()) == sum(t.format is None for t in plan.tensors)
    sizes = [sum(t.nbytes for t in kept) for kept in groups.values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture
def report():
    plan = make()
    return LoadReport(
        plan=plan,
        seconds={"resolve": 0.25, "stream": 2.0, "total": 2.5},
        bytes_read=4 * GIB,
        device_bytes={"cpu": plan.weight_bytes * 2},
        host_peak_bytes=10 * MIB,
        unexpected=["model.extra"],
        tensors_loaded=len(plan.tensors),
        samples=[(0.0, 5), (0.02, 7)],
    )


def test_comparisons_are_planned_and_measured(report):
    weights, peak = comparisons(report)
    cpu = report.plan.devices[0]
    assert (weights.what, weights.device) == ("weights", "cpu")
    assert weights.measured_bytes == 2 * weights.planned_bytes == 2 * cpu.weight_bytes
    assert peak.planned_bytes == cpu.weight_bytes + cpu.staging_bytes + cpu.runtime_bytes
    assert peak.measured_bytes == 10 * MIB


def test_measured_table_shows_the_difference(report):
    lines = measured_table(report).splitlines()
    assert lines[0].split() == ["planned", "measured", "difference"]
    assert lines[1].split()[:2] == ["weights,", "cpu"] and lines[1].endswith("+100.0 %")
    assert "10.0 MiB" in lines[2]


def test_timings_have_the_rate_of_reading(report):
    assert timings(report) == "resolve 0.25 s, stream 2.00 s, total 2.50 s; read 4.0 GiB at 2.0 GiB/s"
    report.seconds = {}
    assert timings(report) == "; read 4.0 GiB"


def test_str_is_both(report):
    assert str(report) == f"{plan_summary(report.plan)}\n{measured_table(report)}\n{timings(report)}"


def test_json_round_trips(report):
    found = json.loads(json.dumps(report_to_json(report)))
    assert found["schema"] == 1
    assert found["plan"] == json.loads(json.dumps(to_json(report.plan)))
    assert found["comparisons"][0]["planned_bytes"] == report.plan.devices[0].weight_bytes
    assert found["unexpected"] == ["model.extra"] and found["samples"] == [[0.0, 5], [0.02, 7]]
