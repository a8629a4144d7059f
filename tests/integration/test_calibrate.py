"""Calibrated saves: better on the text that they were calibrated on, resumable to the byte, and within their memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

import qlazy
from qlazy import own_text
from qlazy.calibrating.calibration import Calibration
from qlazy.calibrating.tokens import Text
from qlazy.calibrating.walk import Walk
from qlazy.errors import CorruptCheckpoint, DoesNotFit, UnsupportedModel, UsageError
from qlazy.formats import Int8
from qlazy.planning.recipe import make_recipe
from qlazy.reading.chunks import CACHED_BYTES, MERGED_BYTES
from qlazy.saving.save import save
from qlazy.saving.saved import read_manifest, verify
from qlazy.sources.source import open_source
from tests.integration.conftest import stored

SMALL = Calibration(samples=8, sequence_length=32)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlazy.calibrating.walk.TOKENS", 64)


def text(samples: int = 8) -> Tensor:
    return torch.randint(3, 256, (samples, 32), generator=torch.Generator().manual_seed(0))


def calibrated(source: Path, folder: Path, tokens: Any = text, **options: Any) -> Any:
    written = None if tokens is None else lambda: Text(tokens=tokens())
    return save(open_source(source), make_recipe(), folder, calibration=SMALL, text=written, shard_bytes=60_000, **options)


def same(one: Path, other: Path) -> bool:
    files = {path.name for path in one.iterdir()}
    return files == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in files
    )


@torch.no_grad()
def loss(folder: Path, reference: Path) -> float:
    """KL on the calibration text."""
    model = qlazy.load_quantized(folder, device_map="cpu")
    plain = AutoModelForCausalLM.from_pretrained(reference)
    tokens = text()
    wanted, got = (m(tokens).logits.double().log_softmax(-1) for m in (plain, model))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_better_on_its_text_and_reopened_as_it_was_saved(checkpoint, tmp_path, name):
    source = checkpoint(name)
    report = calibrated(source, tmp_path / "calibrated")
    qlazy.save_quantized(source, tmp_path / "plain", max_shard_size=60_000)
    one, other = stored(tmp_path / "calibrated"), stored(tmp_path / "plain")
    assert {key: t.shape for key, t in one.items()} == {key: t.shape for key, t in other.items()}
    unlike = {key for key in one if not torch.equal(one[key], other[key])}
    assert unlike and all(".layers." in key or ".h." in key for key in unlike)
    assert loss(tmp_path / "calibrated", source) < 0.9 * loss(tmp_path / "plain", source)
    verify(tmp_path / "calibrated")
    assert report.calibrated.blocks == 2 and report.calibrated.sequences == 8 and report.calibrated.tokens == 32
    packed = sum(t.numel() for key, t in one.items() if key.endswith("weight_packed") and "head" not in key)
    assert report.calibrated.weights == 8 * packed
    assert report.calibrated.plain == ({} if name == "gpt2" else {"lm_head.weight": "in no block"})


def test_every_layout_holds_what_is_calibrated(checkpoint, tmp_path):
    options = {"calibrate": Calibration(samples=2, sequence_length=8), "max_shard_size": 60_000}
    qlazy.save_quantized(checkpoint("llama"), tmp_path / "own", head_bits=16, symmetric=True, **options)
    qlazy.save_quantized(checkpoint("llama"), tmp_path / "gptq", layout="gptq", **options)
    models = [qlazy.load_quantized(tmp_path / name, device_map="cpu") for name in ("own", "gptq")]
    tensors = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in models]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_the_manifest_and_the_folder_say_how(checkpoint, tmp_path):
    file = tmp_path / "text"
    own = Calibration(samples=2, sequence_length=8, seed=5)
    qlazy.save_quantized(checkpoint("llama"), tmp_path / "saved", calibrate=own)
    manifest = read_manifest(tmp_path / "saved")
    assert manifest is not None
    assert manifest["calibration"] == {"samples": 2, "sequence_length": 8, "text": "its own", "seed": 5, "written_in_bits": 8}
    told = json.loads((tmp_path / "saved/calibration.json").read_text())
    assert (
        torch.tensor(told["tokens"]).shape == (2, 8)
        and told["written_in_bits"] == 8
        and "calibration.json" in manifest["files"]
    )
    file.write_text("a text")
    with pytest.raises(UnsupportedModel, match="has no tokenizer"):  # the checkpoint is weights alone
        qlazy.save_quantized(
            checkpoint("llama"), tmp_path / "saved", calibrate=Calibration(file=file, sequence_length=8), force=True
        )


def test_writes_in_4_bits_where_8_do_not_fit_and_says_so(checkpoint, tmp_path, monkeypatch, caplog):
    loaded = own_text.load

    def short(source: Any, recipe: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(recipe.format, Int8):
            raise DoesNotFit("8 bits are too many.")
        return loaded(source, recipe, *rest, **options)

    monkeypatch.setattr(own_text, "load", short)
    small = Calibration(samples=2, sequence_length=8)
    qlazy.save_quantized(checkpoint("llama"), tmp_path / "saved", calibrate=small)
    assert "in 4 bits, as it does not fit in 8: 8 bits are too many." in caplog.text
    manifest = read_manifest(tmp_path / "saved")
    assert manifest is not None and manifest["calibration"]["written_in_bits"] == 4


def test_inputs_that_are_not_finite_name_the_layer(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden * torch.inf)
    with pytest.raises(CorruptCheckpoint, match=r"'model\.layers\.0\.self_attn\.q_proj': The inputs of a layer are not finite"):
        calibrated(checkpoint("llama"), tmp_path / "saved")


def test_the_same_again_is_what_is_there(checkpoint, tmp_path):
    calibrated(checkpoint("llama"), tmp_path / "saved")
    before = (tmp_path / "saved/config.json").stat().st_mtime_ns
    calibrated(checkpoint("llama"), tmp_path / "saved", tokens=None)
    assert (tmp_path / "saved/config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("block", [0, 1])
def test_cut_off_and_gone_on_with_gives_the_same_bytes(checkpoint, tmp_path, monkeypatch, block):
    source = checkpoint("llama")
    calibrated(source, tmp_path / "whole")
    walked: list[int] = []
    step = Walk.step

    def stopping(walk: Walk, *args: Any) -> None:
        if walk.next == block and not walked[1:]:
            walked.append(-1)
            raise KeyboardInterrupt
        walked.append(walk.next)
        step(walk, *args)

    monkeypatch.setattr(Walk, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, tmp_path / "saved")
    walked[:] = [0, 0]

    def again() -> Tensor:
        raise AssertionError("the text is there already")

    calibrated(source, tmp_path / "saved", again)
    assert walked[2:] == list(range(block, 2))
    assert same(tmp_path / "whole", tmp_path / "saved")


def test_goes_on_where_what_goes_into_the_next_block_is_lost(checkpoint, tmp_path, monkeypatch):
    source = checkpoint("llama")
    calibrated(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        step = Walk.step

        def stopping(walk: Walk, *args: Any) -> None:
            if walk.next == 1:
                raise KeyboardInterrupt
            step(walk, *args)

        patch.setattr(Walk, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            calibrated(source, tmp_path / "saved")
    (lost,) = (tmp_path / ".saved.qlazy-partial").glob("calibration-inputs-*")
    lost.unlink()
    calibrated(source, tmp_path / "saved")
    assert same(tmp_path / "whole", tmp_path / "saved")


def test_experts_that_no_token_comes_to_are_told(checkpoint, tmp_path, monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    route = MixtralTopKRouter.forward

    def two_of_four(router: Any, hidden: Tensor) -> Any:
        logits, weights, index = route(router, hidden)
        return logits, weights, index % 2

    monkeypatch.setattr(MixtralTopKRouter, "forward", two_of_four)
    report = calibrated(checkpoint("mixtral"), tmp_path / "saved")
    assert report.calibrated.plain["model.layers.0.mlp.experts"] == "2 of the experts: no token came"
    monkeypatch.undo()
    monkeypatch.setattr("qlazy.calibrating.experts._NEEDED", ("no_such_attribute",))
    other = calibrated(checkpoint("mixtral"), tmp_path / "other")
    reason = "MixtralExperts does not say how its experts compute"
    assert other.calibrated.plain["model.layers.1.mlp.experts"] == reason and reason in str(other)


@pytest.mark.parametrize(("name", "words"), [("t5", "no causal language model"), ("bert", "no causal language model")])
def test_other_models_are_refused_before_anything_is_written(checkpoint, tmp_path, name, words):
    with pytest.raises(UnsupportedModel, match=words):
        qlazy.save_quantized(checkpoint(name), tmp_path / "saved", calibrate=True)
    assert not list(tmp_path.glob("*saved*"))


def test_what_cannot_be_calibrated_is_refused_before_the_text_and_the_folder(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="nf4-dq is bitsandbytes' own rounding"):
        qlazy.save_quantized(checkpoint("llama"), tmp_path / "saved", format="nf4", calibrate=True)
    with pytest.raises(UsageError, match="Sequences of 257 tokens are longer than the 256 positions that Llama"):
        qlazy.save_quantized(checkpoint("llama"), tmp_path / "saved", calibrate=Calibration(sequence_length=257))
    forward = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, input_ids, **rest: forward(self, input_ids[:, :1], **rest))

    def text() -> Tensor:
        raise AssertionError("this takes minutes")

    with pytest.raises(UnsupportedModel, match="LlamaModel does more than hand on"):
        calibrated(checkpoint("llama"), tmp_path / "saved", text)
    assert not list(tmp_path.glob("*saved*"))
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        calibrated(checkpoint("llama"), tmp_path / "saved", None)
    loaded = qlazy.load_quantized(checkpoint("llama"), device_map="cpu")
    with pytest.raises(UsageError, match="is in low bits already"):
        qlazy.save_quantized(loaded, tmp_path / "saved", calibrate=True)


MEMORY = """
import json, os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the ring grows with the processors
import torch
import transformers.generation, transformers.models.llama.modeling_llama
from qlazy.calibrating.calibration import Calibration
from qlazy.calibrating.tokens import Text
from qlazy.memory import Meter
from qlazy.planning.recipe import make_recipe
from qlazy.saving.save import save
from qlazy.sources.source import open_source

