"""In which order the layers of a block run, and which take in the same: these are calibrated together, the rest after them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlazy.calibrating.blocks import Call, Enough, run_block, watching

ROWS = 1024
"""Tokens whose products are summed at a time."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers that take in the same tensor: queries, keys and values, say, or gate and up."""

    names: tuple[str, ...]
    """Their paths in the block, in the order in which they run."""


def find_stages(
    block: nn.Module, names: Sequence[str], alone: Collection[str], call: Call, hidden: Tensor
) -> tuple[list[Stage], dict[str, str]]:
    """Run a block once to see what its layers take in.

    Args:
        block: The block, with storage.
        names: Paths of layers in it, and of modules of fused experts.
        alone: Those of experts, which are stages of their own.
        call: Its arguments.
        hidden: (B, L, K), what goes in.
    Returns:
        Stages in the order in which they run; and why a layer is in none, by its path.

    Memory: what all layers of the block take in for one batch.
    """
    seen: dict[str, list[Tensor]] = {}  # kept, so that no two have the same address
    with contextlib.ExitStack() as hooks:
        for name in names:

            def see(*args: Any, _name: str = name, **kwargs: Any) -> None:
                seen.setdefault(_name, []).append(next(iter([*args, *kwargs.values()])))

            hooks.enter_context(watching(block.get_submodule(name), see))
        run_block(block, call, hidden)
    stages: dict[Any, list[str]] = {}
    left = {name: "runs several times in a block" for name, inputs in seen.items() if len(inputs) > 1}
    left |= {name: "does not run in a text" for name in names if name not in seen}
    for name, inputs in seen.items():
        if name not in left:
            x = inputs[0]
            same = (x.data_ptr(), x.shape, x.stride(), x.dtype, name if name in alone else "")
            stages.setdefault(same, []).append(name)
    return [Stage(names=tuple(members)) for members in stages.values()], left


def input_of(block: nn.Module, name: str, call: Call, hidden: Tensor) -> tuple[Any, ...] | None:
    """What a module of a block is called with; nothing that comes after it is run.

    Args:
        block: The block, with storage.
        name: The module's path in it.
        call: The block's arguments.
        hidden: (B, L, K), what goes into the block.
    Returns:
        Its arguments, those by name behind the others; None where it does not run.

    Memory: activations of one batch.
    """
    seen: list[tuple[Any, ...]] = []

    def see(*args: Any, **kwargs: Any) -> None:
        seen.append((*args, *kwargs.values()))
        raise Enough

    with watching(block.get_submodule(name), see), contextlib.suppress(Enough):
        run_block(block, call, hidden)
    return seen[0] if seen else None


def add_products(sums: Tensor, y: Tensor, x: Tensor) -> None:
    """Add y^T x of some tokens.

    Args:
        sums: float32 (B, K/B, K/B), the blocks along the diagonal.
        y: (T, K).
        x: (T, K).

    Memory: `ROWS` tokens in float32, twice where x is not y.
    """
    blocks, width = sums.shape[:2]
    for part in range(0, len(x), ROWS):
        right = x[part : part + ROWS].to(torch.float32).view(-1, blocks, width)
        left = right if y is x else y[part : part + ROWS].to(torch.float32).view(-1, blocks, width)
        sums.baddbmm_(left.permute(1, 2, 0), right.permute(1, 0, 2))
