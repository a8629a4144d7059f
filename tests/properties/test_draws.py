"""Any draw, from any position, cut anywhere: bit for bit what PyTorch's own op gives, and the generator's state after it."""

import itertools

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlazy.lazy.draw import Draw
from qlazy.lazy.draw_model import after, generate, random_access
from qlazy.lazy.rng import Position, run_exactly

FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
INTEGERS = st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool])
SIZES = st.one_of(st.integers(0, 70), st.integers(0, 6000))


@st.composite
def draws(draw):
    kind = draw(
        st.sampled_from(
            ["uniform", "normal", "normal", "random", "bernoulli", "exponential", "cauchy", "geometric", "log_normal"]
        )
    )
    dtype = draw(st.one_of(FLOATS, INTEGERS) if kind in ("random", "bernoulli") else FLOATS)
    params = {
        "uniform": st.tuples(st.floats(-3, 0), st.floats(0.5, 3)),
        "normal": st.tuples(st.floats(-3, 3), st.floats(0, 3)),
        "random": st.one_of(st.just(()), st.just((1,)), st.just((0, 2))),
        "bernoulli": st.tuples(st.floats(0, 1)),
        "exponential": st.tuples(st.floats(0.1, 3)),
        "cauchy": st.tuples(st.floats(-1, 1), st.floats(0.1, 3)),
        "geometric": st.tuples(st.floats(0.1, 0.9)),
        "log_normal": st.tuples(st.floats(-1, 1), st.floats(0.1, 1)),
    }[kind]
    if kind == "random" and dtype == torch.int64:
        params = st.one_of(
            params, st.tuples(st.integers(-100, 0), st.sampled_from([7, 2**28 - 1, 2**28, 2**40])), st.just((-(2**63), None))
        )
    return Draw(kind=kind, dtype=dtype, numel=draw(SIZES), params=draw(params))


def beyond(position, draw):
    """The position after a draw, run for real where PyTorch hands it to a library that draws in its own way."""
    there = after(position, draw)
    if there is None:
        assert draw.kind in ("bernoulli", "exponential")
        there = run_exactly(position, lambda scratch: draw.fill(torch.empty(draw.numel, dtype=draw.dtype), scratch))[1]
    return there


@settings(max_examples=300, deadline=None)
@given(before=st.lists(draws(), max_size=3), drawn=draws(), seed=st.integers(0, 2**32), data=st.data())
def test_any_slice_of_any_draw(before, drawn, seed, data):
    generator = torch.Generator().manual_seed(seed)
    position = Position.of(generator)
    for other in before:
        other.fill(torch.empty(other.numel, dtype=other.dtype), generator)
        position = beyond(position, other)
    whole = drawn.fill(torch.empty(drawn.numel, dtype=drawn.dtype), generator)
    start = data.draw(st.integers(0, drawn.numel))
    stop = data.draw(st.integers(start, drawn.numel))
    assert torch.equal(beyond(position, drawn).state(), generator.get_state())
    if not random_access(drawn):
        return
    part = generate(position, drawn, start, stop)
    assert part.dtype == whole.dtype
    assert torch.equal(part.view(torch.uint8), whole[start:stop].clone().view(torch.uint8))


@settings(max_examples=50, deadline=None)
@given(drawn=draws(), seed=st.integers(0, 2**32), worlds=st.sampled_from([1, 2, 3, 4, 8]))
def test_any_number_of_parts_joins_to_the_whole(drawn, seed, worlds):
    assume(random_access(drawn))
    generator = torch.Generator().manual_seed(seed)
    position = Position.of(generator)
    whole = drawn.fill(torch.empty(drawn.numel, dtype=drawn.dtype), generator)
    each = -(-drawn.numel // worlds)
    cuts = [min(drawn.numel, each * rank) for rank in range(worlds + 1)]
    parts = [generate(position, drawn, start, stop) for start, stop in reversed([*itertools.pairwise(cuts)])]
    assert torch.equal(torch.cat(parts[::-1]).view(torch.uint8), whole.view(torch.uint8))
