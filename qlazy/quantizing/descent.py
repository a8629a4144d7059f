"""Coordinate descent on codes and scales: what is left of the error E H E^T after rounding, taken down step by step.

Rounding with feedback knows the columns behind a column, not those that are still to come. Here all are known: each scale in
turn is put where the error is least with all else as it is, and each code likewise. No turn makes the error larger.

Planes as in `qlazy.quantizing.feedback`. The gradient H E is kept: exact inside a block of columns, and brought up to date for
all columns by one product of matrices a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlazy.quantizing.curvature import Curvature
from qlazy.quantizing.feedback import BLOCK, Grid, Rounded
from qlazy.quantizing.search import round_scale, tree_sum

SWEEPS = 2
"""How often all columns get their turn."""


def descend(weight: Tensor, rounded: Rounded, curvature: Curvature, grid: Grid, scale_dtype: torch.dtype) -> None:
    """Lowers the error of rounded rows in place. A diagonal leaves nothing to lower.

    Args:
        weight: Planes, float32 (K, rows).
        rounded: Their rounding.
        curvature: Of their inputs.
        grid: Values to choose from.
        scale_dtype: Dtype in which scales are stored.

    Memory: twice the planes.
    """
    if curvature.factor is None:
        return
    error = weight - rounded.values()
    group = len(weight) // len(rounded.scale)
    for part, hessian, _ in curvature.blocks():
        gradient = hessian @ error[part]
        for _ in range(SWEEPS):
            for stop in range(len(hessian), 0, -BLOCK):
                begin = max(stop - BLOCK, 0)
                change = torch.zeros_like(gradient[begin:stop])
                for last in range(stop, begin, -min(group, BLOCK)):
                    first = max(last - group, begin)
                    here, behind = slice(first, last), slice(last, stop)
                    slope = gradient[here]
                    if last < stop:
                        slope = torch.addmm(slope, hessian[here, behind], change[last - begin :])
                    index = (part.start + first) // group
                    steps, scale, zero = rounded.steps[part][here], rounded.scale[index], rounded.zero[index]
                    moved = change[first - begin : last - begin]
                    if group <= BLOCK:
                        slope = _move_scale(steps, scale, slope, hessian[here, here], moved, scale_dtype)
                    _move_steps(steps, scale, zero, slope, hessian[here, here], moved, grid)
                gradient.addmm_(hessian[:, begin:stop], change)


def _move_scale(
    steps: Tensor, scale: Tensor, slope: Tensor, hessian: Tensor, moved: Tensor, scale_dtype: torch.dtype
) -> Tensor:
    """Puts the scale of a group where the error is least, if that lowers it once it is rounded; the gradient afterwards."""
    bent = hessian @ steps
    along, square = tree_sum(steps * slope).clone(), tree_sum(steps * bent).clone()
    best = scale + along / square
    move = round_scale(best, square, scale_dtype).sub_(scale)
    better = (best > 0) & (square > 0) & (move * (move * square - 2.0 * along) < 0)
    move = torch.where(better, move, torch.zeros_like(move))
    scale.add_(move)
    moved.sub_(steps * move)
    return slope - bent.mul_(move)


def _move_steps(steps: Tensor, scale: Tensor, zero: Tensor, slope: Tensor, hessian: Tensor, moved: Tensor, grid: Grid) -> None:
    """Puts each column of a group in turn on the code of least error."""
    lowest, highest = grid.lowest - zero, grid.highest - zero
    changes = torch.empty_like(steps)
    inverse = scale.reciprocal()
    columns = len(steps)
    for column in range(columns - 1, -1, -1):
        behind, own = slice(column + 1, columns), float(hessian[column, column])
        wanted = torch.mm((hessian[column, behind] / own).unsqueeze(0), changes[behind]).squeeze(0)
        wanted.add_(slope[column] / own).mul_(inverse).add_(steps[column])
        wanted.round_().clamp_(lowest, highest)
        torch.sub(steps[column], wanted, out=changes[column]).mul_(scale)
        steps[column] = wanted
    moved.add_(changes)
