"""Mixtures of experts, embeddings and bits by module through whole loads, against the same model with dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import qlazy
from qlazy.formats import Codebook4, Int4, Int8
from qlazy.layers.quant_linear import QuantLinear
from qlazy.layers.quant_weight import QuantWeight

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Lists of experts whose gate and up go straight to their rows, and such whose rows end within a block.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2},
    ),
    # Fused, (E, K, N), with biases, gate and up interleaved, and limits.
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Fused, (E, K, N), every token through every expert.
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 128},
    ),
    # Two-dimensional stacks.
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    # No gate.
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build(family: str) -> PreTrainedModel:
    architecture, config_name, options = FAMILIES[family]
    torch.manual_seed(0)
    base = {
        k: v for k, v in BASE.items() if family != "dbrx" or k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    }
    model: PreTrainedModel = getattr(transformers, architecture)(getattr(transformers, config_name)(**(base | options)))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    return model.eval()


def logits(model: nn.Module, tokens: int = 12) -> torch.Tensor:
    ids = torch.arange(5, 5 + 2 * tokens).view(2, tokens)
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def dequantize_into(reference: PreTrainedModel, ours: nn.Module) -> PreTrainedModel:
    """The reference with the values that our packed weights stand for."""
    held = dict(reference.named_parameters(remove_duplicate=False))
    for path, module in ours.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear | QuantWeight):
            values = module.dequantize()
            held[path if path in held else f"{path}.weight"].data.copy_(
                values.t() if isinstance(module, QuantLinear) and module.transposed else values
            )
    return reference


def require_exact_plan(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Bytes from the headers alone are those of the model's own plan, and those that it holds, for all that is packed."""
    report: Any = model.qlazy_report
    assert sum(report.device_bytes.values()) == report.plan.weight_bytes
    planned = qlazy.plan(folder, device_map="cpu", **options)
    kinds = ("experts", "embedding", "tied", "head", "linear")
    of_headers, of_model = (
        {kind: sum(t.nbytes for t in plan.tensors if t.kind == kind) for kind in kinds} for plan in (planned, report.plan)
    )
    assert of_headers == of_model


@pytest.mark.parametrize("original", [True, False], ids=["hub", "saved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, original, tmp_path):
    reference = build(family)
    reference.save_pretrained(tmp_path, max_shard_size="60KB", save_original_format=original)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = qlazy.load_quantized(tmp_path, device_map="cpu", dtype="float32", embedding_bits=8)
    require_exact_plan(ours, tmp_path, dtype="float32", embedding_bits=8)
    report: Any = ours.qlazy_report
    stacks = {path for path, module in ours.named_modules() if isinstance(module, QuantWeight) and module.stack.experts}
    expected = {path for path, p in reference.named_parameters() if "experts" in path and p.dim() > 1 and "bias" not in path}
    assert stacks == expected and len(stacks) >= 4
    routers = [t for t in report.plan.tensors if "router" in t.name or t.name.endswith("gate.weight")]
    assert routers and all(t.format is None for t in routers)
    low = sum(t.source_nbytes for t in report.plan.tensors if t.format is not None)
    assert low >= 0.95 * report.plan.source_bytes

    original_logits = logits(reference)
    twin = dequantize_into(reference, ours)
    # Both ways: as transformers dispatches to our grouped product, and as the model's own code calls each expert.
    assert error(logits(ours), logits(twin)) < 1e-5
    assert error(logits(ours, 1), logits(twin, 1)) < 1e-5
    if ours._can_set_experts_implementation():
        assert ours.config._experts_implementation == "qlazy"
        ours.set_experts_implementation("eager")
        assert error(logits(ours), logits(twin)) < 1e-5
    assert error(logits(ours), original_logits) < 0.5


@pytest.mark.parametrize("experts", [1, 4])
def test_stacks_that_are_stored_turned(experts, tmp_path):
    """Qwen3-VL's checkpoints have (E, K, N), its model (E, N, K): transformers tells by comparing the shapes."""
    text = BASE | {"num_experts": experts, "moe_intermediate_size": 48, "num_experts_per_tok": 1}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    reference = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    reference.set_experts_implementation("eager")
    stored = {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts." in name else tensor.clone()
        for name, tensor in reference.state_dict().items()
    }
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference.config.architectures = [type(reference).__name__]
    reference.config.save_pretrained(tmp_path)
    ours = qlazy.load_quantized(tmp_path, device_map="cpu", dtype="float32")
    stacks = {path for path, module in ours.named_modules() if isinstance(module, QuantWeight)}
    assert len(stacks) == 4
    before = logits(reference)
    assert error(logits(ours), logits(dequantize_into(reference, ours))) < 1e-5
    assert error(logits(ours), before) < 0.5


@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"format": "nf4"}, {"format": "fp4", "double_quant": False}, {"group_size": 64}]
)
def test_every_format(options, tmp_path):
    reference = build("mixtral")
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    ours = qlazy.load_quantized(tmp_path, device_map="cpu", dtype="float32", **options)
    require_exact_plan(ours, tmp_path, dtype="float32", **options)
    before = logits(reference)
    after = logits(ours)
    assert error(after, logits(dequantize_into(reference, ours))) < 1e-5
    assert 0 < error(after, before) < (0.2 if options.get("bits") == 8 else 0.6)


