"""Save a model that is loaded already: what lies in memory goes to the disk as it is."""

from __future__ import annotations

import functools
import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlazy.errors import UnsupportedModel, UsageError
from qlazy.formats import Format, packed_nbytes
from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import QuantLinear
from qlazy.saving.companions import companions, config_json, gguf_companions
from qlazy.saving.expert_names import ExpertRows, expert_names
from qlazy.saving.folder import writing
from qlazy.saving.layout_config import Layout, quantization_config
from qlazy.saving.layouts import cut_rows, default_layout, misfit, to_stored
from qlazy.saving.outputs import stored
from qlazy.saving.pieces import cut_shards, hub_names, renamed
from qlazy.saving.save import SHARD_BYTES, write_index
from qlazy.saving.saved import SaveReport, make_manifest
from qlazy.saving.shards import shard_pieces
from qlazy.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class _Held:
    """One tensor of a loaded model, a packed weight, or the packed weights of all experts of a layer."""

    key: str
    """Its name on disk; of a packed weight the name that the weight would have."""
    nbytes: int
    """Bytes that it takes."""
    tensors: Callable[[Layout], dict[str, Tensor]]
    """What is written of it."""


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    layout: Layout | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> SaveReport:
    """Write a loaded model to a folder. `qlazy.save_quantized` is this where it is given a model.

    Args:
        model: A model with low-bit layers.
        folder: The folder to make.
        layout: Whose layout it has; by default what most weights say. What it cannot hold is written in the model's dtype.
        force: Replace a folder that holds something.
        shard_bytes: Bytes of a shard.
    Returns:
        What was written.
    Raises:
        UsageError: the folder holds something, or the model has no low-bit layers.
        OutOfSpace: the disk is full.

    Memory: a copy of one shard's tensors where the layout is not that in memory, or the model is not on the host.
    """
    began = time.perf_counter()
    layout = layout or model_layout(model)
    source: Source | None = getattr(model, "_qlazy_source", None)
    read = [source.folder] if source is not None and source.folder is not None else []
    # Nothing tells whether a model is the same as that of an earlier attempt: each begins anew.
    with writing(folder, uuid.uuid4().hex, force=force, sources=read) as partial, torch.no_grad():
        shards = cut_shards(_held(model), shard_bytes)
        for name, shard in shards.items():
            tensors = {key: tensor for held in shard for key, tensor in held.tensors(layout).items()}
            partial.write(name, shard_pieces(stored(tensors), {"format": "pt"}))
        nbytes = write_index(partial, list(shards))
        for name, content in _companions(model, source):
            partial.write(name, [content])
        if model.can_generate() and "generation_config.json" not in partial.done:
            generation = model.generation_config.to_json_string().encode()
            partial.write("generation_config.json", [generation])
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
        config.pop("_name_or_path", None)
        dtype = str(model.dtype).removeprefix("torch.")
        origin = source.resolved if source is not None else model.config.name_or_path
        partial.commit(make_manifest(layout, dtype, model_id=origin), config_json(config, model_config(layout, model), dtype))
    return SaveReport(
        folder=partial.folder,
        layout=layout,
        nbytes=nbytes,
        shards=len(shards),
        shards_resumed=0,
        seconds=time.perf_counter() - began,
    )


def _companions(model: PreTrainedModel, source: Source | None) -> Iterable[tuple[str, bytes]]:
    """What lay beside the weights that a model was loaded from; a warning where that cannot be told."""
    origin = Path(model.config.name_or_path) if model.config.name_or_path else None
    folder = source.folder if source is not None else origin
    if source is not None and source.gguf_file and folder is not None and (folder / source.gguf_file).is_file():
        return gguf_companions(source, model)
    if folder is not None and folder.is_dir() and (source is None or not source.gguf_file):
        return companions(folder)
    warnings.warn("No tokenizer is written, as the folder of the model's weights is not known or not there.", stacklevel=3)
    return ()


def model_layout(model: nn.Module) -> Layout:
    """The layout that most low-bit layers of a model say.

    Args:
        model: Any model.
    Returns:
        The layout.
    Raises:
        UsageError: it has no low-bit layers.
    """
    counts: dict[Layout, int] = {}
    found: list[QuantLinear | PackedStack] = [*_layers(model).values(), *_stacks(model).values()]
    for packed in found:
        own = default_layout(packed.format)
        counts[own] = counts.get(own, 0) + sum(getattr(packed, name).nbytes for name in packed.storage)
    if not counts:
        raise UsageError(
            f"{type(model).__name__} has no low-bit layers.",
            hint="Load it with qlazy.load_quantized, or name its folder.",
        )
    return max(counts, key=lambda layout: counts[layout])


