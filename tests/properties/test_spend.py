"""Spending bytes: never more than there are, as good as every other way of spending them, and always the same."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from qlazy.planning.spend import Option, least_bytes, spend

OPTIONS = st.lists(
    st.builds(lambda nbytes, loss: Option(nbytes=nbytes, loss=loss / 8), st.integers(1, 12), st.integers(0, 64)),
    min_size=1,
    max_size=4,
)
CHOICES = st.lists(OPTIONS, min_size=1, max_size=5)


def total(choices: list[list[Option]], picked: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [options[index] for options, index in zip(choices, picked, strict=True)]
    return sum(option.nbytes for option in taken), math.fsum(option.loss for option in taken)


def least_loss(choices: list[list[Option]], nbytes: int) -> float:
    """By trying everything."""
    every = itertools.product(*(range(len(options)) for options in choices))
    return min(loss for spent, loss in (total(choices, picked) for picked in every) if spent <= nbytes)


@given(CHOICES, st.integers(0, 40))
def test_never_spends_more_and_loses_at_most_one_step_more_than_the_best(choices: list[list[Option]], extra: int):
    nbytes = least_bytes(choices) + extra
    spent, loss = total(choices, spend(choices, nbytes))
    assert spent <= nbytes
    step = max(max(o.loss for o in options) - min(o.loss for o in options) for options in choices)
    assert loss <= least_loss(choices, nbytes) + step


@given(CHOICES, st.integers(1, 40))
def test_the_best_of_all_where_the_walk_ends_between_two_steps(choices: list[list[Option]], price: int):
    # What is best at some price of a byte is the best of all that take as many bytes.
    at_price = [
        min(range(len(options)), key=lambda i: (options[i].loss + options[i].nbytes * price / 8, options[i].nbytes))
        for options in choices
    ]
    nbytes, _ = total(choices, at_price)
    spent, loss = total(choices, spend(choices, nbytes))
    assert spent <= nbytes
    assert loss == least_loss(choices, nbytes)


@given(CHOICES, st.integers(0, 40))
def test_the_same_every_time_and_the_least_loss_where_there_is_plenty(choices: list[list[Option]], extra: int):
    nbytes = least_bytes(choices) + extra
    assert spend(choices, nbytes) == spend([list(options) for options in choices], nbytes)
    everything = spend(choices, least_bytes(choices) + 1000)
    assert total(choices, everything)[1] == sum(min(o.loss for o in options) for options in choices)
