"""What is written of each tensor of a model: from its storage to tensors by their names on disk, and to bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlazy.layers.packed_stack import PackedStack
from qlazy.saving.layout_config import Layout
from qlazy.saving.layouts import cut_rows, to_stored
from qlazy.saving.pieces import Output
from qlazy.saving.shards import StoredTensor


def stored(tensors: Mapping[str, Tensor]) -> list[StoredTensor]:
    """Tensors as a shard takes them.

    Args:
        tensors: By name.
    Returns:
        The same, as bytes.

    Memory: views; a copy of what is not contiguous or not on the host.
    """
    made = []
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = str(tensor.dtype).removeprefix("torch.")
        made.append(StoredTensor(name=name, dtype=dtype, shape=tuple(tensor.shape), data=flat.numpy().data))
    return made


def output_tensors(layout: Layout, output: Output, owner: nn.Module) -> dict[str, Tensor]:
    """What is written of one tensor of a model.

    Args:
        layout: Whose layout.
        output: Which.
        owner: The module that holds it.
    Returns:
        Tensors by their names on disk.

    Memory: as `to_stored`.
    """
    if output.format is None:
        held: Tensor = getattr(owner, output.name.rpartition(".")[2])
        return {output.key: held}
    stack = owner._modules.get(output.name.rpartition(".")[2])
    layer: Any = owner
    if isinstance(stack, PackedStack):
        layer = stack.layer(output.rows.expert if output.rows else 0)
    held_by_name: dict[str, Tensor] = {name: getattr(layer, name) for name in layer.storage}
    rows, columns = output.shape[-2:]
    if output.rows is not None and rows < layer.out_features:
        held_by_name = cut_rows(output.format, held_by_name, output.rows.start, output.rows.stop)
    path = output.key.removesuffix(".weight")
    made = to_stored(layout, output.format, held_by_name, rows, columns, getattr(torch, output.dtype))
    return {f"{path}.{name}": tensor for name, tensor in made.items()}


def by_stack(outputs: Sequence[Output], made: Sequence[dict[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """All experts' words, then all their scales, and so on: so a stack of them is one stretch of the file.

    Args:
        outputs: What is written.
        made: Tensors of each by their names on disk.
    Yields:
        Tensors that follow each other.
    """
    stacks: dict[str, list[dict[str, Tensor]]] = {}
    for output, tensors in zip(outputs, made, strict=True):
        stacks.setdefault(output.rows.name if output.rows else output.key, []).append(tensors)
    for alike in stacks.values():
        for column in zip(*(tensors.items() for tensors in alike), strict=True):
            yield list(column)
