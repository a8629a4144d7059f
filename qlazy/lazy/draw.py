"""Which values a random op draws, where the generator stands after it, and any part of the values without the rest.

How many words an op takes from the stream depends on its dtype and size, and on the build of PyTorch and the CPU: each kind of
op is therefore tried on small sizes the first time it is met, and one that fits none of the models below has to be run for real
instead (`qlazy.lazy.rng.run_exactly`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qlazy.lazy.rng import Position

_PAIR_WORDS = 4
"""A pair of normals is made from two uniform doubles."""
_BLOCK = 16
"""`normal_` fills contiguous tensors from this size on in blocks of as many."""
_PROBE_PARAMS: dict[str, tuple[Any, ...]] = {"geometric": (0.5,)}
"""Arguments of ops that have no defaults."""
_PROBES = (0, 1, 2, 3, 15, 16, 17, 30, 32, 41)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One random op: which values it draws, and how many."""

    kind: str
    """Name of the in-place op, without the underscore: "normal"."""
    dtype: torch.dtype
    """Of the result."""
    numel: int
    """Of the result."""
    contiguous: bool = True
    """Whether the result is contiguous; `normal_` takes another path where it is not."""
    params: tuple[Any, ...] = ()
    """Arguments of the op: mean and standard deviation, bounds, ..."""

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Run the op itself on this tensor."""
        op: Callable[..., Tensor] = getattr(out, self.kind + "_")
        return op(*self.params, generator=generator)


_PARAMS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "uniform": ("uniform", (("from", 0.0), ("to", 1.0))),
    "normal": ("normal", (("mean", 0.0), ("std", 1.0))),
    "random": ("random", ()),
    "random.from": ("random", (("from", None), ("to", None))),
    "random.to": ("random", (("to", None),)),
    "bernoulli.float": ("bernoulli", (("p", 0.5),)),
    "bernoulli.p": ("bernoulli", (("p", 0.5),)),
    "exponential": ("exponential", (("lambd", 1.0),)),
    "cauchy": ("cauchy", (("median", 0.0), ("sigma", 1.0))),
    "geometric": ("geometric", (("p", None),)),
    "log_normal": ("log_normal", (("mean", 1.0), ("std", 2.0))),
    "rand": ("uniform", (("from", 0.0), ("to", 1.0))),
    "rand_like": ("uniform", (("from", 0.0), ("to", 1.0))),
    "randn": ("normal", (("mean", 0.0), ("std", 1.0))),
    "randn_like": ("normal", (("mean", 0.0), ("std", 1.0))),
    "normal.float_float": ("normal", (("mean", 0.0), ("std", 1.0))),
    "normal_functional": ("normal", (("mean", 0.0), ("std", 1.0))),
    "randint": ("random", (("low", 0), ("high", None))),
    "randint.low": ("random", (("low", 0), ("high", None))),
    "randint_like": ("random", (("low", 0), ("high", None))),
    "randint_like.low_dtype": ("random", (("low", 0), ("high", None))),
}
"""By aten op: the in-place op that its result is filled with, and the names and defaults of that op's arguments."""


def draw_of(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Draw | None:
    """What a call of an aten op draws.

    Args:
        func: The op, as a dispatch mode sees it.
        args: Its positional arguments; tensors may be on the meta device.
        kwargs: Its keyword arguments.
        result: What it returned (for an in-place op: the tensor it filled), also on the meta device.

    Returns:
        The draw; None for an op that none of the models cover, which `run_exactly` is for.
    """
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    overload = func._schema.overload_name.removesuffix("generator").removesuffix("_")
    known = _PARAMS.get(f"{name}.{overload}" if overload else name)
    if known is None or result.dtype.is_complex:
        return None
    kind, params = known
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return Draw(
        kind=kind,
        dtype=result.dtype,
        numel=result.numel(),
        contiguous=result.is_contiguous(),
        params=tuple(given.get(param, default) for param, default in params),
    )


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
    model = _model_of(draw)
    assert model is not None and draw.contiguous
    stop = draw.numel if stop is None else stop
    assert 0 <= start <= stop <= draw.numel
    return _generate(position, draw, model, start, stop)


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


def _generate(position: Position, draw: Draw, model: _Model, start: int, stop: int) -> Tensor:
    model = model.for_size(draw.numel)
    out = torch.empty(stop - start, dtype=draw.dtype, device="cpu")
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
            _generate(position, draw, model, start, stop).view(torch.uint8), values[start:stop].clone().view(torch.uint8)
        )
        for start, stop in parts
    )