def test_adapters_below_experts_get_their_gradients(tmp_path):
    reference = build("mixtral")
    reference.save_pretrained(tmp_path)
    ours = qlazy.load_quantized(tmp_path, device_map="cpu", dtype="float32")
    twin = dequantize_into(reference, ours)
    grads = []
    for model in (ours, twin):
        model.requires_grad_(False)
        x = model.get_input_embeddings().weight[torch.arange(5, 17)].detach().clone().unsqueeze(0).requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert error(*grads) < 1e-4


def test_a_part_of_the_experts_may_keep_its_dtype(tmp_path):
    reference = build("mixtral")
    reference.save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": "float32", "module_bits": {"experts.down_proj": 16, "layers.0": 8}}
    ours = qlazy.load_quantized(tmp_path, device_map="cpu", **options)
    require_exact_plan(ours, tmp_path, **options)
    held = {t.name: t.format for t in ours.qlazy_report.plan.tensors if t.kind == "experts"}  # type: ignore[attr-defined]
    assert {name: fmt for name, fmt in held.items() if "layers.0" in name} == {
        f"model.layers.0.mlp.experts.{p}": Int8() for p in ("gate_up_proj", "down_proj")
    }
    assert {name: fmt for name, fmt in held.items() if "layers.1" in name} == {
        "model.layers.1.mlp.experts.gate_up_proj": Int4(),
        "model.layers.1.mlp.experts.down_proj": None,
    }
    assert error(logits(ours), logits(dequantize_into(reference, ours))) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "t5", "gpt2", "bert", "qwen2"])
def test_embeddings(checkpoint, name, bits):
    folder = checkpoint(name)
    from tests.integration.conftest import MODELS, inputs_of

    ours = qlazy.load_quantized(folder, device_map="cpu", dtype="float32", embedding_bits=bits)
    require_exact_plan(ours, folder, dtype="float32", embedding_bits=bits)
    table = ours.get_input_embeddings().weight
    assert isinstance(table, QuantWeight) and table.format.bits == bits
    reference = getattr(transformers, MODELS[name][0]).from_pretrained(folder, dtype=torch.float32).eval()
    if reference.config.get_text_config().tie_word_embeddings and reference.get_output_embeddings() is not None:
        assert ours.get_output_embeddings().weight is table, "one table embeds and is the head"
    assert type(ours.get_input_embeddings()) is type(reference.get_input_embeddings())
    twin = dequantize_into(reference, ours)
    inputs = inputs_of(name)
    with torch.no_grad():
        assert error(ours(**inputs).logits, twin(**inputs).logits) < 1e-5
    text = str(ours.qlazy_report)
    assert f"int{bits}" in text and "embedding" in text


