"""What is saved reopens bit for bit in every layout, is mapped and not copied, and means the same to plain transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qlazy
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel, UsageError
from qlazy.formats import Int8
from qlazy.planning.recipe import Recipe
from qlazy.saving.fingerprint import content_key, fingerprint
from qlazy.saving.saved import verify
from qlazy.saving.shards import ALIGNMENT
from qlazy.sources.packed import PackedTensor
from qlazy.sources.safetensors import read_header
from qlazy.sources.source import open_source
from tests.integration.conftest import inputs_of
from tests.integration.test_load import write_gguf

SAVES: list[dict[str, Any]] = [
    {},
    {"symmetric": True, "group_size": 64, "head_bits": 16},
    {"group_size": -1, "head_bits": 4},
    {"bits": 8},
    {"bits": 8, "group_size": 32},
    {"format": "nf4"},
    {"format": "fp4", "double_quant": False},
    {"layout": "bitsandbytes", "bits": 8},
    {"layout": "gptq"},
    {"layout": "gptq", "symmetric": False},
    {"layout": "gptq", "bits": 8},
    {"modules_to_not_convert": ["down_proj"]},
]
"""Options of `save_quantized`."""


def load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `load_quantized` that quantize as a save with these does."""
    layout = options.get("layout")
    told = {key: value for key, value in options.items() if key != "layout"}
    if layout == "gptq" and told.get("bits") != 8:
        told.setdefault("symmetric", True)
    if layout in ("gptq", "bitsandbytes") or "format" in options:
        told.setdefault("head_bits", 16)
    return told


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def require_equal(one: Any, other: Any) -> None:
    left, right = tensors(one), tensors(other)
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture
def save(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    def make(name: str, **options: Any) -> Path:
        qlazy.save_quantized(checkpoint(name), tmp_path / "saved", max_shard_size=60_000, **options)
        return tmp_path / "saved"

    yield make


@pytest.mark.parametrize("options", SAVES, ids=str)
def test_reopened_bit_for_bit(checkpoint, save, options):
    folder = save("llama", **options)
    loaded = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", **load_options(options))
    reopened = qlazy.load_quantized(folder, device_map="cpu")
    require_equal(loaded, reopened)
    assert torch.equal(loaded(**inputs_of("llama")).logits, reopened(**inputs_of("llama")).logits)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3", "gpt2", "t5", "bert", "siglip", "nomic_bert", "gte"])
@pytest.mark.parametrize("options", [{}, {"layout": "gptq"}, {"bits": 8}], ids=str)
def test_other_architectures_reopen(checkpoint, save, name, options):
    folder = save(name, **options)
    loaded = qlazy.load_quantized(checkpoint(name), device_map="cpu", **load_options(options))
    require_equal(loaded, qlazy.load_quantized(folder, device_map="cpu"))


@pytest.mark.parametrize("name", ["nomic_bert", "gte"])
@pytest.mark.parametrize("left", [[], ["v_proj"], ["q_proj", "k_proj", "v_proj"]], ids=str)
def test_layers_that_checkpoints_join_are_written_apart(checkpoint, save, tmp_path, name, left):
    assert any("qkv" in key for key in open_source(checkpoint(name)).tensors)
    loaded = qlazy.load_quantized(checkpoint(name), device_map="cpu", modules_to_not_convert=left)
    require_equal(loaded, qlazy.load_quantized(save(name, modules_to_not_convert=left), device_map="cpu"))
    qlazy.save_quantized(loaded, tmp_path / "loaded", max_shard_size=60_000)
    require_equal(loaded, qlazy.load_quantized(tmp_path / "loaded", device_map="cpu"))


def test_save_pretrained_refuses_to_join_packed_layers(checkpoint, tmp_path):
    loaded = qlazy.load_quantized(checkpoint("nomic_bert"), device_map="cpu")
    with pytest.raises(UnsupportedModel, match="low bits cannot be joined"):
        loaded.save_pretrained(tmp_path / "saved")


def test_both_names_of_renamed_layers_are_told(checkpoint, save, tmp_path):
    folder = save("llava")
    loaded = qlazy.load_quantized(checkpoint("llava"), device_map="cpu")
    require_equal(loaded, qlazy.load_quantized(folder, device_map="cpu"))
    qlazy.save_quantized(loaded, tmp_path / "loaded")
    require_equal(loaded, qlazy.load_quantized(tmp_path / "loaded", device_map="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        expected = theirs(**inputs_of("llava")).logits
    ours = qlazy.load_quantized(folder, device_map="cpu", dtype="float32")(**inputs_of("llava")).logits
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"layout": "gptq"}, {"format": "nf4"}], ids=str)
def test_experts_reopen(checkpoint, save, name, options):
    folder = save(name, **options)
    more = {"modules_to_not_convert": ["experts"]} if "format" in options else {}
    loaded = qlazy.load_quantized(checkpoint(name), device_map="cpu", **load_options(options), **more)
    require_equal(loaded, qlazy.load_quantized(folder, device_map="cpu"))
    # Each expert has tensors of its own, under the names of the checkpoint.
    assert set(open_source(folder).tensors) == set(open_source(checkpoint(name)).tensors)


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"layout": "gptq"}], ids=str)
def test_experts_that_do_not_come_in_blocks_of_rows_reopen(tmp_path, options):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3, "vocab_size": 64}
    config = transformers.MixtralConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **shape)
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    qlazy.save_quantized(tmp_path / "model", tmp_path / "saved", **options)
    loaded = qlazy.load_quantized(tmp_path / "model", device_map="cpu", **load_options(options))
    reopened = qlazy.load_quantized(tmp_path / "saved", device_map="cpu")
    require_equal(loaded, reopened)
    assert all(
        isinstance(info, PackedTensor) for name, info in open_source(tmp_path / "saved").tensors.items() if "experts" in name
    )


