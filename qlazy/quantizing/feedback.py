"""Rounding with error feedback (GPTQ, arXiv 2210.17323): what one column loses, the columns after it make up for.

The error E of a row costs E H E^T = |E L|^2 with H = L L^T, the Cholesky factor L lower triangular. Entry j of E L holds the
errors of column j and of those behind it only. So columns are rounded from the last to the first, and each is told what those
behind it have left: it is rounded not at its weight but where its entry would vanish. That is the rounding of GPTQ, without
the inverse of H.

Scale and zero of a group are found when its turn comes, from weights that hold what is left to make up for. Every candidate is
tried out: the group is rounded with it, feedback included, and the one whose entries have the least squares is taken. Scales
are rounded to their stored dtype first.

Inside, weights lie as *planes*, float32 (K, rows): a column of all rows is contiguous, and rows never mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlazy.quantizing.curvature import Curvature
from qlazy.quantizing.search import round_scale, tree_sum

BLOCK = 128
"""Columns after which the errors are handed on to all columns that are left, by one product of matrices."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which values a group can take: (code - zero) * scale."""

    lowest: int
    """Least code."""
    highest: int
    """Largest code."""
    asymmetric: bool
    """Whether the zero is any code; it is 0 otherwise."""
    factors: tuple[float, ...]
    """Scales to try, as factors on the one that spans the group."""


INT4 = Grid(lowest=0, highest=15, asymmetric=True, factors=(1.0, 0.92, 0.96, 1.06))
INT4_SYMMETRIC = Grid(lowest=-8, highest=7, asymmetric=False, factors=(1.0, 0.8, 0.88, 0.96))
INT8 = Grid(lowest=-127, highest=127, asymmetric=False, factors=(1.0,))
FITS = 1
"""How often the scale of a group is fitted to its steps, and the zeros beside tried."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Rows of a weight on their grid."""

    steps: Tensor
    """code - zero, float32 (K, rows)."""
    scale: Tensor
    """As it will be stored, float32 (G, rows)."""
    zero: Tensor
    """float32 (G, rows)."""

    def values(self) -> Tensor:
        """The weights that are stored.

        Returns:
            float32 (K, rows), new.
        """
        groups, rows = self.scale.shape
        return (self.steps.view(groups, -1, rows) * self.scale.unsqueeze(1)).view_as(self.steps)


