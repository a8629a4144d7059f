"""Where a generator stands after a draw, and any part of the drawn values without the rest.

How many words an op takes from the stream depends on its dtype and size, and on the build of PyTorch and the CPU: each kind of
op is therefore tried on small sizes the first time it is met, and one that fits none of the models below has to be run for real
instead (`qlazy.lazy.rng.run_exactly`).
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qlazy.lazy.draw import Draw
from qlazy.lazy.rng import Position

_PAIR_WORDS = 4
"""A pair of normals is made from two uniform doubles."""
_BLOCK = 16
"""`normal_` fills contiguous tensors from this size on in blocks of as many."""
_PROBE_PARAMS: dict[str, tuple[Any, ...]] = {"geometric": (0.5,)}
"""Arguments of ops that have no defaults."""
LONG = 1 << 22
"""Elements from which on a draw is worth several threads: jumping to where the next starts takes as long as 3 million draws."""
_PROBES = (0, 1, 2, 3, 15, 16, 17, 30, 32, 41)


def after(position: Position, draw: Draw) -> Position | None:
    """Where the generator stands after a draw.

    Args:
        position: Where it stood before.
        draw: The draw.

    Returns:
        The position; None where this build of PyTorch fits no model, and `run_exactly` is needed.

    Memory: none, except that the first draw of a kind tries it on small sizes.
    """
    model = _model_of(draw)
    return None if model is None else _after(position, draw, model)


def random_access(draw: Draw) -> bool:
    """Whether `generate` can make this draw's values, and each part of them alone.

    Args:
        draw: The draw.

    Returns:
        False where the order of the values in memory is not that of the draws, or no model fits: replay the op itself then.
    """
    return draw.contiguous and _model_of(draw) is not None


def generate(position: Position, draw: Draw, start: int = 0, stop: int | None = None) -> Tensor:
    """Values `start` to `stop` of a draw, bit for bit those of the whole op.

    Args:
        position: Where the generator stood before the whole op.
        draw: The op; `random_access` of it must hold.
        start: First element.
        stop: The element after the last; None for all.

    Returns:
        A vector on the CPU.

    Memory: the result, and at most 32 elements more.
    """
    stop = draw.numel if stop is None else stop
    out = torch.empty(stop - start, dtype=draw.dtype, device="cpu")
    return generate_into(out, position, draw, start)


def generate_into(out: Tensor, position: Position, draw: Draw, start: int = 0) -> Tensor:
    """As `generate`, into memory that is there.

    Args:
        out: A contiguous vector; as many values are made as it has elements.
        position: Where the generator stood before the whole op.
        draw: The op; `random_access` of it must hold.
        start: First element.

    Returns:
        `out`.

    Memory: at most 32 elements.
    """
    model = _model_of(draw)
    assert model is not None and draw.contiguous
    assert 0 <= start <= start + out.numel() <= draw.numel
    return _generate(position, draw, model, start, out)


def generate_in_threads(out: Tensor, position: Position, draw: Draw) -> bool:
    """Make a long draw in as many threads as torch uses for an op; PyTorch itself takes one, as the draws depend on each other.

    Args:
        out: The tensor that the draw fills.
        position: Where the generator stood before.
        draw: The op.

    Returns:
        False where it is short or cannot be cut, and nothing was done.

    Memory: 6 MiB a thread while jumping.
    """
    threads = torch.get_num_threads()
    if threads == 1 or draw.numel < LONG or not random_access(draw):
        return False
    flat = out.view(-1)
    step = -(-draw.numel // threads // _BLOCK) * _BLOCK
    starts = range(0, draw.numel, step)
    with ThreadPoolExecutor(threads, "qlazy-draw") as pool:
        list(pool.map(lambda start: generate_into(flat[start : start + step], position, draw, start), starts))
    return True


@dataclass(frozen=True, kw_only=True)
class _Model:
    """How an op takes words from the stream."""

    shape: Literal["each", "pairs", "blocks"]
    """Words for each element; for pairs of normals, one of which may be left over; or blocks of sixteen with a tail redrawn."""
    words: int = _PAIR_WORDS
    """Words an element; for "pairs" words a pair."""
    tail: Literal["again", "once"] = "again"
    """Of "blocks": whether the elements of an incomplete block are drawn before the last sixteen are drawn (again)."""

    def for_size(self, numel: int) -> _Model:
        """The model that holds for this size: too few for a block are drawn in pairs."""
        return _Model(shape="pairs") if self.shape == "blocks" and numel < _BLOCK else self

    def tail_at(self, numel: int) -> int:
        """Of "blocks": in how many words from the start the last sixteen elements are drawn, if the size is no multiple."""
        return self.words * (numel if self.tail == "again" else numel - numel % _BLOCK)


def _after(position: Position, draw: Draw, model: _Model) -> Position:
    model = model.for_size(draw.numel)
    words, pair = position.words, position.pair
    if model.shape == "each":
        words += model.words * draw.numel
    elif model.shape == "blocks":
        words += model.words * draw.numel if draw.numel % _BLOCK == 0 else model.tail_at(draw.numel) + model.words * _BLOCK
    elif draw.numel:
        fresh = draw.numel - (pair is not None)
        words += model.words * -(-fresh // 2)
        pair = words - model.words if fresh % 2 else None
    return Position(stream=position.stream, words=words, pair=pair)


def _generate(position: Position, draw: Draw, model: _Model, start: int, out: Tensor) -> Tensor:
    model = model.for_size(draw.numel)
    stop = start + out.numel()
    if start == stop:
        return out
    if model.shape == "each":
        _fill_at(position, draw, model.words * start, out, model.words * out.numel())
    elif model.shape == "pairs":
        leftover = position.pair is not None
        if start == 0:
            # From the start the cached normal is used as it is.
            draw.fill(out, position.generator())
        else:
            first = start - (start - leftover) % 2
            part = torch.empty(stop - first, dtype=draw.dtype, device="cpu")
            _fill_at(position, draw, model.words * ((first - leftover) // 2), part)
            out.copy_(part[start - first :])
    else:
        _generate_blocks(position, draw, model, start, out)
    return out


def _generate_blocks(position: Position, draw: Draw, model: _Model, start: int, out: Tensor) -> None:
    """Elements of a "blocks" draw from `start` on: the whole blocks in place, cut ones by way of a block of their own."""
    stop = start + out.numel()
    body = draw.numel if draw.numel % _BLOCK == 0 else draw.numel - _BLOCK
    block = torch.empty(_BLOCK, dtype=draw.dtype, device="cpu")
    at = start
    while at < min(stop, body):
        inside = at % _BLOCK
        whole = (min(stop, body) - at) // _BLOCK * _BLOCK
        if inside == 0 and whole:
            _fill_at(position, draw, model.words * at, out[at - start : at - start + whole], model.words * whole)
            at += whole
        else:
            count = min(_BLOCK - inside, min(stop, body) - at)
            _fill_at(position, draw, model.words * (at - inside), block)
            out[at - start : at - start + count] = block[inside : inside + count]
            at += count
    if at < stop:
        _fill_at(position, draw, model.tail_at(draw.numel), block)
        out[at - start :] = block[at - body : stop - body]


def _fill_at(position: Position, draw: Draw, words: int, out: Tensor, takes: int = 0) -> None:
    """Run the op so many words after `position`, with no cached normal; what it takes, where given, saves a later jump."""
    words += position.words
    generator = Position(stream=position.stream, words=words).generator()
    draw.fill(out, generator)
    if takes:
        position.stream.remember(words + takes, generator.get_state())


def _model_of(draw: Draw) -> _Model | None:
    """The model that this draw follows on this machine."""
    # How wide the bounds of random_ are decides how many words a value takes. Other arguments have no such effect.
    params = draw.params if draw.kind == "random" else _PROBE_PARAMS.get(draw.kind, ())
    return _probe(draw.kind, draw.dtype, draw.contiguous, params)


@functools.lru_cache(maxsize=512)
def _probe(kind: str, dtype: torch.dtype, contiguous: bool, params: tuple[Any, ...]) -> _Model | None:
    """Find the model whose counts and values are those of the op itself for every small size."""
    candidates = [_Model(shape="each", words=words) for words in (1, 2)]
    candidates.append(_Model(shape="pairs"))
    candidates += [_Model(shape="blocks", words=words, tail=tail) for words in (1, 2) for tail in ("again", "once")]
    for leftover in (False, True):
        generator = torch.Generator().manual_seed(23)
        torch.empty(1, dtype=torch.float64 if leftover else torch.float32, device="cpu").uniform_(generator=generator)
        if leftover:
            torch.empty(1, dtype=torch.float64, device="cpu").normal_(generator=generator)
        position = Position.of(generator)
        for numel in _PROBES:
            draw = Draw(kind=kind, dtype=dtype, numel=numel, contiguous=contiguous, params=params)
            out = torch.empty((numel, 1 if contiguous else 2), dtype=dtype, device="cpu")[:, 0]
            generator = position.generator()
            try:
                draw.fill(out, generator)
            except (RuntimeError, NotImplementedError, TypeError):
                return None
            candidates = [model for model in candidates if _fits(model, position, draw, out, generator.get_state())]
    return candidates[0] if candidates else None


def _fits(model: _Model, position: Position, draw: Draw, values: Tensor, state: Tensor) -> bool:
    """Whether a model gives what the op itself gave: the state after it, and parts of its values."""
    if not torch.equal(_after(position, draw, model).state(), state):
        return False
    if not draw.contiguous:
        return True
    values = values.contiguous()
    cuts = {0, 1, draw.numel // 2, max(0, draw.numel - 1), draw.numel}
    parts = ((start, stop) for start in cuts for stop in cuts if 0 <= start <= stop <= draw.numel)
    return all(
        torch.equal(
            _generate(position, draw, model, start, torch.empty_like(values[start:stop])).view(torch.uint8),
            values[start:stop].clone().view(torch.uint8),
        )
        for start, stop in parts
    )
