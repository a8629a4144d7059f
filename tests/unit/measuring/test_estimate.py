"""Standard errors on series whose errors are known."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from qlazy.measuring.estimate import Estimate, blocks_of, exponential_of_mean, mean, quantile, root_mean_square

VALUES = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0, 7.0], dtype=torch.float64)
SINGLE = torch.arange(6)


def test_blocks_end_with_their_window():
    assert blocks_of([5, 1, 4], 2).tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]


def test_blocks_of_one_token_give_the_textbook_error():
    found = mean(VALUES, SINGLE)
    assert found.value == 4.5
    assert math.isclose(found.error, statistics.stdev(VALUES.tolist()) / math.sqrt(6), rel_tol=1e-12)


def test_equal_blocks_give_the_error_of_their_means():
    found = mean(VALUES, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert math.isclose(found.error, statistics.stdev([2.5, 5.0, 6.0]) / math.sqrt(3), rel_tol=1e-12)


def test_tokens_that_repeat_their_neighbour_are_no_more_than_one():
    repeated = VALUES.repeat_interleave(8)
    assert math.isclose(mean(repeated, SINGLE.repeat_interleave(8)).error, mean(VALUES, SINGLE).error, rel_tol=1e-12)
    assert mean(repeated, torch.arange(48)).error < 0.4 * mean(VALUES, SINGLE).error


def test_error_is_the_deviation_that_new_samples_have():
    """A series with memory: the errors told of 400 samples against how much those samples' means and tails really differ."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 1024, generator=generator, dtype=torch.float64)
    series = noise.unfold(1, 4, 1).sum(-1)[:, :1020]
    blocks = blocks_of([1020], 32)
    for measure in (mean, root_mean_square, lambda v, b: quantile(v, b, 0.99)):
        found = [measure(row, blocks) for row in series]
        really = statistics.stdev(one.value for one in found)
        assert 0.85 * really < statistics.mean(one.error for one in found) < 1.15 * really


def test_exponential_and_root_take_the_slope():
    inner = mean(VALUES, SINGLE)
    whole = exponential_of_mean(VALUES, SINGLE)
    assert whole.value == math.exp(4.5) and math.isclose(whole.error, whole.value * inner.error)
    squared = mean(VALUES.square(), SINGLE)
    root = root_mean_square(VALUES, SINGLE)
    assert math.isclose(root.value**2, squared.value) and math.isclose(root.error, squared.error / (2 * root.value))
    assert root_mean_square(torch.zeros(6), SINGLE) == Estimate(value=0.0, error=0.0)
    assert exponential_of_mean(torch.full((6,), 1e4), SINGLE).value == math.inf


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_quantile_is_torchs(share):
    values = torch.randn(101, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = quantile(values, torch.arange(101), share)
    assert math.isclose(found.value, float(values.quantile(share)), abs_tol=1e-12) and found.error >= 0


def test_units_change_both():
    assert Estimate(value=-0.5, error=0.25).scaled(-100) == Estimate(value=50.0, error=25.0)
