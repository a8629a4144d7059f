"""The part of a save that has to do with calibration: where it goes on after it was cut off, again and again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlazy.calibrating.blocks import Decoder
from qlazy.calibrating.tokens import Text
from qlazy.saving.calibrated import CalibratedSave
from qlazy.saving.folder import writing
from qlazy.saving.pieces import Piece

DECODER = Decoder(path="model", list_path="model.layers", count=6)


class Steps:
    """Stands in for a walk: each block adds one."""

    def __init__(self, tokens: Tensor) -> None:
        self.model, self.done, self.walked = torch.nn.Module(), None, []
        self.start = tokens.to(torch.float32).unsqueeze(-1)

    def begin(self, hidden: Tensor | None = None, clean: Tensor | None = None, at: int = 0) -> None:
        self.hidden, self.clean, self.next = (
            self.start if hidden is None else hidden,
            self.start if clean is None else clean,
            at,
        )

    def step(self, reading: Any = None) -> None:
        self.walked.append(self.next)
        self.hidden, self.next = self.hidden + 1, self.next + 1

    def packed_in(self, number: int) -> set[str]:
        return {f"model.layers.{number}.weight"}


def shard(*numbers: int) -> list[Piece]:
    pieces = [(SimpleNamespace(targets=(f"model.layers.{number}.weight",), nbytes=1),) for number in numbers]
    return [Piece(fills=fills, outputs=()) for fills in pieces]  # type: ignore[arg-type]


def attempt(folder: Path, *, fails_at: int) -> tuple[list[int], Tensor]:
    """Walks through shards of two blocks, and is cut off before one of them is on the disk."""
    made: list[Steps] = []

    def make(tokens: Tensor) -> Any:
        made.append(Steps(tokens))
        return made[0]

    with pytest.raises(KeyboardInterrupt), writing(folder, "key") as partial:
        saved = CalibratedSave(partial, lambda: Text(tokens=torch.arange(6).view(2, 3)), make, DECODER)
        for first in range(0, DECODER.count, 2):
            if f"shard-{first}" in partial.done:
                continue
            saved.fill(shard(first, first + 1), lambda done: None)
            if first == fails_at:
                raise KeyboardInterrupt
            partial.write(f"shard-{first}", [b"written"])
    return made[0].walked, made[0].hidden


def test_a_shard_that_fails_again_and_again_begins_at_its_first_block(tmp_path):
    assert attempt(tmp_path / "saved", fails_at=2)[0] == [0, 1, 2, 3]
    for _ in range(3):
        walked, hidden = attempt(tmp_path / "saved", fails_at=2)
        assert walked == [2, 3] and torch.equal(hidden[..., 0], torch.arange(6.0).view(2, 3) + 4)
    assert attempt(tmp_path / "saved", fails_at=4)[0] == [2, 3, 4, 5]
    assert attempt(tmp_path / "saved", fails_at=4)[0] == [4, 5]
