"""Fills of fused experts, one expert at a time, from tensors that hold all of them."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor
from transformers import PreTrainedModel

from qlazy.layers.stacks import Stack, stack_of
from qlazy.matching.fill import Convert, Fill, row_count


def matrix_rows(model: PreTrainedModel, target: str, placeholder: Tensor) -> tuple[int, bool]:
    """How rows of a tensor of the model may come.

    Args:
        model: A placeholder.
        target: The tensor's name in it.
        placeholder: The tensor.
    Returns:
        Rows of one of its matrices, all where it is no stack of experts; and whether they must come together, as those of a
        transposed matrix.
    """
    stack = _stack(model, target)
    return (stack.held_rows, stack.transposed) if stack else (max(1, row_count(tuple(placeholder.shape))), False)


def by_expert(model: PreTrainedModel, fill: Fill) -> list[Fill]:
    """Cut a straight fill of fused experts into one for each.

    Args:
        model: A placeholder.
        fill: Of one stored tensor.
    Returns:
        The fill itself where it is no stack of experts.
    """
    (target,) = fill.targets
    stack = _stack(model, target)
    if stack is None or fill.convert is not None:
        return [fill]
    rows = stack.held_rows
    convert = functools.partial(_as_it_is, target) if stack.transposed else None
    return [
        dataclasses.replace(fill, convert=convert, spans=((start, start + rows),), target_row=start)
        for start in range(0, stack.count * rows, rows)
    ]


def expert_fills(fill: Fill, state: dict[str, Tensor]) -> list[Fill]:
    """Cut a fill whose conversion does not mix experts into one for each.

    Args:
        fill: Of one stored tensor (E, ...), with `convert`.
        state: The model's tensors by name.
    Returns:
        The fill itself where the tensors are not stacks of equally many, and its targets of equal shapes.
    """
    (info,) = fill.sources
    convert, experts = fill.convert, info.shape[0]
    shapes = [tuple(state[target].shape) for target in fill.targets]
    if convert is None or any(len(shape) != 3 or shape[0] != experts for shape in (info.shape, *shapes)) or len({*shapes}) > 1:
        return [fill]
    stored, rows = info.shape[1], shapes[0][1]
    return [
        dataclasses.replace(
            fill,
            convert=functools.partial(_one_expert, convert),
            spans=((expert * stored, (expert + 1) * stored),),
            target_row=expert * rows,
        )
        for expert in range(experts)
    ]


def _stack(model: PreTrainedModel, target: str) -> Stack | None:
    path, _, leaf = target.rpartition(".")
    return stack_of(model.get_submodule(path), leaf)


def _as_it_is(target: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {target: tensors[0]}


def _one_expert(convert: Convert, tensors: list[Tensor]) -> dict[str, Tensor]:
    """A conversion of all experts, of one: a stack of one, as which it comes where there is no other."""
    (matrix,) = tensors
    return {name: values[0] for name, values in convert([matrix.reshape(1, *matrix.shape[-2:])]).items()}
