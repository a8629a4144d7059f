"""The story refuses what it cannot tell to its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlazy.errors import UsageError
from qlazy.load import _require_one_kind


def plan_on(*devices: str) -> Any:
    return SimpleNamespace(model_id="m", tensors=[SimpleNamespace(device=device) for device in devices])


def test_a_model_on_gpus_and_the_host_is_refused_by_the_names_of_both():
    with pytest.raises(UsageError, match="m would lie on cpu, cuda:0") as caught:
        _require_one_kind(plan_on("cuda:0", "cpu", "cuda:0"))
    assert caught.value.hint
    _require_one_kind(plan_on("cuda:0", "cuda:1"))
    _require_one_kind(plan_on("cpu"))
