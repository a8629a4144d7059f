"""Where random generators would stand, while the real ones draw nothing.

While a recorder is open a generator holds a marker: a state whose words are a serial number that stands for a position in its
stream. So code that saves and restores states (`torch.random.fork_rng`) saves and restores positions, and a state that is no
marker was set by somebody else (`torch.manual_seed`): recording goes on from it. When recording ends the marker gives way to
the true state.
"""

from __future__ import annotations

import itertools
import threading

import torch

from qlazy.errors import UsageError
from qlazy.lazy.rng import Position

_WORDS = slice(24, 24 + 4 * 8)
"""The first words of the twister in `Generator.get_state()`: 64 bits each, of which 32 are kept."""
_MAGIC = (0x716C617A, 0x795F6D6B)
_serial = itertools.count()
_positions: dict[int, Position] = {}
_lock = threading.RLock()
_open = 0


def position_of(generator: torch.Generator) -> Position:
    """Where a generator would stand now.

    Args:
        generator: A CPU generator.
    Returns:
        The position.
    Raises:
        UsageError: it is another device's.
    """
    if generator.device.type != "cpu":
        raise UsageError(
            f"A generator on {generator.device} was drawn from while a module was built lazily.",
            hint="Draw from a CPU generator, and move the values.",
        )
    with _lock:
        serial = _read(generator.get_state())
        return Position.of(generator) if serial is None else _positions[serial]


def move(generator: torch.Generator, position: Position) -> None:
    """Let a generator stand somewhere, without working out the state.

    Args:
        generator: A CPU generator.
        position: Where it would stand.
    """
    with _lock:
        serial = next(_serial)
        _positions[serial] = position
        state = generator.get_state()
        low, high = serial & 0xFFFFFFFF, serial >> 32
        state[_WORDS].view(torch.int64).copy_(torch.tensor([*_MAGIC, low, high]))
        generator.set_state(state)


def settle(generator: torch.Generator) -> None:
    """Give a generator the state of the position where it would stand.

    Args:
        generator: Any generator.
    """
    if generator.device.type != "cpu":
        return
    with _lock:
        serial = _read(generator.get_state())
        if serial is not None:
            generator.set_state(_positions[serial].state())


def opened() -> None:
    """Count one recorder more."""
    global _open
    with _lock:
        _open += 1


def closed() -> None:
    """Count one recorder less; after the last no marker means anything."""
    global _open
    with _lock:
        _open -= 1
        if not _open:
            _positions.clear()


def _read(state: torch.Tensor) -> int | None:
    first, second, low, high = state[_WORDS].view(torch.int64).tolist()
    serial = low | high << 32
    return serial if (first, second) == _MAGIC and serial in _positions else None
