"""Damaged checkpoints: the right error, by name of file and tensor and with both numbers, and nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import qlazy
from qlazy.errors import (
    CorruptCheckpoint,
    DeviceUnavailable,
    DoesNotFit,
    IncompleteCheckpoint,
    ModelNotFound,
    QlazyError,
    UnsupportedModel,
    UsageError,
)
from qlazy.layers.quant_linear import QuantLinear
from qlazy.match import match_tensors
from tests.integration.conftest import stored

NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
QUANTIZED, HEAD = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"


def load(folder: Path, **options: Any) -> Any:
    return qlazy.load_quantized(folder, **{"device_map": "cpu", **options})


def shard_of(folder: Path, key: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


def place_of(folder: Path, key: str) -> tuple[Path, int, int]:
    """The file of a tensor, and where its bytes begin and end there."""
    path = shard_of(folder, key)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[key]["data_offsets"]
    return path, 8 + length + begin, 8 + length + end


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """Takes the libraries' own objects out of every later collection, which would look at a million of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No half-loaded model, thread, open file or changed thread count outlives a test, whatever it raised."""
    layers: list[weakref.ref[QuantLinear]] = []
    make = QuantLinear.__init__

    def remembered(self: QuantLinear, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        layers.append(weakref.ref(self))

    monkeypatch.setattr(QuantLinear, "__init__", remembered)
    register, threads = nn.Module.register_parameter, torch.get_num_threads()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert not [ref for ref in layers if ref() is not None]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("qlazy-load", "qlazy-meter"))]
    assert torch.get_num_threads() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert register.__name__ in ("register_parameter", "_register") and not nn.Linear(1, 1).weight.is_meta


def fails(folder: Path, error: type[QlazyError], *texts: str, **options: Any) -> QlazyError:
    """The load raises exactly this error, with these texts in its message."""
    with pytest.raises(QlazyError) as caught:
        load(folder, **options)
    raised = caught.value
    assert type(raised) is error, repr(raised)
    for text in texts:
        assert text in str(raised), f"{text!r} is not in {raised}"
    # The traceback holds the frames of the load, and they the model.
    raised.__traceback__ = raised.__cause__ = raised.__context__ = None
    del caught
    return raised


def cli_fails(folder: Path, code: int, *texts: str, flags: tuple[str, ...] = ()) -> None:
    """`qlazy load` ends with this code, and its message on standard error alone."""
    from qlazy.cli import app

    done = CliRunner().invoke(app, ["load", str(folder), "--device-map", "cpu", "--prompt", "", *flags])
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    words = " ".join(done.stderr.split())
    for text in texts:
        assert text in words, f"{text!r} is not in {words}"


def test_shard_cut_short(copied):
    folder = copied("llama")
    path, _, _ = place_of(folder, HEAD)
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    fails(folder, IncompleteCheckpoint, path.name, f"{size - 1000:,}")
    cli_fails(folder, 5, path.name)


def test_shard_cut_short_while_it_is_read(copied, monkeypatch):
    folder = copied("llama")
    path = sorted(folder.glob("*.safetensors"))[-1]
    size = path.stat().st_size - 1000

    def match_and_cut(*args: Any, **options: Any) -> Any:
        os.truncate(path, size)
        return match_tensors(*args, **options)

    monkeypatch.setattr("qlazy.load.match_tensors", match_and_cut)
    fails(folder, IncompleteCheckpoint, path.name, "tensor '", f"{size:,}")


def test_shard_missing(copied):
    folder = copied("llama")
    path = shard_of(folder, NORM)
    path.unlink()
    fails(folder, IncompleteCheckpoint, path.name)
    cli_fails(folder, 5, path.name)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("key", [QUANTIZED, NORM, EMBEDDING, HEAD])
