"""Loads and saves that have a target: its formats are chosen by what they cost the stored weights."""

from __future__ import annotations

import itertools
import math

import huggingface_hub
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlazy
from qlazy.calibrating.calibration import Calibration
from qlazy.calibrating.tokens import Text
from qlazy.errors import DoesNotFit, UsageError
from qlazy.formats import Int4, Int8
from qlazy.load import load
from qlazy.planning.budget import UNLIMITED
from qlazy.planning.recipe import make_recipe
from qlazy.quantizing.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from qlazy.saving.save import save
from qlazy.sources.source import open_source
from tests.hub_server import point_to, serve_hub
from tests.integration.conftest import inputs_of, stored


def error_of(weight: Tensor, fmt: Int4 | Int8) -> float:
    """Squared error over squared weights."""
    weight = weight.float()
    if isinstance(fmt, Int4):
        packed = quantize_int4(weight, group_size=fmt.group_size, symmetric=fmt.symmetric, scale_dtype=torch.bfloat16)
        values = dequantize_int4(*packed, torch.float32)
    else:
        values = dequantize_int8(*quantize_int8(weight, group_size=-1, scale_dtype=torch.bfloat16), torch.float32)
    return float((values - weight).square().sum() / weight.square().sum())


def put_far_out(rows: Tensor) -> None:
    """One weight of each row, in place; its squares stay what they are."""
    before = rows.float().square().sum()
    rows[:, 0] = 10 * rows.float().std()
    rows.mul_((before / rows.float().square().sum()).sqrt().to(rows.dtype))


def assert_halves_differ(weight: Tensor, fmt: Int4 | Int8) -> None:
    """So much that 512 rows from one place tell another error than all."""
    halves = [error_of(part, fmt) for part in (weight[:512], weight[-512:])]
    assert all(abs(error / error_of(weight, fmt) - 1) > 0.1 for error in halves)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_a_load_meets_its_target_by_errors_that_are_those_of_the_stored_weights(checkpoint, name):
    model = qlazy.load_quantized(checkpoint(name), device_map="cpu", target_bpw=5)
    plan = model.qlazy_report.plan
    assert 4.8 < plan.bits_per_weight() <= 5
    chosen = {tensor.name: tensor for tensor in plan.tensors if tensor.format is not None}
    assert {tensor.format.bits for tensor in chosen.values()} == {4, 8}
    errors = plan.recipe.target.errors
    assert set(errors) == {name for name, _ in plan.recipe.chosen}
    weights = stored(checkpoint(name))
    looked_at = 0
    for key, weight in weights.items():
        if key in errors:
            values = weight.t() if name == "gpt2" else weight
            assert errors[key] == pytest.approx({fmt: error_of(values, fmt) for fmt in errors[key]}, rel=1e-5)
            looked_at += 1
    assert looked_at == sum(len(chosen[key].shape) == 2 for key in errors)


