"""Swap the layers that the recipe quantizes for low-bit ones, before any storage exists, and make the plan exact."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlazy.formats import Format
from qlazy.layers.experts import EXPERTS_IMPLEMENTATION
from qlazy.layers.linear import LAYERS
from qlazy.layers.quant_linear import QuantLinear
from qlazy.layers.quant_weight import QuantWeight
from qlazy.layers.stacks import Stack, stack_of
from qlazy.match import Match
from qlazy.model_entries import entries_of, tied_groups
from qlazy.planning.plan import Entry, Plan, TensorPlan, allocate, require_fit
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
    is_tied = tensor.name in tied_groups(getattr(model, "all_tied_weights_keys", {}))
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
    group = tied_groups(tied).get(name, {name})
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