def test_flipped_bits_of_one_weight(copied, key, bits):
    folder = copied("llama")
    path, begin, end = place_of(folder, key)
    with path.open("r+b") as file:
        file.seek(begin + (end - begin) // 2 // 2 * 2)
        file.write(struct.pack("<H", bits))
    for options in ({}, {"bits": 8}, {"format": "nf4"}):
        fails(folder, CorruptCheckpoint, path.name, repr(key), "NaN or an infinity", **options)
    fails(folder, CorruptCheckpoint, path.name, repr(key), strict=False)
    if key == QUANTIZED:
        cli_fails(folder, 5, path.name, repr(key))


@pytest.mark.parametrize(
    "name, key", [("gpt2", "transformer.h.1.mlp.c_fc.weight"), ("qwen2", "model.layers.0.self_attn.q_proj.bias")]
)
def test_flipped_bits_in_a_conv1d_and_in_a_bias(copied, rewrite, name, key):
    folder = copied(name)
    key = key if key in stored(folder) else key.removeprefix("transformer.")
    value = stored(folder)[key]
    value.view(-1)[-1] = float("nan")
    rewrite(folder, {key: value})
    fails(folder, CorruptCheckpoint, shard_of(folder, key).name, repr(key))


def test_flipped_bits_in_an_expert(copied, rewrite):
    folder = copied("mixtral")
    key = next(key for key in sorted(stored(folder)) if "experts.2" in key)
    value = stored(folder)[key]
    value.view(-1)[7] = float("inf")
    rewrite(folder, {key: value})
    fails(folder, CorruptCheckpoint, ".safetensors", "experts", "NaN or an infinity")


@pytest.mark.parametrize("key", [QUANTIZED, NORM, EMBEDDING])
def test_tensor_missing(copied, rewrite, key):
    folder = rewrite(copied("llama"), {key: None})
    fails(folder, IncompleteCheckpoint, repr(key), "LlamaForCausalLM")
    cli_fails(folder, 5, repr(key), "--no-strict")


def test_tensor_that_the_index_names_is_missing(copied, rewrite):
    folder = copied("llama")
    index_file = folder / "model.safetensors.index.json"
    index = index_file.read_text()
    path = shard_of(folder, NORM)
    rewrite(folder, {NORM: None})
    index_file.write_text(index)
    fails(folder, IncompleteCheckpoint, NORM, path.name)


@pytest.mark.parametrize("key", [QUANTIZED, NORM, EMBEDDING, HEAD])
def test_missing_is_initialized_by_transformers_where_not_strict(copied, rewrite, key):
    folder = copied("llama")
    original = stored(folder)
    rewrite(folder, {key: None})
    model = load(folder, strict=False)
    assert model.qlazy_report.initialized == [key]
    made: Tensor = model.get_parameter(key)
    assert made.isfinite().all()
    if key == NORM:
        assert torch.equal(made, torch.ones_like(made))
    else:
        assert 0.01 < made.float().std() < 0.03 and not torch.equal(made, original[key])
    quantized = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    others = {name: tensor for name, tensor in original.items() if name not in {key, *quantized}}
    assert ("lm_head.weight" in quantized) == (key != HEAD) and len(others) >= 5
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in others.items())
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
    assert model.qlazy_report.device_bytes["cpu"] == model.qlazy_report.plan.weight_bytes


def test_missing_bias_of_a_quantized_layer_is_zero_where_not_strict(copied, rewrite):
    key = "model.layers.0.self_attn.q_proj.bias"
    folder = rewrite(copied("qwen2"), {key: None})
    fails(folder, IncompleteCheckpoint, repr(key))
    # Memory that is reused is not zero by chance.
    dirty = [torch.full((128,), 7.0, dtype=torch.bfloat16) for _ in range(1000)]
    del dirty
    model = load(folder, strict=False)
    assert isinstance(model.get_submodule(key.rpartition(".")[0]), QuantLinear)
    assert torch.equal(model.get_parameter(key), torch.zeros(128, dtype=torch.bfloat16))


def test_loaded_weights_are_not_initialized_again_where_not_strict(copied, rewrite):
    """Torch's own MultiheadAttention initializes itself, without asking transformers."""
    key = "vision_model.head.layernorm.weight"
    folder = copied("siglip")
    original = stored(folder)
    assert key in original
    rewrite(folder, {key: None})
    model = load(folder, strict=False)
    name = "vision_model.head.attention.in_proj_weight"
    assert model.qlazy_report.initialized == [key]
    assert torch.equal(model.get_parameter(name), original[name])