def test_an_eighth_of_a_large_matrix_tells_as_much_as_all_of_it(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    put_far_out(model.model.layers[0].mlp.up_proj.weight.data[2048:])
    model.save_pretrained(tmp_path)
    plan = qlazy.load_quantized(tmp_path, device_map="cpu", target_bpw=5).qlazy_report.plan
    found = plan.recipe.target.errors["model.layers.0.mlp.up_proj.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    for fmt, error in found.items():
        assert_halves_differ(weight, fmt)
        assert error == pytest.approx(error_of(weight, fmt), rel=0.05)


@pytest.mark.parametrize("loud", ["first", "last"])
def test_rows_of_a_turned_matrix_are_taken_from_all_of_it(tmp_path, loud):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_inner=2048, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    weight = model.transformer.h[0].mlp.c_fc.weight.detach()  # (64, 2048): columns are the rows that share scales
    half = weight[:, :1024] if loud == "first" else weight[:, 1024:]
    put_far_out(half.t())
    model.save_pretrained(tmp_path)
    errors = qlazy.load_quantized(tmp_path, device_map="cpu", target_bpw=5).qlazy_report.plan.recipe.target.errors
    found = errors["transformer.h.0.mlp.c_fc.weight"]
    assert found
    for fmt, error in found.items():
        assert_halves_differ(weight.t(), fmt)
        assert error == pytest.approx(error_of(weight.t(), fmt), rel=0.05)


def test_zeros_cost_nothing_in_any_format(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path)
    plan = qlazy.load_quantized(tmp_path, device_map="cpu", target_bpw=5).qlazy_report.plan
    errors = plan.recipe.target.errors["model.layers.0.mlp.down_proj.weight"]
    assert len(errors) == 4 and set(errors.values()) == {0.0}
    formats = {tensor.name: tensor.format for tensor in plan.tensors}
    assert formats["model.layers.0.mlp.down_proj.weight"] == Int4(group_size=128)


def test_a_save_for_a_target_that_is_too_small_begins_no_folder(checkpoint, tmp_path):
    with pytest.raises(DoesNotFit, match="more than the 64 KiB of the target"):
        qlazy.save_quantized(checkpoint("llama"), tmp_path / "saved", target_size="64KiB")
    assert not list(tmp_path.iterdir())


def test_what_headers_tell_is_refused_before_a_download(checkpoint, tmp_path, monkeypatch):
    huggingface_hub.close_session()
    with serve_hub() as hub:
        hub.add("org/tiny", checkpoint("llama"))
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        with pytest.raises(DoesNotFit, match="by their names"):
            qlazy.load_quantized("org/tiny", device_map="cpu", target_bpw=4.01)
        with pytest.raises(DoesNotFit, match="cpu is short"):
            qlazy.load_quantized("org/tiny", max_memory={"cpu": "1MiB"}, target_bpw=5)
        with pytest.raises(DoesNotFit, match="by their names"):
            qlazy.save_quantized("org/tiny", tmp_path / "saved", target_size="64KiB")
        with pytest.raises(UsageError, match="no model dtype"):
            qlazy.save_quantized("org/tiny", tmp_path / "saved", dtype="fp16")
        assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "saved").exists()
        model = qlazy.load_quantized("org/tiny", device_map="cpu", target_bpw=5)
    huggingface_hub.close_session()
    here = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", target_bpw=5)
    assert model.qlazy_report.plan.recipe == here.qlazy_report.plan.recipe


def test_measuring_tells_how_far_it_is(checkpoint):
    told = []
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", target_bpw=5, on_progress=told.append)
    assert list(dict.fromkeys(progress.stage for progress in told)) == ["measure", "read"]
    last = [progress for progress in told if progress.stage == "measure"][-1]
    assert 0 < last.done_bytes == last.total_bytes <= model.qlazy_report.bytes_read


def test_what_was_saved_for_a_target_is_what_was_loaded_for_it(checkpoint, tmp_path):
    source = checkpoint("llama")
    nbytes = int(0.97 * qlazy.plan(source, device_map="cpu").weight_bytes)
    loaded = qlazy.load_quantized(source, device_map="cpu", target_size=nbytes)
    plan = loaded.qlazy_report.plan
    assert sum(loaded.qlazy_report.device_bytes.values()) == plan.weight_bytes
    assert 0.99 * nbytes < plan.weight_bytes <= nbytes
    qlazy.save_quantized(source, tmp_path / "saved", target_size=nbytes)
    reopened = qlazy.load_quantized(tmp_path / "saved", device_map="cpu")
    formats = {tensor.name: tensor.format for tensor in plan.tensors}
    assert formats == {tensor.name: tensor.format for tensor in reopened.qlazy_report.plan.tensors}
    assert len({fmt for fmt in formats.values() if fmt is not None}) > 2
    inputs = inputs_of("llama")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, reopened(**inputs).logits)
    groups = reopened.config.quantization_config
    assert groups is not None
    assert math.isclose(plan.bits_per_weight(), reopened.qlazy_report.plan.bits_per_weight())


def test_a_calibrated_save_for_a_target_calibrates_in_each_of_its_formats(checkpoint, tmp_path):
    source, recipe = open_source(checkpoint("llama")), make_recipe(target_bpw=4.8)
    tokens = torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    small = Calibration(samples=8, sequence_length=32)
    report = save(source, recipe, tmp_path / "calibrated", calibration=small, text=lambda: Text(tokens=tokens))
    save(source, recipe, tmp_path / "plain")
    assert report.calibrated is not None and report.calibrated.plain == {"lm_head.weight": "in no block"}
    aimed = load(source, recipe, UNLIMITED).qlazy_report.plan
    wanted = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    saved = {name: qlazy.load_quantized(tmp_path / name, device_map="cpu") for name in ("calibrated", "plain")}
    chosen = {tensor.name: tensor.format for tensor in aimed.tensors}
    for model in saved.values():
        assert {tensor.name: tensor.format for tensor in model.qlazy_report.plan.tensors} == chosen
    layers = {name.removesuffix(".weight"): fmt for name, fmt in chosen.items() if fmt is not None and ".layers." in name}
    assert set(layers.values()) == {Int4(group_size=128), Int4(group_size=64), Int4(group_size=32), Int8()}

    took_in: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}
    for name in layers:
        ours, theirs = saved["calibrated"].get_submodule(name), wanted.get_submodule(name)
        ours.register_forward_hook(lambda _, args, made, name=name: took_in.update({name: args[0]}))
        theirs.register_forward_hook(lambda _, args, made, name=name: gave.update({name: made.float()}))
    with torch.no_grad():
        logits = wanted(tokens).logits.double().log_softmax(-1)
        kl, off = {}, dict.fromkeys(itertools.product(saved, set(layers.values())), 0.0)
        for how, model in saved.items():
            kl[how] = float((logits.exp() * (logits - model(tokens).logits.double().log_softmax(-1))).sum(-1).mean())
        for (how, model), (name, fmt) in itertools.product(saved.items(), layers.items()):
            made = model.get_submodule(name)(took_in[name]).float()
            off[how, fmt] += float((made - gave[name]).square().sum() / gave[name].square().sum())
    assert kl["calibrated"] < 0.3 * kl["plain"]
    # By what each layer takes in, its output is nearer to what it should be than that of the same layer without calibration.
    for fmt in set(layers.values()):
        assert off["calibrated", fmt] < 0.7 * off["plain", fmt], fmt
