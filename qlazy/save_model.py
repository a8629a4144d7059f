"""Save a model that is loaded already: what lies in memory goes to the disk as it is."""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlazy import __version__
from qlazy.companions import companions, config_json
from qlazy.errors import UsageError
from qlazy.folder import writing
from qlazy.formats import Format, packed_nbytes
from qlazy.layouts import Layout, default_layout, misfit, quantization_config, to_stored
from qlazy.quant_linear import QuantLinear
from qlazy.save import SHARD_BYTES, stored, write_index
from qlazy.saved import SaveReport
from qlazy.shards import shard_names, shard_pieces


@dataclass(frozen=True, kw_only=True)
class _Held:
    """One tensor of a loaded model, or a packed weight."""

    key: str
    """Its name on disk; of a packed weight the name that the weight would have."""
    tensor: Tensor | None
    """None where a layer has it packed."""
    layer: QuantLinear | None
    """That layer."""
    nbytes: int
    """Bytes that it takes."""

    def tensors(self, layout: Layout) -> dict[str, Tensor]:
        if self.layer is None:
            assert self.tensor is not None
            return {self.key: self.tensor}
        if not _fits(layout, self.layer, self.key):
            return {self.key: self.layer.dequantize()}
        path = self.key.removesuffix(".weight")
        return {f"{path}.{name}": tensor for name, tensor in layer_tensors(layout, self.layer).items()}


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
    # Nothing tells whether a model is the same as that of an earlier attempt: each begins anew.
    with writing(folder, uuid.uuid4().hex, force=force) as partial, torch.no_grad():
        shards = list(_shards(_held(model), shard_bytes))
        names = shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            tensors = {key: tensor for held in shard for key, tensor in held.tensors(layout).items()}
            partial.write(name, shard_pieces(stored(tensors), {"format": "pt"}))
        nbytes = write_index(partial, names)
        origin = Path(model.config.name_or_path or "")
        for name, content in companions(origin if origin.is_dir() else origin.parent) if origin.exists() else ():
            partial.write(name, [content])
        if model.can_generate() and "generation_config.json" not in partial.done:
            generation = model.generation_config.to_json_string().encode()
            partial.write("generation_config.json", [generation])
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
        dtype = str(model.dtype).removeprefix("torch.")
        manifest = {"schema": 1, "made_by": f"qlazy {__version__}", "layout": layout, "dtype": dtype}
        partial.commit(
            manifest | {"source": {"model_id": str(origin)}}, config_json(config, model_config(layout, model), dtype)
        )
    return SaveReport(
        folder=partial.folder,
        layout=layout,
        nbytes=nbytes,
        shards=len(shards),
        shards_resumed=0,
        seconds=time.perf_counter() - began,
    )


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
    for layer in _layers(model).values():
        own = default_layout(layer.format)
        counts[own] = counts.get(own, 0) + layer.in_features * layer.out_features
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
    packed: dict[str, Format] = {path: layer.format for path, layer in _layers(model).items() if _fits(layout, layer)}
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, QuantLinear)]
    return quantization_config(layout, packed, [path for path in linear if path not in packed], [])


def model_tensors(layout: Layout, model: PreTrainedModel) -> dict[str, Tensor]:
    """A loaded model's state as a folder of this layout has it, by its names in the model.

    Args:
        layout: Whose layout.
        model: The model.
    Returns:
        Tensors by name.

    Memory: views; a copy of what the layout has in another order.
    """
    layers = _layers(model)
    made: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path not in layers or leaf not in layers[path].storage:
            made[name] = tensor
    for path, layer in layers.items():
        if _fits(layout, layer, path):
            made |= {f"{path}.{name}": tensor for name, tensor in layer_tensors(layout, layer).items()}
        else:
            made[f"{path}.weight"] = layer.dequantize()
    return made


def layer_tensors(layout: Layout, layer: QuantLinear) -> dict[str, Tensor]:
    """What is written of one layer.

    Args:
        layout: Whose layout.
        layer: A layer that it can hold.
    Returns:
        Tensors by their name after the layer's.

    Memory: as `to_stored`.
    """
    held: dict[str, Tensor] = {name: getattr(layer, name) for name in layer.storage}
    return to_stored(layout, layer.format, held, layer.out_features, layer.in_features, layer.dtype)


def _fits(layout: Layout, layer: QuantLinear, warn_of: str = "") -> bool:
    """Whether a layout can hold a layer; where it cannot, the layer is written in the model's dtype, and a warning says so."""
    reason = misfit(layout, layer.format, layer.out_features, layer.in_features)
    if reason and warn_of:
        dtype = str(layer.dtype).removeprefix("torch.")
        warnings.warn(f"{warn_of.removesuffix('.weight')} {reason}: it is written in {dtype}.", stacklevel=2)
    return not reason


def _layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def _held(model: PreTrainedModel) -> list[_Held]:
    """All that a folder holds of a model, under the names of its checkpoints; tied tensors once."""
    layers = _layers(model)
    marks = {f"{path}.weight": torch.empty(0, device="meta") for path in layers}
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and name.rpartition(".")[2] not in getattr(layers.get(name.rpartition(".")[0]), "storage", {})
    }
    by_mark = {id(mark): layers[name.removesuffix(".weight")] for name, mark in marks.items()}
    found = []
    for key, tensor in revert_weight_conversion(model, state | marks).items():
        layer = by_mark.get(id(tensor))
        if layer is None:
            found.append(_Held(key=key, tensor=tensor, layer=None, nbytes=tensor.nbytes))
        else:
            dtype = str(layer.dtype).removeprefix("torch.")
            nbytes = packed_nbytes(layer.format, layer.out_features, layer.in_features, dtype)
            found.append(_Held(key=key, tensor=None, layer=layer, nbytes=nbytes))
    return found


def _shards(held: list[_Held], shard_bytes: int) -> Iterator[list[_Held]]:
    shard: list[_Held] = []
    nbytes = 0
    for one in held:
        if shard and nbytes + one.nbytes > shard_bytes:
            yield shard
            shard, nbytes = [], 0
        shard.append(one)
        nbytes += one.nbytes
    if shard:
        yield shard