def test_unexpected_tensor(copied, rewrite):
    key = "model.layers.0.mlp.other_proj.weight"
    folder = rewrite(copied("llama"), {key: torch.ones(2, 2)})
    fails(folder, CorruptCheckpoint, repr(key), "LlamaForCausalLM")
    cli_fails(folder, 5, repr(key))
    model = load(folder, strict=False)
    assert model.qlazy_report.unexpected == [key] and not model.qlazy_report.initialized


def test_what_transformers_ignores_is_only_reported(copied, rewrite):
    keys = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(2)]
    folder = rewrite(copied("llama"), {key: torch.full((16,), 3.0) for key in keys})
    model = load(folder)
    assert model.qlazy_report.unexpected == keys
    assert model.model.rotary_emb.inv_freq[0] == 1.0
    assert model.qlazy_report.bytes_read == model.qlazy_report.plan.source_bytes


@pytest.mark.parametrize("key", [QUANTIZED, NORM, EMBEDDING])
def test_wrong_shape(copied, rewrite, key):
    folder = copied("llama")
    value = stored(folder)[key]
    rewrite(folder, {key: value[:-8].contiguous()})
    shapes = [str([value.shape[0] - less, *value.shape[1:]]) for less in (8, 0)]
    fails(folder, CorruptCheckpoint, shard_of(folder, key).name, repr(key), *shapes)
    fails(folder, CorruptCheckpoint, repr(key), strict=False)


