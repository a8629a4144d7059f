"""What is written of a shard: its tensors are read, quantized into the model's storage, and given their names on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint
from qlazy.layers.quant_linear import NonFiniteError, require_finite
from qlazy.matching.fill import Fill, row_count
from qlazy.place import Placer
from qlazy.planning.plan import Plan
from qlazy.reading.chunks import CACHED_BYTES, Chunk, worker_count
from qlazy.saving.layout_config import Layout
from qlazy.saving.outputs import by_stack, output_tensors
from qlazy.saving.pieces import Output, Piece
from qlazy.stream import Stream


def fill_shard(
    model: PreTrainedModel,
    plan: Plan,
    shard: Sequence[Piece],
    layout: Layout,
    drop_page_cache: bool,
    reading: Callable[[int], None],
    filled: Collection[str] = (),
) -> dict[str, Tensor]:
    """Read and quantize one shard.

    Args:
        model: A placeholder, its layers swapped.
        plan: The exact plan.
        shard: What is in the shard.
        layout: Whose layout it has.
        drop_page_cache: Give the file pages that reading brings in back to the kernel.
        reading: Called with the bytes that are read.
        filled: Tensors of the model that have been filled otherwise.
    Returns:
        What is to be written, by its names on disk.
    Raises:
        CorruptCheckpoint: a damaged file, by name of file and tensor.

    Memory: the shard's tensors, and the ring of a load.
    """
    outputs = [output for piece in shard for output in piece.outputs]
    names = {output.name for output in outputs} - set(filled)
    placer = Placer(model, dataclasses.replace(plan, tensors=tuple(t for t in plan.tensors if t.name in names)))
    passed = _Passed([output for output in outputs if not output.name])

    def place(chunk: Chunk, tensors: list[Tensor]) -> None:
        (passed if chunk.fill.targets[0] in passed.tensors else placer).place(chunk, tensors)

    wanted = (fill for piece in shard for fill in piece.fills if not set(fill.targets) <= set(filled))
    fills = tuple(sorted(wanted, key=_file_order))
    with Stream(fills, place, worker_count(fills), drop_page_cache, None, CACHED_BYTES) as stream:
        for done in stream:
            reading(done)
    made: list[dict[str, Tensor]] = []
    for output in outputs:
        if output.name in filled:
            left = 0
        else:
            left = placer.rows_left(output.name) if output.name else passed.rows_left(output.key)
        if left:
            raise IncompleteCheckpoint(f"{plan.model_id}: {left} rows of {output.key!r} were never filled.")
        if output.name:
            made.append(output_tensors(layout, output, model.get_submodule(output.name.rpartition(".")[0])))
        else:
            made.append({output.key: passed.tensors[output.key]})
    tensors = [item for piece in by_stack(outputs, made) for item in piece]
    assert len(dict(tensors)) == len(tensors), "two tensors of one name"
    return dict(tensors)


def _file_order(fill: Fill) -> tuple[str, int]:
    return str(fill.sources[0].path), fill.sources[0].offset


class _Passed:
    """Stored tensors that go from file to file, cast to the dtype of the model."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.tensors = {output.key: torch.empty(output.shape, dtype=getattr(torch, output.dtype)) for output in outputs}
        self._rows = {output.key: row_count(output.shape) for output in outputs}

    def place(self, chunk: Chunk, tensors: list[Tensor]) -> None:
        info, values = chunk.fill.sources[0], tensors[0]
        whole = self.tensors[info.name]
        rows = whole.view(-1, whole.shape[-1]) if whole.dim() > 1 else whole.reshape(-1)
        try:
            if values.is_floating_point():
                require_finite(values)
        except NonFiniteError:
            raise CorruptCheckpoint(
                f"{info.path.name}: tensor {info.name!r} holds a NaN or an infinity in rows {chunk.start} to {chunk.stop}.",
                hint="The file is damaged; download it again, e.g. with `hf download --force-download`.",
            ) from None
        rows[chunk.start : chunk.stop].copy_(values.reshape(rows[chunk.start : chunk.stop].shape))
        self._rows[info.name] -= chunk.stop - chunk.start

    def rows_left(self, key: str) -> int:
        return self._rows[key]
