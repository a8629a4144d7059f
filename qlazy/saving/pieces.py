"""Cut a model into pieces that can be written one after the other: what fills each, and what it is called on disk.

A folder has the names of the checkpoint that it comes from, as that is what other engines know. What is not quantized goes from
file to file as it is stored, so that not even fused experts have to be taken apart again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlazy.errors import UsageError
from qlazy.formats import ITEMSIZE, Codebook4, Format, packed_nbytes
from qlazy.layers.packed_stack import PackedStack
from qlazy.match import Match
from qlazy.matching.fill import Fill, is_stored_so
from qlazy.planning.plan import Plan, TensorPlan
from qlazy.saving.expert_names import ExpertRows, expert_names
from qlazy.saving.layout_config import Layout, quantization_config
from qlazy.saving.layouts import misfit
from qlazy.saving.shards import shard_names
from qlazy.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of a model, or a weight that is packed, as it is called on disk."""

    key: str
    """Its name there; of a packed weight the name that the weight would have."""
    name: str
    """Its name in the model; empty where a stored tensor is passed on as it is."""
    format: Format | None
    """How it is packed; None = not at all."""
    shape: tuple[int, ...]
    """Its shape before that."""
    dtype: str
    """Its dtype; of a packed weight that of its scales."""
    nbytes: int
    """Bytes that it takes."""
    rows: ExpertRows | None = None
    """Which rows of which expert it is, of fused experts."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors that are filled, and so written, together."""

    fills: tuple[Fill, ...]
    """What is read for them."""
    outputs: tuple[Output, ...]
    """What is written."""

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(output.nbytes for output in self.outputs)


def make_pieces(model: PreTrainedModel, plan: Plan, match: Match, source: Source) -> list[Piece]:
    """Cut a placeholder into pieces.

    Args:
        model: A placeholder, its layers swapped.
        plan: The exact plan.
        match: What fills it.
        source: Where it comes from.
    Returns:
        Pieces that hold every stored tensor once, in file order.

    Memory: names and shapes.
    """
    planned = {tensor.name: tensor for tensor in plan.tensors}
    groups: dict[str, list[Fill]] = {}  # by module, of what is quantized, and else by target
    for fill in match.fills:
        places = {_place(target, planned[target]) for target in fill.targets}
        # What one stored tensor fills belongs together: where it is passed on it is written once, and whole.
        places |= {f"{info.name} stored" for info in fill.sources}
        joined = {id(group): group for place in places if (group := groups.get(place)) is not None}
        group = [other for known in joined.values() for other in known] + [fill] if len(joined) != 1 else joined.popitem()[1]
        if group[-1] is not fill:
            group.append(fill)
        for place in [place for place, known in groups.items() if id(known) in joined] if len(joined) > 1 else ():
            groups[place] = group
        groups.update(dict.fromkeys(places, group))
    names = [target for fill in match.fills for target in fill.targets]
    keys = hub_names(model, names)
    stacks = {name: module.stack for name, module in model.named_modules() if isinstance(module, PackedStack)}
    stacks = {name: stack for name, stack in stacks.items() if stack.experts}
    by_expert = expert_names(model, stacks)
    pieces = []
    for fills in {id(group): group for group in groups.values()}.values():
        targets = list(dict.fromkeys(target for fill in fills for target in fill.targets))
        if source.kind == "safetensors" and all(planned[target].format is None for target in targets):
            stored = {info.name: (info, fill) for fill in fills for info in fill.sources}
            outputs = [_passed_on(info, planned[fill.targets[0]]) for info, fill in stored.values()]
            fills = [Fill(sources=(info,), targets=(name,), row_block=fill.row_block) for name, (info, fill) in stored.items()]
        else:
            from_file = _whole_sources(model, fills) if source.kind == "safetensors" else {}
            named = {target: from_file.get(target, keys[target]) for target in targets if target not in stacks}
            outputs = [_made(target, key, planned[target]) for target, key in named.items()]
            outputs += [_of_expert(key, rows, planned) for key, rows in by_expert.items() if rows.name in targets]
        pieces.append(Piece(fills=tuple(fills), outputs=tuple(outputs)))
    return pieces


class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


_Bytes = TypeVar("_Bytes", bound=_HasBytes)


