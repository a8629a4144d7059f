import pytest
import torch

from qlazy.lazy import mt19937
from qlazy.lazy.mt19937 import advance


def state_at(words, seed=11):
    """The state after so many words, by drawing them."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty(words).uniform_(generator=generator)
    return generator.get_state()


JUMPED = 624 * mt19937._STEPPED_BLOCKS


@pytest.mark.parametrize(
    "words", [0, 1, 2, 622, 623, 624, 625, 1248, JUMPED - 7, JUMPED, JUMPED + 617, JUMPED + 625, 3_000_001]
)
@pytest.mark.parametrize("before", [0, 7, 623, 624])
def test_state_is_that_of_drawing(before, words):
    start = state_at(before)
    kept = start.clone()
    assert torch.equal(advance(start, words), state_at(before + words))
    assert torch.equal(start, kept)


def test_two_jumps_are_one():
    start = state_at(3)
    there = advance(start, 70_000_000_000)
    assert torch.equal(there, advance(advance(start, 69_999_000_000), 1_000_000))
    assert torch.equal(there, advance(advance(start, 1_000_000), 69_999_000_000))
    # The generator goes on from a state that was jumped to.
    generator = torch.Generator().set_state(there)
    torch.empty(5000, dtype=torch.float64).uniform_(generator=generator)
    assert torch.equal(generator.get_state(), advance(start, 70_000_010_000))


def test_cached_normals_stay():
    generator = torch.Generator().manual_seed(2)
    torch.empty(1).normal_(generator=generator)
    start = generator.get_state()
    torch.empty(1000).uniform_(generator=generator)
    assert torch.equal(advance(start, 1000), generator.get_state())


def test_characteristic_polynomial():
    polynomial = mt19937._times_characteristic(1)
    assert (polynomial.bit_length() - 1, polynomial.bit_count()) == (19937, 135)


def test_a_distance_is_raised_once():
    mt19937._power_of_t.cache_clear()
    for seed in (1, 2, 3):
        advance(state_at(1, seed), 10**12)
    assert mt19937._power_of_t.cache_info().misses == 1
