"""What is filled from what: stored tensors on one side, tensors of the model on the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.errors import CorruptCheckpoint
from qlazy.layers.quant_linear import ROW_BLOCK
from qlazy.sources.packed import PackedTensor
from qlazy.sources.source import TensorInfo

Convert = Callable[[list[Tensor]], dict[str, Tensor]]
"""Stored tensors, in the order of `Fill.sources`, to tensors of the model by name."""


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Stored tensors that together become tensors of the model."""

    sources: tuple[TensorInfo, ...]
    """What is read."""
    targets: tuple[str, ...]
    """Names in the model."""
    convert: Convert | None = None
    """None: one tensor whose rows go straight to their place, a chunk at a time. Else it is read as a whole and converted."""
    spans: tuple[tuple[int, int], ...] = ()
    """First row, and one past the last, that are read of each source; none = all of every source."""
    target_row: int = 0
    """Row of the target at which they go. All dimensions but the last are rows, as in `row_count`."""
    row_order: Tensor | None = None
    """int64 (rows,): the row of the model that each stored row becomes; None = the same."""
    row_block: int = ROW_BLOCK
    """Rows that must come together: a multiple of 64, and of the blocks within which `row_order` moves rows."""

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(bytes_of_rows(info, *span) for info, span in zip(self.sources, self.all_spans, strict=True))

    @property
    def all_spans(self) -> tuple[tuple[int, int], ...]:
        """First row of each source, and one past the last."""
        return self.spans or tuple((0, row_count(info.shape)) for info in self.sources)


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor as it is read and placed: all dimensions but the last; a vector's elements are rows of one.

    Args:
        shape: Any shape.
    Returns:
        1 for a scalar.
    """
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def is_stored_so(owner: nn.Module, fill: Fill) -> bool:
    """Whether a tensor of the model is one stored tensor with its rows in their order; of a Conv1D it may be turned.

    Args:
        owner: The module that holds it, swapped or not.
        fill: What fills it.
    Returns:
        False where it is a part of a stored tensor, or made of several, or converted.
    """
    single = len(fill.sources) == len(fill.targets) == 1 and fill.row_order is None
    whole = single and fill.all_spans[0] == (0, row_count(fill.sources[0].shape))
    turned = isinstance(owner, Conv1D) or getattr(owner, "transposed", False) is True
    return whole and (fill.convert is None or turned)


def bytes_of_rows(info: TensorInfo, start: int, stop: int) -> int:
    """Bytes that are read for some rows; those of a weight of several parts by its rows' share, so that all rows add up to it.

    Args:
        info: A stored tensor.
        start: First row.
        stop: One past the last.
    Returns:
        Bytes.
    """
    rows = max(1, row_count(info.shape))
    return info.nbytes * stop // rows - info.nbytes * start // rows


def held_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes while it is read as a whole: stored or decoded, whichever is more; of one in low bits both.

    Args:
        info: A stored tensor.
    Returns:
        Bytes.
    """
    decoded = math.prod(info.shape) * dtype_of(info).itemsize
    return info.nbytes + decoded if isinstance(info, PackedTensor) else max(info.nbytes, decoded)


def straight_fill(model: PreTrainedModel, target: str, info: TensorInfo, placeholder: Tensor) -> Fill:
    """The fill of one tensor by one stored tensor of the same shape.

    Args:
        model: A placeholder.
        target: The tensor's name in it.
        info: The stored tensor.
        placeholder: The tensor.
    Returns:
        The fill.
    Raises:
        CorruptCheckpoint: the shapes differ.
    """
    is_conv1d = isinstance(model.get_submodule(target.rpartition(".")[0]), Conv1D) and len(info.shape) == 2
    if is_conv1d and isinstance(info, PackedTensor) and tuple(placeholder.shape) == info.shape[::-1]:
        # Whoever packs a transposed layer turns it first, as every library does.
        return Fill(sources=(info,), targets=(target,), convert=lambda tensors: {target: tensors[0].t()})
    if tuple(placeholder.shape) != info.shape:
        raise CorruptCheckpoint(
            f"{info.path.name}: tensor {info.name!r} has shape {list(info.shape)}, but {type(model).__name__} has "
            f"{list(placeholder.shape)} for {target!r}.",
            hint="config.json and the weights belong to different models; download both again.",
        )
    if is_conv1d:
        return Fill(sources=(info,), targets=(target,), convert=lambda tensors: {target: tensors[0]})
    return Fill(sources=(info,), targets=(target,))


def dtype_of(info: TensorInfo) -> torch.dtype:
    """Torch's dtype of a stored tensor; float32 for GGUF's block types, which are decoded to it.

    Args:
        info: The stored tensor.
    Returns:
        A dtype.
    """
    found = getattr(torch, info.dtype, None)
    return found if isinstance(found, torch.dtype) else torch.float32