def test_a_tied_table_is_held_once_and_follows_to_another_dtype(checkpoint):
    folder = checkpoint("llama-tied")
    ours = qlazy.load_quantized(folder, device_map="cpu", embedding_bits=8)
    plain = qlazy.load_quantized(folder, device_map="cpu")
    report, other = (model.qlazy_report.plan for model in (ours, plain))  # type: ignore[attr-defined]
    assert report.weight_bytes < other.weight_bytes
    assert other.weight_bytes - report.weight_bytes == 256 * 128 * 2 - 256 * 128 - 256 * 2
    before = ours.get_input_embeddings().weight.weight_packed
    ours.to(torch.float32)
    assert ours.get_input_embeddings().weight.weight_packed.dtype == before.dtype
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


TABLES: list[dict[str, Any]] = [{"embedding_bits": 8}, {"embedding_bits": 4}, {"embedding_bits": 8, "head_bits": 16}]


@pytest.mark.parametrize("options", TABLES, ids=str)
def test_a_pair_that_is_stored_twice_is_packed_twice(copied, rewrite, options):
    folder = copied("llama-tied")
    from tests.integration.conftest import stored

    rewrite(folder, {"lm_head.weight": stored(folder)["model.embed_tokens.weight"].clone()})
    ours = qlazy.load_quantized(folder, device_map="cpu", dtype="float32", **options)
    require_exact_plan(ours, folder, dtype="float32", **options)
    assert isinstance(ours.lm_head, QuantLinear) and isinstance(ours.model.embed_tokens.weight, QuantWeight)
    assert torch.equal(ours.lm_head.dequantize(), ours.model.embed_tokens.weight.dequantize())


def test_what_module_bits_says_stands_in_the_plan_and_in_the_config(checkpoint):
    folder = checkpoint("llama")
    options: dict[str, Any] = {"module_bits": {"down_proj": 8, "layers.1.mlp": "nf4", "lm_head": 16}}
    ours = qlazy.load_quantized(folder, device_map="cpu", **options)
    held = {t.name: (t.format, t.reason) for t in ours.qlazy_report.plan.tensors}  # type: ignore[attr-defined]
    assert held["model.layers.0.mlp.down_proj.weight"] == (Int8(), "listed in module_bits as 'down_proj'")
    assert held["model.layers.1.mlp.down_proj.weight"][0] == Codebook4()
    assert held["model.layers.0.mlp.up_proj.weight"] == (Int4(), "")
    assert held["lm_head.weight"][0] is None and held["model.embed_tokens.weight"][0] is None
    assert ours.config.quantization_config.recipe() == ours.qlazy_report.plan.recipe  # type: ignore[attr-defined]
    assert "module_bits" in str(ours.qlazy_report)


MEMORY = """
import json, sys, torch, qlazy
torch.set_num_threads(1)
qlazy.load_quantized(sys.argv[2], device_map="cpu")
model = qlazy.load_quantized(sys.argv[1], device_map="cpu")
report = model.qlazy_report
print(json.dumps([report.host_peak_bytes, report.plan.weight_bytes, report.bytes_read]))
"""


def test_peak_of_a_load_is_the_packed_bytes_and_the_ring(tmp_path, python, checkpoint):
    """Experts of 96 MiB a layer: stacked in 16 bits, as transformers' converter does it, they alone would break the promise."""
    options = {"num_local_experts": 16, "intermediate_size": 1024, "hidden_size": 1024, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**(BASE | options))
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    del model
    done = python(MEMORY, tmp_path / "large", checkpoint("mixtral"))
    peak, packed, read = json.loads(done.stdout.strip().splitlines()[-1])
    assert read > 96 << 20
    assert peak <= packed + (64 << 20) + (64 << 20)
