"""Decoding through compiled code: the same tokens, one graph, and none more for another token, prompt or answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import qlazy
from qlazy import compiled
from qlazy.compiled import cache_room, compile_decoding, warm_up
from qlazy.errors import UnsupportedModel


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch) -> CompileCounterWithBackend:
    """Counts graphs, and runs them as they are: Inductor takes longer than all else here."""
    counter, compile = CompileCounterWithBackend("eager"), torch.compile

    def counted(call, dynamic=None, **kwargs):
        return compile(call, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(torch, "compile", counted)
    return counter


def answer(model, length: int, tokens: int = 8) -> list[int]:
    ids = torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(length))
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return made[0].tolist()


LENGTHS = [5, 9, 30, 6]


@pytest.mark.parametrize(
    "name, options",
    [("llama", {}), ("llama", {"format": "nf4"}), ("gpt2", {"bits": 8}), ("gemma3", {})],
    ids=["llama", "llama-nf4", "gpt2-int8", "gemma3"],
)
def test_one_graph_for_every_prompt_and_answer(name, options, checkpoint, counter):
    model = qlazy.load_quantized(checkpoint(name), device_map="cpu", max_model_len=128, **options)
    plain = [answer(model, length) for length in LENGTHS]
    compile_decoding(model)
    ids = torch.full((1, 4), 7)
    warm_up(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, model.generation_config)
    graphs = counter.frame_count
    assert graphs >= 1
    assert [answer(model, length) for length in LENGTHS] == plain
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_inductor_gives_the_same_tokens(checkpoint):
    """In bfloat16, where a fused operation that keeps float32 in between gives others."""
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", max_model_len=128)
    plain = [answer(model, length, 24) for length in LENGTHS]
    torch._dynamo.utils.counters.clear()
    compile_decoding(model)
    assert [answer(model, length, 24) for length in LENGTHS] == plain
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]


def test_on_a_gpu_the_cache_is_static_and_steps_are_compiled_by_generate(checkpoint, counter, monkeypatch):
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", max_model_len=128)
    plain = [answer(model, length) for length in LENGTHS]
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
        compile_decoding(model)
    config = model.generation_config
    assert config.cache_implementation == "static"
    assert config.compile_config.to_dict()["options"] == {"triton.cudagraphs": True, "emulate_precision_casts": True}
    config.compile_config._compile_all_devices = True
    config.max_cache_len = cache_room(38, 128)
    assert [answer(model, length) for length in LENGTHS] == plain
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
def test_options_for_gpus_are_ones_that_torch_takes():
    assert torch.compile(torch.relu, mode=None, options=compiled._GRAPHS | compiled._ROUNDING) is not None


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_model_that_continues_no_text_is_refused(name, checkpoint):
    model = qlazy.load_quantized(checkpoint(name), device_map="cpu")
    with pytest.raises(UnsupportedModel, match="does not continue text"):
        compile_decoding(model)


def test_what_cannot_be_compiled_is_said(checkpoint, monkeypatch):
    model = qlazy.load_quantized(checkpoint("llama"), device_map="cpu", max_model_len=128)

    def broken(graph, example_inputs):
        raise OSError("no compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **kwargs: compile(call, dynamic=True, backend=broken))
    compile_decoding(model)
    ids = torch.full((1, 4), 7)
    with pytest.raises(UnsupportedModel, match=r"cannot compile LlamaForCausalLM here: .*no compiler") as error:
        warm_up(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, model.generation_config)
    assert "Or leave --compile out" in error.value.hint


@pytest.mark.parametrize(
    ("tokens", "most", "room"),
    [(1, 4096, 256), (256, 4096, 256), (257, 4096, 512), (3000, 4000, 4000), (90, 128, 128), (5, 4, 5)],
)
def test_room_of_a_static_cache(tokens, most, room):
    assert cache_room(tokens, most) == room
