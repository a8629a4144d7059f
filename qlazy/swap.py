"""Swap the layers that the recipe quantizes for low-bit ones, before any storage exists, and make the plan exact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.formats import Format
from qlazy.layers import LAYERS
from qlazy.match import Match
from qlazy.plan import Entry, Plan, allocate, require_fit
from qlazy.quant_linear import QuantLinear
from qlazy.recipe import Kind, guess_kind
from qlazy.source import Source


def swap_layers(model: PreTrainedModel, plan: Plan, match: Match, source: Source) -> Plan:
    """Replace every layer that the recipe quantizes, and plan again with what the model really holds.

    Args:
        model: A placeholder.
        plan: The plan from the headers; its recipe, budget and dtype are kept.
        match: What fills the model.
        source: Where it comes from.
    Returns:
        The exact plan: every parameter and buffer of the model, by its name there.
    Raises:
        DoesNotFit: the exact bytes do not fit where the headers alone promised they would.

    Memory: none; the new layers have no storage.
    """
    read = {target: fill.nbytes // len(fill.targets) for fill in match.fills for target in fill.targets}
    exact = allocate(
        entries_of(model, read),
        source,
        plan.recipe,
        plan.budget,
        dtype=plan.dtype,
        exact=True,
        extra_bytes=2 * match.largest_conversion,
    )
    require_fit(exact, source)
    for tensor in exact.tensors:
        if tensor.format is None:
            continue
        path = tensor.name.removesuffix(".weight")
        layer = model.get_submodule(path)
        model.set_submodule(path, quant_layer(layer, tensor.format, getattr(torch, tensor.dtype), tensor.device))
    return exact


def quant_layer(layer: nn.Module, fmt: Format, dtype: torch.dtype, device: str) -> QuantLinear:
    """The low-bit layer that takes the place of a linear one.

    Args:
        layer: `nn.Linear` or Conv1D.
        fmt: Format of the weight.
        dtype: Dtype of scales.
        device: Where it will live.
    Returns:
        A layer without storage for its weight; it keeps the bias parameter of `layer`.
    """
    assert isinstance(layer, (nn.Linear, Conv1D))
    columns, rows = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    swapped = LAYERS[type(fmt)](
        columns, rows, format=fmt, dtype=dtype, device=device, bias=layer.bias, transposed=isinstance(layer, Conv1D)
    )
    return swapped.train(layer.training)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """One tensor of the model and the module that holds it."""

    owner: nn.Module
    tensor: Tensor


def entries_of(model: PreTrainedModel, read: Mapping[str, int]) -> list[Entry]:
    """What a model holds, as the planner sees it: every parameter and buffer once, tied ones under the name that is filled.

    Args:
        model: A placeholder, its layers not swapped yet.
        read: Bytes that are read for each tensor, by name; what is not named is not in the checkpoint.
    Returns:
        One entry a tensor, in the model's order.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    untouchable = _not_convertible(model)
    entries = []
    for name, held in _tensors(model):
        if (name in tied or name in tied.values()) and name not in read:
            continue
        shape = tuple(held.tensor.shape)
        kind = _kind(name, held, untouchable, read)
        if kind == "linear" and isinstance(held.owner, Conv1D):
            shape = (shape[1], shape[0])
        entries.append(
            Entry(
                name=name,
                shape=shape,
                dtype=str(held.tensor.dtype).removeprefix("torch."),
                kind=kind,
                source_nbytes=read.get(name, 0),
            )
        )
    return entries


def _tensors(model: nn.Module) -> list[tuple[str, _Held]]:
    found: list[tuple[str, _Held]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = [*module._parameters.items(), *module._buffers.items()]
        for leaf, tensor in held:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((f"{path}.{leaf}" if path else leaf, _Held(owner=module, tensor=tensor)))
    return found


def _kind(name: str, held: _Held, untouchable: set[str], read: Mapping[str, int]) -> Kind:
    """What a tensor is: the names' guess, held against the module; only plain linear layers that are read are `linear`."""
    guess = guess_kind(name, tuple(held.tensor.shape))
    if isinstance(held.owner, nn.Embedding):
        return "embedding"
    if name in untouchable and isinstance(held.owner, nn.Linear) and name.endswith(".weight"):
        return "head"
    if guess != "linear":
        # A list of small expert modules is as good as any linear layer; only fused experts have no low-bit layer yet.
        inside_list = guess == "experts" and _is_linear(held.owner) and name.endswith(".weight") and len(held.tensor.shape) == 2
        return "linear" if inside_list and name in read else guess
    if not _is_linear(held.owner) or name not in read:
        return "other"
    return "linear"


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly a linear layer: a subclass may do anything with its weight."""
    return type(module) in (nn.Linear, Conv1D)


def _not_convertible(model: PreTrainedModel) -> set[str]:
    """Parameters of output heads and tied ones, and what the model class keeps in float32."""
    tied = getattr(model, "all_tied_weights_keys", {})
    names = set(tied) | set(tied.values())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    pattern = re.compile("|".join(rf"(^|\.){re.escape(word)}\." for word in kept)) if kept else None
    for path, module in model.named_modules():
        if head is not None and module is head:
            names |= {f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
    if pattern is not None:
        names |= {name for name, _ in model.named_parameters() if pattern.search(name)}
    return names
