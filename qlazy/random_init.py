"""Fill a placeholder with the values that building the model eagerly would give, straight into packed storage."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlazy.chunks import Chunk, worker_count
from qlazy.fill import Fill, row_count, straight_fill
from qlazy.lazy.log import record_of
from qlazy.lazy.shard import is_cuttable, materialize_rows, materialize_shard
from qlazy.match import Match
from qlazy.placeholder import construct
from qlazy.source import Source, TensorInfo

RUN_ELEMENTS = 1 << 26
"""What a worker draws at a time: to jump to where it starts takes as long as drawing some 5 million elements."""


class Drawn:
    """In the place of `Stream`: makes rows and hands them on, in about the order in which the generator drew them.

    Args:
        reference: The model as it is built eagerly, without memory.
        fills: What becomes of what.
        place: Called with every piece.
        chunk_bytes: Size of the pieces.

    Memory: a piece for each worker; a whole tensor, one at a time, where its operations cannot be cut.
    """

    def __init__(
        self, reference: nn.Module, fills: tuple[Fill, ...], place: Callable[[Chunk, list[Tensor]], None], chunk_bytes: int
    ) -> None:
        self._tensors: dict[str, Tensor] = dict(reference.named_parameters()) | dict(reference.named_buffers())
        self._fills = fills
        self._place = place
        self._chunk_bytes = chunk_bytes
        self._count = threading.Lock()
        self._whole = threading.Lock()
        self.bytes_done = 0

    def __enter__(self) -> Drawn:
        """As a stream is entered."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to close."""
        self._tensors.clear()

    def __iter__(self) -> Iterator[int]:
        """Draw and place in workers, each with one thread for an operation as in a stream, so that sums are the same.

        Yields:
            Bytes done so far, after each run of rows.
        """
        workers = worker_count(self._fills)
        with ThreadPoolExecutor(workers, "qlazy-draw", lambda: torch.set_num_threads(1)) as pool:
            running: set[Future[None]] = set()
            for run in self._runs():
                running.add(pool.submit(self._make, run))
                if len(running) > workers:
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                    yield self.bytes_done
            for task in running:
                task.result()
        yield self.bytes_done

    def _runs(self) -> Iterator[list[_Rows]]:
        """What each worker makes at a time: rows that are drawn one after the other, across tensors."""
        run: list[_Rows] = []
        room = RUN_ELEMENTS
        for fill in self._fills:
            (name,) = fill.targets
            tensor = self._tensors[name].detach()
            rows, start = tensor.shape[0] if tensor.dim() else 1, 0
            row = max(1, tensor.numel() // max(1, rows))
            whole = fill.convert is not None or tensor.dim() == 0 or not is_cuttable(tensor)
            while start < rows:
                stop = rows if whole else min(rows, start + self._blocks_of(fill, tensor, room // row))
                run.append(_Rows(fill, tensor, start, stop, whole))
                room -= (stop - start) * row
                start = stop
                if room <= 0:
                    yield run
                    run, room = [], RUN_ELEMENTS
        yield run

    def _make(self, run: list[_Rows]) -> None:
        for rows in run:
            with self._whole if rows.whole else contextlib.nullcontext(), torch.no_grad():
                for chunk, values in self._pieces(rows):
                    self._place(chunk, [values])
                    with self._count:
                        self.bytes_done += values.nbytes

    def _pieces(self, rows: _Rows) -> Iterator[tuple[Chunk, Tensor]]:
        fill, tensor = rows.fill, rows.tensor
        if fill.convert is not None or tensor.dim() == 0:
            yield Chunk(fill=fill, start=0, stop=row_count(tuple(tensor.shape))), materialize_shard(tensor)
            return
        inner = math.prod(tensor.shape[1:-1])
        row_bytes = inner * tensor.shape[-1] * tensor.element_size() if tensor.dim() > 1 else tensor.element_size()
        step = self._blocks_of(fill, tensor, self._chunk_bytes // max(1, row_bytes))
        for start, values in materialize_rows(tensor, step, rows.start, rows.stop):
            values = values.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else values
            yield Chunk(fill=fill, start=start * inner, stop=start * inner + values.shape[0]), values

    def _blocks_of(self, fill: Fill, tensor: Tensor, rows: int) -> int:
        """So many rows of the first dimension, or fewer, that low-bit layers can take: whole blocks, and at least one."""
        block = fill.row_block // math.gcd(fill.row_block, math.prod(tensor.shape[1:-1]))
        return max(1, rows // block) * block


class _Rows(NamedTuple):
    """Rows of one tensor."""

    fill: Fill
    tensor: Tensor
    start: int
    stop: int
    whole: bool
    """Whether all of it has to be made at once."""


def build_reference(
    source: Source, dtype: torch.dtype, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model as its class builds it, with what initializes it written down.

    Args:
        source: A source with a config.
        dtype: Dtype of parameters.
        attn_implementation: As in transformers; None takes its choice.
        trust_remote_code: Whether Python code from the model's folder may be run.
    Returns:
        The model without memory; the default generator stands where it stood.
    """
    return construct(source, dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)[0]


def drawn_source(source: Source, dtype: str, *, trust_remote_code: bool = False) -> Source:
    """The source as if a checkpoint held what building the model gives.

    Args:
        source: A source with a config.
        dtype: Name of the dtype of parameters.
        trust_remote_code: Whether Python code from the model's folder may be run.
    Returns:
        A source that can be planned for; no file of it exists.
    """
    return with_tensors(source, build_reference(source, getattr(torch, dtype), trust_remote_code=trust_remote_code))


def with_tensors(source: Source, reference: PreTrainedModel) -> Source:
    """The source as if a checkpoint held what the model holds.

    Args:
        source: A source with a config.
        reference: The model; its tensors are not looked at.
    Returns:
        A source that can be planned for; no file of it exists.
    """
    saved = [*reference.named_parameters(), *((n, b) for n, b in reference.named_buffers() if _is_saved(reference, n))]
    tensors = {
        name: TensorInfo(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            path=Path("(drawn)"),
            offset=0,
            nbytes=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in saved
    }
    # How a checkpoint stored its weights says nothing of what is drawn.
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    return dataclasses.replace(source, config=config, tensors=tensors)


def match_drawn(model: PreTrainedModel, source: Source, reference: PreTrainedModel) -> Match:
    """In the place of `match_tensors`: every tensor becomes the one of its name.

    Args:
        model: A placeholder.
        source: From `with_tensors`.
        reference: The model that draws; its order of drawing is the order of the fills.
    Returns:
        The match; nothing is missing.
    """
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    order = _drawing_order(reference)
    names = sorted(source.tensors, key=lambda name: order[name])
    fills = tuple(straight_fill(model, name, source.tensors[name], held[name]) for name in names)
    return Match(fills=fills, unexpected=(), missing=())


def _drawing_order(reference: nn.Module) -> dict[str, int]:
    """When each tensor got its values: numbers to sort by."""
    found: dict[str, int] = {}
    for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
        record = record_of(tensor)
        found[name] = -1 if record is None else record.version.op.order
    return found


def _is_saved(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(path)._non_persistent_buffers_set
