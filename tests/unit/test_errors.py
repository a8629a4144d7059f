"""The tree of errors: what each is caught as, the exit code, and the hint in its text."""

from __future__ import annotations

import inspect
import pickle

import pytest

from qlazy import errors
from qlazy.errors import DoesNotFit, OutOfSpace, QlazyError

TREE = {
    "QlazyError": (1, Exception),
    "UsageError": (2, ValueError),
    "ModelNotFound": (3, FileNotFoundError),
    "GatedModel": (3, errors.ModelNotFound),
    "HubUnreachable": (3, errors.ModelNotFound),
    "UnsupportedModel": (3, QlazyError),
    "DoesNotFit": (4, MemoryError),
    "CorruptCheckpoint": (5, ValueError),
    "IncompleteCheckpoint": (5, errors.CorruptCheckpoint),
    "DeviceUnavailable": (6, RuntimeError),
    "OutOfSpace": (1, OSError),
}


def test_tree_is_whole():
    assert {name for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, QlazyError)} == set(TREE)


@pytest.mark.parametrize("name", TREE)
def test_error_has_its_code_and_is_caught_as_pythons_own(name):
    cls, (code, base) = getattr(errors, name), TREE[name]
    assert issubclass(cls, QlazyError) and issubclass(cls, base) and cls.exit_code == code
    with pytest.raises(base) as caught:
        raise cls("what and where", hint="do this")
    assert str(caught.value) == "what and where\ndo this"
    assert str(cls("what and where")) == "what and where"
    assert cls.__doc__


def test_the_table_in_the_docstring_has_the_codes():
    for name, (code, _) in TREE.items():
        (line,) = [line for line in (errors.__doc__ or "").splitlines() if f" {name}" in line or line.lstrip().startswith(name)]
        assert f" {code}" in line


def test_does_not_fit_carries_its_numbers():
    error = DoesNotFit("too large", hint="smaller", needed_bytes=5, free_bytes=3)
    assert (error.needed_bytes, error.free_bytes, error.hint) == (5, 3, "smaller")


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(OutOfSpace("the disk is full", hint="make room")))
    assert type(error) is OutOfSpace and error.message == "the disk is full" and error.hint == "make room"
    error = pickle.loads(pickle.dumps(DoesNotFit("too large", hint="smaller", needed_bytes=5, free_bytes=3)))
    assert (error.needed_bytes, error.free_bytes) == (5, 3)
