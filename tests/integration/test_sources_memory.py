"""The memory promise for quantized sources: packed bytes, the ring, 64 MiB, and of GPTQ what is held as it is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlazy.sources.packed import PackedTensor, read_whole_at_once
from qlazy.sources.source import open_source
from tests.integration.test_memory_bound import CONFIG, LOAD, MIB

LAYERS = 5

SAID = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "checkpoint_format": "gptq"},
}


def packed(method: str, name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    if method == "fp8":
        weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        return {f"{name}.weight": weight, f"{name}.weight_scale_inv": torch.full((rows // 128, columns // 128), 0.01)}
    words = torch.randint(-(1 << 31), 1 << 31, (columns // 8, rows), dtype=torch.int64).to(torch.int32)
    zeros = torch.full((columns // 128, rows // 8), 0x77777777, dtype=torch.int32)
    return {
        f"{name}.qweight": words,
        f"{name}.qzeros": zeros,
        f"{name}.scales": torch.full((columns // 128, rows), 0.01).half(),
    }


@pytest.fixture(scope="module", params=SAID)
def large(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of 90 million weights in low bits."""
    folder = tmp_path_factory.mktemp("large")
    hidden, inner, kv, vocabulary = 1024, 2816, 256, 16000
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    table = (torch.randn(vocabulary, hidden) * 0.02).bfloat16()
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.flip(0).contiguous()}
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for block in range(LAYERS):
        layer = f"model.layers.{block}."
        for name, shape in shapes.items():
            tensors |= packed(request.param, layer + name, *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"num_hidden_layers": LAYERS, "quantization_config": SAID[request.param]})
    )
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.slow
def test_host_memory_of_a_load_from_low_bits(large, python):
    found = json.loads(python(LOAD, large, json.dumps({"bits": 8})).stdout.splitlines()[-1])
    tensors = open_source(large).tensors.values()
    whole = read_whole_at_once(tensors)[1]
    assert sum(isinstance(info, PackedTensor) for info in tensors) == 7 * LAYERS and bool(whole) == (
        "qweight" in next(iter_names(large))
    )
    assert found["load"] <= found["weights"] + 64 * MIB + whole, found
    assert found["load"] >= found["weights"], "else the meter missed something"
    assert found["whole"] <= found["total"], found
    assert found["tokens"] == 128


def iter_names(folder: Path) -> Iterator[str]:
    yield from (part.stored.name for info in open_source(folder).tensors.values() for part in getattr(info, "parts", ()))
