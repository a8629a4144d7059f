"""What the matrices of fused experts are called in a checkpoint, where each expert has tensors of its own.

transformers' converters that split a fused parameter are applied to the numbers of its rows: what comes out under each name
tells which rows of which expert it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlazy.errors import UnsupportedModel
from qlazy.layers.stacks import Stack


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """Rows of one expert's matrix."""

    name: str
    """The fused parameter in the model."""
    expert: int
    """Which matrix of it."""
    start: int
    """First row, of those that are multiplied: out_features."""
    stop: int
    """One past the last."""


def expert_names(model: PreTrainedModel, stacks: Mapping[str, Stack]) -> dict[str, ExpertRows]:
    """Name every expert's matrices as the checkpoints of a model do.

    Args:
        model: A placeholder or a loaded model.
        stacks: Fused parameters by name.
    Returns:
        By key, each ending in `.weight`, in the order of the rows.
    Raises:
        UnsupportedModel: checkpoints hold them fused too, or in an order of rows that no matrix has.

    Memory: eight bytes for each row.
    """
    numbers: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    base = 0
    for name, stack in stacks.items():
        count = stack.count * stack.rows
        rows = torch.arange(base, base + count)
        numbers[name] = rows.view(stack.count, 1, -1) if stack.transposed else rows.view(stack.count, -1, 1)
        first[name] = base
        base += count
    try:
        reverted: Mapping[str, Tensor] = revert_weight_conversion(model, dict(numbers))
    except Exception:  # a converter that looks at more than rows
        reverted = {}
    found: dict[str, ExpertRows] = {}
    covered = dict.fromkeys(stacks, 0)
    for key, rows in reverted.items():
        told = _rows_of(rows, stacks, first)
        if told is not None:
            found[key if key.endswith(".weight") else f"{key}.weight"] = told
            covered[told.name] += told.stop - told.start
    named: dict[str, ExpertRows] = {}
    for name, stack in stacks.items():
        if covered[name] == stack.count * stack.rows:
            own = [item for item in found.items() if item[1].name == name]
            named |= dict(sorted(own, key=lambda item: (item[1].expert, item[1].start)))
        else:
            raise UnsupportedModel(
                f"Checkpoints of {type(model).__name__} hold all experts of {name!r} in one tensor, for which no layout has "
                "a name in low bits.",
                hint="Save with --modules-to-not-convert experts, which keeps them in 16 bits.",
            )
    return named


def _rows_of(rows: Tensor, stacks: Mapping[str, Stack], first: Mapping[str, int]) -> ExpertRows | None:
    """Which rows these are, where they are neighbours in one matrix."""
    flat = rows.flatten()
    start, count = int(flat[0]), flat.numel()
    if not torch.equal(flat, torch.arange(start, start + count)):
        return None
    name = next(name for name in reversed(list(first)) if first[name] <= start)
    expert, row = divmod(start - first[name], stacks[name].rows)
    if row + count > stacks[name].rows:
        return None
    return ExpertRows(name=name, expert=expert, start=row, stop=row + count)
