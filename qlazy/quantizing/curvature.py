"""What the inputs of a layer say about its weights: how much an error in one column costs, and which errors cancel.

A layer that gets inputs x answers an error E in its weights with an error E x. Over many inputs its square is the trace of
E H E^T with H = mean of x x^T, for each row of the weight by itself. `Curvature` holds H and its Cholesky factor, made once for
all weights that read the same inputs (query, key and value; gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlazy.errors import UsageError

LARGEST_BLOCK = 8192
"""Columns up to which H is kept whole (256 MiB, and its factor again as much); twice as many where it cannot be cut well."""

SMALLEST_BLOCK = 2048
"""Columns that a block should have: what it does not know of the others is lost."""

ALIGNED = 128
"""Blocks of H begin at multiples of this, so that no group lies in two."""

DAMPING = 0.1
"""What is added to the diagonal of H, as a share of its mean: inputs that were not seen are expected to that extent.

Ten times what is usual. Judged by other text than H comes from, it is better where tokens are few for the columns (12,000 for
1536: the error falls by 4 %), and costs nothing to speak of elsewhere."""

CORRECTED = 0.5
"""Share of the drift that weights make up for: all of it would fit the noise of the calibration text too."""


def curvature_blocks(columns: int) -> int:
    """How many equal blocks H is cut into along its diagonal: one up to 8192 columns, as few as will do beyond.

    Args:
        columns: Inputs of the layer.

    Returns:
        The number of blocks, of 16384 columns at most; 0 where so many columns cannot be cut evenly at multiples of 128.
    """
    units, rest = divmod(columns, ALIGNED)
    counts = [1] if rest else [count for count in range(1, units + 1) if units % count == 0]
    for least, most in ((SMALLEST_BLOCK, LARGEST_BLOCK), (SMALLEST_BLOCK, 2 * LARGEST_BLOCK), (0, LARGEST_BLOCK)):
        for count in counts:
            if columns // count <= most and (count == 1 or columns // count >= least):
                return count
    return 0


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """H, damped, and its factor; or its diagonal alone."""

    hessian: Tensor
    """float32 (B, K/B, K/B): blocks along the diagonal of H; or (K,), the diagonal alone."""
    factor: Tensor | None
    """Lower Cholesky factors of the blocks; None for a diagonal."""
    correction: Tensor | None = None
    """(B, K/B, K/B): what is added to a weight's columns, as its share of the other columns, against drift."""

    @classmethod
    def from_hessian(cls, hessian: Tensor, *, damping: float = DAMPING, drift: Tensor | None = None) -> Curvature:
        """Damps and factorizes H.

        Columns that were never anything but zero need no care: damping alone gives them a small cost of their own. Where
        float32 does not suffice for the factor float64 is tried, and then ten times the damping, again and again.

        Args:
            hessian: float32 (K, K), or (B, K/B, K/B) for blocks along the diagonal; the mean of x x^T or its sum, as only
                proportions matter. It is overwritten and kept.
            damping: Share of the mean of the diagonal that is added to it.
            drift: Of the shape of H, the mean of (y - x) x^T, or its sum where H is one: x is what the layer gets now that the
                layers before it are quantized, y what it got from them in 16 bits. Weights are then moved, before they are
                rounded, towards those that answer x as they answered y. It is overwritten.

        Returns:
            What `quantize_calibrated` takes.

        Raises:
            UsageError: H or the drift has another shape, or is not finite.

        Memory: as many bytes as H has for the factor, and again for a drift; four times a block where it takes float64.
        """
        blocks = hessian.unsqueeze(0) if hessian.dim() == 2 else hessian
        if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or blocks.dtype != torch.float32:
            raise UsageError(
                f"A Hessian of shape {tuple(hessian.shape)} in {hessian.dtype} is neither (K, K) nor (B, K/B, K/B) in float32."
            )
        if not bool(torch.isfinite(blocks.diagonal(dim1=1, dim2=2)).all()):
            raise UsageError(
                "The inputs of a layer are not finite, so that nothing can be learnt from them.",
                hint="Check the 16-bit model: its activations overflow on the calibration text.",
            )
        factor = torch.empty_like(blocks)
        for block, out in zip(blocks, factor, strict=True):
            _factorize(block, out, damping)
        if drift is None:
            return cls(hessian=blocks, factor=factor)
        if drift.shape != hessian.shape or drift.dtype != torch.float32 or not bool(torch.isfinite(drift).all()):
            raise UsageError(f"A drift of shape {tuple(drift.shape)} in {drift.dtype} is not that of H, or it is not finite.")
        correction = drift.view_as(blocks)
        for block, lower in zip(correction, factor, strict=True):
            block.copy_(torch.cholesky_solve(block.T, lower))
        return cls(hessian=blocks, factor=factor, correction=correction.mul_(CORRECTED))

    def corrected(self, planes: Tensor) -> Tensor:
        """Weights that make up for the drift of their inputs.

        Args:
            planes: float32 (K, rows).

        Returns:
            The same where there was no drift to make up for; else new ones.
        """
        if self.correction is None:
            return planes
        parts = planes.view(len(self.correction), -1, planes.shape[1])
        return torch.baddbmm(parts, self.correction, parts).view_as(planes)

    @classmethod
    def from_diagonal(cls, diagonal: Tensor, *, damping: float = DAMPING) -> Curvature:
        """Knows how large each input is and nothing of how they go together: for layers that saw few tokens.

        Args:
            diagonal: float32 (K,): mean of x^2, or its sum.
            damping: Share of its mean that is added.

        Returns:
            What `quantize_calibrated` takes.

        Raises:
            UsageError: it has another shape, or is not finite.

        Memory: as much as the diagonal.
        """
        if diagonal.dim() != 1 or not bool(torch.isfinite(diagonal).all()):
            raise UsageError(f"A diagonal of shape {tuple(diagonal.shape)} is not (K,), or it is not finite.")
        return cls(hessian=diagonal + _ridge(diagonal, damping), factor=None)

    @property
    def columns(self) -> int:
        """Inputs of the layer."""
        return self.hessian.shape[0] if self.factor is None else self.hessian.shape[0] * self.hessian.shape[1]

    @property
    def diagonal(self) -> Tensor:
        """float32 (K,): what an error in each column alone costs."""
        return self.hessian if self.factor is None else self.hessian.diagonal(dim1=1, dim2=2).reshape(-1)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The blocks of H that have a factor.

        Yields:
            Columns of the block, the block, and its lower factor.
        """
        if self.factor is None:
            return
        size = self.hessian.shape[1]
        for index, (block, factor) in enumerate(zip(self.hessian, self.factor, strict=True)):
            yield slice(index * size, (index + 1) * size), block, factor


def _ridge(diagonal: Tensor, damping: float) -> float:
    """What is added to a diagonal. A layer that saw nothing but zeros has all its columns alike."""
    return float(diagonal.mean(dtype=torch.float64)) * damping or 1.0


def _factorize(block: Tensor, out: Tensor, damping: float) -> None:
    ridge = _ridge(block.diagonal(), damping)
    while True:
        block.diagonal().add_(ridge)
        failed = torch.empty((), dtype=torch.int32, device=block.device)
        torch.linalg.cholesky_ex(block, out=(out, failed))
        if int(failed):
            precise, failed = torch.linalg.cholesky_ex(block.to(torch.float64))
            out.copy_(precise)
        if not int(failed):
            return
        ridge *= 10.0
