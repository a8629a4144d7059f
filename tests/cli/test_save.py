"""`qlazy save`: what is written and said, and that what was written runs."""

from __future__ import annotations

import json

import torch


def test_save_run_and_save_again(qlazy, tiny, tmp_path):
    folder = tmp_path / "saved"
    done = qlazy("save", tiny, folder)
    assert done.code == 0 and done.out == ""
    assert f"{folder}: " in done.err and "in 1 file, compressed-tensors" in done.err
    assert f"Next: qlazy run {folder}" in done.err
    assert (folder / "tokenizer.json").is_file() and (folder / "qlazy.json").is_file()
    run = qlazy("run", folder, "the sea", "--max-new-tokens", "4", "--verify")
    assert run.code == 0 and run.out.strip()
    again = qlazy("save", tiny, folder, "--json")
    assert again.json["shards_resumed"] == again.json["shards"] == 1


def test_layout_is_told_by_the_weights_or_by_hand(qlazy, tiny, tmp_path):
    assert qlazy("save", tiny, tmp_path / "nf4", "--format", "nf4", "--json").json["layout"] == "bitsandbytes"
    assert qlazy("save", tiny, tmp_path / "gptq", "--as", "gptq", "--json").json["layout"] == "gptq"
    plan = qlazy("plan", tmp_path / "gptq", "--json").json
    formats = {tensor["format"] for tensor in plan["tensors"] if "mlp" in tensor["name"]}
    assert formats == {"int4-g32-sym"}


def test_refusals(qlazy, tiny, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "notes.txt").write_text("mine")
    done = qlazy("save", tiny, held)
    assert done.code == 2 and "is not empty: it holds notes.txt" in done.err and "--force" in done.err
    done = qlazy("save", tiny, tmp_path / "other", "--as", "awq")
    assert done.code == 2 and "There is no layout 'awq'" in done.err
    done = qlazy("save", tmp_path / "absent", tmp_path / "other")
    assert done.code == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["held"]


def test_cache(qlazy, tiny, tmp_path):
    settings = {"QLAZY_CACHE": str(tmp_path / "cache")}
    first = qlazy("load", tiny, "--cache", "--prompt", "", "--json", env=settings)
    second = qlazy("load", tiny, "--cache", "--prompt", "", "--json", env=settings)
    assert first.code == second.code == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_vllm_merges_is_told_where_formats_differ(qlazy, tiny, tmp_path):
    done = qlazy("save", tiny, tmp_path / "saved", "--module-bits", "v_proj=8")
    assert done.code == 0 and "Not for vLLM: it merges model.layers.0.self_attn.q_proj.weight, " in done.err
    assert "vllm serve" not in done.err
    done = qlazy("save", tiny, tmp_path / "other", "--module-bits", "o_proj=8")
    assert done.code == 0 and "Not for vLLM" not in done.err and "vllm serve" in done.err


def test_calibrated_on_a_file(qlazy, tiny, tmp_path):
    file = tmp_path / "text"
    file.write_text("the sea and the sky " * 40)
    options = ["--samples", "2", "--sequence-length", "16"]
    done = qlazy("quantize", tiny, tmp_path / "saved", "--calibration-file", file, *options)
    assert done.code == 0 and "Calibrated: " in done.err and "on 2 x 16 tokens" in done.err
    report = qlazy("save", tiny, tmp_path / "own", "--calibrate", *options, "--json")
    assert report.code == 0 and report.json["calibrated"]["sequences"] == 2
    done = qlazy("save", tiny, tmp_path / "other", *options)
    assert done.code == 2 and "--samples, --sequence-length belongs to a calibration" in done.err
    done = qlazy("save", tiny, tmp_path / "other", "--calibration-file", file, "--seed", "1")
    assert done.code == 2 and "--seed is of a text that is drawn" in done.err


def test_calibrated_on_random_tokens(qlazy, tiny, tmp_path):
    options = ["--random-tokens", "--samples", "3", "--sequence-length", "16", "--seed", "5"]
    done = qlazy("save", tiny, tmp_path / "saved", *options, "--json")
    assert done.code == 0 and done.json["calibrated"]["sequences"] == 3
    told = json.loads((tmp_path / "saved" / "qlazy.json").read_text())["calibration"]
    assert told == {"samples": 3, "sequence_length": 16, "text": "random tokens", "seed": 5}
    tokens = torch.tensor(json.loads((tmp_path / "saved" / "calibration.json").read_text())["tokens"])
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    assert tokens.shape == (3, 16) and tokens.min() >= 0 and vocabulary / 2 < tokens.max() < vocabulary
    done = qlazy("save", tiny, tmp_path / "other", "--random-tokens", "--calibration-file", tiny / "config.json")
    assert done.code == 2 and "Tokens drawn at random are not those of" in done.err
