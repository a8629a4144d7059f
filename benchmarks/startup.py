"""How long `qlazy --help` and `qlazy plan FOLDER` take as whole processes: medians of seven, after one that warms the cache.

    python benchmarks/startup.py

The folder has the headers of a Llama of 70 billion parameters in 30 sparse files: 131 GiB that take no room.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INNER, KV, LAYERS, VOCABULARY, SHARDS = 8192, 28672, 1024, 80, 128256, 30


def write_headers(folder: Path) -> None:
    """Config, index and sparse shards."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER}
    config |= {"num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    names = list(shapes)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, end = {}, 0
        for name in names[shard::SHARDS]:
            size = 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            header[f"{name}.weight"] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            weight_map[f"{name}.weight"] = file
            end += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def median_seconds(*words: str) -> float:
    """Of seven runs after a first one; exit 4, that it does not fit, is an answer too."""
    took = []
    for _ in range(8):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "qlazy", *words], capture_output=True, env=os.environ | {"PYTHONPATH": "."}
        )
        took.append(time.perf_counter() - start)
        assert done.returncode in (0, 4), done.stderr.decode()
    return statistics.median(took[1:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="qlazy-bench-") as folder:
        write_headers(Path(folder))
        print(f"qlazy --help: {median_seconds('--help'):.2f} s")
        print(f"qlazy plan FOLDER (70B, 30 shards): {median_seconds('plan', folder, '--device-map', 'cpu'):.2f} s")
