"""Whole loads of many kinds of model, held against transformers' own load of the same folder, bit for bit where it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import qlazy
from qlazy.formats import Int4, Int8
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import QuantLinear
from qlazy.layers.quant_weight import QuantWeight
from qlazy.planning.recipe import make_recipe
from qlazy.sources.gguf_rope import DIVISORS, LLAMA3, llama3_divisors
from tests.integration.conftest import MODELS, inputs_of, make, stored

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
QUANTIZED: dict[str, tuple[set[str], int]] = {
    "llama": ({*LLAMA, "lm_head"}, 15),
    "llama-tied": (LLAMA, 14),
    "llama-head": (LLAMA, 14),
    "qwen2": ({*LLAMA, "lm_head"}, 15),
    "gemma3": (LLAMA, 14),
    "mixtral": ({"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}, 9),
    "qwen2-moe": ({*LLAMA, "lm_head"}, 15),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, 8),
    "bert": ({"query", "key", "value", "dense"}, 13),
    "t5": ({"q", "k", "v", "o", "wi_0", "wi_1"}, 32),
    "siglip": ({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 26),
}
"""Last names of the layers that are quantized, and how many there are; router and float32 layers are not, nor heads that are
tied or of a task. Fused experts are, and stand in the place of their parameters.
"""


def theirs(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PreTrainedModel:
    """The same folder by transformers itself."""
    model: PreTrainedModel = getattr(transformers, MODELS[name][0]).from_pretrained(folder, dtype=dtype, **options)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def stand_ins(model: nn.Module) -> dict[str, QuantWeight]:
    """Packed weights in the place of parameters, by each name."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, QuantWeight)}