def cut_shards(pieces: Iterable[_Bytes], shard_bytes: int) -> dict[str, list[_Bytes]]:
    """Put pieces into shards.

    Args:
        pieces: In order.
        shard_bytes: Bytes of a shard; more only where one piece has more.
    Returns:
        The pieces of each shard by the name of its file, in order.
    """
    shards: list[list[_Bytes]] = []
    held = 0
    for piece in pieces:
        if not shards or held + piece.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.nbytes
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def require_layout_fits(pieces: Iterable[Piece], layout: Layout) -> None:
    """Refuse weights that a layout cannot hold before anything is read.

    Args:
        pieces: What will be written.
        layout: Whose layout.
    Raises:
        UsageError: which weight, and why.
    """
    kinds = set()
    outputs = [output for piece in pieces for output in piece.outputs]
    has_codebook = any(isinstance(output.format, Codebook4) for output in outputs)
    for output in outputs:
        if output.format is None:
            continue
        rows, columns = output.shape[-2:]
        path = output.key.removesuffix(".weight")
        reason = misfit(layout, output.format, rows, columns)
        kinds.add(output.format)
        if not reason and layout == "bitsandbytes" and len(kinds) > 1:
            reason = f"is {output.format.name}, and a bitsandbytes folder has one format"
        if reason:
            other = "--head-bits 16" if "head" in output.key else f"--modules-to-not-convert {path}"
            hint = "Use --as bitsandbytes with --head-bits 16." if has_codebook else f"Use --as compressed-tensors, or {other}."
            raise UsageError(f"{path} {reason}.", hint=hint)


def describe(layout: Layout, model: nn.Module, pieces: Iterable[Piece]) -> dict[str, Any]:
    """The `quantization_config` of what is written.

    Args:
        layout: Whose layout.
        model: The model.
        pieces: All of it.
    Returns:
        The config.
    """
    outputs = [output for piece in pieces for output in piece.outputs]
    packed = {output.key.removesuffix(".weight"): output.format for output in outputs if output.format is not None}
    single = [output for output in outputs if output.format is not None and output.rows is None]
    names = {output.key.removesuffix(".weight"): output.name.removesuffix(".weight") for output in single}
    left, others = [], []
    for output in outputs:
        path = output.key.removesuffix(".weight")
        owner = _module(model, output.name.rpartition(".")[0]) if output.name else _module(model, path)
        embeds = isinstance(owner, nn.Embedding) or "Embedding" in type(owner).__name__
        if output.format is None and len(output.shape) == 2 and output.key.endswith(".weight") and not embeds:
            left.append(path)
        if output.format is not None and embeds:
            others.append(path)
    # A tied head is in no file, and is a linear layer all the same.
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    known = {*packed, *names.values()}
    left += [path for path in hub_names(model, linear).values() if path not in left and path not in known]
    left += [path for path in linear if path not in left and path not in known]
    return quantization_config(layout, packed, left, others, names)


def hub_names(model: PreTrainedModel | nn.Module, names: Sequence[str]) -> dict[str, str]:
    """What tensors of a model are called in its checkpoints, by transformers' own renames.

    Args:
        model: A placeholder or a loaded model.
        names: Names in the model.
    Returns:
        By name; what is converted and not just renamed keeps its name.
    """
    return {name: name for name in names} | renamed(model, names)


def renamed(model: PreTrainedModel | nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The same of those tensors alone that are not converted.

    Args:
        model: A placeholder or a loaded model.
        names: Names in the model.
    Returns:
        By name; without those that a converter takes apart or puts together.
    """
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in names}
    marks = {name: torch.empty(0, device="meta") for name in names}
    by_mark = {id(mark): name for name, mark in marks.items()}
    try:
        found: Mapping[str, Tensor] = revert_weight_conversion(model, dict(marks))
    except Exception:  # a conversion that looks into what it is given
        return {}
    return {by_mark[id(mark)]: key for key, mark in found.items() if id(mark) in by_mark}


def _place(target: str, planned: TensorPlan) -> str:
    return target.rpartition(".")[0] if planned.format is not None else f"{target} itself"


def _passed_on(info: Any, planned: TensorPlan) -> Output:
    nbytes = math.prod(info.shape) * ITEMSIZE.get(planned.dtype, 1)
    return Output(key=info.name, name="", format=None, shape=info.shape, dtype=planned.dtype, nbytes=nbytes)


def _whole_sources(model: nn.Module, fills: Sequence[Fill]) -> dict[str, str]:
    """Tensors of the model that are each one stored tensor, and its name: such a weight keeps it in low bits."""
    targets = Counter(target for fill in fills for target in fill.targets)
    return {
        fill.targets[0]: fill.sources[0].name
        for fill in fills
        if targets[fill.targets[0]] == 1 and is_stored_so(model.get_submodule(fill.targets[0].rpartition(".")[0]), fill)
    }


def _made(target: str, key: str, planned: TensorPlan) -> Output:
    return Output(
        key=key,
        name=target,
        format=planned.format,
        shape=planned.shape,
        dtype=planned.dtype,
        nbytes=planned.nbytes,
    )


def _of_expert(key: str, rows: ExpertRows, planned: Mapping[str, TensorPlan]) -> Output:
    tensor = planned[rows.name]
    assert tensor.format is not None
    shape = (rows.stop - rows.start, tensor.shape[-1])
    nbytes = packed_nbytes(tensor.format, *shape, tensor.dtype)
    return Output(key=key, name=rows.name, format=tensor.format, shape=shape, dtype=tensor.dtype, nbytes=nbytes, rows=rows)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
