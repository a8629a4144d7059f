"""What a model holds, as the planner sees it, and what each tensor is: told by the model itself, not by names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.layers.stacks import stack_of
from qlazy.planning.data import Entry
from qlazy.planning.demand import text_config
from qlazy.planning.recipe import Kind, guess_kind


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
    for group in tied_groups(getattr(model, "all_tied_weights_keys", {})).values():
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


def tied_groups(tied: Mapping[str, str]) -> dict[str, set[str]]:
    """All names of each tied weight, by each of them.

    Args:
        tied: A model's `all_tied_weights_keys`.
    Returns:
        Every group by every name in it.
    """
    groups: dict[str, set[str]] = {}
    for target, origin in tied.items():
        joined = groups.get(target, {target}) | groups.get(origin, {origin})
        groups.update(dict.fromkeys(joined, joined))
    return groups
