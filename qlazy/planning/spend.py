"""Spend bytes where they take the most loss away: among the formats of layers, for a target. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store some weights."""

    nbytes: int
    """Bytes that they take."""
    loss: float
    """What it costs in quality, in any unit that adds up."""


def spend(choices: Sequence[Sequence[Option]], nbytes: int) -> list[int]:
    """Pick one option of every choice so that all together take no more than `nbytes`, and lose little.

    Walks down the lower convex hull of each choice, the steepest step of all first (loss per byte); a step for which there is
    no room is passed over, and with it what would follow there. Where the walk passes none over, no other pick of as many
    bytes loses less; else the loss is at most one step above the least.

    Args:
        choices: The options of each; at least one.
        nbytes: Bytes that may be taken; at least `least_bytes(choices)`.
    Returns:
        The index of the option of each choice. The same arguments give the same indices.
    """
    hulls = [_hull(options) for options in choices]
    picked = [0] * len(hulls)
    left = nbytes - sum(options[hull[0]].nbytes for options, hull in zip(choices, hulls, strict=True))
    assert left >= 0, "the smallest options take more than there is"
    steps = []
    for choice, (options, hull) in enumerate(zip(choices, hulls, strict=True)):
        for place, (low, high) in enumerate(itertools.pairwise(hull), start=1):
            more, less = options[high].nbytes - options[low].nbytes, options[low].loss - options[high].loss
            steps.append((-less / more, choice, place, more))
    for _, choice, place, more in sorted(steps):
        if place == picked[choice] + 1 and more <= left:
            picked[choice], left = place, left - more
    return [hull[place] for hull, place in zip(hulls, picked, strict=True)]


def least_bytes(choices: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest options.

    Args:
        choices: The options of each.
    Returns:
        The least that `spend` can do with.
    """
    return sum(min(option.nbytes for option in options) for options in choices)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of loss over bytes: each next one takes more bytes and loses less."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].nbytes, options[index].loss, index)):
        new = options[index]
        if hull and new.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) <= _slope(options[hull[-1]], new):
            hull.pop()
        hull.append(index)
    return hull


def _slope(low: Option, high: Option) -> float:
    """Loss taken away by each byte."""
    return (low.loss - high.loss) / (high.nbytes - low.nbytes)
