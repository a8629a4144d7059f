"""Points in the stream of PyTorch's CPU generator.

A `Position` is a state plus a count of words, so passing a random op costs an addition; the bytes of the state are made only
where they are wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qlazy.lazy.mt19937 import STATE_BYTES, advance

_T = TypeVar("_T")

_NORMAL = slice(24 + 8 * 624, STATE_BYTES - 8)
"""The cached second normal of a pair, and whether there is one."""
_HAS_NORMAL = slice(STATE_BYTES - 16, STATE_BYTES - 12)
_BEFORE = -1
"""In place of a pair's position: it was drawn before the stream was picked up."""
_REMEMBERED = 32
"""States of a stream kept to jump from; 5 KB each."""


class Stream:
    """One generator's stream from a known state on, with a few states on the way remembered.

    Args:
        state: What `torch.Generator.get_state()` returned.
    """

    def __init__(self, state: Tensor) -> None:
        self._states = {0: state.clone()}
        self._lock = threading.Lock()

    def state(self, words: int) -> Tensor:
        """The state after so many words; the caches of normals are those of the stream's start."""
        with self._lock:
            known = max(at for at in self._states if at <= words)
            start = self._states[known]
        state = advance(start, words - known)
        self.remember(words, state)
        return state

    def remember(self, words: int, state: Tensor) -> None:
        """Keep a state that is known to be the one after so many words, so that a later jump can start from it."""
        with self._lock:
            if words in self._states:
                return
            state = state.clone()
            state[_NORMAL] = self._states[0][_NORMAL]
            self._states[words] = state
            if len(self._states) > _REMEMBERED:
                # The oldest, but never the start.
                del self._states[next(at for at in self._states if at)]

    @property
    def has_normal(self) -> bool:
        """Whether the start has a cached normal."""
        return bool(self._states[0][_HAS_NORMAL].any())


@dataclass(frozen=True, kw_only=True)
class Position:
    """A point in the stream of one CPU generator."""

    stream: Stream
    """The stream, from the state at which it was picked up."""
    words: int = 0
    """Words of 32 bits drawn since."""
    pair: int | None = None
    """Where the pair of normals was drawn whose second one is still to be used; -1 if that was before the stream's start."""

    @classmethod
    def of(cls, generator: torch.Generator) -> Position:
        """Where a generator stands now; nothing is shared with it."""
        stream = Stream(generator.get_state())
        return cls(stream=stream, pair=_BEFORE if stream.has_normal else None)

    def state(self) -> Tensor:
        """The bytes that `torch.Generator.get_state()` has here in eager execution.

        Returns:
            A tensor of its own.

        Memory: 6 MiB while jumping.
        """
        state = self.stream.state(self.words)
        if self.pair is None:
            state[_NORMAL] = 0
        elif self.pair != _BEFORE:
            scratch = torch.Generator().set_state(Position(stream=self.stream, words=self.pair).state())
            torch.empty(1, dtype=torch.float64, device="cpu").normal_(generator=scratch)
            state[_NORMAL] = scratch.get_state()[_NORMAL]
        return state

    def generator(self) -> torch.Generator:
        """A generator of its own that stands here."""
        return torch.Generator().set_state(self.state())


def run_exactly(position: Position, call: Callable[[torch.Generator], _T]) -> tuple[_T, Position]:
    """Run anything random for real, as if its generator stood at this position.

    Args:
        position: Where it starts.
        call: Gets a generator that stands there.

    Returns:
        What `call` returned, and the position after it.
    """
    generator = position.generator()
    result = call(generator)
    return result, Position.of(generator)
