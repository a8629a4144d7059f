"""The tokens of a calibration, and where its activations lie."""

from __future__ import annotations

import errno
import os

import pytest
import torch
import transformers

from qlazy.calibrating.calibration import Calibrated, Calibration
from qlazy.calibrating.spilled import spilled
from qlazy.calibrating.tokens import sample_tokens, text_tokens
from qlazy.errors import OutOfSpace, UnsupportedModel, UsageError


class Letters:
    """A tokenizer of letters, which puts a token before every text or not."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*begin, *text.encode()]}


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=list(range(60)),
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_writes_sequences_of_one_length_by_the_seed():
    model, seen = llama(), []
    state = torch.random.get_rng_state()
    one = sample_tokens(model, Calibration(samples=5, sequence_length=9), batch=2, on_tokens=seen.append)
    assert one.shape == (5, 9) and one.dtype == torch.int64 and len(one.unique()) > 10
    assert seen == sorted(seen) and 0 < seen[-1] <= 45
    assert torch.equal(one, sample_tokens(model, Calibration(samples=5, sequence_length=9), batch=2))
    assert not torch.equal(one, sample_tokens(model, Calibration(samples=5, sequence_length=9, seed=1), batch=2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_model_that_does_not_write_is_refused():
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(UnsupportedModel, match="does not predict the next token"):
        sample_tokens(transformers.BertModel(config), Calibration(), batch=1)


@pytest.mark.parametrize("bos", [None, 7])
def test_sequences_come_evenly_from_a_text(bos):
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    tokens = text_tokens(Letters(bos), text, Calibration(samples=3, sequence_length=10))
    length = 10 - (bos is not None)
    starts = [0, (100 // length) // 3 * length, 2 * (100 // length) // 3 * length]
    assert tokens.shape == (3, 10)
    for row, start in zip(tokens.tolist(), starts, strict=True):
        assert row == [*([bos] if bos is not None else []), *text.encode()[start : start + length]]
    assert len(text_tokens(Letters(bos), text, Calibration(sequence_length=50))) == 2
    with pytest.raises(UsageError, match="The text has 100 tokens, and a sequence"):
        text_tokens(Letters(bos), text, Calibration(sequence_length=200))


def test_what_is_told_decides_what_is_made(tmp_path):
    file = tmp_path / "text"
    file.write_text("one")
    one = Calibration(file=str(file)).told()
    file.write_text("two")
    told = [one, Calibration(file=file).told(), Calibration().told(), Calibration(seed=1).told(), Calibration(samples=2).told()]
    assert len({str(each) for each in told}) == 5
    assert Calibration(file=file).told() == Calibration(file=file, seed=3).told()  # nothing is drawn
    with pytest.raises(UsageError, match="cannot be read"):
        Calibration(file=tmp_path / "none").told()
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        Calibration(file=file).told()
    with pytest.raises(UsageError, match="are no text"):
        Calibration(samples=0)


def test_spilled_tensors_have_no_name_and_need_room(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensor = spilled((3, 4), torch.bfloat16)
    assert not any(tmp_path.iterdir()) and not tensor.any()
    tensor.copy_(torch.ones(3, 4))
    assert tensor.sum() == 12

    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfSpace, match="Activations take 24 B in"):
        spilled((3, 4), torch.bfloat16)
    assert not any(tmp_path.iterdir())


def test_what_was_not_calibrated_is_told():
    done = Calibrated(sequences=2, tokens=8, blocks=1, weights=1000, plain={f"layer.{i}": "no reason" for i in range(5)})
    assert str(done) == (
        "Calibrated: 1,000 weights in 1 blocks, on 2 x 8 tokens.\n"
        "Not calibrated: layer.0, layer.1, layer.2 and 2 more (no reason)."
    )