def test_experts_that_checkpoints_hold_fused_are_refused(tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        layer_types=["full_attention"],
    )
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"hold all experts of .* in one tensor"):
        qlazy.save_quantized(tmp_path / "model", tmp_path / "saved")
    qlazy.save_quantized(tmp_path / "model", tmp_path / "saved", modules_to_not_convert=["experts"])
    loaded = qlazy.load_quantized(tmp_path / "model", device_map="cpu", modules_to_not_convert=["experts"])
    require_equal(loaded, qlazy.load_quantized(tmp_path / "saved", device_map="cpu"))


UNCHANGED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"symmetric": True, "head_bits": 4}),
    ("llama", {"format": "fp4", "double_quant": False}),
    ("llama", {"bits": 8}),
    ("llama", {"bits": 8, "group_size": 32, "embedding_bits": 8}),
    ("llama-tied", {"embedding_bits": 8}),
    ("mixtral", {}),
    ("mixtral", {"bits": 8}),
]


@pytest.mark.parametrize(("name", "options"), UNCHANGED, ids=str)
def test_nothing_is_copied(save, name, options):
    reopened = qlazy.load_quantized(save(name, **options), device_map="cpu")
    assert reopened.qlazy_report.bytes_read == 0
    # Two tensors of one file share the map, and lie where the file has them.
    held = [tensor for name, tensor in tensors(reopened).items() if "inv_freq" not in name]
    files = len(list(reopened_folder(reopened).glob("*.safetensors")))
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == files > 1


def reopened_folder(model: Any) -> Path:
    return Path(model.config.name_or_path)


def test_tensors_lie_on_boundaries(save):
    for shard in save("llama").glob("*.safetensors"):
        for info in read_header(shard).values():
            if info.nbytes % ALIGNMENT == 0:
                assert info.offset % ALIGNMENT == 0, info.name


def test_writing_to_a_mapped_weight_leaves_the_file_alone(save):
    folder = save("llama")
    reopened = qlazy.load_quantized(folder, device_map="cpu")
    with torch.no_grad():
        for tensor in tensors(reopened).values():
            tensor.zero_()
    verify(folder)


