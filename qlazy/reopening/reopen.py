"""Open what is packed already: files are mapped, and the layers' storage is a view of the maps.

As a load (see `qlazy/load.py`), but nothing is streamed or quantized. On a CPU nothing is copied either, unless the files have
another order of bytes than the layers: GPTQ's is transposed, and int8 in words has its top bit flipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.errors import CorruptCheckpoint
from qlazy.finish import finish
from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import QuantLinear
from qlazy.match import Match, match_tensors
from qlazy.matching.fill import Fill, is_stored_so
from qlazy.memory import Meter, anonymous_bytes
from qlazy.place import Placer
from qlazy.placeholder import build_placeholder, eager_values
from qlazy.planning.budget import Budget
from qlazy.planning.kept import KeptRecipe, renamed
from qlazy.planning.plan import Plan, resolve_dtype
from qlazy.reading.chunks import worker_count
from qlazy.reopening.mapped import MappedFiles
from qlazy.reopening.mapped_stack import NotAsStored, stacked
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
        NotAsStored: a packed weight that the model has in parts or in another order; it can be loaded, but not mapped.

    Memory: on a CPU no more than the model's buffers; pages of the files are the page cache's. On a GPU the packed bytes.
    """
    clock = Clock()
    with Meter() as meter, torch.no_grad():
        # No rule for this machine's processor: scales are kept as they are.
        dtype = resolve_dtype(source, dtype, dataclasses.replace(budget, devices=("cuda:0",)))
        construct: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        clock.lap("plan")
        model = build_placeholder(source, getattr(torch, dtype), **construct)
        source = _turned(source, model)
        match = match_tensors(model, source, strict=strict)
        names = {target: fill.sources[0].name for fill in match.fills for target in fill.targets}
        asked = Plan(
            model_id=source.model_id,
            resolved=source.resolved,
            recipe=renamed(recipe, names),
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
                with Stream(read, mapper.place, worker_count(read), drop_page_cache) as stream:
                    for _ in stream:
                        pass
        mapper.require_finite()
        clock.lap("stream")
        total = sum(fill.nbytes for fill in match.fills)
        if on_progress is not None:
            on_progress(Progress(stage="read", done_bytes=total, total_bytes=total, host_bytes=anonymous_bytes()))
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
    """Puts views of mapped files into a model; what is no view of a file is placed as in a load.

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
        stacks: dict[str, list[Fill]] = {}
        for fill in match.fills:
            target, info = fill.targets[0], fill.sources[0]
            path, _, leaf = target.rpartition(".")
            owner = model.get_submodule(path)
            if isinstance(owner._modules.get(leaf), PackedStack):
                stacks.setdefault(target, []).append(fill)
                continue
            if isinstance(owner, QuantLinear) and leaf == "weight":
                if not isinstance(info, PackedTensor):
                    raise CorruptCheckpoint(f"{info.path.name}: tensor {info.name!r} is not packed, though others are.")
                if not is_stored_so(owner, fill):
                    raise NotAsStored(f"{info.path.name}: {info.name!r} is not {target!r} as it is.")
                parts = {part.role: files.tensor(part.stored) for part in info.parts}
                for name, tensor in from_stored(owner.format, info, parts, owner.in_features, owner.dtype).items():
                    self._put(owner, name, tensor, devices[target], files)
            elif _is_plain(fill):
                held: Tensor = getattr(owner, leaf)
                self._put(owner, leaf, files.tensor(info).to(held.dtype), devices[target], files)
            else:
                continue
            self.mapped.add(target)
        for target, fills in stacks.items():
            stack = model.get_submodule(target)
            assert isinstance(stack, PackedStack)
            for name, tensor in stacked(stack, fills, files).items():
                self._put(stack, name, tensor, devices[target], files)
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


def _turned(source: Source, model: PreTrainedModel) -> Source:
    """The source with the shapes of a Conv1D's weights as the model has them: packed weights are stored rows first."""
    turned = {path for path, module in model.named_modules() if isinstance(module, Conv1D)}
    prefix = f"{model.base_model_prefix}."
    tensors = dict(source.tensors)
    for name, info in source.tensors.items():
        path = name.removesuffix(".weight")
        if isinstance(info, PackedTensor) and turned & {path, prefix + path, path.removeprefix(prefix)}:
            tensors[name] = dataclasses.replace(info, shape=info.shape[::-1])
    return dataclasses.replace(source, tensors=tensors)


def _device_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of weights and buffers by device; not of their storages as in a load, since that of a view is its whole file."""
    found: dict[str, int] = {}
    for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values():
        found[str(tensor.device)] = found.get(str(tensor.device), 0) + tensor.nbytes
    return found
