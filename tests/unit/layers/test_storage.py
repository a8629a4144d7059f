"""Storage taken ahead: what the plan names comes from there, anything else is made, nothing is left."""

from __future__ import annotations

import pytest
import torch

from qlazy import native
from qlazy.formats import Int8
from qlazy.layers import storage
from qlazy.layers.storage import allocate, taken_ahead
from qlazy.planning.budget import make_budget
from qlazy.planning.data import Plan, TensorPlan
from qlazy.planning.recipe import make_recipe

ROWS, COLUMNS = 1024, 4096


def plan_of(*devices: str) -> Plan:
    """One int8 weight on each device."""
    tensors = tuple(
        TensorPlan(
            name=f"{number}.weight",
            shape=(ROWS, COLUMNS),
            format=Int8(),
            kind="linear",
            dtype="bfloat16",
            reason="",
            device=device,
            nbytes=0,
            source_nbytes=0,
        )
        for number, device in enumerate(devices)
    )
    return Plan(
        model_id="m",
        resolved="m",
        recipe=make_recipe(bits=8),
        budget=make_budget("cpu", None, reserve=0, max_model_len=1),
        dtype="bfloat16",
        tensors=tensors,
        devices=(),
        exact=False,
    )


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
def test_what_the_plan_names_is_taken_once_and_in_order() -> None:
    with taken_ahead(plan_of("cpu", "cuda:0", "cpu")):
        ahead = storage._ahead.get()
        assert ahead is not None
        ahead.thread.join()  # all is taken, as nobody asked before
        held = [tensor.data_ptr() for tensor in ahead.taken[(ROWS, COLUMNS), torch.uint8]]
        assert len(held) == 2, "none for a GPU"
        taken = [allocate((ROWS, COLUMNS), torch.uint8, "cpu") for _ in range(3)]
        assert [tensor.data_ptr() for tensor in taken[:2]] == held and taken[2].data_ptr() not in held
        other = allocate((3, 5), torch.float32, "cpu")
        assert other.shape == (3, 5) and other.dtype == torch.float32
        assert allocate((ROWS, COLUMNS), torch.uint8, "meta").is_meta
    for tensor in taken:
        tensor.fill_(1)
    assert not ahead.taken, "what nobody took is given back"
    assert storage._ahead.get() is None


def test_a_build_that_fails_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), taken_ahead(plan_of("cpu")):
        ahead = storage._ahead.get()
        raise ZeroDivisionError
    assert ahead is not None and not ahead.taken and not ahead.thread.is_alive()


def test_without_compiled_loops_all_is_made_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with taken_ahead(plan_of("cpu")):
        assert allocate((ROWS, COLUMNS), torch.uint8, "cpu").shape == (ROWS, COLUMNS)


def test_allocate() -> None:
    made = allocate((5, 7), torch.bfloat16, "cpu")
    assert made.shape == (5, 7) and made.dtype == torch.bfloat16 and allocate((), torch.float32, "cpu").shape == ()
