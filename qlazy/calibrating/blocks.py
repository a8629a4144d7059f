"""The blocks of a decoder: where they are, with what the model calls each, and running one alone.

The model itself is asked for masks, positions and flags: its decoder runs with blocks that hand on what they are given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlazy.calibrating.spilled import spilled
from qlazy.errors import QlazyError, UnsupportedModel

_HINT = "Leave --calibrate out."


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Where a model's blocks are."""

    path: str
    """Of the module that calls them."""
    list_path: str
    """Of the list that they are in."""
    count: int
    """How many there are."""

    def module(self, model: nn.Module) -> nn.Module:
        """The module that calls the blocks.

        Args:
            model: The model, or another of its class.
        Returns:
            The module.
        """
        return model.get_submodule(self.path)

    def block(self, model: nn.Module, number: int) -> nn.Module:
        """One block.

        Args:
            model: The model, or another of its class.
            number: Which.
        Returns:
            The block.
        """
        return model.get_submodule(f"{self.list_path}.{number}")

    def number_of(self, name: str) -> int | None:
        """The block that a tensor or module is in.

        Args:
            name: Its name in the model.
        Returns:
            The block's number; None where it is in none.
        """
        head, _, rest = name.partition(f"{self.list_path}.")
        number = rest.partition(".")[0]
        return int(number) if not head and number.isdigit() else None

    def is_beside(self, name: str) -> bool:
        """Whether a tensor belongs to the decoder, but to no block: embeddings, norms.

        Args:
            name: Its name in the model.
        Returns:
            The answer.
        """
        return (name.startswith(f"{self.path}.") or not self.path) and self.number_of(name) is None


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the one list of blocks that a causal language model consists of.

    Args:
        model: A placeholder.
    Returns:
        Where they are.
    Raises:
        UnsupportedModel: it has none, or several, or is no causal language model.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(model).__name__} is no causal language model, and only those are calibrated.", hint=_HINT
        )
    decoder: Any = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = [
        name
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and any(t.dim() > 1 for t in [*child.parameters(), *child.buffers()])
    ]
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise UnsupportedModel(
            f"The blocks of {type(model).__name__} should be one list in {path or 'the model'!r}; it has {found}.", hint=_HINT
        )
    list_path = f"{path}.{lists[0]}" if path else lists[0]
    return Decoder(path=path, list_path=list_path, count=len(decoder.get_submodule(lists[0])))


@dataclass(frozen=True, kw_only=True)
class Call:
    """With what the model calls a block."""

    hidden: Tensor
    """(B, L, K), what goes from block to block."""
    args: tuple[Any, ...]
    """What else comes by position."""
    kwargs: Mapping[str, Any]
    """What else comes by name: masks, positions."""


class Enough(Exception):
    """Raised within a model to end its forward where all is known that was asked for."""


def embed(decoder: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, batch: int) -> tuple[Tensor, list[Call]]:
    """What goes into the first block, and with what else the model calls each block.

    Args:
        decoder: The module that calls the blocks; what is in it beside them has storage.
        blocks: All of them, with or without storage.
        tokens: int64 (S, L).
        batch: Sequences at a time, a divisor of S.
    Returns:
        (S, L, K) in a temporary file, and for each block the arguments of any batch.
    Raises:
        UnsupportedModel: the model does something with what goes from block to block, or tells blocks what differs from
            sequence to sequence.

    Memory: activations of one batch beside the file.
    """
    hidden, calls = torch.empty(0), []
    for number, ids in enumerate(tokens.split(batch)):
        found = _calls(decoder, blocks if number < 2 else blocks[:1], ids)
        first = found[0].hidden
        if number == 0:
            hidden = spilled((len(tokens), *first.shape[1:]), first.dtype)
            calls = found
        elif number == 1 and not all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(calls, found, strict=True)):
            raise UnsupportedModel(
                f"{type(decoder).__name__} gives its blocks more of a text than what goes from one to the next, so that they "
                "cannot be run one by one.",
                hint=_HINT,
            )
        hidden[number * batch :][: len(ids)].copy_(first)
    return hidden, calls


def run_block(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """Run one block.

    Args:
        block: The block, with storage.
        call: Its arguments.
        hidden: (B, L, K), as many sequences as in that call.
    Returns:
        (B, L, K).
    Raises:
        UnsupportedModel: something else comes out.
    """
    made = block(hidden, *call.args, **call.kwargs)
    made = made[0] if isinstance(made, tuple | list) else made
    if not isinstance(made, Tensor) or made.shape != hidden.shape:
        raise UnsupportedModel(f"{type(block).__name__} does not give what goes into the next block.", hint=_HINT)
    return made


def _calls(decoder: nn.Module, blocks: Sequence[nn.Module], ids: Tensor) -> list[Call]:
    """Run a decoder whose blocks hand on what they are given, up to the last of these."""
    calls: list[Call] = []

    def stand_in(number: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), ())
            handed_on = number == 0 or (len(calls) == number and hidden.data_ptr() == calls[-1].hidden.data_ptr())
            if not isinstance(hidden, Tensor) or (hidden.shape[:2] != ids.shape and number == 0) or not handed_on:
                raise UnsupportedModel(
                    f"{type(decoder).__name__} does more than hand on what comes out of one block to the next.", hint=_HINT
                )
            calls.append(Call(hidden=hidden, args=args, kwargs=kwargs))
            if len(calls) == len(blocks):
                raise Enough
            return hidden

        return forward

    with contextlib.ExitStack() as restored:
        for number, block in enumerate(blocks):
            block.forward = stand_in(number)
            restored.callback(delattr, block, "forward")
        try:
            decoder(input_ids=ids, use_cache=False)
        except Enough:
            return calls
        except QlazyError:
            raise
        except Exception as error:  # any model's own code
            raise UnsupportedModel(
                f"{type(decoder).__name__} cannot be run block by block: {error or type(error).__name__}", hint=_HINT
            ) from error
    raise UnsupportedModel(
        f"{type(decoder).__name__} runs {len(calls)} of its {len(blocks)} blocks, and each should be run once.", hint=_HINT
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of arguments are equal, tensors by their values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return type(one) is type(other) and (one is other or not hasattr(one, "__eq__") or bool(one == other))


@contextlib.contextmanager
def watching(module: nn.Module, seen: Any) -> Iterator[None]:
    """Call a function with what a module is called with.

    Args:
        module: Any module.
        seen: Takes its arguments, by position and by name.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(*args, **kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
