"""Finish a load: ties, what no checkpoint holds, hooks between devices, and the proof that nothing is left without storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from qlazy.errors import IncompleteCheckpoint
from qlazy.hf import attach_quantizer
from qlazy.layers.quant_weight import QuantWeight
from qlazy.match import Match
from qlazy.place import Placer
from qlazy.planning.plan import Plan, block_of
from qlazy.sources.source import Source


def finish(
    model: PreTrainedModel,
    plan: Plan,
    match: Match,
    placer: Placer,
    source: Source,
    missing_values: Iterable[tuple[str, Tensor]] = (),
) -> PreTrainedModel:
    """Turn a filled placeholder into a model that runs.

    Args:
        model: The model, its storage filled.
        plan: The exact plan.
        match: What was filled and what was missing.
        placer: The account of rows.
        source: Where it comes from, for its generation config.
        missing_values: Name and values of what was missing; asked for only here.
    Returns:
        The same model, in evaluation mode, its weights frozen.
    Raises:
        IncompleteCheckpoint: a tensor was not filled to its last row, or has no storage. That would be a fault of qlazy's,
            found here and not by the user.

    Memory: what is initialized, which is part of the plan.
    """
    for fill in match.fills:
        for target in fill.targets:
            if left := placer.rows_left(target):
                raise IncompleteCheckpoint(f"{source.model_id}: {left} rows of {target!r} were never filled.")
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, values in missing_values:
            held[name].copy_(values)
    model.tie_weights(missing_keys=_unfilled(model, match), recompute_mapping=False)
    require_storage(model, source.model_id)
    model.requires_grad_(False)
    if model.can_generate() and source.folder is not None and (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    devices = {tensor.device for tensor in plan.tensors}
    if len(devices) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, device_map=_module_map(model, plan), main_device=plan.budget.devices[0])
    attach_quantizer(model, plan.recipe)
    loaded: Any = model
    loaded._qlazy_source = dataclasses.replace(source, tensors={})  # a save copies the tokenizer from there
    model.eval()
    return model


def require_storage(model: nn.Module, model_id: str) -> None:
    """Raise where a parameter or buffer is still a placeholder.

    Args:
        model: Any module.
        model_id: For the message.
    Raises:
        IncompleteCheckpoint: one has no storage; the message names the first three.
    """
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise IncompleteCheckpoint(f"{model_id}: {len(empty)} tensors have no storage after the load: {', '.join(empty[:3])}.")


def _unfilled(model: PreTrainedModel, match: Match) -> set[str]:
    filled = {target for fill in match.fills for target in fill.targets}
    tied = getattr(model, "all_tied_weights_keys", {})
    return (set(tied) | set(tied.values()) | set(match.missing)) - filled


def _module_map(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Device of every block, and of every module outside the blocks, as accelerate wants it.

    Blocks, as what a decoder layer does between its own modules needs its inputs on its device too.
    """
    places = {block_of(tensor.name) or tensor.name.rpartition(".")[0]: tensor.device for tensor in plan.tensors}
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        paths = [name.rpartition(".")[0] for name in (target, origin)]
        for path, other in (paths, paths[::-1]):
            if path not in places and other in places:
                places[path] = places[other]
    where: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = path.rpartition(".")[0]
        if isinstance(module, QuantWeight) and parent in places:
            where[id(module)] = places[parent]
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in where:  # a packed table under two names lies where its first is
            places.setdefault(path.rpartition(".")[0], where[id(module)])
    return places