torch.set_num_threads(1)
torch.nn.Linear(256, 256)(torch.randn(64, 256)) @ torch.randn(256, 256)
tokens = torch.randint(3, 1000, (2, 16))
recipe = make_recipe(modules_to_not_convert=["q_proj", "k_proj", "v_proj", "mlp"])
with Meter(interval_s=0.002) as meter:
    save(open_source(sys.argv[1]), recipe, "saved", calibration=Calibration(samples=2, sequence_length=16),
         text=lambda: Text(tokens=tokens), shard_bytes=1 << 20)
print(json.dumps(meter.peak_bytes))
"""


def test_holds_one_block_at_a_time(tmp_path, python):
    """One layer of a block is rounded, as rounding takes more time than anything else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = 512, 12
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="20MB")
    block = 2 * 7 * width * width
    rounding, ring, slack = 6 * 4 * width * width, 3 * (CACHED_BYTES + MERGED_BYTES), 8 << 20
    bound = 2 * block + rounding + ring + slack
    assert bound < 0.75 * (layers - 1) * block  # what all others would add, were they kept
    peak = json.loads(python(MEMORY, tmp_path / "model").stdout)
    assert peak < bound, f"{peak >> 20} of {bound >> 20} MiB; all blocks are {layers * block >> 20}"
