"""A save that walks through the blocks of a model with a text, and goes on where it was cut off.

The text's tokens are written beside the weights, and stay there. What goes into the first block of the next shard is written
before a shard is, and taken away when the shard after that is there: so whatever is on the disk, the walk can be taken up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlazy.calibrating.blocks import Decoder
from qlazy.calibrating.calibration import Calibrated
from qlazy.calibrating.spilled import spilled
from qlazy.calibrating.tokens import Text
from qlazy.calibrating.walk import Walk
from qlazy.place import empty
from qlazy.saving.folder import PartialFolder
from qlazy.saving.pieces import Piece

TOKENS = "calibration.json"
"""File that holds the tokens of the text."""

_INPUTS = "calibration-inputs-"


class CalibratedSave:
    """The part of a save that has to do with calibration.

    Args:
        partial: The folder in the making.
        text: Gives the tokens of the text.
        walk: Makes a walk with them.
        decoder: Where the blocks of the model are.

    Memory: nothing until `fill` is called; then as `Walk` says.
    """

    def __init__(
        self, partial: PartialFolder, text: Callable[[], Text], walk: Callable[[Tensor], Walk], decoder: Decoder
    ) -> None:
        self._partial, self._text, self._make, self._decoder = partial, text, walk, decoder
        self._walk: Walk | None = None

    @property
    def done(self) -> Calibrated:
        """What was calibrated."""
        return Calibrated() if self._walk is None else self._walk.done

    def told(self) -> dict[str, Any]:
        """What the manifest says beside what was asked for.

        Returns:
            In how many bits the model wrote the text; nothing where it comes from a file, or was not needed.

        Memory: the tokens.
        """
        written = self._written() if TOKENS in self._partial.done else {}
        return {name: bits for name, bits in written.items() if name == "written_in_bits"}

    def in_blocks(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Join the pieces of each block, so that no shard ends within one.

        Args:
            pieces: Of the model.
        Returns:
            What is in no block, then the blocks in their order.
        """
        outside: list[Piece] = []
        blocks: dict[int, list[Piece]] = {}
        for piece in pieces:
            number = self._number(piece)
            (outside if number is None else blocks.setdefault(number, [])).append(piece)
        for _, members in sorted(blocks.items()):
            fills = tuple(fill for piece in members for fill in piece.fills)
            outside.append(Piece(fills=fills, outputs=tuple(output for piece in members for output in piece.outputs)))
        return outside

    def fill(self, shard: Sequence[Piece], reading: Callable[[int], None]) -> set[str]:
        """Quantize the blocks of a shard into the model's storage.

        Args:
            shard: Pieces as `in_blocks` made them.
            reading: Called with the bytes that are read.
        Returns:
            Names of the weights that are filled.
        """
        filled: set[str] = set()
        before = 0
        for number, piece in ((self._number(piece), piece) for piece in shard):
            if number is None:
                continue
            walk = self._reach(number)
            walk.step(lambda done, before=before: reading(before + done))  # type: ignore[misc]
            before += sum(fill.nbytes for fill in piece.fills)
            filled |= walk.packed_in(number)
        if filled:
            self._keep()
        return filled

    def end(self) -> None:
        """Take away what was only there for a later attempt."""
        self._forget(set())

    def _number(self, piece: Piece) -> int | None:
        """The block that a piece is in: by its names in the model, else by those on disk, which are told by what fills them."""
        targets = {target for fill in piece.fills for target in fill.targets}
        names = {output.name for output in piece.outputs if output.name} or targets
        numbers = {number for name in names if (number := self._decoder.number_of(name)) is not None}
        return min(numbers) if numbers else None

    def _reach(self, number: int) -> Walk:
        """The walk, at a block: gone on with, taken up, or from the first block on once more."""
        if self._walk is None:
            self._walk = self._make(self._tokens())
            found = [at for at in self._kept() if at <= number]
            self._walk.begin(*((*self._read(found[-1]), found[-1]) if found else ()))
        while self._walk.next < number:  # what these blocks become is on the disk already
            passed = self._walk.next
            self._walk.step()
            empty(self._walk.model, self._walk.packed_in(passed))
        assert self._walk.next == number
        return self._walk

    def _tokens(self) -> Tensor:
        if TOKENS not in self._partial.done:
            made = self._text()
            wrote = {} if made.bits is None else {"written_in_bits": made.bits}
            self._partial.write(TOKENS, [json.dumps({"schema": 1, **wrote, "tokens": made.tokens.tolist()}).encode()])
        return torch.tensor(self._written()["tokens"], dtype=torch.int64)

    def _written(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self._partial.path / TOKENS).read_bytes())
        return told

    def _kept(self) -> list[int]:
        names = [name for name in self._partial.done if name.startswith(_INPUTS)]
        return sorted(int(name.removeprefix(_INPUTS)) for name in names)

    def _keep(self) -> None:
        walk = self._walk
        assert walk is not None
        # What goes into the first block of this shard, which is not on the disk yet: an earlier attempt may have come as far.
        begun = max((at for at in self._kept() if at < walk.next), default=walk.next)
        if walk.next < self._decoder.count:
            name = f"{_INPUTS}{walk.next}"
            header = json.dumps([list(walk.hidden.shape), str(walk.hidden.dtype).removeprefix("torch.")]).encode()
            streams = [stream.reshape(-1).view(torch.uint8).numpy().data for stream in (walk.hidden, walk.clean)]
            self._partial.write(name, [header.ljust(_HEADER), *streams])
        self._forget({begun, walk.next})

    def _forget(self, wanted: set[int]) -> None:
        for number in set(self._kept()) - wanted:
            name = f"{_INPUTS}{number}"
            del self._partial.done[name]
            (self._partial.path / name).unlink()

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        path = self._partial.path / f"{_INPUTS}{number}"
        with path.open("rb") as file:
            shape, dtype = json.loads(file.read(_HEADER))
            hidden, clean = (spilled(tuple(shape), getattr(torch, dtype)) for _ in range(2))
            for stream in (hidden, clean):
                file.readinto(stream.reshape(-1).view(torch.uint8).numpy().data)
        return hidden, clean


_HEADER = 128
