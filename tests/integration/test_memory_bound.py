"""The memory promise: a load takes the packed bytes, the ring of 64 MiB and 64 MiB more, measured in a process of its own."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlazy.reading.files import _held_pages

MIB = 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 11,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LOAD = """
import json, sys
import torch
from transformers import LlamaForCausalLM
import qlazy, qlazy.load
from qlazy.layers.linear import Codebook4Linear
from qlazy.memory import Meter, anonymous_bytes

folder, options = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
small = torch.nn.Linear(64, 64)(torch.randn(2, 64))  # thread pools and their stacks belong to torch
with Meter(interval_s=0.002) as whole:
    with Meter(interval_s=0.002) as load:
        model = qlazy.load_quantized(folder, device_map="cpu", max_model_len=128, **options)
    made = model.generate(torch.randint(3, 16000, (1, 120)), max_new_tokens=8, min_new_tokens=8, do_sample=False)
plan = model.qlazy_report.plan
print(json.dumps({
    "load": load.peak_bytes,
    "reported": model.qlazy_report.host_peak_bytes,
    "whole": whole.peak_bytes,
    "weights": plan.weight_bytes,
    "total": plan.total_bytes,
    "tokens": made.shape[1],
}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of 300 MB in bfloat16, written shard by shard and deleted afterwards."""
    folder = tmp_path_factory.mktemp("large")
    hidden, inner, kv, vocabulary = 1024, 2816, 256, 16000
    shards = [
        {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "lm_head.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for block in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{block}."
        shards.append(
            {
                f"{layer}self_attn.q_proj.weight": (hidden, hidden),
                f"{layer}self_attn.k_proj.weight": (kv, hidden),
                f"{layer}self_attn.v_proj.weight": (kv, hidden),
                f"{layer}self_attn.o_proj.weight": (hidden, hidden),
                f"{layer}mlp.gate_proj.weight": (inner, hidden),
                f"{layer}mlp.up_proj.weight": (inner, hidden),
                f"{layer}mlp.down_proj.weight": (hidden, inner),
                f"{layer}input_layernorm.weight": (hidden,),
                f"{layer}post_attention_layernorm.weight": (hidden,),
            }
        )
    weight_map = {}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert 290e6 < sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 360e6
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"format": "nf4"}], ids=["int4", "int8", "nf4"])
def test_host_memory_of_a_load(large, python, options):
    found = json.loads(python(LOAD, large, json.dumps(options)).stdout.splitlines()[-1])
    # Anonymous memory above the imports: packed bytes, and half of what is promised beside them, as little of the ring is used.
    assert found["load"] <= found["weights"] + 64 * MIB, found
    assert found["load"] >= found["weights"], "else the meter missed something"
    assert abs(found["reported"] - found["load"]) <= 8 * MIB
    # The plan covers all that the model took, generating included.
    assert found["whole"] <= found["total"], found
    assert found["tokens"] == 128


@pytest.mark.slow
def test_the_page_cache_after_a_cold_load(large, python):
    shards = sorted(large.glob("*.safetensors"))
    for shard in shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cached_bytes(shards)
    if before > 0:
        pytest.skip("this file system keeps pages whatever fadvise says")
    python(LOAD, large, json.dumps({"bits": 4}))
    assert cached_bytes(shards) < 16 * MIB  # of 300 MB that were read; 64 MiB are promised


def cached_bytes(paths: list[Path]) -> int:
    """Bytes of files in the page cache, as `mincore` tells."""
    held = 0
    for path in paths:
        with path.open("rb") as file:
            pages, all_held = _held_pages(file.fileno())
            held += int(np.unpackbits(pages).sum())
            assert len(pages) or not all_held, "the kernel does not tell"
    return held * mmap.PAGESIZE
