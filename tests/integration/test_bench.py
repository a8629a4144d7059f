"""What a benchmark runs: so many passes of so many tokens, and nothing ends them early."""

from __future__ import annotations

import pytest
import torch

import qlazy
from qlazy.bench import measure
from qlazy.errors import UnsupportedModel, UsageError
from tests.integration.conftest import MODELS, stored

VOCABULARY = MODELS["llama"][2]["vocab_size"]


@pytest.fixture
def model(checkpoint):
    return qlazy.load_quantized(checkpoint("llama"), device_map="cpu")


def test_tests_run_once_to_warm_up_and_then_on_the_clock(model):
    # Whatever comes out would end an answer, and the model's own settings would sample.
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    passes: list[tuple[int, int, int]] = []

    def seen(module, args, kwargs, output):
        held = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") is not None else 0
        passes.append((kwargs["input_ids"].shape[-1], held, output.logits.shape[1]))

    model.register_forward_hook(seen, with_kwargs=True)
    announced = []
    found = measure(
        model, prompt_tokens=[7, 20], gen_tokens=[5], repetitions=2, on_test=lambda t: announced.append((t, len(passes)))
    )

    prompts = [tokens for tokens, *_ in passes[:6]]
    assert prompts == [7] * 3 + [20] * 3
    # Only the last token's logits are computed, as while generating.
    assert {logits for *_, logits in passes} == {1}
    # Each generated token is one pass over the one before it, with all earlier ones in the cache.
    assert [(tokens, held) for tokens, held, _ in passes[6:]] == [(1, held) for held in (1, 2, 3, 4, 5)] * 3
    assert announced == [("pp7", 0), ("pp20", 3), ("tg5", 6)]

    assert [(timing.test, timing.tokens, len(timing.seconds)) for timing in found.timings] == [
        ("pp7", 7, 2),
        ("pp20", 20, 2),
        ("tg5", 5, 2),
    ]
    assert all(timing.tokens_per_s > 0 for timing in found.timings)


def test_a_benchmark_says_what_was_loaded(model, checkpoint):
    report = model.qlazy_report
    found = measure(model, prompt_tokens=[4], gen_tokens=[], repetitions=1)
    assert (found.model, found.device, found.threads) == (report.plan.model_id, "cpu", torch.get_num_threads())
    assert found.format == report.plan.recipe.format.name
    assert found.weight_bytes == sum(report.device_bytes.values())
    assert found.load_seconds == report.seconds["total"] and found.load_peak_bytes == report.host_peak_bytes
    assert found.parameters == sum(tensor.numel() for tensor in stored(checkpoint("llama")).values())


def test_memory_while_running_is_that_of_the_process(model):
    def peak():
        return measure(model, prompt_tokens=[4], gen_tokens=[], repetitions=1).run_peak_bytes

    before = peak()
    ballast = torch.ones(64 << 20, dtype=torch.uint8)
    assert 0.8 * ballast.nbytes < peak() - before < 1.2 * ballast.nbytes


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_what_continues_no_text_is_refused(checkpoint, name):
    model = qlazy.load_quantized(checkpoint(name), device_map="cpu")
    with pytest.raises(UnsupportedModel, match="does not continue text"):
        measure(model)


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(UsageError, match="needs 257 positions; LlamaForCausalLM has 256") as caught:
        measure(model, prompt_tokens=[8], gen_tokens=[257])
    assert caught.value.hint