def round_rows(weight: Tensor, curvature: Curvature, grid: Grid, group: int, scale_dtype: torch.dtype) -> Rounded:
    """Rounds rows of a weight, the last column first.

    Args:
        weight: Planes, float32 (K, rows).
        curvature: Of their inputs.
        grid: Values to choose from.
        group: Columns that share a scale.
        scale_dtype: Dtype in which scales are stored.

    Returns:
        The weights on their grid.

    Memory: four times the planes.
    """
    columns, rows = weight.shape
    rounded = Rounded(
        steps=torch.empty_like(weight),
        scale=weight.new_empty((columns // group, rows)),
        zero=weight.new_zeros((columns // group, rows)),
    )
    if group > BLOCK:
        _choose_scales(weight, curvature.diagonal, grid, group, scale_dtype, rounded)
    for part, factor in _parts(curvature, columns):
        _round_part(weight, part, factor, grid, group, scale_dtype, rounded)
    return rounded


def _parts(curvature: Curvature, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Columns that know of each other, and the factor of their H."""
    if curvature.factor is not None:
        yield from ((part, factor) for part, _, factor in curvature.blocks())
        return
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        yield part, torch.diag(curvature.hessian[part].sqrt())


def _round_part(
    weight: Tensor, part: slice, factor: Tensor, grid: Grid, group: int, scale_dtype: torch.dtype, rounded: Rounded
) -> None:
    """Rounds the columns of one block of H."""
    weight, steps = weight[part], rounded.steps[part]
    left, errors = torch.zeros_like(weight), torch.empty_like(weight)  # entries of E L from the columns behind, and E
    for stop in range(weight.shape[0], 0, -BLOCK):
        begin = max(stop - BLOCK, 0)
        for last in range(stop, begin, -min(group, BLOCK)):
            first = max(last - group, begin)
            here, behind = slice(first, last), slice(last, stop)
            own = factor[here, here]
            entries = left[here] if last == stop else torch.addmm(left[here], factor[behind, here].T, errors[behind])
            # The weights whose errors would leave nothing: what is left is put on the group's own columns.
            inverse = torch.linalg.inv(own.to(torch.float64)).to(torch.float32)
            target = torch.addmm(weight[here], inverse.T, entries)
            index = (part.start + first) // group
            scale, zero = rounded.scale[index], rounded.zero[index]
            if group > BLOCK:
                steps[here] = _try(target, own, scale.unsqueeze(0), zero.unsqueeze(0), grid)[0].squeeze(1)
            else:
                steps[here], scale[:], zero[:] = _round_group(target, own, grid, scale_dtype)
            torch.mul(steps[here], scale, out=errors[here])
            torch.sub(weight[here], errors[here], out=errors[here])
        if begin:
            left[:begin].addmm_(factor[begin:stop, :begin].T, errors[begin:stop])


def _round_group(target: Tensor, factor: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, scale and zero of a group: the best candidate, then its scale as it fits the steps best, with the zeros beside."""
    scales, zeros = _candidates(target, grid, scale_dtype)
    steps, scale, zero = _best(target, factor, scales, zeros, grid)
    for _ in range(FITS):
        fitted = _fit(target, factor, steps, scale, scale_dtype)
        scales, zeros = torch.stack([scale, fitted]), torch.stack([zero, zero])
        if grid.asymmetric:
            beside = torch.stack([zero - 1.0, zero + 1.0]).clamp_(grid.lowest, grid.highest)
            scales, zeros = torch.cat([scales, fitted.expand(2, -1)]), torch.cat([zeros, beside])
        steps, scale, zero = _best(target, factor, scales, zeros, grid)
    return steps, scale, zero


def _best(target: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, scale and zero of the candidate that loses least; of equal ones the first."""
    steps, loss = _try(target, factor, scales, zeros, grid)
    best = loss.argmin(0, keepdim=True)
    steps = steps.gather(1, best.expand(len(steps), 1, -1)).squeeze(1)
    return steps, scales.gather(0, best).squeeze(0), zeros.gather(0, best).squeeze(0)


def _try(target: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounds a group with every candidate: steps (columns, candidates, rows), and the squares of its entries summed."""
    columns, (candidates, rows) = len(target), scales.shape
    steps, errors = torch.empty((2, columns, candidates, rows), dtype=torch.float32, device=target.device)
    loss, product = torch.zeros_like(scales), torch.empty_like(scales)
    inverses, lowest, highest = scales.reciprocal(), grid.lowest - zeros, grid.highest - zeros
    for column in range(columns - 1, -1, -1):
        weight, step, behind = target[column], steps[column], errors[column + 1 :].flatten(1)
        own = float(factor[column, column])
        carried = torch.mm((factor[column + 1 :, column] / own).unsqueeze(0), behind).view_as(scales).add_(weight)
        torch.mul(carried, inverses, out=step).round_().clamp_(lowest, highest)
        torch.mul(step, scales, out=product)
        torch.sub(weight, product, out=errors[column])
        loss.add_(carried.sub_(product).mul_(own).square_())
    return steps, loss


def _fit(target: Tensor, factor: Tensor, steps: Tensor, scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale that fits the steps best, entries of E L told; the same where there is none above 0."""
    entries, moved = factor.T @ target, factor.T @ steps
    along, square = tree_sum(entries.mul_(moved)).clone(), tree_sum(moved.square_())
    fits = (along > 0) & (square > 0)
    return torch.where(fits, round_scale(along / square, square, scale_dtype), scale)


def _candidates(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as they would be stored and zeros to try, float32 (candidates, rows)."""
    factors = torch.tensor(grid.factors, device=weight.device).unsqueeze(1)
    high, low = weight.amax(0), weight.amin(0)
    if not grid.asymmetric:
        span = torch.maximum(high, low.neg_())
        scales = round_scale(span / grid.highest * factors, span, scale_dtype)
        return scales, torch.zeros_like(scales)
    # Zero has to be a code, so the range always takes in 0.
    span = high.clamp_(min=0.0) - low.clamp_(max=0.0)
    scales = round_scale(span / (grid.highest - grid.lowest) * factors, span, scale_dtype)
    zeros = 0.5 * (grid.highest + grid.lowest) - (high + low).mul_(0.5) / scales
    return scales, zeros.round_().clamp_(grid.lowest, grid.highest)


def _choose_scales(
    weight: Tensor, diagonal: Tensor, grid: Grid, group: int, scale_dtype: torch.dtype, rounded: Rounded
) -> None:
    """Scales and zeros of groups that are longer than a block: of least error if each column were rounded by itself."""
    for index, first in enumerate(range(0, len(weight), group)):
        here = weight[first : first + group]
        scales, zeros = _candidates(here, grid, scale_dtype)
        losses = []
        for scale, zero in zip(scales, zeros, strict=True):
            error = (here / scale).round_().clamp_(grid.lowest - zero, grid.highest - zero).mul_(scale).sub_(here).square_()
            losses.append(tree_sum(error.mul_(diagonal[first : first + group].unsqueeze(1))).clone())
        best = torch.stack(losses).argmin(0, keepdim=True)
        rounded.scale[index], rounded.zero[index] = scales.gather(0, best).squeeze(0), zeros.gather(0, best).squeeze(0)