def weight_of(layer: nn.Module) -> Tensor:
    """(N, K), of a Linear or Conv1D."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.t() if isinstance(layer, Conv1D) else weight


def bit_equal(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.contiguous()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
    )


def require_same_rest(model: nn.Module, reference: nn.Module) -> None:
    """Every parameter and buffer but the quantized weights is bit-equal, persistent or not; no other exists."""
    layers = quantized(model)
    ours, wanted = tensors(model), tensors(reference)
    packed = {f"{path}.{key}" for path, layer in [*layers.items(), *stand_ins(model).items()] for key in layer.storage}
    assert set(ours) - packed == set(wanted) - {f"{path}.weight" for path in layers} - set(stand_ins(model))
    for name in set(ours) - packed:
        assert bit_equal(ours[name], wanted[name]), name
    persistent = {name for name in reference.state_dict() if name in ours}
    assert persistent == {name for name in model.state_dict() if name in wanted}


def require_same_weights(model: nn.Module, reference: nn.Module) -> None:
    """Every quantized layer holds what its format makes of the original weight."""
    for path, layer in quantized(model).items():
        original = reference.get_submodule(path)
        again = LAYERS[type(layer.format)](
            layer.in_features, layer.out_features, format=layer.format, dtype=layer.dtype, bias=None
        )
        again.allocate("cpu")
        again.fill(weight_of(original))
        for key in layer.storage:
            assert bit_equal(getattr(layer, key), getattr(again, key)), f"{path}.{key}"
        assert bit_equal(layer.weight, again.dequantize())
    for path, held in stand_ins(model).items():
        stored = reference.get_parameter(path)
        fresh = QuantWeight(tuple(held.shape), stack=held.stack, format=held.format, dtype=held.dtype)
        fresh.allocate("cpu")
        fresh.fill(stored.detach())
        assert bit_equal(held.dequantize(), fresh.dequantize()), path


def storages(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that share storage."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    if "logits" in out:
        return out.logits
    return torch.cat([out.text_embeds.flatten(), out.image_embeds.flatten()])


def require_close_output(name: str, model: nn.Module, reference: PreTrainedModel, tokens: int = 6) -> None:
    """Our output errs at most twice as much as torch with the dequantized weights, both held against float64."""
    for path, layer in quantized(model).items():
        original = reference.get_submodule(path)
        weight = layer.weight
        original.weight = nn.Parameter(weight.t().contiguous() if isinstance(original, Conv1D) else weight, requires_grad=False)
    for path, held in stand_ins(model).items():
        reference.get_parameter(path).data.copy_(held.dequantize())
    inputs = inputs_of(name, tokens)
    typed = {k: v.to(reference.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    ours, plain = output_of(model, typed), output_of(reference, typed)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in typed.items()}
    if getattr(reference, "_can_set_experts_implementation", lambda: False)():
        reference.set_experts_implementation("eager")  # the fused product has no float64
    exact = output_of(reference.double(), wide)
    assert ours.shape == exact.shape and ours.isfinite().all()
    error, allowed = (ours.double() - exact).norm(), 2 * (plain.double() - exact).norm()
    assert error <= allowed, f"error {error:.3g}, torch's own {allowed / 2:.3g}"


@pytest.mark.parametrize("name", MODELS)
def test_model(checkpoint, name):
    folder = checkpoint(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = qlazy.load_quantized(folder, device_map="cpu")
    reference = theirs(name, folder)

    ends, count = QUANTIZED[name]
    layers = quantized(model)
    assert ({path.rpartition(".")[2] for path in layers}, len(layers)) == (ends, count)
    assert type(model) is type(reference) and model.dtype == torch.bfloat16
    require_same_rest(model, reference)
    require_same_weights(model, reference)
    assert storages(model) == storages(reference)

    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in tensors(model).values())
    if model.can_generate():
        assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    require_close_output(name, model, reference)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_many_tokens_take_the_other_path(checkpoint, name):
    model = qlazy.load_quantized(checkpoint(name), device_map="cpu")
    require_close_output(name, model, theirs(name, checkpoint(name)), tokens=150)


OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4-g64": {"group_size": 64},
    "int4-g128": {"group_size": 128},
    "int4-channel": {"group_size": -1},
    "int4-sym": {"symmetric": True},
    "int4-g64-sym": {"symmetric": True, "group_size": 64},
    "int4-g128-sym": {"symmetric": True, "group_size": 128},
    "int4-channel-sym": {"symmetric": True, "group_size": -1},
    "int8": {"bits": 8},
    "int8-g64": {"bits": 8, "group_size": 64},
    "nf4": {"format": "nf4"},
    "nf4-plain": {"format": "nf4", "double_quant": False},
    "fp4": {"format": "fp4"},
    "fp4-plain": {"format": "fp4", "double_quant": False},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_format(checkpoint, options, dtype):
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", dtype=dtype, **options)
    wanted = make_recipe(**options).format
    layers = quantized(model)
    assert layers.pop("lm_head").format == Int8()
    assert len(layers) == 14 and all(layer.format == wanted for layer in layers.values())
    reference = theirs("llama", checkpoint("llama"), getattr(torch, dtype))
    require_same_rest(model, reference)
    if dtype == "bfloat16":
        require_same_weights(model, reference)
    require_close_output("llama", model, reference)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_dtype_of_the_file_and_of_the_model(tmp_path, stored):
    folder = make("qwen2", tmp_path / "qwen2", dtype=stored)
    # A CPU has no fast float16, so that "auto" takes bfloat16 for it.
    automatic = {torch.float32: torch.float32, torch.float16: torch.bfloat16}[stored]
    for asked, dtype in [("auto", automatic), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]:
        model = qlazy.load_quantized(folder, device_map="cpu", bits=8, dtype=asked)
        reference = theirs("qwen2", folder, dtype)
        assert model.dtype == dtype and {layer.dtype for layer in quantized(model).values()} == {dtype}
        require_same_rest(model, reference)
        assert model.qlazy_report.plan.dtype == str(dtype).removeprefix("torch.")


def test_float32_is_quantized_as_stored_and_not_by_way_of_bfloat16(tmp_path):
    folder = make("llama", tmp_path / "llama", dtype=torch.float32)
    model = qlazy.load_quantized(folder, device_map="cpu", dtype="bfloat16")
    require_same_weights(model, theirs("llama", folder, torch.float32))


def test_what_is_kept_in_float32_by_the_model_is_so_in_float16(checkpoint):
    model = qlazy.load_quantized(checkpoint("t5"), device_map="cpu", dtype="float16")
    reference = theirs("t5", checkpoint("t5"), torch.float16)
    kept = {name for name, parameter in reference.named_parameters() if parameter.dtype == torch.float32}
    assert kept and all(name.endswith("wo.weight") for name in kept)
    require_same_rest(model, reference)


def test_modules_to_not_convert_adds_to_the_defaults(checkpoint):
    plain = set(quantized(qlazy.load_quantized(checkpoint("llama"), device_map="cpu")))
    model = qlazy.load_quantized(
        checkpoint("llama"), device_map="cpu", modules_to_not_convert=["down_proj", "layers.1.self_attn"]
    )
    left = {path for path in plain if path.endswith("down_proj") or "layers.1.self_attn" in path}
    assert set(quantized(model)) == plain - left and len(left) == 6
    assert model.lm_head.format == Int8()
    reference = theirs("llama", checkpoint("llama"))
    require_same_rest(model, reference)
    reasons = {t.name: t.reason for t in model.qlazy_report.plan.tensors}
    assert all("modules_to_not_convert" in reasons[f"{path}.weight"] for path in left)


UNTIED = ["llama", "qwen2", "mixtral", "qwen2-moe"]


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"format": "nf4"}], ids=["int4", "int8", "nf4"])
@pytest.mark.parametrize("name", UNTIED)
def test_an_untied_output_head_has_8_bits(checkpoint, name, options):
    model = qlazy.load_quantized(checkpoint(name), device_map="cpu", **options)
    whole = qlazy.load_quantized(checkpoint(name), device_map="cpu", modules_to_not_convert=["lm_head"], **options)
    assert model.lm_head.format == Int8() and type(whole.lm_head) is nn.Linear
    assert set(quantized(model)) - set(quantized(whole)) == {"lm_head"}
    (head,) = [t for t in model.qlazy_report.plan.tensors if t.name == "lm_head.weight"]
    assert (head.kind, head.format, head.reason) == ("head", Int8(), "output head")
    # A code and a share of a scale for every two bytes.
    saved = whole.qlazy_report.device_bytes["cpu"] - model.qlazy_report.device_bytes["cpu"]
    assert saved == whole.lm_head.weight.nbytes - head.nbytes == 256 * 128 - 256 * 2
    # Rounding moves a weight by up to half a step, evenly: a step over the root of 12 is to be expected.
    inputs = inputs_of(name)
    hidden, weight = whole.model(**inputs).last_hidden_state.double(), whole.lm_head.weight.double()
    error = (output_of(model, inputs).double() - hidden @ weight.T).norm()
    expected = (hidden.norm(dim=-1, keepdim=True) * weight.abs().amax(1) / 127 / 12**0.5).norm()
    assert 0.8 <= error / expected <= 1.2


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi": ("PhiForCausalLM", "lm_head", {**MODELS["llama"][2]}),
    "gpt_neox": ("GPTNeoXForCausalLM", "embed_out", {**MODELS["bert"][2], "tie_word_embeddings": False}),
    "bert": ("BertForMaskedLM", "cls.predictions.decoder", {**MODELS["bert"][2], "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_output_heads_of_other_families(tmp_path, family):
    """Under other names, with a bias, of encoders: found in the headers and in the model, by both ways of loading."""
    architecture, stored_path, options = FAMILIES[family]
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    cls(transformers.AutoConfig.for_model(family, **options)).bfloat16().save_pretrained(tmp_path)
    model, headers = qlazy.load_quantized(tmp_path, device_map="cpu"), qlazy.plan(tmp_path, device_map="cpu")
    head = model.get_output_embeddings()
    assert head.format == Int8() and (head.bias is not None) == (family != "gpt_neox")
    (planned,) = [t for t in headers.tensors if t.name == f"{stored_path}.weight"]
    assert (planned.format, planned.reason) == (Int8(), "output head")
    report = model.qlazy_report
    assert report.device_bytes["cpu"] == report.plan.weight_bytes <= headers.weight_bytes
    other = cls.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=qlazy.QlazyConfig()).eval()
    assert all(bit_equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output_of(model, inputs_of("llama")), output_of(other, inputs_of("llama")))


def test_head_of_a_t5_is_tied_or_not_by_what_is_stored(copied, rewrite):
    """transformers' config calls every T5 tied, whatever config.json says; version 1.1 stores a head of its own."""
    folder = copied("t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tied = qlazy.load_quantized(folder, device_map="cpu")
    assert tied.lm_head.weight is tied.shared.weight
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    rewrite(folder, {"lm_head.weight": weight})
    model, headers = qlazy.load_quantized(folder, device_map="cpu"), qlazy.plan(folder, device_map="cpu")
    reference = theirs("t5", folder)
    assert model.lm_head.format == Int8() and torch.equal(reference.lm_head.weight, weight)
    require_same_weights(model, reference)
    require_close_output("t5", model, reference)
    plan = model.qlazy_report.plan
    assert model.qlazy_report.device_bytes["cpu"] == plan.weight_bytes
    assert headers.weight_bytes - plan.weight_bytes == 256 * 128 - 256 * 2, "headers do not tell what is stored"


def test_a_head_that_the_models_code_reads_stays_in_16_bits(tmp_path):
    config = transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, tie_word_embeddings=False)
    transformers.MambaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = qlazy.load_quantized(tmp_path, device_map="cpu")
    assert type(model.lm_head) is nn.Linear and quantized(model)
    headers = qlazy.plan(tmp_path, device_map="cpu")
    for plan in (headers, model.qlazy_report.plan):
        (head,) = [t for t in plan.tensors if t.name == "lm_head.weight"]
        assert head.format is None and "own code reads" in head.reason


