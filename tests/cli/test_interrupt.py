"""Ctrl-C: exit code 130, one word, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory) -> Path:
    """A Llama that takes a while to read: 320 MB of random bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large") / "large-llama"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=14,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    for file in tiny.glob("token*"):
        (folder / file.name).symlink_to(file)
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert len(stored.keys()) > 100
    return folder


@pytest.mark.parametrize("moment", ["Fits.", "%  Reading"])
def test_nothing_is_left_behind(environment, home, ctrl_c, large, tmp_path, moment):
    """While torch is imported, and in the middle of the weights."""
    before, written = sorted(large.iterdir()), sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "qlazy", "load", str(large)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment | home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        said = []
        for line in child.stderr:
            said.append(line)
            if moment in line:
                child.send_signal(signal.SIGINT)
                break
        out, rest = child.communicate(timeout=120)
    assert child.returncode == 130, "".join(said) + rest
    assert out == ""
    assert rest.rstrip().endswith("Interrupted.") and "Traceback" not in rest and "Next:" not in rest
    assert sorted(large.iterdir()) == before
    assert sorted(path for path in tmp_path.rglob("*") if path in written or path.is_file()) == written
