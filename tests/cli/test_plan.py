"""`qlazy plan`: the numbers of make_plan, on stdout, with the exit code of the verdict."""

from __future__ import annotations

import json

import pytest

from qlazy.planning.budget import make_budget
from qlazy.planning.plan import make_plan, to_json
from qlazy.planning.recipe import make_recipe
from qlazy.sources.source import open_source

TINY_PARAMETERS = 2 * 64 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64


def expected(folder, **options):
    return make_plan(open_source(str(folder)), make_recipe(**options), make_budget("cpu"))


def test_table_holds_the_numbers_of_the_plan(qlazy, tiny):
    done = qlazy("plan", tiny)
    plan = expected(tiny)
    assert done.code == 0
    assert done.out.splitlines()[0].endswith(f"{TINY_PARAMETERS / 1e6:.1f} M parameters, 2 layers, 1 file")
    for words in ("cpu", "free now", "int4-g32-asym weights", "bfloat16 embedding", "int8-channel output head", "left"):
        assert words in done.out
    assert f"Quantized: 15 tensors, {plan.bits_per_weight():.2f} bits per weight" in done.out
    assert "Kept in bfloat16: 1 tensor, 8 KiB (embedding)." in done.out
    assert "Fits." in done.out
    assert done.err == f"Next: qlazy load {tiny}\n"


def test_json_is_the_plan_and_nothing_else(qlazy, tiny):
    done = qlazy("plan", tiny, "--bits", "8", "--json")
    mine, theirs = done.json, to_json(expected(tiny, bits=8))
    assert done.code == 0 and done.err == ""
    assert mine["schema"] == 1 and mine["fits"] is True
    # What is free may change from one second to the next.
    assert mine["tensors"] == theirs["tensors"]
    assert mine["weight_bytes"] == theirs["weight_bytes"]
    assert mine["total_bytes"] == theirs["total_bytes"]
    assert all(isinstance(value, int) for name, value in mine["devices"][0].items() if name.endswith("_bytes"))


def test_dry_run_of_load_is_plan(qlazy, tiny):
    plan, dry = (
        qlazy("plan", tiny, "--format", "nf4", "--json").json,
        qlazy("load", tiny, "--format", "nf4", "--json", "--dry-run").json,
    )
    assert [t["format"] for t in dry["tensors"]] == [t["format"] for t in plan["tensors"]]
    assert dry["total_bytes"] == plan["total_bytes"]


def test_what_does_not_fit_is_shown_and_refused(qlazy, tiny):
    done = qlazy("plan", tiny, "--max-memory", "cpu=300MiB", "--reserve", "0MiB", "--max-model-len", "200000")
    assert done.code == 4
    assert "left" in done.out and "-" in done.out.split("left")[1] and "Does not fit." in done.out
    assert done.err.startswith("Error: ") and "does not fit: it needs" in done.err
    assert "Hint: This would fit: --max-model-len 8192." in done.err


def test_what_does_not_fit_is_one_json_object(qlazy, tiny):
    done = qlazy("plan", tiny, "--max-memory", "cpu=1MiB", "--json")
    found = done.json
    assert done.code == 4
    assert found["fits"] is False and found["tensors"]
    error = found["error"]
    assert error["type"] == "DoesNotFit" and error["needed_bytes"] > error["free_bytes"] >= 0
    assert error["message"] in done.err


def test_verbose_lists_every_tensor(qlazy, tiny):
    lines = qlazy("plan", tiny, "-v").out.splitlines()
    (line,) = [line for line in lines if "model.layers.1.mlp.down_proj.weight" in line]
    assert line.split()[1:4] == ["64x128", "int4-g32-asym", "cpu"]


def test_quiet_says_nothing_on_stderr(qlazy, tiny):
    assert qlazy("plan", tiny, "-q").err == ""


