"""Loads to a GPU: the bytes of a load to the host, within the planned memory, and a model that answers."""

from __future__ import annotations

import gc
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qlazy
from qlazy.compiled import compile_decoding, warm_up
from qlazy.errors import CorruptCheckpoint
from qlazy.planning.plan import GPU_CHUNK_BYTES, GPU_RING_BYTES, SCRATCH_CHUNKS
from qlazy.reading.files import make_ring
from qlazy.reading.staging import DeviceQueue, page_locked

pytestmark = pytest.mark.gpu

MIB = 1 << 20
OPTIONS = {
    "int4": {"bits": 4},
    "int4-g128-sym": {"bits": 4, "group_size": 128, "symmetric": True},
    "int8": {"bits": 8},
    "nf4": {"format": "nf4"},
    "nf4-single": {"format": "nf4", "double_quant": False},
}
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10}


def config_of(shape: dict[str, int]) -> dict[str, object]:
    return {
        **shape,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes_of(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // 2
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden), "lm_head.weight": (32000, hidden)}
    block = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(shape["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    return found | {"model.norm.weight": (hidden,)}


def write(folder: Path, shape: dict[str, int], damage: tuple[str, int] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator).mul_(0.02)
        for name, size in shapes_of(shape).items()
    }
    if damage is not None:
        tensors[damage[0]][damage[1], 7] = float("nan")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "model", SMALL)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("large") / "model", LARGE)


def load(folder: Path, device: str = "cuda:0", **options):
    return qlazy.load_quantized(folder, device_map=device, max_model_len=256, **options).eval()


def prompt(length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 32000, (1, length), generator=torch.Generator().manual_seed(length)).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer(model, length: int = 12, tokens: int = 24) -> list[int]:
    with torch.inference_mode():
        made = model.generate(
            **prompt(length), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return made[0, length:].tolist()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bytes_are_those_of_a_load_to_the_host(small, options):
    theirs, ours = load(small, "cpu", **options).state_dict(), load(small, **options).state_dict()
    assert theirs.keys() == ours.keys()
    differ = {name: int((ours[name].cpu() != theirs[name]).sum()) for name in ours if ours[name].numel()}
    assert {name: count for name, count in differ.items() if count} == {}
    assert {tensor.device.type for tensor in ours.values()} == {"cuda"}


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"format": "nf4"}], ids=["int4", "int8", "nf4"])
def test_memory_stays_within_weights_and_three_chunks(large, options):
    model = load(large, **options)  # kernels are compiled, and libraries have what they keep
    del model
    gc.collect()
    torch.cuda.empty_cache()
    before, asked_before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.current"]
    model = load(large, **options)
    asked = torch.cuda.memory_stats()["requested_bytes.all.peak"] - asked_before
    report = model.qlazy_report
    weights = report.plan.weight_bytes
    planned = next(device for device in report.plan.devices if device.device == "cuda:0")
    assert report.device_bytes == {"cuda:0": weights}
    assert planned.staging_bytes == SCRATCH_CHUNKS * GPU_CHUNK_BYTES
    assert asked <= planned.weight_bytes + planned.staging_bytes + 16 * MIB
    # PyTorch's allocator rounds a large tensor up by as much as a MiB.
    rounding = MIB * len(model.state_dict())
    assert report.device_peak_bytes["cuda:0"] - before <= planned.weight_bytes + planned.staging_bytes + 16 * MIB + rounding
    assert report.host_peak_bytes <= GPU_RING_BYTES + 64 * MIB


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"format": "nf4"}, {"format": "nf4", "double_quant": False}])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_damaged_weights_are_named(tmp_path, options, name):
    folder = write(tmp_path / "model", SMALL, (name, 300))
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors: tensor '{name}' holds a NaN or an infinity in rows "):
        load(folder, **options)
    torch.cuda.synchronize()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_are_those_of_the_host(small, options):
    on_host, on_gpu = (load(small, device, dtype="float32", **options) for device in ("cpu", "cuda:0"))
    with torch.inference_mode():
        theirs = on_host(input_ids=prompt()["input_ids"].cpu()).logits
        ours = on_gpu(input_ids=prompt()["input_ids"]).logits.cpu()
        one = on_gpu(input_ids=prompt()["input_ids"][:, :1]).logits.cpu()
    assert (ours - theirs).abs().max() <= 5e-3 * theirs.abs().max()
    assert (one - theirs[:, :1]).abs().max() <= 5e-3 * theirs.abs().max()


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"format": "nf4"}], ids=["int4", "int8", "nf4"])
def test_decoding_by_cuda_graphs_gives_the_same_tokens(small, options):
    model = load(small, dtype="float32", **options)
    plain = [answer(model, length) for length in (12, 5, 40)]
    torch._dynamo.reset()
    compile_decoding(model)
    model.generation_config.max_cache_len = 128
    assert warm_up(model, prompt(), model.generation_config) > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    assert [answer(model, length) for length in (12, 5, 40)] == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_step_is_captured_in_a_graph_by_hand(small):
    """No product waits for the host, takes memory from outside the graph's pool, or compiles a kernel while it is captured."""
    model = load(small, bits=4).model.layers[0].mlp
    x = torch.randn(1, 1, SMALL["hidden_size"], dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_devices_are_filled_side_by_side(small):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two CUDA devices")
    device_map = {"model.embed_tokens": "cuda:0", "model.layers.0": "cuda:0", "": "cuda:1"}
    alone = load(small, dtype="float32", bits=4)
    split = qlazy.load_quantized(small, device_map=device_map, max_model_len=256, dtype="float32", bits=4).eval()
    assert {tensor.device.index for tensor in split.parameters()} == {0, 1}
    assert answer(split) == answer(alone)


def test_a_ring_is_locked_while_it_is_used():
    ring = make_ring(4, 4 * MIB)
    with page_locked(ring) as locked:
        assert locked and all(slot.data.is_pinned() and slot.data[4096:].is_pinned() for slot in ring)
    assert not ring[0].data.is_pinned()
    torch.zeros(8, device="cuda").add_(1).cpu()  # no error is left behind


def test_nothing_is_overwritten_while_it_is_read():
    """Kernels that take long, slots that are overwritten at once, rows of all sizes."""
    draw = random.Random(0)
    sizes = [draw.randrange(1, MIB) for _ in range(200)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    final = torch.zeros(sum(sizes), dtype=torch.int16, device="cuda")
    queue, lock, numbers = DeviceQueue("cuda:0", 2 * MIB), threading.Lock(), iter(range(len(sizes)))
    ring = make_ring(4, 2 * MIB)

    def work(slot: Tensor) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            rows = slot[: sizes[number]]
            rows.fill_(number + 1)
            begin, end = starts[number], starts[number] + sizes[number]

            def copy(there: Tensor, begin: int = begin, end: int = end) -> None:
                torch.cuda._sleep(200_000)
                final[begin:end].copy_(there)

            queue.run(rows, copy)
            slot.fill_(-1)

    with page_locked(ring) as locked, ThreadPoolExecutor(4) as pool:
        assert locked
        for task in [pool.submit(work, slot.data.view(torch.int16)) for slot in ring]:
            task.result()
    queue.close()
    wanted = torch.arange(1, len(sizes) + 1, dtype=torch.int16).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(final.cpu(), wanted)


def test_an_interrupted_load_leaves_the_device_usable(large):
    """As Ctrl-C does: the caller's thread stops while copies are in flight."""

    def interrupt(progress) -> None:
        if progress.done_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(large, bits=4, on_progress=interrupt)
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("qlazy-load")] == []
    assert torch.ones(1000, device="cuda").sum().item() == 1000
