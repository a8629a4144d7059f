"""Jump far ahead in the stream of PyTorch's CPU generator without drawing what lies between.

PyTorch's CPU generator is MT19937: 624 words of 32 bits, replaced as a block when all have been drawn. One step of it is linear
over GF(2), so n steps are the polynomial t**n in it, and modulo the characteristic polynomial that has at most 19937 terms
whatever n is: the words there are sums (XOR) of the first 19937 + 624 words of the sequence. The method is that of Haramoto,
Matsumoto, Nishimura, Panneton and L'Ecuyer, "Efficient Jump Ahead for F2-Linear Random Number Generators" (2008).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

STATE_BYTES = 5056
"""Length of `torch.Generator.get_state()`: a header, 624 words of 64 bits with 32 in use, and the cached normals."""

_N, _M = 624, 397
_DEGREE = 19937
_TWIST = 0x9908B0DF
_WORDS = slice(24, 24 + 8 * _N)
_LEFT, _NEXT = slice(8, 12), slice(16, 24)
_STEPPED_BLOCKS = 200
"""Up to here, making every block costs less than a jump does."""


def advance(state: Tensor, words: int) -> Tensor:
    """State of a CPU generator after so many more words of 32 bits have been drawn.

    Args:
        state: What `torch.Generator.get_state()` returned; not written to.
        words: How many words to pass; not negative.

    Returns:
        The state that drawing them would have left, to the byte. Cached normals stay as they are.

    Memory: 6 MiB while jumping, 2.5 KB for each distance that is remembered.
    """
    assert state.numel() == STATE_BYTES and words >= 0
    state = state.clone()
    if words == 0:
        return state
    # Right after seeding `left` is 1: all words of the seed's block count as drawn.
    drawn = _N + 1 - int(state[_LEFT].view(torch.int32)) + words
    blocks = (drawn - 1) // _N
    block = state[_WORDS].view(torch.int64)
    steps = blocks
    if blocks > _STEPPED_BLOCKS:
        # One block early, as a jump leaves the low bits of the first word undefined; the step from there does not read them.
        block.copy_(_jump(block, _N * (blocks - 1)))
        steps = 1
    for _ in range(steps):
        block.copy_(_next_block(block))
    state[_NEXT].view(torch.int64).fill_(drawn - _N * blocks)
    state[_LEFT].view(torch.int32).fill_(_N + 1 - (drawn - _N * blocks))
    return state


def _next_block(old: Tensor) -> Tensor:
    """The 624 words (int64) that follow these."""

    def mix(high: Tensor, low: Tensor) -> Tensor:
        return (((high & 0x80000000) | (low & 0x7FFFFFFF)) >> 1) ^ ((low & 1) * _TWIST)

    new, rest = torch.empty_like(old), _N - _M
    new[:rest] = mix(old[:rest], old[1 : rest + 1]) ^ old[_M:]
    # Each part needs words of the one before.
    new[rest : 2 * rest] = mix(old[rest : 2 * rest], old[rest + 1 : 2 * rest + 1]) ^ new[:rest]
    new[2 * rest : -1] = mix(old[2 * rest : -1], old[2 * rest + 1 :]) ^ new[rest : _M - 1]
    new[-1] = mix(old[-1], new[0]) ^ new[_M - 1]
    return new


def _jump(block: Tensor, words: int) -> Tensor:
    """The 624 words that start so many words after the first of these."""
    blocks = [block]
    while len(blocks) * _N < _DEGREE + _N:
        blocks.append(_next_block(blocks[-1]))
    # As int32 they take half the memory; XOR does not mind the sign.
    windows = torch.cat(blocks).to(torch.int32).unfold(0, _N, 1)
    power = reversed(format(_power_of_t(words), "b"))
    terms = torch.tensor([k for k, bit in enumerate(power) if bit == "1"])
    total = torch.zeros(_N, dtype=torch.int32)
    for some in terms.split(1024):
        rows = windows[some]
        while len(rows) > 1:
            half = len(rows) // 2
            odd = rows[2 * half :]
            rows = torch.cat([rows[:half] ^ rows[half : 2 * half], odd])
        total ^= rows[0]
    return total.to(torch.int64) & 0xFFFFFFFF


@functools.lru_cache(maxsize=256)
def _power_of_t(exponent: int) -> int:
    """`t**exponent` modulo the characteristic polynomial; bit k of the integer is the coefficient of `t**k`."""
    power = 1
    for bit in format(exponent, "b"):
        # Over GF(2) a square only spreads the bits: binary digits read as digits to base 4.
        power = int(format(power, "b"), 4) << int(bit)
        # The second highest term stands 623 below the highest, so each pass takes 623 bits off the top.
        while high := power >> _DEGREE:
            power ^= _times_characteristic(high)
    return power


def _times_characteristic(factor: int) -> int:
    """A polynomial times the characteristic one, which has 135 terms.

    With y = t**623 + t**396 and a the bits of the twist constant, lowest first, that is
    t*y*(y**31 + a0*y**30 + a1*y**29 + ... + a30) + a31 (Matsumoto and Nishimura 1998, section 3.3).
    """
    total = factor
    for k in range(31):
        total = ((total << _N - _M) ^ total) << _M - 1
        if _TWIST >> k & 1:
            total ^= factor
    # a31 is 1.
    return (((total << _N - _M) ^ total) << _M) ^ factor
