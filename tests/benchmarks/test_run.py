"""A run that was cut off goes on with what is missing; everybody is measured on the same things."""

import json
from dataclasses import asdict

import checkpoint
import child
import contenders
import gguf_files
import machine
import pytest
import run
import scaling
import torch
from contenders import CONTENDERS, Inputs, TorchModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", "tiny")


def test_each_round_begins_with_another_name():
    assert run.remaining(["a", "b", "c"], 2, []) == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


def test_what_is_done_is_not_done_again_and_what_failed_is():
    runs = [{"contender": "a", "round": 0}, {"contender": "b", "round": 0, "error": "no"}, {"contender": "b", "round": 1}]
    assert run.remaining(["a", "b"], 2, runs) == [(0, "b"), (1, "a")]


def test_who_is_in_no_goal_runs_in_fewer_rounds():
    order = run.remaining(["bf16", "quanto-int4"], 5, [])
    assert [name for _, name in order].count("bf16") == 5
    assert [round_ for round_, name in order if name == "quanto-int4"] == [0, 1, 2]


def test_named_contenders_exist():
    assert {*run.QUICK, *run.FEWER} <= {*run.PROBES, *CONTENDERS}


def test_other_work_is_only_what_others_did():
    record = {}
    with machine.other_work(record):
        sum(range(1_000_000))
    assert 0 <= record["others_share"] <= 1.01
    assert 0 <= record["stolen_share"] <= 1.01


def test_the_13b_shape_is_llama_2():
    shapes = checkpoint.llama_tensors(**checkpoint.SHAPES["13b"])
    assert sum(torch.Size(size).numel() for size in shapes.values()) == 13_015_864_320


def test_gguf_holds_the_same_weights(tiny, tmp_path):
    file = gguf_files.write_bf16(tiny, tmp_path / "tiny.bf16.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.bfloat16).state_dict()
    stored = {key: value for shard in tiny.glob("*.safetensors") for key, value in load_file(shard).items()}
    assert set(read) == set(stored)
    for key, value in stored.items():
        assert torch.equal(read[key], value), key
    total = file.stat().st_size
    embedding = 32000 * 256 * 2
    assert 0 < total - embedding - gguf_files.bytes_for_a_token(file) < 100_000
    assert gguf_files.tensor_types(file)["blk.0.attn_norm.weight"] == "F32"


def test_bytes_for_a_token_leave_out_an_embedding_that_is_no_head():
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
    )
    table = 100 * 32 * 4
    for tied in (True, False):
        config.tie_word_embeddings = tied
        found = TorchModel(LlamaForCausalLM(config)).weights()
        assert found["weight_bytes"] - found["token_bytes"] == (0 if tied else table)


def test_bytes_of_packed_weights_are_those_under_them():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer.weight = layer.weight.to("cpu")
    codes, absmax, codebook = 64 * 128 // 2, 64 * 128 // 64 * 4, 16 * 4
    assert contenders.storage_bytes([layer]) == codes + absmax + codebook


def test_the_reason_of_a_failure_is_what_was_raised():
    text = "Traceback (most recent call last):\n  File 'x', line 1\nqlazy.errors.DoesNotFit: needs 3 GiB.\nType this: that\n"
    assert child.reason(text) == "qlazy.errors.DoesNotFit: needs 3 GiB."
    assert child.reason("a warning\nlast words\n") == "last words"


@pytest.mark.slow
def test_one_run_from_end_to_end(tiny, tmp_path):
    inputs = Inputs(folder=str(tiny), prompts={"short": [5, 6, 7], "8": list(range(8))}, new_tokens=6, threads=1)
    given = tmp_path / "inputs.json"
    given.write_text(json.dumps(asdict(inputs)))
    found = child.call("measure.py", "qlazy-int4", str(given), timeout_s=280)
    assert "error" not in found, found
    assert len(found["answer"]) == 6
    assert found["load_s"] > 0 and found["load_again_s"] > 0 and found["prefill_8"] > 0 and found["decode"] > 0
    assert found["token_bytes"] == found["weight_bytes"] - 32000 * 256 * 2
    assert found["weight_bytes"] < found["anonymous_peak_bytes"] + (1 << 20)
    assert found["run_peak_bytes"] >= found["total_peak_bytes"]


def test_scaling_is_summed_up_by_shape_and_cache():
    usual = {"weight_bytes": 1 << 30, "total_peak_bytes": 2 << 30, "decode": 9.0, "commit": "abc", "file_bytes": 2_000_000_000}
    large = usual | {"file_bytes": 26_000_000_000}
    runs = [
        {"shape": "13b", "cache": "cold", "run": 0, "load_s": 30.0, "anonymous_peak_bytes": 8 << 30, **large},
        {"shape": "1.1b", "cache": "cold", "run": 0, "load_s": 4.0, "anonymous_peak_bytes": 2 << 30, **usual},
        {"shape": "1.1b", "cache": "cold", "run": 1, "load_s": 6.0, "anonymous_peak_bytes": 2 << 30, **usual},
        {"shape": "3b", "cache": "warm", "run": 0, "error": "no room", "commit": "abc"},
    ]
    machine = {"processor": "Some CPU", "cores": 2, "memory_bytes": 24 << 30}
    result = {"runs": runs, "machine": machine, "versions": {"torch": "2.13.0"}}
    assert [(row["shape"], row["load_s"]) for row in scaling.summary(result)] == [("1.1b", 5.0), ("13b", 30.0)]
    text = scaling.render(result)
    assert "13B: highest peak 8.00 GiB, to be under 7.5 GiB: **missed**." in text
    assert "- 3b warm, run 1: no room" in text