def test_saved_model_is_what_was_loaded(checkpoint, tmp_path):
    for options in ({}, {"format": "nf4", "head_bits": 16}, {"bits": 8}):
        loaded = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", **options)
        folder = tmp_path / str(options)
        report = qlazy.save_quantized(loaded, folder, max_shard_size=60_000)
        assert report.shards > 1
        require_equal(loaded, qlazy.load_quantized(folder, device_map="cpu"))


@pytest.mark.parametrize("options", [{}, {"symmetric": True, "head_bits": 16}, {"bits": 8}], ids=str)
def test_plain_transformers_opens_compressed_tensors(save, options):
    folder = save("llama", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = theirs(**inputs_of("llama")).logits
    ours = qlazy.load_quantized(folder, device_map="cpu", dtype="float32")(**inputs_of("llama")).logits
    # 6e-7 was measured: the same weights, multiplied in another order.
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"format": "nf4"}, 0.02),
        ({"format": "fp4", "double_quant": False}, 0.02),
        ({"layout": "bitsandbytes", "bits": 8}, 0.04),  # it rounds activations to 8 bits too; 0.018 was measured
    ],
    ids=str,
)
def test_plain_transformers_opens_bitsandbytes(save, options, bound):
    folder = save("llama", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = theirs(**inputs_of("llama")).logits.float()
    ours = qlazy.load_quantized(folder, device_map="cpu")(**inputs_of("llama")).logits.float()
    assert (ours - expected).abs().max() < bound * expected.abs().max()


def test_config_says_what_is_packed_and_what_is_not(save):
    config = json.loads((save("llama", modules_to_not_convert=["down_proj"]) / "config.json").read_text())
    said = config["quantization_config"]
    groups = said["config_groups"].values()
    targets = [(group["targets"], group["weights"]["num_bits"]) for group in groups]
    assert targets == [([r"re:(.*\.)?lm_head$"], 8), (["Linear"], 4)]
    assert said["ignore"] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert config["dtype"] == "bfloat16"


def test_tied_head_is_ignored_and_not_written(save):
    folder = save("llama-tied")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in open_source(folder).tensors


def test_verify_finds_a_changed_byte_and_a_missing_file(save, tmp_path):
    folder = save("llama")
    read = verify(folder)
    assert read > sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    shard = sorted(damaged.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        verify(damaged)
    shard.unlink()
    with pytest.raises(IncompleteCheckpoint, match=f"{shard.name} is missing"):
        verify(damaged)
    with pytest.raises(UsageError, match="no manifest"):
        verify(tmp_path)


def test_same_save_again_writes_nothing(checkpoint, save):
    folder = save("llama")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    report = qlazy.save_quantized(checkpoint("llama"), folder, max_shard_size=60_000)
    assert report.shards_resumed == report.shards
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_another_recipe_replaces_only_when_told_to(checkpoint, save):
    folder = save("llama")
    with pytest.raises(UsageError, match="is not empty"):
        qlazy.save_quantized(checkpoint("llama"), folder, bits=8)
    qlazy.save_quantized(checkpoint("llama"), folder, bits=8, force=True)
    assert verify(folder)
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "bitsandbytes", "format": "int4"}, "is int4-g32-asym, and bitsandbytes has"),
        ({"layout": "bitsandbytes", "head_bits": 8}, "a bitsandbytes folder has one format"),
        ({"layout": "compressed-tensors", "format": "nf4"}, "is nf4-dq, and compressed-tensors has integers only"),
        ({"layout": "gptq", "format": "nf4"}, r"gptq has integers only\.\nUse --as bitsandbytes with --head-bits 16"),
        ({"layout": "nf4"}, "There is no layout 'nf4'. That is a format of weights"),
    ],
    ids=str,
)
def test_layouts_refuse_what_they_cannot_hold(checkpoint, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        qlazy.save_quantized(checkpoint("llama"), tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()


def test_saved_formats_are_kept_and_others_are_not(save):
    folder = save("llama", bits=8)
    assert qlazy.load_quantized(folder, device_map="cpu").model.layers[0].mlp.up_proj.format.bits == 8
    assert qlazy.load_quantized(folder, device_map="cpu", bits=8).qlazy_report.plan.recipe.format.bits == 8


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"format": "nf4", "head_bits": 16}], ids=str)
def test_save_pretrained_reopens(checkpoint, tmp_path, options):
    for loaded in (
        qlazy.load_quantized(checkpoint("llama"), device_map="cpu", **options),
        transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint("llama"), dtype=torch.bfloat16, quantization_config=qlazy.QlazyConfig(**options)
        ),
    ):
        folder = tmp_path / type(loaded.hf_quantizer).__name__
        loaded.save_pretrained(folder, max_shard_size="100KB")
        reopened = qlazy.load_quantized(folder, device_map="cpu")
        require_equal(loaded, reopened)
        assert torch.equal(loaded(**inputs_of("llama")).logits, reopened(**inputs_of("llama")).logits)
        reopened.save_pretrained(tmp_path / "again")  # views of one map each, and no tensors that are the same
        require_equal(loaded, qlazy.load_quantized(tmp_path / "again", device_map="cpu"))
        shutil.rmtree(tmp_path / "again")


