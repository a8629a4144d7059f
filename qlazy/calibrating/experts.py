"""Fused experts, one after the other: each by the tokens that are sent to it, its second product by what the first gives.

What the experts take in is kept in a temporary file, so that no more than one expert's curvature is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qlazy.calibrating.rounding import Seen, curvature_of, round_layer, why_less
from qlazy.calibrating.spilled import spilled
from qlazy.calibrating.stages import ROWS
from qlazy.layers.packed_stack import PackedStack

_NEEDED = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def reason_not(experts: nn.Module) -> str:
    """Why fused experts cannot be calibrated.

    Args:
        experts: The module that holds them, in 16 bits.
    Returns:
        The reason; empty where they can: those of transformers' experts interface.
    """
    known = all(hasattr(experts, name) for name in _NEEDED) and (experts.has_gate or hasattr(experts, "act_fn"))
    return "" if known else f"{type(experts).__name__} does not say how its experts compute"


def round_experts(
    experts: nn.Module,
    packed: Mapping[str, PackedStack],
    calls: Iterable[tuple[Any, ...]],
    tokens: int,
) -> tuple[int, dict[str, int]]:
    """Quantize all experts of a module, and put what they have become in the place of what they were.

    Args:
        experts: The module, in 16 bits, of transformers' experts interface.
        packed: Where its weights go, by the names of its parameters.
        calls: What it is called with, batch by batch.
        tokens: In all of these.
    Returns:
        Weights that were calibrated, and how many experts were not or less so, by the reason.
    Raises:
        NonFiniteError: a weight is NaN or infinite.

    Memory: what is in a temporary file aside, as `curvature_of` and `round_layer`, and `ROWS` tokens.
    """
    module: Any = experts
    states, chosen = _kept(calls, tokens)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weights, less = 0, Counter[str]()
    for number in range(len(getattr(experts, first))):
        rows = (chosen == number).any(1).nonzero().squeeze(1)
        one = _round(experts, packed, first, number, _parts(states, rows))
        up, bias = _matrix(experts, first, number), _bias(experts, first, number)
        inner = (_activated(module, linear(x, up, bias)) for x in _parts(states, rows))
        other = _round(experts, packed, "down_proj", number, inner)
        weights += one[0] + other[0]
        less.update({one[1] or other[1]} - {""})
    return weights, dict(less)


def _round(
    experts: nn.Module, packed: Mapping[str, PackedStack], name: str, number: int, inputs: Iterable[Tensor]
) -> tuple[int, str]:
    """Round one matrix of one expert; how many weights were calibrated, or why none."""
    if name not in packed:
        return 0, ""
    matrix, layer = _matrix(experts, name, number), packed[name].layer(number)
    curvature = curvature_of(layer.in_features, (Seen(x=x) for x in inputs))
    matrix.copy_(round_layer(layer, matrix, curvature))
    reason = why_less(layer.in_features, curvature)
    return 0 if reason else matrix.numel(), reason


def _kept(calls: Iterable[tuple[Any, ...]], tokens: int) -> tuple[Tensor, Tensor]:
    """What all tokens bring, and the experts that they go to."""
    states, chosen, done = torch.empty(0), torch.empty(0), 0
    for hidden, index, *_ in calls:
        if not done:
            states = spilled((tokens, hidden.shape[-1]), hidden.dtype)
            chosen = torch.empty((tokens, index.shape[-1]), dtype=index.dtype)
        states[done : done + len(hidden)].copy_(hidden)
        chosen[done : done + len(hidden)].copy_(index)
        done += len(hidden)
    assert done == tokens, f"experts were called with {done} of {tokens} tokens"
    return states, chosen


def _parts(states: Tensor, rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(ROWS):
        if len(part):
            yield states[part]


def _matrix(experts: nn.Module, name: str, number: int) -> Tensor:
    """(N, K) of one expert, a view."""
    matrix: Tensor = getattr(experts, name).data[number]
    return matrix.t() if experts.is_transposed else matrix


def _bias(experts: nn.Module, name: str, number: int) -> Tensor | None:
    return getattr(experts, f"{name}_bias").data[number] if experts.has_bias else None


def _activated(module: Any, y: Tensor) -> Tensor:
    made: Tensor = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return made
