"""Mixtures of experts as GGUF files, in one file and in parts: loaded, and held against models of the values in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

import qlazy
from qlazy.errors import UnsupportedModel
from qlazy.layers.quant_weight import QuantWeight
from qlazy.match import match_tensors
from qlazy.placeholder import build_placeholder, load_config
from qlazy.sources.source import open_source
from qlazy.tokenizer import load_tokenizer
from tests.gguf_files import FAMILIES, build, write, write_qwen35
from tests.integration.test_load import require_same_weights

KINDS = {"gate_exps": "Q8_0", "up_exps": "Q4_0", "down_exps": "Q5_1", "attn_": "F16", "token_embd": "Q8_0", "shexp": "Q4_1"}
KEPT: dict[str, Any] = {"device_map": "cpu", "dtype": "float32", "modules_to_not_convert": ["*"]}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 53).view(2, 24)).logits  # type: ignore[no-any-return]


def require_same(ours: PreTrainedModel, model: PreTrainedModel) -> None:
    """Every value is the file's, and what the model computes with them is the same: its config was told right."""
    held = ours.state_dict()
    assert held.keys() == model.state_dict().keys()
    for name, values in model.state_dict().items():
        assert torch.equal(held[name], values), name
    assert torch.allclose(logits(ours), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts(family: str, tmp_path: Path) -> None:
    model, path = build(family), tmp_path / "m.gguf"
    write(path, model, KINDS | ({"down_exps": "MXFP4", "up_exps": "MXFP4"} if family == "gpt_oss" else {}))
    ours: Any = qlazy.load_quantized(path, **KEPT)
    assert type(ours) is type(model) and not ours.qlazy_report.unexpected
    require_same(ours, model)

    low: Any = qlazy.load_quantized(path, device_map="cpu", dtype="float32")
    report = low.qlazy_report
    stacks = [p for p, module in low.named_modules() if isinstance(module, QuantWeight) and module.stack.experts]
    assert len(stacks) == 4 and {t.kind for t in report.plan.tensors if t.name in stacks} == {"experts"}
    require_same_weights(low, model)
    headers = qlazy.plan(path, device_map="cpu", dtype="float32")
    for kind in ("experts", "linear", "head", "embedding"):
        planned, held = (sum(t.nbytes for t in plan.tensors if t.kind == kind) for plan in (headers, report.plan))
        assert planned == held > 0, kind
    assert sum(report.device_bytes.values()) == report.plan.weight_bytes
    routers = [t for t in headers.tensors if "ffn_gate_inp" in t.name]
    assert len(routers) >= 2 and all(t.format is None for t in routers)


def test_experts_in_parts(tmp_path: Path) -> None:
    """Gate and up of a layer lie in different parts, and the head in another one than the metadata."""
    model = build("gpt_oss")
    write(tmp_path / "m.gguf", model, KINDS, split_max_tensors=4)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 4
    source = open_source(tmp_path)
    homes = [[source.tensors[f"blk.{n}.ffn_{part}_exps.weight"].path for part in ("gate", "up")] for n in (0, 1)]
    assert any(gate != up for gate, up in homes) and source.tensors["output.weight"].path != parts[0]
    for given in (tmp_path, parts[2]):
        require_same(qlazy.load_quantized(given, **KEPT), model)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """As files of Mixtral from before llama.cpp fused them."""
    model, path = build("mixtral"), tmp_path / "m.gguf"
    write(path, model, {"ffn_": "Q4_0"}, one_by_one=True)  # the norm before it too, a vector
    assert "blk.1.ffn_up.3.weight" in open_source(path).tensors
    require_same(qlazy.load_quantized(path, **KEPT), model)
    low: Any = qlazy.load_quantized(path, device_map="cpu")
    headers = qlazy.plan(path, device_map="cpu")
    assert headers.weight_bytes == low.qlazy_report.plan.weight_bytes


def test_k_quants_are_read_by_rows(tmp_path: Path) -> None:
    model, path = build("qwen3_moe", hidden_size=256, moe_intermediate_size=256), tmp_path / "m.gguf"
    write(path, model, {"_exps": "Q4_K", "attn_output": "Q8_0"})
    ours: Any = qlazy.load_quantized(path, **KEPT)
    require_same(ours, model)
    # No matrix is converted, so none is held as a whole.
    source = open_source(path)
    fills = match_tensors(build_placeholder(source, torch.float32), source).fills
    assert not any(fill.convert for fill in fills if len(fill.sources[0].shape) > 1)
    low: Any = qlazy.load_quantized(path, device_map="cpu", dtype="float32")
    require_same_weights(low, model)


def test_values_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """It takes experts to be as wide as Qwen3-30B-A3B's, whatever the metadata says; here they are."""
    model = build("qwen3_moe", moe_intermediate_size=768)
    write(tmp_path / "m.gguf", model, KINDS)
    theirs = Qwen3MoeForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = qlazy.load_quantized(tmp_path, **KEPT)
    require_same(ours, theirs)
    require_same(ours, model)


@pytest.mark.parametrize("experts", [0, 4])
def test_qwen35_is_what_transformers_makes_of_it(experts: int, tmp_path: Path) -> None:
    """Linear attention, whose norms, decays and heads llama.cpp changes; read by transformers' converters."""
    write_qwen35(tmp_path / "m.gguf", experts=experts)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ours: Any = qlazy.load_quantized(tmp_path, **KEPT)
    assert type(ours) is type(theirs) and not ours.qlazy_report.unexpected
    require_same(ours, theirs)
    low: Any = qlazy.load_quantized(tmp_path, device_map="cpu", dtype="float32")
    require_same_weights(low, theirs)
    headers = qlazy.plan(tmp_path, device_map="cpu", dtype="float32")
    for kind in ("experts", "head", "embedding"):
        planned, held = (sum(t.nbytes for t in plan.tensors if t.kind == kind) for plan in (headers, low.qlazy_report.plan))
        assert planned == held and (kind != "experts" or (held > 0) == (experts > 0)), kind


def test_positions_are_scaled_as_the_metadata_says(tmp_path: Path) -> None:
    model = build("gpt_oss")
    write(tmp_path / "m.gguf", model, {})
    rope = load_config(open_source(tmp_path)).rope_parameters
    assert rope == {k: v for k, v in model.config.rope_parameters.items() if k not in ("beta_fast", "beta_slow")}
    assert open_source(tmp_path).config["layer_types"] == model.config.layer_types


def test_experts_of_other_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, build("qwen3_moe"), {})
    path.write_bytes(path.read_bytes().replace(b"qwen3moe", b"grovemoe"))
    for call in (qlazy.plan, qlazy.load_quantized):
        with pytest.raises(UnsupportedModel, match=r"m\.gguf: 'blk\.0\.ffn_.*_exps\.weight' of architecture 'grovemoe': exper"):
            call(path, device_map="cpu")


def write_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


def test_a_tokenizer_that_transformers_cannot_read_may_lie_beside(tmp_path: Path) -> None:
    """It fails over the metadata of gpt-oss."""
    write(tmp_path / "m.gguf", build("gpt_oss"), {})
    source = open_source(tmp_path)
    with pytest.raises(UnsupportedModel, match="no tokenizer that transformers can read") as caught:
        load_tokenizer(source, without="go without")
    assert caught.value.hint == "Copy the tokenizer's files beside the weights, or go without."
    write_tokenizer(tmp_path)
    assert load_tokenizer(source, without="")("b").input_ids == [1]


def test_what_is_saved_is_what_was_loaded(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", build("qwen3_moe", moe_intermediate_size=64), KINDS, split_max_tensors=10)
    write_tokenizer(tmp_path)
    loaded = qlazy.load_quantized(tmp_path, device_map="cpu", dtype="float32")
    qlazy.save_quantized(tmp_path, tmp_path / "saved", dtype="float32")
    again = qlazy.load_quantized(tmp_path / "saved", device_map="cpu", dtype="float32")
    assert type(again) is type(loaded) and torch.equal(logits(again), logits(loaded))
    assert load_tokenizer(open_source(tmp_path / "saved"), without="")("b").input_ids == [1]
