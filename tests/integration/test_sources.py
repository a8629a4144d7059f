"""Whole loads of quantized checkpoints: what comes out is what a load of the dequantized weights gives, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qlazy
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, QlazyError, UnsupportedModel
from qlazy.matching.fill import row_count
from qlazy.reading.files import Files
from qlazy.reading.packed import read_whole
from qlazy.sources.packed import PackedTensor
from qlazy.sources.source import open_source
from tests.integration.conftest import stored as all_tensors

Packed = tuple[dict[str, Tensor], Tensor]
"""What is stored of a weight, by the end of its name, and its values."""


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes along the rows to 32-bit words, the first in the lowest bits."""
    each = 32 // bits
    shifts = torch.arange(0, 32, bits)
    total = (codes.long().view(codes.shape[0], -1, each) << shifts).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def codes_of(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15, float16 scales and zeros, by minimum and maximum."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-4).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = (grouped / scale.float()[:, :, None] + zero[:, :, None]).round().clamp(0, 15).flatten(1)
    return codes.to(torch.int32), scale, zero.to(torch.int32)


def as_fp8(weight: Tensor) -> Packed:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // 32, 32, columns // 64, 64)
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (stored.float() * scale[:, None, :, None]).view(rows, columns).bfloat16()
    return {"weight": stored.view(rows, columns), "weight_scale_inv": scale}, values


def as_gptq(weight: Tensor) -> Packed:
    codes, scale, zero = codes_of(weight, 32)
    values = ((codes - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)).half()
    stored = {"qweight": words(codes, 4).t(), "qzeros": words(zero.t() - 1, 4), "scales": scale.t()}
    return stored | {"g_idx": (torch.arange(weight.shape[1]) // 32).to(torch.int32)}, values


def as_awq(weight: Tensor) -> Packed:
    codes, scale, zero = codes_of(weight, 32)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    values = ((codes - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)).half()

    def interleaved(matrix: Tensor) -> Tensor:
        return words(matrix.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

    return {"qweight": interleaved(codes.t()), "qzeros": interleaved(zero.t()), "scales": scale.t()}, values


def as_compressed(weight: Tensor, group: int = 32) -> Packed:
    codes, scale, zero = codes_of(weight, group)
    scale = scale.bfloat16()
    values = (codes - zero.repeat_interleave(group, 1)).bfloat16() * scale.repeat_interleave(group, 1)
    stored = {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_zero_point": words(zero.t(), 4).t()}
    return stored | {"weight_shape": torch.tensor(weight.shape)}, values


INT4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
METHODS = {
    "fp8": (as_fp8, {"quant_method": "fp8", "weight_block_size": [32, 64]}),
    "gptq": (as_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}),
    "awq": (as_awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "compressed-tensors": (
        as_compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
            "ignore": ["lm_head"],
        },
    ),
}
_LAYER = re.compile(r"\.[a-z0-9]*_proj\.weight$|\.w[123]\.weight$|\.(c_attn|c_fc|Wqkv)\.weight$")
_TURNED = re.compile(r"\.(c_attn|c_fc|c_proj)\.weight$")


def write_both(folder: Path, target: Path, method: str) -> tuple[Path, Path]:
    """A folder whose linear layers are packed by `method`, and one with their values in their own dtype."""
    make, said = METHODS[method]
    packed, plain = target / method, target / f"{method}-values"
    stored, values = {}, {}
    for name, tensor in all_tensors(folder).items():
        if not _LAYER.search(name) or tensor.dim() != 2:
            stored[name] = values[name] = tensor
            continue
        is_turned = _TURNED.search(name) is not None
        parts, made = make(tensor.t() if is_turned else tensor)
        values[name] = made.t().contiguous() if is_turned else made
        stored |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
    config = json.loads((folder / "config.json").read_text())
    for path, tensors, more in ((packed, stored, {"quantization_config": said}), (plain, values, {})):
        shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors*"))
        (path / "config.json").write_text(json.dumps(config | more))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return packed, plain


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_packed_layers_that_the_model_has_in_parts_are_unpacked(checkpoint, tmp_path):
    packed, plain = write_both(checkpoint("nomic_bert"), tmp_path, "compressed-tensors")
    assert any("Wqkv" in name for name, info in open_source(packed).tensors.items() if isinstance(info, PackedTensor))
    options = {"dtype": "bfloat16", "device_map": "cpu"}
    found, requantized = (qlazy.load_quantized(folder, **options).state_dict() for folder in (packed, plain))
    stored = load_file(packed / "model.safetensors")
    for number in (0, 1):
        path = f"nomic_bert.layers.{number}.self_attn."
        for name in (f"{path}{x}_proj.weight_packed" for x in "qkv"):
            assert torch.equal(found[name], requantized[name])
        (name,) = [name for name in stored if name.endswith("out_proj.weight_packed") and f"layers.{number}." in name]
        assert torch.equal(found[f"{path}o_proj.weight_packed"], stored[name]), "what the model has as it is stored is kept"


def test_only_what_cannot_be_kept_is_requantized(checkpoint, tmp_path):
    packed, plain = write_both(checkpoint("llama"), tmp_path, "compressed-tensors")
    fine, stored = {"targets": ["re:.*down_proj"], "weights": INT4 | {"group_size": 16}}, all_tensors(checkpoint("llama"))

    def change(tensors, said):
        said["config_groups"] = {"group_0": fine, "group_1": said["config_groups"]["group_0"]}
        for name in [name.removesuffix("weight") for name in stored if "down_proj" in name]:
            tensors.update({f"{name}{end}": part for end, part in as_compressed(stored[f"{name}weight"], 16)[0].items()})

    damaged(packed, change)
    values = load_file(plain / "model.safetensors")
    values |= {name: as_compressed(tensor, 16)[1] for name, tensor in stored.items() if "down_proj" in name}
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    options = {"dtype": "bfloat16", "device_map": "cpu"}
    model, requantized = (qlazy.load_quantized(folder, **options) for folder in (packed, plain))
    found, expected, held = model.state_dict(), requantized.state_dict(), load_file(packed / "model.safetensors")
    for name in found:
        if name.endswith("weight_packed"):
            assert torch.equal(found[name], (expected if "down_proj" in name else held)[name]), name
    packed_down = [info for info in open_source(packed).tensors.values() if "down_proj" in info.name]
    assert model.qlazy_report.bytes_read == sum(info.nbytes for info in packed_down) > 0
    planned = {t.name: (t.format, t.reason) for t in model.qlazy_report.plan.tensors if t.format}
    assert planned == {t.name: (t.format, t.reason) for t in qlazy.plan(packed, **options).tensors if t.format}
    assert {reason for name, (_, reason) in planned.items() if "down_proj" in name} == {"packed otherwise in the files"}


def test_targets_that_could_take_for_ever_are_refused(checkpoint, tmp_path):
    packed, _ = write_both(checkpoint("llama"), tmp_path, "compressed-tensors")
    for pattern in ("(a+)+$", "([a-z.]*)*x", ".*a.*b.*c.*d.*e.*f.*g"):
        config = json.loads((packed / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = [f"re:{pattern}"]
        (packed / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModel, match="repeats a group, or more than 6 things"):
            open_source(packed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_load_requantizes_the_values_of_the_source(checkpoint, tmp_path, method, bits):
    packed, plain = write_both(checkpoint("llama"), tmp_path, method)
    options = {"bits": bits, "dtype": "bfloat16", "device_map": "cpu", "symmetric": True if bits == 4 else None}
    loaded = qlazy.load_quantized(packed, **options)
    assert_same(loaded, qlazy.load_quantized(plain, **options))
    assert sum(type(layer).__name__.startswith("Int") for layer in loaded.modules()) == 15
    source = open_source(packed)
    assert loaded.qlazy_report.bytes_read == source.nbytes


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_experts_too(checkpoint, tmp_path, method):
    packed, plain = write_both(checkpoint("mixtral"), tmp_path, method)
    options = {"dtype": "bfloat16", "device_map": "cpu"}
    assert sum(isinstance(info, PackedTensor) for info in open_source(packed).tensors.values()) == 2 * (4 + 4 * 3)
    assert_same(qlazy.load_quantized(packed, **options), qlazy.load_quantized(plain, **options))


def test_a_bias_of_zeros_that_the_model_does_not_have_is_left_out(checkpoint, tmp_path):
    packed, _ = write_both(checkpoint("llama"), tmp_path, "gptq")
    damaged(packed, lambda tensors, _: tensors.update({f"{Q}.bias": torch.zeros(128).half()}))
    model = qlazy.load_quantized(packed, device_map="cpu")
    assert model.qlazy_report.unexpected == [f"{Q}.bias"]
    damaged(packed, lambda tensors, _: tensors[f"{Q}.bias"].fill_(0.5))
    with pytest.raises(CorruptCheckpoint, match=rf"1 stored tensors have no place in LlamaForCausalLM: '{Q}.bias'"):
        qlazy.load_quantized(packed, device_map="cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_transposed_layers_are_packed_the_other_way_round(checkpoint, tmp_path, bits):
    packed, plain = write_both(checkpoint("gpt2"), tmp_path, "gptq")
    options = {"dtype": "bfloat16", "device_map": "cpu", "bits": bits, "group_size": 64 if bits == 4 else None}
    model = qlazy.load_quantized(packed, **options)
    assert_same(model, qlazy.load_quantized(plain, **options))
    planned = {t.name: t.shape for t in qlazy.plan(packed, **options).tensors if t.kind == "linear"}
    held = {t.name: t.shape for t in model.qlazy_report.plan.tensors if t.kind == "linear"}
    assert sorted(planned.values()) == sorted(held.values()) and len(held) == 8


@pytest.mark.parametrize("kept", [None, ["experts"]], ids=["int4", "16 bits"])
def test_experts_in_mxfp4_as_gpt_oss_has_them(tmp_path, kept):
    config = GptOssConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "values")
    tensors = load_file(tmp_path / "values" / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 123, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    said = json.loads((tmp_path / "values" / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "mxfp4").mkdir()
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(said))
    save_file(stored, tmp_path / "mxfp4" / "model.safetensors")
    save_file(tensors, tmp_path / "values" / "model.safetensors", metadata={"format": "pt"})
    options = {"device_map": "cpu", "modules_to_not_convert": kept}
    model = qlazy.load_quantized(tmp_path / "mxfp4", **options)
    assert_same(model, qlazy.load_quantized(tmp_path / "values", **options))
    formats = {t.name: t.format for t in model.qlazy_report.plan.tensors if t.kind == "experts"}
    assert len(formats) == 4 and all((fmt is None) == bool(kept) for fmt in formats.values())


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_bitsandbytes_values_are_its_own(checkpoint, tmp_path, options):
    config = BitsAndBytesConfig(**options)
    made = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    made.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    reference = reopened.dequantize(dtype=torch.float32).state_dict()
    files, packed = Files(False), 0
    for name, info in open_source(tmp_path).tensors.items():
        if isinstance(info, PackedTensor):
            packed += 1
            values = read_whole(files, info, 0, row_count(info.shape))
            assert torch.equal(values.float(), reference[name]), name
            # From any row on, though blocks and words hold more than one.
            assert torch.equal(read_whole(files, info, 5, 23).float(), reference[name][5:23]), name
    files.close()
    assert packed == 14
    assert torch.isfinite(qlazy.load_quantized(tmp_path, device_map="cpu")(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_weight_that_is_read_as_a_whole_counts_in_the_plan(checkpoint, tmp_path):
    packed, _ = write_both(checkpoint("llama"), tmp_path, "gptq")
    by_rows, _ = write_both(checkpoint("llama"), tmp_path, "fp8")
    largest = max(info.nbytes for info in open_source(packed).tensors.values() if isinstance(info, PackedTensor))
    staging = {
        folder: next(d.staging_bytes for d in qlazy.plan(folder, device_map="cpu").devices if d.device == "cpu")
        for folder in (packed, by_rows)
    }
    assert staging[packed] - staging[by_rows] >= largest


def damaged(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("method", "change", "error", "words"),
    [
        ("gptq", lambda t, c: t.pop(f"{Q}.scales"), IncompleteCheckpoint, f"the tensor '{Q}.scales' that it needs"),
        ("gptq", lambda t, c: t.update({f"{Q}.scales": t[f"{Q}.scales"][1:]}), CorruptCheckpoint, "has shape"),
        ("gptq", lambda t, c: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:, 1:]}), CorruptCheckpoint, "none of"),
        ("gptq", lambda t, c: c.update(checkpoint_format="marlin"), UnsupportedModel, "'marlin'; of GPTQ gptq and gptq_v2"),
        ("gptq", lambda t, c: t[f"{Q}.g_idx"].fill_(99), CorruptCheckpoint, "names group 99 of a column, but there are 4"),
        ("gptq", lambda t, c: t[f"{Q}.g_idx"].fill_(-1), CorruptCheckpoint, "names group -1"),
        ("gptq", lambda t, c: c.update(group_size="x"), CorruptCheckpoint, "group_size of quantization_config is 'x'"),
        ("awq", lambda t, c: c.update(version="gemv"), UnsupportedModel, "'gemv'; of AWQ the gemm layout is read"),
        ("awq", lambda t, c: t.pop(f"{Q}.qzeros"), IncompleteCheckpoint, f"{Q}.qzeros"),
        (
            "fp8",
            lambda t, c: c.update(quant_method="quark"),
            UnsupportedModel,
            "with quark in its config.json; what is read is",
        ),
        ("fp8", lambda t, c: c.update(weight_block_size=[0, 64]), CorruptCheckpoint, "weight_block_size"),
        ("fp8", lambda t, c: t.pop(f"{Q}.weight_scale_inv"), IncompleteCheckpoint, f"{Q}.weight_scale_inv"),
        ("fp8", lambda t, c: t.update({f"{Q}.weight_scale_inv": torch.ones(3, 3)}), CorruptCheckpoint, "no grid of blocks"),
        ("fp8", lambda t, c: t[f"{Q}.weight_scale_inv"].fill_(torch.nan), CorruptCheckpoint, "NaN or an infinity"),
        ("compressed-tensors", lambda t, c: c.update(format="sparse-24-bitmask"), UnsupportedModel, "sparse-24-bitmask"),
        ("compressed-tensors", lambda t, c: c.pop("config_groups"), CorruptCheckpoint, "no config_groups"),
        ("compressed-tensors", lambda t, c: t.pop(f"{Q}.weight_zero_point"), IncompleteCheckpoint, "weight_zero_point"),
        ("compressed-tensors", lambda t, c: t.update({f"{Q}.weight_scale": torch.ones(7, 4)}), CorruptCheckpoint, "has shape"),
        (
            "compressed-tensors",
            lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=10**30),
            CorruptCheckpoint,
            "num_bits",
        ),
        (
            "compressed-tensors",
            lambda t, c: c.update(config_groups={b: {"targets": ["re:no"], "weights": INT4 | {"num_bits": b}} for b in (4, 8)}),
            CorruptCheckpoint,
            "no config group",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(checkpoint, tmp_path, method, change, error, words):
    packed, _ = write_both(checkpoint("llama"), tmp_path, method)
    with pytest.raises(error) as caught:
        qlazy.load_quantized(damaged(packed, change), device_map="cpu")
    assert words in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_any_value_in_the_config_is_read_or_refused(checkpoint, tmp_path, method):
    packed, _ = write_both(checkpoint("llama"), tmp_path, method)
    config = json.loads((packed / "config.json").read_text())
    said = config["quantization_config"]
    weights = said.get("config_groups", {}).get("group_0", {}).get("weights", {})
    for holder in (said, weights):
        for key in list(holder):
            for value in (None, -1, 0, 3, 10**30, 1.5, "x", [], [1], {}, {"a": 1}, True):
                kept, holder[key] = holder[key], value
                (packed / "config.json").write_text(json.dumps(config))
                try:
                    open_source(packed)
                except QlazyError as error:
                    assert str(error)
                holder[key] = kept


@pytest.mark.parametrize(
    "key", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "nested_dtype"]
)
def test_any_value_in_a_quant_state_is_read_or_refused(tmp_path, key):
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    tensors = {f"a.weight.{end}": value for end, value in state.as_dict(packed=True).items()} | {"a.weight": packed}
    (name,) = [name for name in tensors if "quant_state" in name]
    said = json.loads(bytes(tensors[name].tolist()))
    assert key in said
    config = {"quantization_config": {"quant_method": "bitsandbytes"}, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for value in (None, -1, 0, 3, 64.0, 10**30, 1e400, "x", "nf4", [], [1, 2], [64, 10**30], [64.0, 128.0], {}, True):
        text = json.dumps(said | {key: value}).encode()
        save_file(tensors | {name: torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "model.safetensors")
        try:
            (info,) = open_source(tmp_path).tensors.values()
        except QlazyError as error:
            assert "a.weight" in str(error)
            continue
        files = Files(False)
        assert read_whole(files, info, 0, 64).shape == (64, 128)
        files.close()


@pytest.mark.parametrize("method", METHODS)
def test_by_default_what_a_layer_can_hold_is_kept_and_the_rest_is_close(checkpoint, tmp_path, method):
    packed, plain = write_both(checkpoint("llama"), tmp_path, method)
    values = all_tensors(plain)
    model = qlazy.load_quantized(packed, device_map="cpu")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            wanted, weight = values[f"{name}.weight"].float(), module.weight.float()
            if method == "compressed-tensors":
                assert torch.equal(weight, wanted), name
            else:
                assert (weight - wanted).norm() < 0.1 * wanted.norm(), name
