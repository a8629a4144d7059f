"""Fill a placeholder with the values that building the model eagerly would give, straight into packed storage."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlazy.lazy.log import record_of
from qlazy.lazy.shard import is_cuttable, materialize_shard
from qlazy.match import Match
from qlazy.matching.fill import Fill, bytes_of_rows, row_count, straight_fill
from qlazy.matching.fill_experts import by_expert
from qlazy.placeholder import construct
from qlazy.planning.plan import RING_BYTES
from qlazy.reading.chunks import Chunk, worker_count
from qlazy.sources.source import Source, TensorInfo

RUN_ELEMENTS = 1 << 26
"""What a worker draws at a time: to jump to where it starts takes as long as drawing some 5 million elements."""


class Drawn:
    """In the place of `Stream`: makes rows and hands them on, in about the order in which the generator drew them.

    Args:
        reference: The model as it is built eagerly, without memory.
        fills: What becomes of what; those of one tensor one after the other.
        place: Called with every piece.
        chunk_bytes: Size of the pieces, unless 64 rows, or a matrix that is converted, have more.
        ring_bytes: Bytes of all pieces at a time, unless one has more.

    Memory: a piece for each worker; a whole tensor, one at a time, where its operations cannot be cut.
    """

    def __init__(
        self,
        reference: nn.Module,
        fills: tuple[Fill, ...],
        place: Callable[[Chunk, list[Tensor]], None],
        chunk_bytes: int,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self._tensors: dict[str, Tensor] = dict(reference.named_parameters()) | dict(reference.named_buffers())
        self._fills = fills
        self._place = place
        self._chunk_bytes = chunk_bytes
        self._ring_bytes = ring_bytes
        self._count = threading.Lock()
        self._whole = threading.Lock()
        self.bytes_done = 0

    def __enter__(self) -> Drawn:
        """As a stream is entered."""
        self._torch_threads = torch.get_num_threads()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to close; what workers set is set back, for threads that are started later."""
        self._tensors.clear()
        torch.set_num_threads(self._torch_threads)

    def __iter__(self) -> Iterator[int]:
        """Draw and place in workers, each with one thread for an operation as in a stream, so that sums are the same.

        Yields:
            Bytes done so far, after each run of rows.
        """
        largest = max((self._piece_bytes(fill) for fill in self._fills), default=1)
        workers = max(1, min(worker_count(self._fills), self._ring_bytes // max(1, largest)))
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
        for name, group in itertools.groupby(self._fills, lambda fill: fill.targets[0]):
            tensor = self._tensors[name].detach()
            for rows in self._parts(tensor, tuple(group)):
                run.append(rows)
                room -= sum(stop - start for start, stop in rows.spans) * _columns(tensor)
                if room <= 0:
                    yield run
                    run, room = [], RUN_ELEMENTS
        yield run

    def _parts(self, tensor: Tensor, fills: tuple[Fill, ...]) -> Iterator[_Rows]:
        """Rows of one tensor, about as many elements as a run has; all at once where they cannot be made in parts."""
        if tensor.dim() == 0 or not is_cuttable(tensor):
            yield _Rows(tensor, fills, tuple(fill.all_spans[0] for fill in fills), is_whole=True)
            return
        for fill in fills:
            first, last = fill.all_spans[0]
            step = self._rows_of(fill, RUN_ELEMENTS * tensor.element_size())
            for start in range(first, last, step):
                yield _Rows(tensor, (fill,), ((start, min(last, start + step)),), is_whole=False)

    def _make(self, run: list[_Rows]) -> None:
        for rows in run:
            with self._whole if rows.is_whole else contextlib.nullcontext(), torch.no_grad():
                made = materialize_shard(rows.tensor) if rows.is_whole else rows.tensor
                for fill, span in zip(rows.fills, rows.spans, strict=True):
                    self._make_rows(fill, made, *span)

    def _make_rows(self, fill: Fill, made: Tensor, first: int, last: int) -> None:
        columns, step = _columns(made), self._rows_of(fill, self._chunk_bytes)
        for start in range(first, last, step):
            stop = min(last, start + step)
            values = made if made.dim() == 0 else materialize_shard(made, flat=slice(start * columns, stop * columns))
            values = values.view(-1, columns) if made.dim() > 1 else values
            self._place(Chunk(fill=fill, start=start, stop=stop), [values])
            with self._count:
                self.bytes_done += values.nbytes

    def _rows_of(self, fill: Fill, nbytes: int) -> int:
        """Rows that come together: of so many bytes, in blocks that low-bit layers can take, or all that are converted."""
        info = fill.sources[0]
        first, last = fill.all_spans[0]
        if fill.convert is not None:
            return max(1, last - first)
        rows = nbytes * max(1, row_count(info.shape)) // max(1, info.nbytes)
        return max(1, rows // fill.row_block) * fill.row_block

    def _piece_bytes(self, fill: Fill) -> int:
        first, last = fill.all_spans[0]
        return bytes_of_rows(fill.sources[0], first, min(last, first + self._rows_of(fill, self._chunk_bytes)))


class _Rows(NamedTuple):
    """Rows of one tensor."""

    tensor: Tensor
    fills: tuple[Fill, ...]
    spans: tuple[tuple[int, int], ...]
    """First row, and one past the last, of each fill."""
    is_whole: bool
    """Whether all of the tensor has to be made at once."""


def _columns(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() > 1 else 1


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
    fills = [fill for name in names for fill in by_expert(model, straight_fill(model, name, source.tensors[name], held[name]))]
    return Match(fills=tuple(fills), unexpected=(), missing=())


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
