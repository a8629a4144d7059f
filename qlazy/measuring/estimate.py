"""Figures of a text with their standard errors. Neighbouring tokens are not independent, so that errors are told by blocks.

A block is a run of consecutive tokens. The sums of whole blocks are taken for independent, which single tokens are not: an
error told token by token is too small where a hard passage is hard for all of its tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure measured on a sample."""

    value: float
    """The figure."""
    error: float
    """Its standard error."""

    def scaled(self, factor: float) -> Estimate:
        """The figure in another unit.

        Args:
            factor: What one of the old unit is in the new one.
        Returns:
            Value and error times `factor`.
        """
        return Estimate(value=self.value * factor, error=self.error * abs(factor))


def blocks_of(lengths: list[int], block_tokens: int) -> Tensor:
    """The block that each token belongs to; none spans two windows, and the last of a window may be short.

    Args:
        lengths: Tokens of each window.
        block_tokens: Tokens of a block.
    Returns:
        Numbers from 0 on, one a token.
    """
    numbers, first = [], 0
    for length in lengths:
        numbers.append(first + torch.arange(length) // block_tokens)
        first += -(-length // block_tokens)
    return torch.cat(numbers)


def mean(values: Tensor, blocks: Tensor) -> Estimate:
    """The mean. Its error is that of a ratio of block sums, which for blocks of one token is deviation / sqrt(tokens).

    Args:
        values: One a token.
        blocks: The block of each token, of which there are two or more.
    Returns:
        The mean of all tokens.
    """
    values = values.to(torch.float64)
    centre, count = values.mean(), int(blocks.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, blocks, values - centre)
    error = math.sqrt(count / (count - 1) * float(sums.square().sum())) / len(values)
    return Estimate(value=float(centre), error=error)


def exponential_of_mean(values: Tensor, blocks: Tensor) -> Estimate:
    """E to the mean, as a perplexity is one of negative log-likelihoods.

    Args:
        values: One a token.
        blocks: The block of each token.
    Returns:
        The figure; its error is the mean's times the slope there.
    """
    inner = mean(values, blocks)
    value = math.exp(inner.value) if inner.value < 700 else math.inf
    return Estimate(value=value, error=value * inner.error)


def root_mean_square(values: Tensor, blocks: Tensor) -> Estimate:
    """The root of the mean square.

    Args:
        values: One a token.
        blocks: The block of each token.
    Returns:
        The figure; its error is that of the mean square times the slope there.
    """
    inner = mean(values.to(torch.float64).square(), blocks)
    value = math.sqrt(inner.value)
    return Estimate(value=value, error=inner.error / (2 * value) if value else 0.0)


def quantile(values: Tensor, blocks: Tensor, share: float) -> Estimate:
    """The value that a share of the tokens does not exceed.

    Its error is Woodruff's: half the way between the quantiles one standard error of the share below it and above.

    Args:
        values: One a token.
        blocks: The block of each token.
        share: Between 0 and 1.
    Returns:
        The figure.
    """
    values = values.to(torch.float64)
    ordered = values.sort().values

    def at(where: float) -> float:
        place = min(max(where, 0.0), 1.0) * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))

    value = at(share)
    error = mean((values <= value).to(torch.float64), blocks).error
    return Estimate(value=value, error=(at(share + error) - at(share - error)) / 2)
