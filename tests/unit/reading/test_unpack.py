"""Low-bit weights of other libraries, read from files that these libraries made: values equal to their own bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qlazy.errors import CorruptCheckpoint, UnsupportedModel
from qlazy.reading.unpack import unpack_rows
from qlazy.sources.float8 import as_stored
from qlazy.sources.packed import PackedTensor
from qlazy.sources.quantized import join_parts
from qlazy.sources.safetensors import TensorInfo, read_header

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures" / "quantized").glob("*.safetensors"))


def read_rows(info: PackedTensor, start: int, stop: int) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(info.path.read_bytes()), dtype=torch.uint8)
    spans = {part.role: part.span(start, stop) for part in info.parts}
    return unpack_rows(info, {role: raw[begin : begin + nbytes] for role, (begin, nbytes) in spans.items()}, start, stop)


def row_count(info: PackedTensor) -> int:
    return info.shape[0] if len(info.shape) == 2 else info.shape[0] * info.shape[1]


def joined(path: Path, config: dict) -> dict[str, PackedTensor]:
    tensors = {name: info for name, info in read_header(path).items() if not name.startswith("reference:")}
    found = join_parts({"dtype": "bfloat16", "quantization_config": config}, tensors, where=path.name)
    assert all(isinstance(info, PackedTensor) for info in found.values())
    return found


def assert_equal(info: PackedTensor, reference: torch.Tensor, *, zero_sign: bool = True) -> None:
    """The same bits, read at once, and read in pieces; at any alignment of the file's bytes."""
    rows = row_count(info)
    step = info.row_block
    pieces = torch.cat([read_rows(info, start, min(rows, start + step)) for start in range(0, rows, step)])
    for values in (read_rows(info, 0, rows), pieces):
        values = values.view(info.shape)
        assert values.dtype == reference.dtype and values.shape == reference.shape
        assert torch.equal(values, reference)
        assert not zero_sign or torch.equal(values.signbit(), reference.signbit())


@pytest.mark.parametrize("path", FIXTURES, ids=[path.stem for path in FIXTURES])
def test_values_are_those_of_the_library_that_made_the_file(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        reference = {name.removeprefix("reference:"): file.get_tensor(name) for name in file.keys() if ":" in name}  # noqa: SIM118
    found = joined(path, config)
    assert found.keys() == reference.keys()
    for name, info in found.items():
        # modelopt knows no negative zero.
        assert_equal(info, reference[name], zero_sign="modelopt" not in path.stem)


def test_there_is_a_file_of_every_method():
    assert len(FIXTURES) >= 25


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_fp8_as_transformers_writes_it_is_what_transformers_makes_of_it(tmp_path, block, scale_fmt):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = {"quant_method": "fp8", "weight_block_size": list(block) if block else None, "scale_fmt": scale_fmt}
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**config))
    made = Fp8Quantize(quantizer).convert({"a.weight": torch.randn(256, 384).bfloat16()})
    assert made["a.weight"].dtype == torch.float8_e4m3fn
    path = saved(tmp_path, made | {"a.activation_scale": torch.tensor(1.0)})
    reference = Fp8Dequantize(quantizer)._dequantize_one(*made.values(), output_dtype=torch.bfloat16)
    assert_equal(joined(path, config)["a.weight"], reference)


