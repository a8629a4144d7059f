"""In which order the layers of a block run, and which take in the same: these are calibrated together, the rest after them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
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


def inputs_of(
    block: nn.Module, name: str, call: Call, hidden: Tensor, batch: int
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """What a module of a block is called with, batch by batch; nothing that comes after it is run.

    Args:
        block: The block, with storage.
        name: The module's path in it.
        call: The block's arguments.
        hidden: (S, L, K), what goes into the block.
        batch: Sequences at a time.
    Yields:
        Arguments by position and by name.

    Memory: activations of one batch.
    """
    module = block.get_submodule(name)
    for part in hidden.split(batch):
        seen: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

        def see(*args: Any, _seen: Any = seen, **kwargs: Any) -> None:
            _seen.append((args, kwargs))
            raise Enough

        with watching(module, see), contextlib.suppress(Enough):
            run_block(block, call, part)
        yield from seen


def add_products(hessian: Tensor, x: Tensor) -> int:
    """Add x^T x of some tokens.

    Args:
        hessian: float32 (B, K/B, K/B), the blocks along the diagonal.
        x: (..., K).
    Returns:
        Tokens.

    Memory: `ROWS` tokens in float32.
    """
    blocks, width = hessian.shape[:2]
    tokens = x.reshape(-1, blocks * width)
    for rows in tokens.split(ROWS):
        columns = rows.to(torch.float32).view(-1, blocks, width)
        hessian.baddbmm_(columns.permute(1, 2, 0), columns.permute(1, 0, 2))
    return len(tokens)
