"""Swap the layers that the recipe quantizes for low-bit ones, before any storage exists, and make the plan exact."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.formats import Format
from qlazy.layers.experts import EXPERTS_IMPLEMENTATION
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import QuantLinear
from qlazy.layers.quant_weight import QuantWeight
from qlazy.layers.stacks import Stack, stack_of
from qlazy.match import Match
from qlazy.planning.demand import text_config
from qlazy.planning.plan import Entry, Plan, TensorPlan, allocate, require_fit
from qlazy.planning.recipe import Kind, guess_kind
from qlazy.sources.packed import PackedTensor
from qlazy.sources.source import Source, TensorInfo


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
    twice = untie(model, match, both=plan.recipe.embedding is not None)
    read: dict[str, int] = {}
    for fill in match.fills:
        for target in fill.targets:
            read[target] = read.get(target, 0) + fill.nbytes // len(fill.targets)
    exact = allocate(
        entries_of(model, read, twice),
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
        dtype = getattr(torch, tensor.dtype)
        path = tensor.name.removesuffix(".weight")
        if is_replaced(model, tensor):
            model.set_submodule(path, quant_layer(model.get_submodule(path), tensor.format, dtype))
        else:
            swap_parameter(model, tensor.name, tensor.format, dtype)
    return exact


def is_replaced(model: PreTrainedModel, tensor: Entry | TensorPlan) -> bool:
    """Whether a layer is replaced as a whole; else its parameter is, and its class and its forward stay.

    Args:
        model: A placeholder.
        tensor: One that the recipe quantizes.
    Returns:
        True for linear layers of torch's and transformers' own classes whose weight has one name.
    """
    if tensor.kind not in ("linear", "head", "tied"):
        return False
    is_tied = tensor.name in _tied_groups(getattr(model, "all_tied_weights_keys", {}))
    return not is_tied and type(model.get_submodule(tensor.name.removesuffix(".weight"))) in (nn.Linear, Conv1D)


def swap_parameter(model: PreTrainedModel, name: str, fmt: Format, dtype: torch.dtype) -> None:
    """Put a packed weight in the place of a parameter: of fused experts, or of an embedding and what is tied to it.

    Args:
        model: A placeholder; what it ties to this parameter no longer counts as tied, but holds the same packed weight.
        name: The parameter's name.
        fmt: Format of each matrix.
        dtype: Dtype of scales.

    Memory: none; the new weight has no storage.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    parameter = owner._parameters[leaf]
    assert parameter is not None
    rows, columns = parameter.shape[-2:]
    stack = stack_of(owner, leaf) or Stack(experts=0, rows=rows, columns=columns)
    weight = QuantWeight(tuple(parameter.shape), stack=stack, format=fmt, dtype=dtype)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    group = _tied_groups(tied).get(name, {name})
    for member in group:
        path, _, leaf = member.rpartition(".")
        holder = model.get_submodule(path)
        del holder._parameters[leaf]
        holder.add_module(leaf, weight)
        if stack.experts and hasattr(holder, "_apply_gate") and hasattr(holder, "config"):
            config: Any = holder.config
            config._experts_implementation = EXPERTS_IMPLEMENTATION
    for target in [target for target in tied if target in group]:
        del tied[target]


def _tied_groups(tied: Mapping[str, str]) -> dict[str, set[str]]:
    """All names of each tied weight, by each of them."""
    groups: dict[str, set[str]] = {}
    for target, origin in tied.items():
        joined = groups.get(target, {target}) | groups.get(origin, {origin})
        groups.update(dict.fromkeys(joined, joined))
    return groups


def untie(model: PreTrainedModel, match: Match, *, both: bool = False) -> set[str]:
    """Take a pair that is stored as two different tensors off the model's tied weights, so that an output head may be packed.

    The config is wrong then, and transformers does not tie such a pair either, though it can tell only after loading.

    Args:
        model: A placeholder; its `all_tied_weights_keys` changes.
        match: What fills it.
        both: Also a pair of an embedding that is stored twice with the same values, as each is packed on its own then; pairs of
            other weights always.
    Returns:
        Names of an embedding and a head that are stored twice with the same values: each is packed as what is tied is.

    Memory: three samples of at most 4 KiB of each tensor, read here. A pair whose samples are equal stays tied.
    """
    stored = {fill.targets[0]: fill.sources[0] for fill in match.fills if fill.convert is None}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    twice: set[str] = set()
    for target, origin in list(tied.items()):
        one, other = stored.get(target), stored.get(origin)
        of_table = any(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) for name in (target, origin))
        if not (one and other and one.dtype == other.dtype):
            continue
        is_equal = of_table and _sample(one) == _sample(other)
        if is_equal and both:
            twice |= {target, origin}
        if both or not is_equal:
            del tied[target]
    return twice


def _sample(tensor: TensorInfo) -> list[bytes]:
    tensor = tensor.parts[0].stored if isinstance(tensor, PackedTensor) else tensor
    with tensor.path.open("rb") as file:
        quarter = tensor.nbytes // 4
        return [os.pread(file.fileno(), min(quarter, 4096), tensor.offset + i * quarter) for i in (1, 2, 3)]


