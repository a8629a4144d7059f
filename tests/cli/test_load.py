"""`qlazy load`: what is said while and after, and that nothing is left behind."""

from __future__ import annotations

import json

import pytest


def test_order_on_stderr_and_nothing_on_stdout(qlazy, tiny):
    done = qlazy("load", tiny)
    assert done.code == 0 and done.out == ""
    marks = [
        "free now",
        "Fits.",
        "21/21 tensors, 0 left without storage",
        "  planned",
        "weights, cpu",
        "peak while loading, cpu",
        "total ",
        "It says: ",
        f"Next: qlazy chat {tiny}",
    ]
    places = [done.err.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "\x1b" not in done.err


def test_json_has_planned_and_measured_bytes(qlazy, tiny):
    done = qlazy("load", tiny, "--bits", "8", "--json")
    found = done.json
    assert done.code == 0 and done.err == ""
    assert found["schema"] == 1 and found["tensors_loaded"] == 21
    weights = found["comparisons"][0]
    assert (weights["what"], weights["device"]) == ("weights", "cpu")
    assert weights["measured_bytes"] == found["device_bytes"]["cpu"]
    assert abs(weights["measured_bytes"] - weights["planned_bytes"]) <= 0.01 * weights["planned_bytes"]
    assert {"plan", "build", "stream", "finish", "total"} <= set(found["seconds"])
    assert 1 <= found["generated"]["tokens"] <= 32


def test_quiet_and_no_prompt(qlazy, tiny):
    done = qlazy("load", tiny, "-q", "--prompt", "")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_prompt_is_continued_where_there_is_no_chat_template(qlazy, mute):
    assert "It says: " in qlazy("load", mute, "--prompt", "the sea").err


def test_what_does_not_fit_is_refused_before_torch_is_imported(shell, tiny):
    done = shell("load", tiny, "--max-memory", "cpu=1MiB")
    assert done.code == 4 and done.out == ""
    assert "free now" in done.err and "Error: " in done.err and "Reading" not in done.err


def test_no_tokenizer_is_named_with_a_way_out(qlazy, tiny, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny / name)
    done = qlazy("run", tmp_path, "hello")
    assert done.code == 3 and "has no tokenizer" in done.err and done.out == ""
    assert "--prompt ''" in done.err
    assert qlazy("load", tmp_path, "--prompt", "").code == 0


def test_missing_tensor_is_code_5_and_no_strict_loads_it(qlazy, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = qlazy("load", tmp_path)
    assert done.code == 5 and "model.norm.weight" in done.err and "--no-strict" in done.err
    loose = qlazy("load", tmp_path, "--no-strict", "--prompt", "")
    assert loose.code == 0 and "In no file, as building the model makes them: model.norm.weight" in loose.err


@pytest.mark.parametrize("flags", [["--format", "nf4"], ["--recipe", "int4-small"], ["--modules-to-not-convert", "down_proj"]])
def test_recipe_reaches_the_model(qlazy, tiny, flags):
    planned = qlazy("plan", tiny, *flags, "--json").json
    loaded = qlazy("load", tiny, *flags, "--prompt", "", "--json").json
    formats = [
        {t["name"].removesuffix(".weight"): t["format"] for t in p["tensors"] if t["format"]} for p in (planned, loaded["plan"])
    ]
    assert formats[0] == formats[1] and formats[0]


def test_trace_and_plot_are_written(qlazy, tiny, tmp_path):
    trace, plot = tmp_path / "trace.json", tmp_path / "memory.svg"
    done = qlazy("load", tiny, "--prompt", "", "--json", "--trace", trace, "--plot", plot)
    assert done.code == 0 and done.err == ""
    events = json.loads(trace.read_text())["traceEvents"]
    stages = [event["name"] for event in events if event["ph"] == "X" and event["name"] not in ("read", "quantize", "place")]
    assert stages == ["resolve", "plan", "build", "stream", "finish"]
    assert sum(event["args"]["bytes"] for event in events if event["name"] == "read") == done.json["bytes_read"]
    assert done.json["read_samples"][-1][1] == done.json["bytes_read"]
    assert len(done.json["read_samples"]) == len(done.json["samples"])
    drawn = plot.read_text()
    assert all(words in drawn for words in ("host memory, ", "bytes read, ", "planned peak", "seconds"))


@pytest.mark.parametrize("flag", ["--trace", "--plot"])
def test_files_that_cannot_be_written_are_refused_before_the_load(qlazy, tiny, tmp_path, flag):
    done = qlazy("load", tiny, flag, tmp_path / "absent" / "a.png")
    assert done.code == 2 and "there is no folder" in done.err and "free now" not in done.err
    done = qlazy("load", tiny, flag, tmp_path / "a.png", "--dry-run")
    assert done.code == 2 and "--dry-run loads nothing" in done.err
    assert list(tmp_path.iterdir()) == []


def test_random_weights_need_only_a_config(qlazy, tiny, tmp_path):
    (tmp_path / "config.json").symlink_to(tiny / "config.json")
    done = qlazy("load", tmp_path, "--random-init")
    assert done.code == 0, done.err
    assert "random weights" in done.err and "21/21 tensors, 0 left without storage" in done.err
    assert "It says" not in done.err and f"Next: qlazy bench {tmp_path} --random-init" in done.err
    planned = qlazy("plan", tmp_path, "--random-init", "--json").json
    loaded = qlazy("load", tmp_path / "config.json", "--random-init", "--json").json
    sizes = [sum(t["nbytes"] for t in plan["tensors"]) for plan in (planned, loaded["plan"])]
    assert sizes[0] == sizes[1]
    assert loaded["generated"] is None
    timed = qlazy("bench", tmp_path, "--random-init", "-p", "4", "-n", "2", "-r", "1")
    assert timed.code == 0 and timed.out
    absent = qlazy("load", tmp_path.parent, "--random-init")
    assert absent.code == 3 and "config.json" in absent.err


def test_random_weights_answer_where_there_is_a_tokenizer(qlazy, tiny):
    first, again = (qlazy("run", tiny, "hello", "--random-init", "--max-new-tokens", "3") for _ in range(2))
    assert first.code == 0 and first.out == again.out
    assert "It says: " in qlazy("load", tiny, "--random-init", "--prompt", "the sea").err