def test_fp8_blocks_may_be_cut_off_at_the_edges(tmp_path):
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight = (torch.randn(200, 300) * 3).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.01
    path = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    found = joined(path, {"quant_method": "fp8", "weight_block_size": [128, 128]})["a.weight"]
    assert_equal(found, _dequantize_fp8_weight(weight, scale, [128, 128], torch.float32).bfloat16())


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_four_bit_experts_in_an_fp8_checkpoint_are_what_transformers_makes_of_them(tmp_path, scale_dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randint(-128, 128, (96, 64), dtype=torch.int8)
    scale = torch.randint(120, 130, (96, 4), dtype=torch.uint8).view(scale_dtype)
    path = saved(tmp_path, {"a.weight": weight, "a.scale": scale})
    reference = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    assert_equal(joined(path, {"quant_method": "fp8", "weight_block_size": [128, 128]})["a.weight"], reference)


def test_fp8_experts_of_three_dimensions(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = (torch.randn(3, 64, 128) * 3).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 4) + 0.01
    path = saved(tmp_path, {"experts.down_proj": weight, "experts.down_proj_scale_inv": scale})
    found = joined(path, {"quant_method": "fp8", "weight_block_size": [32, 32]})["experts.down_proj"]
    assert_equal(found, Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16))


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 80, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 80, 4), dtype=torch.uint8)
    path = saved(tmp_path, {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales})
    found = joined(path, {"quant_method": "mxfp4"})["experts.gate_up_proj"]
    reference = convert_moe_packed_tensors(blocks, scales)
    assert found.shape == reference.shape == (3, 128, 80)
    assert_equal(found, reference)
    straight = as_stored(found)
    assert straight.shape == (3, 80, 128)
    assert torch.equal(read_rows(straight, 80, 83), reference[1].t()[:3])


def stored_in(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(next(path for path in FIXTURES if path.stem == case), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if ":" not in name}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["quantization_config"])


@pytest.mark.parametrize("shape", [[70, 52], [69, 44], [-70, 44], [70, 1 << 40]])
def test_a_stored_shape_must_be_one_that_the_words_have(tmp_path, shape):
    tensors, config = stored_in("ct-int4-channel-sym-odd")
    name = next(name for name in tensors if name.endswith("weight_shape"))
    path = saved(tmp_path, tensors | {name: torch.tensor(shape)})
    with pytest.raises(CorruptCheckpoint, match="weight_shape' says"):
        joined(path, config)


def test_targets_are_names_then_patterns_then_classes(tmp_path):
    tensors, config = stored_in("ct-int4-g64-sym")
    good = config["config_groups"]["group_0"]["weights"]
    bad = good | {"num_bits": 3}
    name = "model.layers.0.mlp.down_proj"
    for targets in (
        [["Linear"], [name]],
        [["Linear"], ["re:.*down_proj$"]],
        [["re:.*down_proj$"], [name]],
        [["Other"], ["re:.*d"]],
    ):
        groups = {str(n): {"targets": target, "weights": bad if n == 0 else good} for n, target in enumerate(targets)}
        path = saved(tmp_path, tensors)
        (info,) = joined(path, config | {"config_groups": groups}).values()
        assert info.shape == (96, 128)
    # Files may have other names than the model: one scheme for all that is named is that of all that is stored so.
    other = {
        "a": {"targets": ["re:language_model.*"], "weights": good},
        "b": {"targets": ["language_model.x"], "weights": good},
    }
    (info,) = joined(path, config | {"config_groups": other}).values()
    assert info.shape == (96, 128)
    with pytest.raises(CorruptCheckpoint, match="is no regular expression"):
        joined(path, config | {"config_groups": {"a": {"targets": ["re:("], "weights": good}}})


@pytest.mark.parametrize("path", FIXTURES, ids=[path.stem for path in FIXTURES])
def test_headers_alone_tell_the_shapes_of_a_model_on_the_hub(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        shape = next(tuple(file.get_tensor(name).shape) for name in file.keys() if ":" in name)  # noqa: SIM118
    remote = {
        name: dataclasses.replace(info, path=Path(path.name)) for name, info in read_header(path).items() if ":" not in name
    }
    (info,) = join_parts({"quantization_config": config}, remote, where="org/name").values()
    # Of rows that do not fill their last word headers tell no more than how many columns it can hold.
    assert info.shape == ((70, 48) if "odd" in path.stem else shape)


def test_shapes_of_bitsandbytes_are_in_the_files():
    names = {"a.weight": (2048, 1), "a.weight.absmax": (64,), "a.weight.quant_state.bitsandbytes__nf4": (90,)}
    remote = {
        name: TensorInfo(name=name, shape=shape, dtype="uint8", path=Path("m.safetensors"), offset=0, nbytes=math.prod(shape))
        for name, shape in names.items()
    }
    with pytest.raises(UnsupportedModel, match="a plan needs the files: hf download"):
        join_parts({"quantization_config": {"quant_method": "bitsandbytes"}}, remote, where="org/name")