def test_config_of_another_size(copied):
    folder = copied("llama")
    edit_config(folder, intermediate_size=512)
    fails(folder, CorruptCheckpoint, "[128, 256]", "[128, 512]", "config.json")
    cli_fails(folder, 5, "[128, 512]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("key", [QUANTIZED, NORM])
def test_integers_in_place_of_a_weight(copied, rewrite, key, dtype):
    folder = copied("llama")
    rewrite(folder, {key: stored(folder)[key].to(dtype)})
    fails(folder, CorruptCheckpoint, shard_of(folder, key).name, repr(key), str(dtype).removeprefix("torch."))


def test_same_tensor_in_two_shards(copied):
    from safetensors.torch import load_file, save_file

    folder = copied("llama")
    shards = sorted(folder.glob("*.safetensors"))
    other = next(shard for shard in shards if shard != shard_of(folder, NORM))
    save_file(load_file(other) | {NORM: stored(folder)[NORM]}, other, metadata={"format": "pt"})
    fails(folder, CorruptCheckpoint, NORM, other.name)
    cli_fails(folder, 5, NORM)


def test_two_names_for_one_place(copied, rewrite):
    """The base model's name and the full name of one tensor: whichever came last would win in silence."""
    folder = copied("llama")
    rewrite(folder, {"norm.weight": stored(folder)["model.norm.weight"] * 2})
    with pytest.raises(CorruptCheckpoint) as caught:
        load(folder)
    assert "norm.weight" in str(caught.value)
    caught.value.__traceback__ = None
    del caught


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_index_that_leaves_the_folder(copied, shard):
    folder = copied("llama")
    shutil.copy(shard_of(folder, NORM), folder.parent / "other.safetensors")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"][NORM] = shard
    index_file.write_text(json.dumps(index))
    fails(folder, CorruptCheckpoint, "model.safetensors.index.json")
    cli_fails(folder, 5, "model.safetensors.index.json")


def test_folder_of_pickles(copied):
    folder = copied("llama")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": torch.ones(1)}, folder / "pytorch_model.bin")
    fails(folder, UnsupportedModel, "pytorch_model.bin")
    cli_fails(folder, 3, "pytorch_model.bin")


def test_unknown_architecture(copied):
    folder = copied("llama")
    edit_config(folder, architectures=["FancyForCausalLM"])
    fails(folder, UnsupportedModel, "FancyForCausalLM", "transformers 5")
    cli_fails(folder, 3, "FancyForCausalLM")


@pytest.mark.parametrize("kind", ["fancy", None])
def test_unknown_model_type(copied, kind):
    folder = copied("llama")
    edit_config(folder, model_type=kind)
    fails(folder, UnsupportedModel, repr(kind))
    cli_fails(folder, 3, repr(kind))


def test_no_architectures_at_all_means_the_causal_model(copied):
    folder = copied("llama")
    edit_config(folder, architectures=None)
    assert type(load(folder)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("method", ["hqq", "torchao", "qlazy"])
def test_source_that_is_quantized_in_a_way_that_is_not_read(copied, method):
    folder = copied("llama")
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    fails(folder, UnsupportedModel, method)
    fails(folder, UnsupportedModel, method, strict=False)
    cli_fails(folder, 3, method)


@pytest.mark.parametrize(
    "found",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ],
    ids=lambda found: found["quant_method"],
)
def test_config_of_a_quantized_source_whose_tensors_are_not(copied, found):
    folder = copied("llama")
    edit_config(folder, quantization_config=found)
    fails(folder, CorruptCheckpoint, found["quant_method"])
    cli_fails(folder, 5, found["quant_method"])


def test_config_that_is_no_json(copied):
    folder = copied("llama")
    (folder / "config.json").write_text('{"model_type": "llama", ')
    fails(folder, CorruptCheckpoint, "config.json")


@pytest.mark.parametrize("changes", [{"hidden_size": "many"}, {"num_attention_heads": 0}, {"hidden_size": -128}], ids=str)
def test_config_of_nonsense(copied, changes):
    folder = copied("llama")
    edit_config(folder, **changes)
    with pytest.raises(QlazyError) as caught:
        load(folder)
    assert type(caught.value) is UnsupportedModel and "cannot" in str(caught.value)
    caught.value.__traceback__ = caught.value.__cause__ = caught.value.__context__ = None
    del caught


@pytest.mark.parametrize("device", ["cuda:7", "tpu"])
def test_no_such_device(checkpoint, device):
    fails(checkpoint("llama"), DeviceUnavailable, device, device_map=device)
    cli_fails(checkpoint("llama"), 6, device, flags=("--device-map", device))


def test_does_not_fit(checkpoint):
    raised = fails(checkpoint("llama"), DoesNotFit, "does not fit", "cpu is short", max_memory={"cpu": "1MiB"}, reserve=0)
    assert isinstance(raised, DoesNotFit) and raised.needed_bytes > raised.free_bytes == 1 << 20
    cli_fails(checkpoint("llama"), 4, "does not fit", flags=("--max-memory", "cpu=1MiB"))


@pytest.mark.parametrize("options", [{"bits": 3}, {"format": "int2"}, {"group_size": 48}, {"dtype": "int8"}], ids=str)
def test_options_that_cannot_be_meant(checkpoint, options):
    fails(checkpoint("llama"), UsageError, str(next(iter(options.values()))), **options)


def test_no_such_folder(tmp_path):
    fails(tmp_path / "absent", ModelNotFound, "absent")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_error_in_on_progress_reaches_the_caller(checkpoint, error):
    def on_progress(progress: qlazy.Progress) -> None:
        raise error("from outside")

    with pytest.raises(error, match="from outside") as caught:
        load(checkpoint("llama"), on_progress=on_progress)
    caught.value.__traceback__ = None
    del caught


def test_a_failed_load_does_not_spoil_the_next(copied, checkpoint, rewrite):
    folder = copied("llama")
    value = stored(folder)[QUANTIZED]
    value[0, 0] = float("nan")
    rewrite(folder, {QUANTIZED: value})
    fails(folder, CorruptCheckpoint)
    rewrite(folder, {QUANTIZED: stored(checkpoint("llama"))[QUANTIZED]})
    assert torch.equal(load(folder).lm_head.weight, load(checkpoint("llama")).lm_head.weight)


def test_folder_is_left_as_it_was(copied):
    folder = copied("llama")

    def listing() -> dict[str, tuple[int, int]]:
        return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir()}

    before = listing()
    load(folder)
    path, begin, _ = place_of(folder, QUANTIZED)
    assert listing() == before
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(struct.pack("<H", 0x7FC0))
    before = listing()
    fails(folder, CorruptCheckpoint)
    assert listing() == before
