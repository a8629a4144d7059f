"""Perplexity and divergence of tiny random models, against the definitions written out."""

from __future__ import annotations

import errno
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import qlazy
from qlazy.errors import OutOfSpace, QlazyError, UnsupportedModel, UsageError
from qlazy.measuring.logits import RecordedLogits, record_logits
from qlazy.measuring.quality import score, summarize, table, to_json
from qlazy.measuring.windows import TEXT, Windows, cut

VOCABULARY = 101


class Tokenizer:
    """A token a character, with so many special tokens before and after a text."""

    def __init__(self, before=(), after=()):
        self.before, self.after = list(before), list(after)

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) % VOCABULARY for letter in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


def llama(seed, dtype=torch.float32, **more):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5, **more})
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def models():
    return llama(0), llama(1)


@pytest.fixture
def windows():
    return cut(Tokenizer(before=[7]), TEXT.read_text("utf-8"), 40, 200)


def test_windows_begin_as_every_text_does_and_do_not_overlap():
    text = "abcdefghij" * 20
    ids = Tokenizer()(text)["input_ids"]
    for before in ([], [7], [7, 8]):
        found = cut(Tokenizer(before=before, after=[9]), text, 40)
        assert found.prefix == len(before) and all(len(window) <= 40 for window in found.ids)
        assert [window[: len(before)].tolist() for window in found.ids] == [before] * len(found.ids)
        assert torch.cat([window[len(before) :] for window in found.ids]).tolist() == ids
        # Without a beginning, the first token of a window has nothing to be predicted from.
        assert found.tokens == len(ids) - (0 if before else len(found.ids)) == len(found.blocks)


def test_a_last_window_that_predicts_nothing_is_left_out():
    assert [len(ids) for ids in cut(Tokenizer(), "a" * 81, 40).ids] == [40, 40]
    assert [len(ids) for ids in cut(Tokenizer(before=[7]), "a" * 79, 40).ids] == [40, 40, 2]


def test_max_tokens_are_those_of_the_text():
    assert sum(len(ids) - 1 for ids in cut(Tokenizer(before=[7]), "ab" * 100, 40, 77).ids) == 77


@pytest.mark.parametrize("text", ["", "short", "a" * 33])
def test_a_text_too_short_for_an_error_is_refused(text):
    with pytest.raises(UsageError, match=rf"The text has {len(text)} tokens") as caught:
        cut(Tokenizer(), text)
    assert caught.value.hint
    assert cut(Tokenizer(), "a" * 34).tokens == 33


def test_a_window_needs_something_to_predict():
    with pytest.raises(UsageError, match="context of 3 tokens leaves nothing to predict"):
        cut(Tokenizer(before=[7, 8]), "a" * 100, 3)


def test_figures_are_those_of_the_definitions(models, windows):
    model, other = models
    nll, kl, same, delta = [], [], [], []
    for ids in windows.ids:
        with torch.no_grad():
            p, q = (m(input_ids=ids.unsqueeze(0)).logits[0, :-1].double().softmax(-1) for m in (other, model))
        for row, token in enumerate(ids[1:].tolist()):
            nll.append(-math.log(q[row, token]))
            kl.append(float((p[row] * (p[row] / q[row]).log()).sum()))
            same.append(int(p[row].argmax()) == int(q[row].argmax()))
            delta.append(float(q[row, token] - p[row, token]))
    found = summarize(score(model, windows, record_logits(other, windows)), windows, 40)
    assert (found.tokens, found.windows, found.context_length) == (200, 6, 40)
    assert math.isclose(found.perplexity.value, math.exp(sum(nll) / 200), rel_tol=1e-9)
    assert math.isclose(found.kl_mean.value, sum(kl) / 200, rel_tol=1e-9)
    assert math.isclose(found.kl_99.value, float(torch.tensor(kl, dtype=torch.float64).quantile(0.99)), rel_tol=1e-9)
    assert math.isclose(found.same_top.value, sum(same) / 200, rel_tol=1e-12) and 0 < found.same_top.value < 1
    assert math.isclose(found.delta_p_mean.value, sum(delta) / 200, rel_tol=1e-9)
    assert math.isclose(found.delta_p_rms.value, math.sqrt(sum(d * d for d in delta) / 200), rel_tol=1e-9)
    ratio = found.perplexity.value / found.reference_perplexity.value
    assert math.isclose(found.perplexity_ratio.value, ratio, rel_tol=1e-9)
    errors = (found.perplexity, found.kl_mean, found.kl_99, found.same_top, found.delta_p_mean, found.delta_p_rms)
    assert all(figure.error > 0 for figure in errors)


