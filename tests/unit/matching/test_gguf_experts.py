"""Experts of GGUF files: every fill together gives what the model holds, whatever the sizes; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.match import match_tensors
from qlazy.matching.fill import Fill
from qlazy.matching.gguf_experts import expert_fills
from qlazy.sources.source import Source, TensorInfo

SMALL: dict[str, Any] = {
    "vocab_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def qwen(experts: int, width: int, hidden: int) -> PreTrainedModel:
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, num_experts=experts, moe_intermediate_size=width, hidden_size=hidden)
        )


def gpt_oss(experts: int, width: int, hidden: int) -> PreTrainedModel:
    with torch.device("meta"):
        return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=experts, intermediate_size=width, hidden_size=hidden))


def source_of(shapes: dict[str, tuple[int, ...]], model_type: str = "qwen3moe") -> Source:
    tensors = {
        name: TensorInfo(name=name, shape=shape, dtype="float32", path=Path("m.gguf"), offset=0, nbytes=0)
        for name, shape in shapes.items()
    }
    return Source(
        model_id="m.gguf",
        resolved="/m.gguf",
        revision=None,
        kind="gguf",
        folder=None,
        gguf_file="m.gguf",
        config={"model_type": model_type},
        tensors=tensors,
    )


def filled(fills: list[Fill], stored: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What placing every fill gives; rows that none fills stay NaN."""
    made = {target: torch.full(state[target].shape, torch.nan) for fill in fills for target in fill.targets}
    for fill in fills:
        read = []
        for info, (start, stop) in zip(fill.sources, fill.all_spans, strict=True):
            values = stored[info.name]
            whole = stop - start == values.numel() // values.shape[-1]
            read.append(values if whole or values.dim() < 2 else values.reshape(-1, values.shape[-1])[start:stop])
        values_of = fill.convert(read) if fill.convert else {fill.targets[0]: read[0]}
        for target, values in values_of.items():
            rows = made[target].view(-1, made[target].shape[-1])
            values = values.reshape(-1, values.shape[-1])
            assert rows[fill.target_row : fill.target_row + len(values)].isnan().all(), "filled twice"
            rows[fill.target_row : fill.target_row + len(values)] = values
    return made


SIZES = {"experts": st.integers(1, 5), "width": st.sampled_from([8, 48, 64, 96, 128]), "hidden": st.sampled_from([16, 64])}


@settings(max_examples=20, deadline=None)
@given(**SIZES, form=st.sampled_from(["fused", "gate and up fused", "one by one"]))
def test_rows_of_gate_up_and_down_find_their_place(experts: int, width: int, hidden: int, form: str) -> None:
    model = qwen(experts, width, hidden)
    state = model.state_dict()
    gate, up, down = (
        torch.randn(experts, width, hidden),
        torch.randn(experts, width, hidden),
        torch.randn(experts, hidden, width),
    )
    stored = {"gate": gate, "up": up, "down": down}
    if form == "gate and up fused":
        stored = {"gate_up": torch.cat((gate, up), dim=1), "down": down}
    if form == "one by one":
        named = {f"blk.0.ffn_{part}.{e}.weight": held[e] for part, held in stored.items() for e in range(experts)}
    else:
        named = {f"blk.0.ffn_{part}_exps.weight": held for part, held in stored.items()}
    fills = expert_fills(model, source_of({name: tuple(held.shape) for name, held in named.items()}), state)
    made = filled(fills, named, state)
    path = "model.layers.0.mlp.experts"
    assert torch.equal(made[f"{path}.gate_up_proj"], torch.cat((gate, up), dim=1))
    assert torch.equal(made[f"{path}.down_proj"], down)
    # Rows go straight to their place but where an up begins within a block of rows that a layer takes together.
    apart = form != "gate and up fused" and width % 64 != 0
    assert {fill.targets[0] for fill in fills if fill.convert} == ({f"{path}.gate_up_proj"} if apart else set())
    assert all(
        len(fill.sources) <= 2 and fill.all_spans[0][1] - fill.all_spans[0][0] <= max(2 * width, hidden) for fill in fills
    )


@settings(max_examples=10, deadline=None)
@given(**SIZES)
def test_gpt_oss_alternates_gate_and_up_and_turns_them(experts: int, width: int, hidden: int) -> None:
    model = gpt_oss(experts, width, hidden)
    state = model.state_dict()
    stored = {
        "gate_exps.weight": torch.randn(experts, width, hidden),
        "up_exps.weight": torch.randn(experts, width, hidden),
        "down_exps.weight": torch.randn(experts, hidden, width),
        "gate_exps.bias": torch.randn(experts, width),
        "up_exps.bias": torch.randn(experts, width),
        "down_exps.bias": torch.randn(experts, hidden),
    }
    named = {f"blk.0.ffn_{name}": held for name, held in stored.items()}
    fills = expert_fills(model, source_of({name: tuple(held.shape) for name, held in named.items()}, "gpt-oss"), state)
    made = filled(fills, named, state)
    path = "model.layers.0.mlp.experts"
    for part, start in (("gate", 0), ("up", 1)):
        assert torch.equal(made[f"{path}.gate_up_proj"][..., start::2], stored[f"{part}_exps.weight"].transpose(1, 2))
        assert torch.equal(made[f"{path}.gate_up_proj_bias"][..., start::2], stored[f"{part}_exps.bias"])
    assert torch.equal(made[f"{path}.down_proj"], stored["down_exps.weight"].transpose(1, 2))
    assert torch.equal(made[f"{path}.down_proj_bias"], stored["down_exps.bias"])
    # One expert at a time.
    weights = [fill for fill in fills if not fill.targets[0].endswith("_bias")]
    assert len(weights) == 2 * experts


GATE, UP, DOWN = (f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({GATE: (2, 64, 16)}, IncompleteCheckpoint, "its like are 1, but 0 of 'up'"),
        ({UP: (2, 64, 16)}, IncompleteCheckpoint, "its like are 1, but 0 of 'gate'"),
        ({GATE: (2, 64, 16), UP: (2, 32, 16)}, CorruptCheckpoint, r"of shape \[2, 96, 16\], but the model has \[2, 128, 16\]"),
        ({GATE: (2, 64, 16), UP: (3, 64, 16)}, CorruptCheckpoint, "do not fit each other"),
        ({DOWN: (2, 16, 32)}, CorruptCheckpoint, r"of shape \[2, 16, 32\], but the model has \[2, 16, 64\]"),
        ({DOWN: (16, 64)}, CorruptCheckpoint, "of shape"),
        ({"blk.0.ffn_down.0.weight": (16, 64)}, CorruptCheckpoint, "of shape"),
        ({"blk.7.ffn_down_exps.weight": (2, 16, 64)}, UnsupportedModel, "has no place in Qwen3MoeForCausalLM"),
        ({"blk.0.ffn_down_exps.bias": (2, 16)}, UnsupportedModel, "has no place in Qwen3MoeForCausalLM"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        match_tensors(qwen(2, 64, 16), source_of(shapes))
    assert next(iter(shapes)) in str(caught.value) and "m.gguf" in str(caught.value)


def test_experts_for_a_model_without_any_are_refused() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**SMALL, hidden_size=16, intermediate_size=64))
    with pytest.raises(UnsupportedModel, match="has no place in LlamaForCausalLM"):
        match_tensors(llama, source_of({DOWN: (2, 16, 64)}, "llama"))
