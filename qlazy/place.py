"""Put chunks where they belong: quantized straight into packed storage, or copied into a tensor of the model's dtype.

What goes to a GPU goes through its queue, and is quantized there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qlazy.errors import CorruptCheckpoint
from qlazy.layers.quant_linear import ROW_BLOCK, NonFiniteError, QuantLinear, require_finite
from qlazy.layers.quant_weight import QuantWeight
from qlazy.layers.storage import allocate
from qlazy.matching.fill import Fill, row_count
from qlazy.planning.plan import GPU_CHUNK_BYTES, Plan
from qlazy.reading.chunks import Chunk
from qlazy.reading.staging import DeviceQueue


class Placer:
    """Final storage of a model, and the account of what has been filled. A context: what GPUs do ends with it.

    Args:
        model: A placeholder with its layers swapped. Everything that `plan` names gets storage now; pages stay untouched until
            filled.
        plan: The exact plan.
        open_queue: Makes the queue of a GPU.

    Memory: the bytes that the plan gives each device, and three chunks on each GPU while the context is open.
    """

    def __init__(self, model: nn.Module, plan: Plan, open_queue: Callable[[str, int], DeviceQueue] = DeviceQueue) -> None:
        self._owners = {tensor.name: model.get_submodule(tensor.name.rpartition(".")[0]) for tensor in plan.tensors}
        self._rows_placed = dict.fromkeys(self._owners, 0)
        self._lock = threading.Lock()
        for tensor in plan.tensors:
            owner, leaf = self._owners[tensor.name], tensor.name.rpartition(".")[2]
            packed = _packed(owner, leaf)
            if packed is not None:
                packed.allocate(tensor.device)
                continue
            held: Tensor = getattr(owner, leaf)
            storage = allocate(held.shape, held.dtype, tensor.device) if held.is_meta else held.to(tensor.device)
            setattr(owner, leaf, storage if leaf in owner._buffers else nn.Parameter(storage, requires_grad=False))
        self._devices = {tensor.name: tensor.device for tensor in plan.tensors}
        # After the storage, see `DeviceQueue`.
        self._queues = {device: open_queue(device, GPU_CHUNK_BYTES) for device in sorted({*self._devices.values()} - {"cpu"})}
        self._sent: dict[str, Fill] = {}

    def __enter__(self) -> Placer:
        """Nothing to open."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Wait for the GPUs, whether or not all went well: their storage may be given back now."""
        for queue in self._queues.values():
            queue.close()

    def place(self, chunk: Chunk, tensors: list[Tensor]) -> None:
        """Put one chunk in its place. Called from several threads, for different rows.

        Args:
            chunk: What it is.
            tensors: Its values on the host; only used during the call.
        Raises:
            CorruptCheckpoint: a weight on the host is NaN or infinite (see `require_finite` for those on a GPU), or a tensor
                came twice.

        Memory: a quantizer's work buffers, or the result of a conversion.
        """
        fill = chunk.fill
        if fill.convert is not None:
            for target, values in fill.convert(tensors).items():
                self._place_rows(target, fill.target_row, values, chunk)
            return
        values = tensors[0]
        if fill.row_order is not None:
            values = values[torch.argsort(fill.row_order[chunk.start : chunk.stop])]
        self._place_rows(fill.targets[0], fill.target_row + chunk.start - fill.all_spans[0][0], values, chunk)

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
        queue, packed = self._queues.get(self._devices[target]), _packed(owner, leaf)
        try:
            if queue is not None:
                self._send(queue, target, start, values)
                self._sent[target] = chunk.fill
            elif packed is not None:
                packed.fill(values, start)
            else:
                values = _as_rows(values.contiguous())
                if leaf in owner._parameters and values.is_floating_point():
                    require_finite(values)
                whole = _as_rows(getattr(owner, leaf).data)
                whole[start : start + values.shape[0]].copy_(values)
        except NonFiniteError:
            raise _not_finite(chunk.fill, start, start + values.shape[0]) from None
        with self._lock:
            rows = row_count(tuple(values.shape))
            self._rows_placed[target] += values.shape[1] if isinstance(packed, QuantLinear) and packed.transposed else rows
            if self._rows_placed[target] > self._extent(target):
                raise CorruptCheckpoint(
                    f"Tensor {target!r} was filled twice: two stored tensors have the same place in the model."
                )

    def _send(self, queue: DeviceQueue, target: str, start: int, values: Tensor) -> None:
        """Have rows filled on their GPU, in pieces that a scratch chunk holds."""
        owner, leaf = self._owners[target], target.rpartition(".")[2]
        packed = _packed(owner, leaf)
        fill: Callable[[int, Tensor], object]
        if isinstance(packed, QuantWeight):
            parts, fill = list(packed.by_matrix(values, start)), packed.fill_rows
        elif packed is not None:
            parts, fill = [(start, values.t() if packed.transposed else values)], packed.fill_rows
        else:
            fill = functools.partial(_copy_rows, _as_rows(getattr(owner, leaf).data))
            parts = [(start, _as_rows(values.contiguous()))]
        for begin, rows in parts:
            row_bytes = rows[:1].nbytes
            step = max(ROW_BLOCK, queue.chunk_bytes // max(1, row_bytes) // ROW_BLOCK * ROW_BLOCK)
            for first in range(0, rows.shape[0] if row_bytes else 0, step):
                queue.run(rows[first : first + step].contiguous(), functools.partial(fill, begin + first))

    def require_finite(self) -> None:
        """Raise where a weight that was filled on a GPU is NaN or infinite.

        Looked for once, when all is filled: a look on the way would have the host wait for the GPU. Scales tell of a quantized
        weight, as they are not finite where it is not.

        Raises:
            CorruptCheckpoint: file, tensor and rows.

        Memory: two numbers a tensor; where one is not finite, a byte for each of its numbers.
        """
        looks: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        for name in self._sent:
            for tensor in self._tell_tales(name):
                span = torch.stack(torch.aminmax(tensor)).float()
                looks.setdefault(self._devices[name], []).append((name, tensor, span))
        for here in looks.values():
            sound = torch.stack([span for _, _, span in here]).isfinite().all(1).tolist()  # the host waits once a GPU
            for name, tensor, _ in (look for look, good in zip(here, sound, strict=True) if not good):
                bad = tensor.reshape(-1).isfinite().logical_not_().nonzero()
                extent, first, last = self._extent(name), int(bad[0]), int(bad[-1])
                # What tells of a weight has as many numbers for each row as for any other.
                stop = -(-(last + 1) * extent // tensor.numel())
                raise _not_finite(self._sent[name], first * extent // tensor.numel(), stop)

    def _tell_tales(self, name: str) -> list[Tensor]:
        """The numbers that are not finite where a weight was not."""
        owner, leaf = self._owners[name], name.rpartition(".")[2]
        packed = _packed(owner, leaf)
        if packed is not None:
            tensors = [getattr(packed, key) for key in packed.storage]
        else:
            tensors = [getattr(owner, leaf)] if leaf in owner._parameters else []
        return [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]

    def _extent(self, name: str) -> int:
        owner, leaf = self._owners[name], name.rpartition(".")[2]
        packed = _packed(owner, leaf)
        return packed.out_features if isinstance(packed, QuantLinear) else row_count(tuple(getattr(owner, leaf).shape))


def empty(model: nn.Module, names: Iterable[str]) -> None:
    """Take the storage of what has been used or written away; buffers that are no part of a packed weight keep theirs.

    Args:
        model: A model with its layers swapped.
        names: Tensors of its plan.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        packed = _packed(owner, leaf)
        if packed is not None:
            for key in packed.storage:
                setattr(packed, key, torch.empty_like(getattr(packed, key), device="meta"))
        elif leaf in owner._parameters:
            held = torch.empty_like(getattr(owner, leaf), device="meta")
            setattr(owner, leaf, nn.Parameter(held, requires_grad=False))


def _packed(owner: nn.Module, leaf: str) -> QuantLinear | QuantWeight | None:
    """What quantizes the rows of a tensor; None for one that keeps the model's dtype."""
    if isinstance(owner, QuantLinear):
        return owner if leaf == "weight" else None
    held = owner._modules.get(leaf)
    return held if isinstance(held, QuantWeight) else None


def _copy_rows(whole: Tensor, start: int, rows: Tensor) -> None:
    whole[start : start + rows.shape[0]].copy_(rows)


def _not_finite(fill: Fill, start: int, stop: int) -> CorruptCheckpoint:
    source = fill.sources[0]
    return CorruptCheckpoint(
        f"{source.path.name}: tensor {source.name!r} holds a NaN or an infinity in rows {start} to {stop}.",
        hint="The file is damaged; download it again, e.g. with `hf download --force-download`.",
    )


def _as_rows(tensor: Tensor) -> Tensor:
    """The tensor as rows of its last dimension, as it is read; vectors stay, a scalar becomes one."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 2 else tensor.reshape(1) if tensor.dim() == 0 else tensor
