"""Match a checkpoint with a model: which stored tensors become which of the model's, and what is missing or left over.

transformers' own renames, prefixes and weight converters decide, so that whatever it loads finds its place here too. Everything
is checked on shapes alone, before any storage exists and before a byte of weights is read.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint
from qlazy.fill import Fill, dtype_of, straight_fill
from qlazy.match_gguf import match_gguf
from qlazy.source import Source, TensorInfo


@dataclass(frozen=True, kw_only=True)
class Match:
    """How a checkpoint and a model fit together."""

    fills: tuple[Fill, ...]
    """Every stored tensor that has a place, in file order."""
    unexpected: tuple[str, ...]
    """Stored tensors that have none and that transformers ignores."""
    missing: tuple[str, ...]
    """Tensors of the model that nothing fills and that transformers initializes or ties."""

    @property
    def largest_conversion(self) -> int:
        """Bytes of the largest tensors that are read as a whole, decoded: what a load needs beside its ring."""
        whole = [fill.sources for fill in self.fills if fill.convert is not None]
        return max((sum(max(s.nbytes, math.prod(s.shape) * dtype_of(s).itemsize) for s in group) for group in whole), default=0)


def match_tensors(model: PreTrainedModel, source: Source, *, strict: bool = True) -> Match:
    """Find the place of every stored tensor.

    Args:
        model: A placeholder, its layers not swapped yet.
        source: An opened local source.
        strict: Whether a missing or an unexpected tensor that transformers would not ignore is an error.
    Returns:
        The match.
    Raises:
        IncompleteCheckpoint: a tensor of the model is in no file.
        CorruptCheckpoint: a stored tensor has another shape or kind of dtype than the model's, or no place in it.
        UnsupportedModel: a stored dtype or layout that is not read.

    Memory: names and shapes.
    """
    state = model.state_dict()
    fills, leftover = match_gguf(model, source, state) if source.kind == "gguf" else _match_keys(model, source, state)
    for fill in fills:
        _require_dtypes(fill, state)
    filled = {target for fill in fills for target in fill.targets}
    missing = sorted(set(state) - filled - _tied(model, filled))
    missing, ignored_missing = _split(missing, model._keys_to_ignore_on_load_missing)
    # Older checkpoints hold buffers that models now compute; transformers passes over both kinds where the model has them.
    buffers = [name for name, _ in model.named_buffers()]
    old = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    computed = {pattern for end, pattern in old.items() if any(name.endswith(end) for name in buffers)}
    unexpected, ignored = _split(leftover, computed | set(model._keys_to_ignore_on_load_unexpected or ()))
    if strict and missing:
        raise IncompleteCheckpoint(
            f"{source.model_id}: {len(missing)} tensors that {type(model).__name__} "
            f"needs are in none of its files: {_some(missing)}",
            hint="Download the model again, or pass strict=False (--no-strict) to initialize them at random.",
        )
    if strict and unexpected and source.kind != "gguf":
        raise CorruptCheckpoint(
            f"{source.model_id}: {len(unexpected)} stored tensors have no place in {type(model).__name__}: {_some(unexpected)}",
            hint="The files belong to another model or version; pass strict=False (--no-strict) to leave them out.",
        )
    ordered = sorted(fills, key=lambda fill: (str(fill.sources[0].path), fill.sources[0].offset))
    return Match(fills=tuple(ordered), unexpected=(*unexpected, *ignored), missing=(*missing, *ignored_missing))


def _match_keys(model: PreTrainedModel, source: Source, state: dict[str, Tensor]) -> tuple[list[Fill], list[str]]:
    """Match by transformers' renames and converters, as its own loader does."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    fills: list[Fill] = []
    leftover: list[str] = []
    grouped: dict[str, tuple[WeightConverter, list[tuple[str, TensorInfo]]]] = {}
    # Converters collect tensors in natural order of their keys (expert 2 before expert 10).
    for key in sorted(source.tensors, key=_natural):
        info = source.tensors[key]
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if target not in state:
            leftover.append(key)
        elif pattern is None:
            fills.append(straight_fill(model, target, info, state[target]))
        else:
            grouped.setdefault(target, (by_pattern[pattern], []))[1].append((pattern, info))
    for target, (converter, members) in grouped.items():
        fills.append(_converted(model, target, converter, members, state))
    return fills, leftover


def _converted(
    model: PreTrainedModel,
    target: str,
    converter: WeightConverter,
    members: list[tuple[str, TensorInfo]],
    state: dict[str, Tensor],
) -> Fill:
    """A fill through one of transformers' converters, tried on meta tensors first to learn its targets and shapes."""
    sources = tuple(info for _, info in members)

    def convert(tensors: list[Tensor]) -> dict[str, Tensor]:
        fresh = copy.deepcopy(converter)
        for (pattern, info), tensor in zip(members, tensors, strict=True):
            fresh.add_tensor(target, info.name, pattern, tensor)  # type: ignore[arg-type]
        made: dict[str, Any] = fresh.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    empty = [torch.empty(info.shape, dtype=dtype_of(info), device="meta") for info in sources]
    try:
        made = convert(empty)
    except Exception as error:
        raise CorruptCheckpoint(
            f"{sources[0].path.name}: {len(sources)} tensors from {sources[0].name!r} on "
            f"cannot be converted into {target!r}: {error}",
            hint="config.json and the weights belong to different models; download both again.",
        ) from error
    for name, tensor in made.items():
        if name not in state or tensor.shape != state[name].shape:
            wanted = list(state[name].shape) if name in state else "nothing of that name"
            raise CorruptCheckpoint(
                f"{sources[0].path.name}: {sources[0].name!r} and its group become {name!r} of shape {list(tensor.shape)}, but "
                f"{type(model).__name__} has {wanted}.",
                hint="config.json and the weights belong to different models; download both again.",
            )
    return Fill(sources=sources, targets=tuple(made), convert=convert)


def _require_dtypes(fill: Fill, state: dict[str, Tensor]) -> None:
    for info in fill.sources:
        for target in fill.targets:
            stored, wanted = dtype_of(info), state[target].dtype
            if stored.is_floating_point != wanted.is_floating_point:
                raise CorruptCheckpoint(
                    f"{info.path.name}: tensor {info.name!r} is stored as {info.dtype}, but {target!r} is {wanted}.",
                    hint="Integers in place of weights mean a quantized checkpoint without its config; get the original.",
                )


def _tied(model: PreTrainedModel, filled: set[str]) -> set[str]:
    """Tensors that get their values by being tied to one that is filled."""
    tied: set[str] = set()
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if {target, origin} & filled:
            tied |= {target, origin} - filled
    return tied


def _split(names: list[str], patterns: Any) -> tuple[list[str], list[str]]:
    """Names that no pattern matches, and names that one does."""
    joined = re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
    ignored = [name for name in names if joined is not None and joined.search(name)]
    return [name for name in names if name not in set(ignored)], ignored


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