def test_rows_taken_a_few_at_a_time_are_the_same(models, windows, monkeypatch):
    model, other = models
    whole = score(model, windows, record_logits(other, windows))
    monkeypatch.setattr("qlazy.measuring.quality._ROWS_ELEMENTS", 3 * VOCABULARY)
    parts = score(model, windows, record_logits(other, windows))
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("nll", "reference_nll", "kl", "delta_p"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_lies_between_a_model_and_itself(dtype):
    model = llama(3, dtype)
    for reference in (model, record_logits(model, cut(Tokenizer(), TEXT.read_text("utf-8"), 64, 150))):
        found = qlazy.perplexity(model, Tokenizer(), context_length=64, max_tokens=150, reference=reference)
        exact = (found.kl_mean, found.kl_99, found.delta_p_mean, found.delta_p_rms)
        assert all((figure.value, figure.error) == (0.0, 0.0) for figure in exact)
        assert (found.same_top.value, found.same_top.error) == (1.0, 0.0)
        assert (found.perplexity_ratio.value, found.perplexity_ratio.error) == (1.0, 0.0)
        assert found.perplexity == found.reference_perplexity and found.perplexity.error > 0


def test_without_a_reference_there_is_the_perplexity_alone(models):
    found = qlazy.perplexity(models[0], Tokenizer(), "some words " * 20, context_length=50)
    assert found.kl_mean is None and found.reference_perplexity is None
    told = json.loads(json.dumps(to_json(found)))
    assert told["schema"] == 1 and told["kl_mean"] is None and told["perplexity"]["error"] > 0
    assert "KL" not in table(found) and table(found).splitlines()[0].startswith("  Perplexity")


def test_what_the_reference_holds_for_impossible_adds_nothing(models, windows):
    model, other = models
    recorded = record_logits(other, windows)
    masked = [recorded[number].clone() for number in range(len(recorded))]
    for rows in masked:
        rows[:, 50:] = -torch.inf
    kl = score(model, windows, masked).kl
    assert bool(kl.isfinite().all()) and bool((kl > 0).all())


def test_table_says_every_figure_and_how_errors_are_told(models, windows):
    model, other = models
    lines = table(summarize(score(model, windows, record_logits(other, windows)), windows, 40)).splitlines()
    assert len(lines) == 9 and all(" ± " in line for line in lines[:8])
    assert lines[-1] == "200 tokens predicted, in 6 windows of up to 40; ± one standard error, by blocks of 32 tokens."


def test_another_vocabulary_is_refused(models, windows):
    with pytest.raises(UsageError, match="reference predicts 39 times 60 tokens, the model 39 times 101"):
        score(models[0], windows, [torch.zeros(39, 60)] * 6)


def test_predictions_that_are_no_numbers_are_an_error(windows):
    broken = llama(0)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(QlazyError, match=r"200 of 200 predictions are not numbers \(nll\)"):
        score(broken, windows)


def test_a_model_without_a_causal_head_is_refused(windows):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 101}
    with pytest.raises(UnsupportedModel, match="BertForSequenceClassification does not predict the next token"):
        score(BertForSequenceClassification(BertConfig(**sizes)), windows)


def test_more_tokens_than_positions_are_refused(models):
    with pytest.raises(UsageError, match="window has 65 tokens; LlamaForCausalLM has 64 positions") as caught:
        qlazy.perplexity(models[0], Tokenizer(), "a" * 100, context_length=65)
    assert caught.value.hint == "Use --context-length 64."


def test_recorded_logits_are_the_bits_that_were_computed():
    parts = [torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16) for rows in (3, 1, 2)]
    with RecordedLogits(6) as recorded:
        for part in parts:
            recorded.append(part)
        for number in (2, 0, 1):
            assert recorded[number].dtype == torch.bfloat16 and torch.equal(recorded[number], parts[number])
        assert len(recorded) == 3


def test_a_disk_without_room_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with RecordedLogits(26) as recorded:
        with pytest.raises(OutOfSpace, match=r"logits take 1 KiB in .*; 1000 B are free there") as caught:
            recorded.append(torch.zeros(1, 10))
        assert "TMPDIR" in caught.value.hint and len(recorded) == 0


def test_a_disk_that_fills_up_meanwhile_is_an_error_of_ours(monkeypatch):
    with RecordedLogits(2) as recorded:

        def full(data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(recorded, "_file", SimpleNamespace(seek=recorded._file.seek, write=full, close=recorded.close))
        with pytest.raises(OutOfSpace, match="logits take"):
            recorded.append(torch.zeros(1, 10))
        monkeypatch.undo()


def test_nothing_is_kept_of_a_recording_that_failed(models, monkeypatch):
    closed = []
    monkeypatch.setattr(RecordedLogits, "close", lambda self: closed.append(self._file.close()))

    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_logits(models[0], Windows(ids=(torch.arange(40),) * 3, prefix=0), on_window=stop)
    assert len(closed) == 1