def test_modules_to_not_convert_is_repeatable_and_reported(qlazy, tiny):
    done = qlazy("plan", tiny, "--modules-to-not-convert", "down_proj", "--modules-to-not-convert", "model.layers.0.*.q_proj")
    assert "Quantized: 12 tensors" in done.out
    assert "Kept in bfloat16: 3 tensors, 40 KiB (listed in modules_to_not_convert" in done.out


def test_the_head_can_be_kept_in_two_ways(qlazy, tiny):
    bits = qlazy("plan", tiny, "--head-bits", "16")
    assert "Quantized: 14 tensors" in bits.out and "Kept in bfloat16: 1 tensor, 8 KiB (output head)." in bits.out
    assert "qlazy load" in bits.err and "--head-bits 16" in bits.err
    listed = qlazy("plan", tiny, "--head-bits", "4", "--modules-to-not-convert", "lm_head")
    assert "Quantized: 14 tensors" in listed.out
    assert "Kept in bfloat16: 1 tensor, 8 KiB (listed in modules_to_not_convert" in listed.out
    wrong = qlazy("plan", tiny, "--head-bits", "5")
    assert wrong.code == 2 and "head_bits is 5" in wrong.err


def test_next_command_repeats_the_options_but_no_token(qlazy, tiny):
    done = qlazy(
        "plan", tiny, "--no-double-quant", "--format", "nf4", "--modules-to-not-convert", "a b", "--token", "hf_secret", "-v"
    )
    assert done.err == f"Next: qlazy load {tiny} --format nf4 --no-double-quant --modules-to-not-convert 'a b'\n"


def test_demo_is_planned_from_its_headers(qlazy, demo):
    done = qlazy("plan", demo, "--json")
    assert done.code == 0
    assert done.json["model_id"] == "demo" and done.json["resolved"].endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert sum(t["format"] is not None for t in done.json["tensors"]) == 210


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-model-anywhere-at-all"], 3, "no-such-model"),
        (["TINY", "--bits", "3"], 2, "bits is 3"),
        (["TINY", "--format", "int5"], 2, "no format 'int5'"),
        (["TINY", "--max-memory", "cpu=16"], 2, "'16' is not a size"),
        (["TINY", "--max-memory", "16GiB"], 2, "is not a list of NAME=VALUE"),
        (["TINY", "--device-map", "cuda:77"], 6, "cuda:77"),
        (["TINY", "--device-map", "model=cpu"], 2, "no entry for 'lm_head.weight'"),
        (["TINY", "--dtype", "float8"], 2, "float8"),
        (["TINY", "--recipe", "nowhere.yaml"], 2, "no recipe 'nowhere.yaml'"),
        (["TINY", "--no-such-flag"], 2, "--no-such-flag"),
        ([], 2, "MODEL"),
    ],
)
def test_errors_have_their_code_message_and_hint(qlazy, tiny, arguments, code, words):
    arguments = [str(tiny) if a == "TINY" else a for a in arguments]
    done = qlazy("plan", *arguments, env={"HF_HUB_OFFLINE": "1"})
    assert done.code == code
    assert done.out == ""
    first, second = done.err.splitlines()
    assert first.startswith("Error: ") and words in first
    assert second.startswith("Hint: ")
    told = qlazy("plan", *arguments, "--json", env={"HF_HUB_OFFLINE": "1"})
    assert told.code == code and told.err == done.err
    assert told.json["schema"] == 1 and words in told.json["error"]["message"] and told.json["error"]["hint"]


def test_corrupt_header_is_code_5(qlazy, tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    done = qlazy("plan", tmp_path)
    assert done.code == 5 and "model.safetensors" in done.err and done.out == ""


def test_plan_accepts_a_device_for_every_prefix(qlazy, tiny):
    found = json.loads(qlazy("plan", tiny, "--device-map", "model=cpu,lm_head=cpu", "--json").out)
    assert {t["device"] for t in found["tensors"]} == {"cpu"}
