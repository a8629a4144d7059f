"""Numpy arrays that share memory with tensors: a write to one must show in the other."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from qlazy.lazy.log import Op, Record, Version, geometry_of
from qlazy.lazy.replay import plain, replay


class NumpyView:
    """A numpy array that was handed out for a recorded tensor.

    Args:
        array: The array; dead when nobody can write to it any more.
        real: The tensor whose memory it shares.
        record: The storage that it stands for.
    """

    def __init__(self, array: weakref.ref[Any], real: Tensor, record: Record) -> None:
        self.record = record
        self._array = array
        self._real = real
        self._kept = real.untyped_storage().clone()

    @classmethod
    def of(cls, real: Tensor, record: Record) -> tuple[NumpyView, Any]:
        """Hand an array out.

        Args:
            real: Memory for it, of its own.
            record: The storage that it stands for.
        Returns:
            The view, and the array.
        """
        with plain():
            array = real.numpy(force=True)
            return cls(weakref.ref(array), real, record), array

    def is_alive(self) -> bool:
        """Whether somebody has the array."""
        return self._array() is not None

    def take_over(self) -> None:
        """Write down what numpy wrote."""
        with plain():
            storage = self._real.untyped_storage()
            if not torch.equal(_bytes(storage), _bytes(self._kept)):
                self._kept = storage.clone()
                slot = self.record.slot
                self.record.version = Version(slot, Op.constant(storage.clone(), slot, geometry_of(self._real)))

    def show(self) -> None:
        """Let the array see what torch wrote."""
        with plain():
            storage = replay([self.record.version])[self.record.slot]
            _bytes(self._real.untyped_storage()).copy_(_bytes(storage))
            self._kept = storage


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