def quant_layer(layer: nn.Module, fmt: Format, dtype: torch.dtype) -> QuantLinear:
    """The low-bit layer that takes the place of a linear one.

    Args:
        layer: `nn.Linear` or Conv1D.
        fmt: Format of the weight.
        dtype: Dtype of scales.
    Returns:
        A layer without storage for its weight; it keeps the bias parameter of `layer`.
    """
    assert isinstance(layer, (nn.Linear, Conv1D))
    columns, rows = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    swapped = LAYERS[type(fmt)](columns, rows, format=fmt, dtype=dtype, bias=layer.bias, transposed=isinstance(layer, Conv1D))
    return swapped.train(layer.training)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """One tensor of the model and the module that holds it."""

    owner: nn.Module
    tensor: Tensor


def entries_of(model: PreTrainedModel, read: Mapping[str, int], twice: Collection[str] = ()) -> list[Entry]:
    """What a model holds, as the planner sees it: every parameter and buffer once, tied ones under the name that is filled.

    Args:
        model: A placeholder, its layers not swapped yet.
        read: Bytes that are read for each tensor, by name; what is not named is not in the checkpoint.
        twice: Names of weights that are not tied, but have the same values.
    Returns:
        One entry a tensor, in the model's order.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    roles = _roles(model)
    entries = []
    for name, held in _tensors(model):
        if (name in tied or name in tied.values()) and name not in read:
            continue
        shape = tuple(held.tensor.shape)
        kind = _kind(name, held, roles, read)
        if kind == "head" and name in twice:
            kind = "tied"
        if kind in ("linear", "head") and isinstance(held.owner, Conv1D):
            shape = (shape[1], shape[0])
        stack = stack_of(held.owner, name.rpartition(".")[2]) if kind == "experts" else None
        if stack is not None:
            shape = stack.shape
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


def _kind(name: str, held: _Held, roles: Mapping[str, Kind], read: Mapping[str, int]) -> Kind:
    """What a tensor is: what the model says of it, else its name; only plain linear layers that are read are quantized."""
    is_weight = name.endswith(".weight")
    leaf = name.rpartition(".")[2]
    if roles.get(name) in ("tied", "shared"):
        return "embedding" if roles[name] == "tied" and isinstance(held.owner, nn.Embedding) else roles[name]
    if isinstance(held.owner, nn.Embedding):
        kind = guess_kind(name, tuple(held.tensor.shape)) if is_weight else "other"
        return "embedding" if kind == "embedding" and name in read else "positions"
    if stack_of(held.owner, leaf) is not None:
        return "experts" if name in read else "other"
    if is_weight and isinstance(held.owner, nn.Linear | Conv1D) and name in roles:
        kind = roles[name]
    else:
        kind = guess_kind(name, tuple(held.tensor.shape))
    plain = _is_linear(held.owner) and is_weight and name in read
    if kind == "experts":
        # A list of small expert modules is as good as any linear layer.
        return "linear" if plain and len(held.tensor.shape) == 2 else "other"
    return "other" if kind in ("linear", "head", "embedding") and not plain else kind


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; what a class of its own does with the weight a packed one in its place does too.

    All but the output of torch's attention, whose weight is handed to a function that would want it unpacked at every call.
    """
    if isinstance(module, nn.Linear):
        return not isinstance(module, NonDynamicallyQuantizableLinear)
    return type(module) is Conv1D


def _roles(model: PreTrainedModel) -> dict[str, Kind]:
    """What the model itself tells of its linear weights: output heads, those its class keeps in float32, tied ones."""
    family = str(text_config(model.config.to_dict()).get("model_type"))
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = list(output) if isinstance(output, nn.ModuleList) else [output]
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    pattern = re.compile("|".join(rf"(^|\.){re.escape(word)}\." for word in kept)) if kept else None
    roles: dict[str, Kind] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        named = guess_kind(name, (1, 1), family)
        if any(module is head for head in heads):
            roles[name] = "head"
        if named == "read":
            roles[name] = "read"
        if pattern is not None and pattern.search(name):
            roles[name] = "listed"
    for group in _tied_groups(getattr(model, "all_tied_weights_keys", {})).values():
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in group}
        tables = [name for name, owner in owners.items() if isinstance(owner, nn.Embedding)]
        is_table = any(guess_kind(name, tuple(owners[name]._parameters["weight"].shape)) == "embedding" for name in tables)  # type: ignore[union-attr]
        if all(stack_of(owner, name.rpartition(".")[2]) for name, owner in owners.items()):
            continue
        whole = all(
            name.endswith(".weight") and (isinstance(owner, nn.Embedding) or _is_linear(owner))
            for name, owner in owners.items()
        )
        if whole and not tables:
            for name in group:
                roles.setdefault(name, "linear")
        else:
            roles |= dict.fromkeys(group, "tied" if whole and is_table else "shared")
    return roles