@pytest.mark.parametrize(("bits", "fmt"), [(4, Int4()), (16, None)])
def test_bits_of_the_head_are_as_asked(checkpoint, bits, fmt):
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", head_bits=bits)
    assert getattr(model.lm_head, "format", None) == fmt
    reference = theirs("llama", checkpoint("llama"))
    require_same_rest(model, reference)
    require_same_weights(model, reference)
    assert model.config.quantization_config.head_bits == bits
    assert model.qlazy_report.device_bytes["cpu"] == model.qlazy_report.plan.weight_bytes
    assert (
        qlazy.plan(checkpoint("llama"), device_map="cpu", head_bits=bits).weight_bytes == model.qlazy_report.plan.weight_bytes
    )


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_the_report_add_up(checkpoint, name):
    folder = checkpoint(name)
    seen: list[qlazy.Progress] = []
    model = qlazy.load_quantized(folder, device_map="cpu", on_progress=seen.append)
    report = model.qlazy_report
    plan = report.plan
    assert plan.exact and plan.fits
    assert report.device_bytes == {"cpu": plan.weight_bytes}
    assert plan.weight_bytes == sum(tensor.nbytes for tensor in plan.tensors)
    stored = sum(len(json.loads(_header(file)).keys() - {"__metadata__"}) for file in folder.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size - 8 - len(_header(file)) for file in folder.glob("*.safetensors"))
    assert report.bytes_read == plan.source_bytes == nbytes
    assert report.tensors_loaded <= stored and (report.tensors_loaded == stored or name in ("mixtral", "qwen2-moe"))
    assert not report.initialized and not report.unexpected
    stages = {key: value for key, value in report.seconds.items() if key != "total"}
    assert {"plan", "build", "stream", "finish"} <= set(stages)
    assert sum(stages.values()) == pytest.approx(report.seconds["total"])
    assert 0 <= report.host_peak_bytes <= plan.total_bytes and not report.device_peak_bytes
    assert [p.stage for p in seen] == ["read"] * len(seen) and all(p.total_bytes == nbytes for p in seen)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    headers = qlazy.plan(folder, device_map="cpu")
    assert not headers.exact
    assert plan.weight_bytes <= headers.weight_bytes <= 1.01 * plan.weight_bytes


