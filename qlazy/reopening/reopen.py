"""Open what is packed already: files are mapped, and the layers' storage is a view of the maps.

As a load (see `qlazy/load.py`), but nothing is streamed or quantized that has a format of ours. On a CPU nothing is copied
either, unless the files have other bytes than the layers: those of GPTQ are transposed, and int8 of bitsandbytes has a sign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlazy.errors import CorruptCheckpoint
from qlazy.finish import finish
from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import QuantLinear
from qlazy.layers.stacks import stack_of
from qlazy.match import Match, match_tensors
from qlazy.matching.fill import Fill, is_stored_so
from qlazy.memory import Meter
from qlazy.place import Placer
from qlazy.placeholder import build_placeholder, eager_values
from qlazy.planning.budget import Budget
from qlazy.planning.entries import own_dtype
from qlazy.planning.kept import KeptRecipe, renamed
from qlazy.planning.plan import GPU_CHUNK_BYTES, GPU_RING_BYTES, RING_BYTES, Plan
from qlazy.reading.chunks import CACHED_BYTES, worker_count
from qlazy.reopening.mapped import MappedFiles
from qlazy.reopening.mapped_stack import lie_in_order, stacked
from qlazy.report import LoadReport, Progress
from qlazy.saving.layouts import from_stored
from qlazy.sources.packed import PackedTensor
from qlazy.sources.source import Source
from qlazy.stream import Stream
from qlazy.swap import swap_layers
from qlazy.trace import Clock


def reopen(
    source: Source,
    recipe: KeptRecipe,
    budget: Budget,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    strict: bool = True,
    drop_page_cache: bool = True,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> PreTrainedModel:
    """Open a source whose packed weights are kept.

    Args:
        source: An opened local source.
        recipe: What `keep` told.
        budget: Devices and their limits.
        dtype: `auto` (what the files have) or a torch dtype name, for what is not packed.
        attn_implementation: As in transformers.
        strict: Whether missing and unexpected tensors are errors.
        drop_page_cache: Give the file pages of what must be read back to the kernel; maps keep theirs.
        trust_remote_code: Run Python code from the model's folder.
        on_progress: Called once, at the end.
    Returns:
        The model in evaluation mode, with its `LoadReport` as `qlazy_report`.
    Raises:
        DoesNotFit: before anything is read.
        CorruptCheckpoint: files that contradict themselves or the model.
        UnsupportedModel: no such architecture.

    Memory: on a CPU no more than the model's buffers; pages of the files are the page cache's. On a GPU the packed bytes. Where
    a weight is packed otherwise, as a load takes for it.
    """
    clock = Clock()
    with Meter() as meter, torch.no_grad():
        dtype = own_dtype(source, dtype)  # scales are kept as they are, whatever the devices
        construct: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        clock.lap("plan")
        model = build_placeholder(source, getattr(torch, dtype), **construct)
        match = match_tensors(model, source, strict=strict)
        filled = _by_target(match)
        names = {target: [info.name for fill in fills for info in fill.sources] for target, fills in filled.items()}
        otherwise = {target for target, fills in filled.items() if not _lies_so(model, target, fills)}
        asked = Plan(
            model_id=source.model_id,
            resolved=source.resolved,
            recipe=renamed(recipe, names, otherwise),
            budget=budget,
            dtype=dtype,
            tensors=(),
            devices=(),
            exact=False,
        )
        plan = swap_layers(model, asked, match, source)
        clock.lap("build")
        files = MappedFiles()
        mapper = Mapper(model, plan, match, files)
        read = tuple(fill for fill in match.fills if fill.targets[0] not in mapper.mapped)
        with mapper:  # until what GPUs do has ended
            if read:
                on_gpus = any(tensor.device != "cpu" for tensor in plan.tensors)
                sizes = (GPU_CHUNK_BYTES, GPU_RING_BYTES) if on_gpus else (CACHED_BYTES, RING_BYTES)
                devices = plan.device_map if on_gpus else {}
                with Stream(read, mapper.place, worker_count(read, *sizes), drop_page_cache, None, *sizes, devices) as stream:
                    for _ in stream:
                        pass
        mapper.require_finite()
        clock.lap("stream")
        total = sum(fill.nbytes for fill in match.fills)
        if on_progress is not None:
            on_progress(Progress(stage="read", done_bytes=total, total_bytes=total))
        missing = eager_values(source, getattr(torch, dtype), match.missing, **construct)
        model = finish(model, plan, match, mapper, source, missing)
        clock.lap("finish")
    loaded: Any = model
    loaded.qlazy_report = LoadReport(
        plan=plan,
        seconds=clock.seconds,
        bytes_read=mapper.copied_bytes + sum(fill.nbytes for fill in read),
        device_bytes=_device_bytes(model),
        host_peak_bytes=meter.peak_bytes,
        unexpected=list(match.unexpected),
        initialized=list(match.missing),
        samples=meter.samples,
        read_samples=meter.watched,
        tensors_loaded=sum(len(fill.targets) for fill in match.fills),
    )
    return model


class Mapper(Placer):
    """Puts views of mapped files into a model; what is no view of a file, and what is packed otherwise, is placed as in a load.

    Args:
        model: A placeholder with its layers swapped.
        plan: The exact plan.
        match: What fills it.
        files: The maps.

    Memory: what has no file, and what is copied.
    """

    def __init__(self, model: nn.Module, plan: Plan, match: Match, files: MappedFiles) -> None:
        self.mapped: set[str] = set()
        """Names of the tensors that are views, or copies of what is stored."""
        self.copied_bytes = 0
        """Bytes of those that had to be copied."""
        devices = {tensor.name: tensor.device for tensor in plan.tensors}
        kept = plan.recipe.formats if isinstance(plan.recipe, KeptRecipe) else {}
        for target, fills in _by_target(match).items():
            path, _, leaf = target.rpartition(".")
            owner, info = model.get_submodule(path), fills[0].sources[0]
            stack = owner._modules.get(leaf)
            is_packed = isinstance(stack, PackedStack) or (isinstance(owner, QuantLinear) and leaf == "weight")
            if is_packed and kept.get(target) is None:
                continue
            if isinstance(stack, PackedStack):
                for name, tensor in stacked(stack, fills, files).items():
                    self._put(stack, name, tensor, devices[target], files)
            elif isinstance(owner, QuantLinear) and leaf == "weight":
                assert isinstance(info, PackedTensor)
                parts = {part.role: files.tensor(part.stored) for part in info.parts}
                for name, tensor in from_stored(owner.format, info, parts, owner.in_features, owner.dtype).items():
                    self._put(owner, name, tensor, devices[target], files)
            elif len(fills) == 1 and _is_plain(fills[0]):
                held: Tensor = getattr(owner, leaf)
                self._put(owner, leaf, files.tensor(info).to(held.dtype), devices[target], files)
            else:
                continue
            self.mapped.add(target)
        rest = tuple(tensor for tensor in plan.tensors if tensor.name not in self.mapped)
        super().__init__(model, dataclasses.replace(plan, tensors=rest))

    def rows_left(self, name: str) -> int:
        """As of any load.

        Args:
            name: A tensor of the plan.
        Returns:
            0 where it is complete.
        """
        return 0 if name in self.mapped else super().rows_left(name)

    def _put(self, owner: nn.Module, name: str, tensor: Tensor, device: str, files: MappedFiles) -> None:
        held: Tensor = getattr(owner, name)
        if tensor.shape != held.shape or tensor.dtype != held.dtype:
            raise CorruptCheckpoint(
                f"A stored {name} is {tensor.dtype} {list(tensor.shape)}, but the model has {held.dtype} {list(held.shape)}."
            )
        placed = tensor.to(device)
        if not files.holds(placed):
            self.copied_bytes += placed.nbytes
        setattr(owner, name, nn.Parameter(placed, requires_grad=False) if name in owner._parameters else placed)


def _is_plain(fill: Fill) -> bool:
    """Whether a stored tensor is the model's as it is."""
    info = fill.sources[0]
    whole = len(fill.sources) == len(fill.targets) == 1 and fill.convert is None and fill.row_order is None
    return whole and not getattr(fill, "spans", ()) and not isinstance(info, PackedTensor)


def _by_target(match: Match) -> dict[str, list[Fill]]:
    """What fills each tensor of the model."""
    filled: dict[str, list[Fill]] = {}
    for fill in match.fills:
        for target in fill.targets:
            filled.setdefault(target, []).append(fill)
    return filled


def _lies_so(model: nn.Module, target: str, fills: Sequence[Fill]) -> bool:
    """Whether what is stored of a tensor is that tensor, or all of its parts in order."""
    path, _, leaf = target.rpartition(".")
    owner = model.get_submodule(path)
    if stack_of(owner, leaf) is not None:
        return lie_in_order(fills)
    return len(fills) == 1 and is_stored_so(owner, fills[0])


def _device_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of weights and buffers by device; not of their storages as in a load, since that of a view is its whole file."""
    found: dict[str, int] = {}
    for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values():
        found[str(tensor.device)] = found.get(str(tensor.device), 0) + tensor.nbytes
    return found
