"""Put chunks where they belong: quantized straight into packed storage, or copied into a tensor of the model's dtype."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from qlazy.errors import CorruptCheckpoint
from qlazy.fill import row_count
from qlazy.plan import Plan
from qlazy.quant_linear import NonFiniteError, QuantLinear, allocate, require_finite
from qlazy.stream import Chunk


class Placer:
    """Final storage of a model, and the account of what has been filled.

    Args:
        model: A placeholder with its layers swapped. Everything that `plan` names gets storage now; pages stay untouched until
            filled.
        plan: The exact plan.

    Memory: the bytes that the plan gives each device.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._owners = {tensor.name: model.get_submodule(tensor.name.rpartition(".")[0]) for tensor in plan.tensors}
        self._rows_placed = dict.fromkeys(self._owners, 0)
        self._lock = threading.Lock()
        for tensor in plan.tensors:
            owner, leaf = self._owners[tensor.name], tensor.name.rpartition(".")[2]
            if isinstance(owner, QuantLinear) and leaf == "weight":
                owner.allocate(tensor.device)
                continue
            held: Tensor = getattr(owner, leaf)
            storage = allocate(held.shape, held.dtype, tensor.device) if held.is_meta else held.to(tensor.device)
            setattr(owner, leaf, storage if leaf in owner._buffers else nn.Parameter(storage, requires_grad=False))

    def place(self, chunk: Chunk, tensors: list[Tensor]) -> None:
        """Put one chunk in its place. Called from several threads, for different rows.

        Args:
            chunk: What it is.
            tensors: Its values on the host; only used during the call.
        Raises:
            CorruptCheckpoint: a weight is NaN or infinite, or a tensor came twice.

        Memory: a quantizer's work buffers, or the result of a conversion; on a GPU also the chunk.
        """
        fill = chunk.fill
        if fill.convert is not None:
            for target, values in fill.convert(tensors).items():
                self._place_rows(target, 0, values, chunk)
            return
        values = tensors[0]
        if fill.row_order is not None:
            values = values[torch.argsort(fill.row_order[chunk.start : chunk.stop])]
        self._place_rows(fill.targets[0], chunk.start, values, chunk)

    def rows_left(self, name: str) -> int:
        """Rows of a tensor that have not come.

        Args:
            name: A tensor of the plan.
        Returns:
            0 where it is complete.
        """
        return self._extent(name) - self._rows_placed[name]

    def _place_rows(self, target: str, start: int, values: Tensor, chunk: Chunk) -> None:
        owner, leaf = self._owners[target], target.rpartition(".")[2]
        try:
            if isinstance(owner, QuantLinear) and leaf == "weight":
                owner.fill(values, start)
            else:
                values = _as_rows(values.contiguous())
                if leaf in owner._parameters and values.is_floating_point():
                    require_finite(values)
                whole = _as_rows(getattr(owner, leaf).data)
                whole[start : start + values.shape[0]].copy_(values)
        except NonFiniteError:
            source = chunk.fill.sources[0]
            raise CorruptCheckpoint(
                f"{source.path.name}: tensor {source.name!r} holds a NaN or an infinity in rows {start} to "
                f"{start + values.shape[0]}.",
                hint="The file is damaged; download it again, e.g. with `hf download --force-download`.",
            ) from None
        with self._lock:
            self._rows_placed[target] += (
                values.shape[1] if getattr(owner, "transposed", False) and values.dim() > 1 else values.shape[0]
            )
            if self._rows_placed[target] > self._extent(target):
                raise CorruptCheckpoint(
                    f"Tensor {target!r} was filled twice: two stored tensors have the same place in the model."
                )

    def _extent(self, name: str) -> int:
        owner, leaf = self._owners[name], name.rpartition(".")[2]
        if isinstance(owner, QuantLinear) and leaf == "weight":
            return owner.out_features
        return row_count(tuple(getattr(owner, leaf).shape))


def _as_rows(tensor: Tensor) -> Tensor:
    """The tensor as rows of its last dimension, as it is read; vectors stay, a scalar becomes one."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 2 else tensor.reshape(1) if tensor.dim() == 0 else tensor