def model_config(layout: Layout, model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of a loaded model.

    Args:
        layout: Whose layout it is saved in.
        model: The model.
    Returns:
        The config.
    """
    layers, stacks = _layers(model), _stacks(model)
    tables = [name.removesuffix(".weight") for name, stack in stacks.items() if not stack.stack.experts]
    paths = [*layers, *tables]
    keys = hub_names(model, [f"{path}.weight" for path in paths])
    on_disk = {path: keys[f"{path}.weight"].removesuffix(".weight") for path in paths}
    packed: dict[str, Format] = {}
    for path, layer in layers.items():
        if not misfit(layout, layer.format, layer.out_features, layer.in_features):
            packed[on_disk[path]] = layer.format
    others = []
    for name, stack in stacks.items():
        for key, at in _names(model, name, stack).items():
            if not misfit(layout, stack.format, at.stop - at.start, stack.stack.columns):
                packed[key.removesuffix(".weight")] = stack.format
        if not stack.stack.experts and not misfit(layout, stack.format, stack.stack.rows, stack.stack.columns):
            others.append(on_disk[name.removesuffix(".weight")])
            packed[others[-1]] = stack.format
    names = {key: path for path, key in on_disk.items() if key in packed}
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, QuantLinear)]
    left = [path for path in linear if path not in names.values()]
    both = dict.fromkeys(each for path, key in hub_names(model, left).items() for each in (key, path))
    return quantization_config(layout, packed, list(both), others, names)


def model_tensors(layout: Layout, model: PreTrainedModel) -> dict[str, Tensor]:
    """A loaded model's state as a folder of this layout has it, by its names in the model; of experts by those on disk.

    Args:
        layout: Whose layout.
        model: The model.
    Returns:
        Tensors by name.
    Raises:
        UnsupportedModel: transformers, which is given them, would join some that are packed.

    Memory: views; a copy of what the layout has in another order.
    """
    made = _plain_state(model)
    weights = [f"{path}.weight" for path in _layers(model)]
    keys = renamed(model, weights)
    joined = next((name for name in weights if keys and name not in keys), None)
    if joined is not None:
        raise UnsupportedModel(
            f"Checkpoints of {type(model).__name__} hold {joined!r} joined with others, and low bits cannot be joined.",
            hint="Save it with qlazy.save_quantized(model, folder), which writes them apart.",
        )
    for path, layer in _layers(model).items():
        made |= _layer_tensors(layout, layer, f"{path}.weight")
    for name, stack in _stacks(model).items():
        made |= _stack_tensors(layout, stack, _names(model, name, stack), name)
    return made


def _layer_tensors(layout: Layout, layer: QuantLinear, key: str, rows: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """What is written of one layer, or of some of its rows; in the model's dtype where the layout has no room for it."""
    start, stop = rows or (0, layer.out_features)
    reason = misfit(layout, layer.format, stop - start, layer.in_features)
    if reason:
        dtype = str(layer.dtype).removeprefix("torch.")
        warnings.warn(f"{key.removesuffix('.weight')} {reason}: it is written in {dtype}.", stacklevel=2)
        return {key: layer.dequantize()[start:stop].contiguous()}
    held: dict[str, Tensor] = {name: getattr(layer, name) for name in layer.storage}
    if stop - start < layer.out_features:
        held = cut_rows(layer.format, held, start, stop)
    path = key.removesuffix(".weight")
    made = to_stored(layout, layer.format, held, stop - start, layer.in_features, layer.dtype)
    return {f"{path}.{name}": tensor for name, tensor in made.items()}


def _stack_tensors(layout: Layout, stack: PackedStack, names: Mapping[str, ExpertRows], whole: str) -> dict[str, Tensor]:
    """What is written of a stack: all experts' words, then all their scales, and so on; or a table that is no stack."""
    if not stack.stack.experts:
        return _layer_tensors(layout, stack.layer(), whole)
    made = [_layer_tensors(layout, stack.layer(at.expert), key, (at.start, at.stop)) for key, at in names.items()]
    columns = zip(*(tensors.items() for tensors in made), strict=True)
    return {key: tensor for column in columns for key, tensor in column}


def _names(model: PreTrainedModel, name: str, stack: PackedStack) -> dict[str, ExpertRows]:
    return expert_names(model, {name: stack.stack}) if stack.stack.experts else {}


def _layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def _stacks(model: nn.Module) -> dict[str, PackedStack]:
    """By the name of the parameter that each stands for; one that is tied under its first name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedStack)}


def _plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The part of a model's state that is not packed; tied tensors once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    packed = {
        f"{path}.{name}"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear | PackedStack)
        for name in module.storage
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name not in packed and name not in tied}


def _held(model: PreTrainedModel) -> list[_Held]:
    """All that a folder holds of a model, under the names of its checkpoints."""
    stacks, plain = _stacks(model), _plain_state(model)
    tables = {name: stack.layer() for name, stack in stacks.items() if not stack.stack.experts}
    packed = {f"{path}.weight": layer for path, layer in _layers(model).items()} | tables
    linear = [name for name in plain if name.endswith(".weight") and type(model.get_submodule(name[:-7])) is nn.Linear]
    keys = renamed(model, [*packed, *linear])
    # Where checkpoints join weights of which some are packed, all are written apart, by their names in the model.
    joins_packed = any(name not in keys for name in packed)
    apart = {name: plain.pop(name) for name in linear if joins_packed and name not in keys}
    found = []
    for key, tensor in (revert_weight_conversion(model, plain) | apart).items():
        found.append(_Held(key=key, nbytes=tensor.nbytes, tensors=functools.partial(_as_it_is, key, tensor)))
    for name, layer in packed.items():
        key = keys.get(name, name)
        tensors = functools.partial(_layer_tensors, layer=layer, key=key)
        found.append(_Held(key=key, nbytes=_nbytes(layer.format, layer.out_features, layer), tensors=tensors))
    for name, stack in stacks.items():
        if name not in tables:
            rows = stack.stack.count * stack.stack.rows
            several = functools.partial(_stack_tensors, stack=stack, names=_names(model, name, stack), whole=name)
            found.append(_Held(key=name, nbytes=_nbytes(stack.format, rows, stack.layer()), tensors=several))
    return found


def _as_it_is(key: str, tensor: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {key: tensor}


def _nbytes(fmt: Format, rows: int, layer: QuantLinear) -> int:
    return packed_nbytes(fmt, rows, layer.in_features, str(layer.dtype).removeprefix("torch."))