def test_save_pretrained_opens_in_plain_transformers(checkpoint, tmp_path):
    loaded = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", dtype="float32")
    loaded.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        expected = theirs(**inputs_of("llama")).logits
    assert (loaded(**inputs_of("llama")).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_head_in_a_format_that_the_layout_has_no_room_for_is_written_in_16_bits(checkpoint, tmp_path):
    loaded = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", format="nf4", head_bits=4)
    with pytest.warns(UserWarning, match="lm_head is int4-g32-asym, .* it is written in bfloat16"):
        qlazy.save_quantized(loaded, tmp_path / "saved")
    reopened = qlazy.load_quantized(tmp_path / "saved", device_map="cpu")
    assert torch.equal(reopened.lm_head.weight, loaded.lm_head.weight)
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert said["llm_int8_skip_modules"] == ["lm_head"]


def test_a_load_can_verify_first(save):
    folder = save("llama")
    assert qlazy.load_quantized(folder, device_map="cpu", verify=True).is_quantized
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptCheckpoint, match=f"{shard.name} has sha256"):
        qlazy.load_quantized(folder, device_map="cpu", verify=True)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_plan_of_a_saved_folder_has_its_formats(save, name):
    folder = save(name, bits=8)
    planned = qlazy.plan(folder, device_map="cpu").tensors
    assert {t.format for t in planned if t.kind in ("linear", "experts", "head")} == {Int8()}
    exact = qlazy.load_quantized(folder, device_map="cpu").qlazy_report.plan.tensors
    assert sum(t.nbytes for t in planned) == sum(t.nbytes for t in exact)


