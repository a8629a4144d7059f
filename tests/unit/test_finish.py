"""The end of a load: the proof that every tensor has storage and came to its last row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qlazy.errors import IncompleteCheckpoint
from qlazy.finish import finish, require_storage
from qlazy.match import Match
from qlazy.matching.fill import Fill
from qlazy.sources.source import TensorInfo


def test_what_has_no_storage_is_named_and_counted():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2), nn.BatchNorm1d(2, device="meta"))
    with pytest.raises(IncompleteCheckpoint, match=r"tiny: 7 tensors have no storage .*: 0\.weight, 0\.bias, 2\.weight\."):
        require_storage(model, "tiny")
    require_storage(model[1], "tiny")


def test_rows_that_never_came_are_named():
    info = TensorInfo(name="w", shape=(4, 2), dtype="float32", path=Path("x"), offset=0, nbytes=32)
    match = Match(fills=(Fill(sources=(info,), targets=("weight",)),), unexpected=(), missing=())
    placer: Any = SimpleNamespace(rows_left=lambda name: 3)
    source: Any = SimpleNamespace(model_id="tiny")
    model: Any = nn.Linear(2, 4, device=torch.device("cpu"))
    with pytest.raises(IncompleteCheckpoint, match="tiny: 3 rows of 'weight' were never filled"):
        finish(model, None, match, placer, source)  # type: ignore[arg-type]