def _header(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))


def test_it_generates(checkpoint):
    for name in ("llama", "t5", "mixtral"):
        model = qlazy.load_quantized(checkpoint(name), device_map="cpu")
        made = model.generate(inputs_of(name)["input_ids"], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert made.shape[1] == (11 if name != "t5" else 6)


def test_generation_config_of_the_folder_is_carried_over(copied):
    folder = copied("llama")
    GenerationConfig(do_sample=True, temperature=0.3, top_k=7, eos_token_id=[2, 5]).save_pretrained(folder)
    model = qlazy.load_quantized(folder, device_map="cpu")
    wanted = theirs("llama", folder).generation_config
    assert model.generation_config.to_dict() == wanted.to_dict()
    assert (wanted.temperature, wanted.top_k, wanted.eos_token_id) == (0.3, 7, [2, 5])


def test_one_file_without_an_index(tmp_path, checkpoint):
    model = theirs("llama", checkpoint("llama"))
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    require_same_weights(qlazy.load_quantized(tmp_path / "one", device_map="cpu"), model)


def test_attention_is_as_asked(checkpoint):
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert output_of(model, inputs_of("llama")).isfinite().all()


def test_gradients_reach_an_adapter_below(checkpoint):
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu")
    embedded = model.get_input_embeddings()(inputs_of("llama")["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.float().square().mean().backward()
    assert embedded.grad is not None and embedded.grad.isfinite().all() and embedded.grad.abs().sum() > 0


def test_two_loads_are_the_same_bytes(checkpoint):
    one, other = (qlazy.load_quantized(checkpoint("llama"), device_map="cpu", format="nf4") for _ in range(2))
    assert all(bit_equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_a_map_of_one_device_is_that_device(checkpoint):
    model = qlazy.load_quantized(checkpoint("llama"), device_map={"": "cpu"})
    assert model.qlazy_report.device_bytes == {"cpu": model.qlazy_report.plan.weight_bytes}


def write_gguf(path: Path, folder: Path, **more: np.ndarray) -> Path:
    """The tiny Llama as llama.cpp would convert it: its names, its order of the rows of queries and keys, four data types."""
    import gguf

    kinds = {"ffn_down": "Q8_0", "ffn_up": "Q4_1", "token_embd": "F16"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in stored(folder).items():
        values = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        ours = names.get_name(name, try_suffixes=(".weight",))
        kind = gguf.GGMLQuantizationType[next((k for part, k in kinds.items() if part in ours), "F32")]
        writer.add_tensor(ours, gguf.quantize(values.contiguous().numpy(), kind), raw_dtype=kind)
    for name, values in more.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "options",
    [{}, {"format": "nf4"}, {"modules_to_not_convert": ["lm_head"]}, {"modules_to_not_convert": ["*"]}],
    ids=["int4", "nf4", "head kept", "all kept"],
)
def test_gguf(checkpoint, tmp_path, options):
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint("llama"))
    model = qlazy.load_quantized(path, device_map="cpu", dtype="bfloat16", **options)
    reference = theirs("llama", tmp_path, torch.float32, gguf_file=path.name)
    kept = options.get("modules_to_not_convert")
    assert len(quantized(model)) == {None: 15, "lm_head": 14, "*": 0}[kept and kept[0]]
    # The file calls the head "output".
    headers = qlazy.plan(path, device_map="cpu", dtype="bfloat16", **options)
    (head,) = [t for t in headers.tensors if t.name == "output.weight"]
    assert head.format == getattr(model.lm_head, "format", None)
    require_same_weights(model, reference)
    require_same_rest(model, theirs("llama", tmp_path, gguf_file=path.name))
    exact = stored(checkpoint("llama"))["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(reference.model.layers[1].self_attn.q_proj.weight, exact), "rows are back in their order"


def test_gguf_with_the_positions_of_llama_3(checkpoint, tmp_path):
    divisors = np.array(llama3_divisors(16, theta=10000.0, factor=8.0), np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint("llama"), **{DIVISORS: divisors})
    model = qlazy.load_quantized(path, device_map="cpu", dtype="float32", modules_to_not_convert=["*"])
    reference = theirs("llama", tmp_path, torch.float32, gguf_file=path.name)
    assert not torch.allclose(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, **LLAMA3}
    config = transformers.LlamaConfig(**reference.config.to_dict() | {"rope_parameters": scaling})
    right = transformers.LlamaForCausalLM(config).eval()
    right.load_state_dict(reference.state_dict())
    given = {"input_ids": torch.arange(64).view(1, 64), "position_ids": torch.arange(0, 256, 4).view(1, 64)}
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, right(**given).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"module_bits": {"down_proj": "int4-g64", "layers.1.self_attn.v_proj": 8}},
            ("v_proj", "down_proj", "attn_v", "ffn_down"),
        ),
        ({"modules_to_not_convert": ["self_attn", "layers.0.mlp"]}, ("self_attn", "layers.0.mlp", "attn_", "blk.0.ffn_")),
        ({"target_bpw": 5.5, "module_bits": {"o_proj": 8}}, ("o_proj", "attn_output")),
    ],
    ids=["bits", "kept", "target"],
)
def test_plan_of_a_gguf_file_takes_the_names_of_modules(checkpoint, tmp_path, options, named):
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint("llama"))
    headers = qlazy.plan(path, device_map="cpu", **options)
    exact = qlazy.load_quantized(path, device_map="cpu", **options).qlazy_report.plan

    def own(plan: Any) -> list[str]:
        """Formats of the layers that options name."""
        return sorted(str(t.format) for t in plan.tensors if t.kind == "linear" and any(part in t.name for part in named))

    assert own(headers) == own(exact) != []
    if "target_bpw" not in options:
        assert headers.weight_bytes == exact.weight_bytes