@pytest.mark.parametrize("options", [{}, {"format": "nf4", "head_bits": 16}], ids=str)
def test_cache_is_written_once_and_mapped_from_then_on(checkpoint, tmp_path, monkeypatch, options):
    monkeypatch.setenv("QLAZY_CACHE", str(tmp_path / "cache"))
    plain = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", **options)
    assert not (tmp_path / "cache").exists()
    first = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", cache=True, **options)
    (folder,) = (tmp_path / "cache").iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    second = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", cache=True, **options)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    require_equal(plain, first)
    require_equal(plain, second)
    qlazy.load_quantized(checkpoint("llama"), device_map="cpu", cache=True, bits=8)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_cache_notices_a_changed_source(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("QLAZY_CACHE", str(tmp_path / "cache"))
    source = copied("llama")
    qlazy.load_quantized(source, device_map="cpu", cache=True)
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    qlazy.load_quantized(source, device_map="cpu", cache=True)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_cannot_be_cached_is_loaded_all_the_same(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("QLAZY_CACHE", str(tmp_path / "cache"))
    options = {"device_map": "cpu", "format": "nf4", "head_bits": 8}
    with pytest.warns(UserWarning, match="Not cached: .* a bitsandbytes folder has one format"):
        loaded = qlazy.load_quantized(checkpoint("llama"), cache=True, **options)
    require_equal(loaded, qlazy.load_quantized(checkpoint("llama"), **options))


def test_cached_model_has_the_name_that_was_typed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("QLAZY_CACHE", str(tmp_path / "cache"))
    loaded = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", cache=True)
    assert loaded.qlazy_report.plan.model_id == str(checkpoint("llama"))


def test_key_tells_of_what_lies_beside_the_weights(copied):
    folder = copied("llama")
    keys = set()
    for template in ("one", "two"):
        (folder / "chat_template.jinja").write_text(template)
        keys.add(content_key(open_source(folder), Recipe()))
    assert len(keys) == 2


def test_fingerprint_has_the_files_of_all_parts(save):
    source = open_source(save("llama"))
    name, info = next((name, info) for name, info in source.tensors.items() if isinstance(info, PackedTensor))
    other = next(tensor.path for tensor in source.tensors.values() if tensor.path != info.path)
    words, scale, *rest = info.parts
    scale = dataclasses.replace(scale, stored=dataclasses.replace(scale.stored, path=other))
    split = dataclasses.replace(info, parts=(words, scale, *rest))
    assert set(fingerprint(dataclasses.replace(source, tensors={name: split}))) == {info.path.name, other.name}


def test_a_save_never_replaces_its_source(copied, tmp_path):
    source = copied("llama")
    loaded = qlazy.load_quantized(source, device_map="cpu")
    (tmp_path / "link").symlink_to(source.parent)
    for model in (source, loaded):
        for target in (source, source.parent, tmp_path / "link" / "llama"):
            with pytest.raises(UsageError, match="would be replaced as a whole"):
                qlazy.save_quantized(model, target, force=True)
    assert open_source(source).tensors


def test_config_of_a_gguf_file_names_the_class_and_no_path(checkpoint, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint("llama"))
    monkeypatch.setattr("qlazy.saving.save.gguf_companions", lambda source, model: ())  # it has no tokenizer
    qlazy.save_quantized(path, tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert json.loads(text)["architectures"] == ["LlamaForCausalLM"] and str(tmp_path) not in text


def test_files_of_other_models_are_not_copied(copied, tmp_path):
    source = copied("llama")
    (source / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.gguf").touch()
    loaded = qlazy.load_quantized(source, device_map="cpu")
    qlazy.save_quantized(loaded, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    del loaded._qlazy_source
    loaded.config.name_or_path = str(tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match="No tokenizer is written"):
        qlazy.save_quantized(loaded, tmp_path / "unknown")
    assert not (tmp_path / "unknown" / "notes.txt").exists()


@pytest.mark.parametrize("options", [{}, {"bits": 8}], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_loaded_experts_are_saved_as_their_source_is(checkpoint, save, tmp_path, name, options):
    loaded = qlazy.load_quantized(checkpoint(name), device_map="cpu", **options)
    qlazy.save_quantized(loaded, tmp_path / "loaded", max_shard_size=60_000)
    loaded.save_pretrained(tmp_path / "pretrained")
    expected = set(open_source(save(name, **options)).tensors)
    for folder in (tmp_path / "loaded", tmp_path / "pretrained"):
        assert set(open_source(folder).tensors) == expected
        require_equal(loaded, qlazy.load_quantized(folder, device_map="cpu"))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("embedding_bits", [8, 4])
def test_packed_embeddings_reopen(checkpoint, save, tmp_path, name, embedding_bits):
    loaded = qlazy.load_quantized(checkpoint(name), device_map="cpu", embedding_bits=embedding_bits)
    folder = save(name, embedding_bits=embedding_bits)
    require_equal(loaded, qlazy.load_quantized(folder, device_map="cpu"))
    qlazy.save_quantized(loaded, tmp_path / "loaded")
    require_equal(loaded, qlazy.load_quantized(tmp_path / "loaded", device_map="cpu"))
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    (group,) = [group for group in groups if "model.embed_tokens" in group["targets"]]
    assert group["weights"]["num_bits"] == embedding_bits
