"""Match a checkpoint with a model: which stored tensors become which of the model's, and what is missing or left over.

transformers' own renames, prefixes and weight converters decide, so that whatever it loads finds its place here too. Everything
is checked on shapes alone, before any storage exists and before a byte of weights is read.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Interleave,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint
from qlazy.matching.fill import Fill, dtype_of, held_bytes, row_count, straight_fill
from qlazy.matching.fill_experts import by_expert, expert_fills, matrix_rows
from qlazy.matching.gguf import gguf_mapping, match_gguf
from qlazy.matching.row_map import Piece, pieces_of, rows_by_target
from qlazy.sources.packed import PackedTensor, read_whole_at_once
from qlazy.sources.source import Source, TensorInfo

MAX_BIAS_BYTES = 1 << 20
"""Largest bias that is looked at: those of half a million rows."""


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
        converted = [_decoded_bytes(fill) for fill in self.fills if fill.convert is not None]
        # Twice as much is planned, for what a conversion makes; of these nothing is made but a few rows at a time.
        _, packed = read_whole_at_once(info for fill in self.fills for info in fill.sources)
        return max([*converted, -(-packed // 2)])


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
    mapping = gguf_mapping(model, source) if source.kind == "gguf" else get_model_conversion_mapping(model)
    fills, leftover = match_gguf(model, source, state) if mapping is None else _match_keys(model, source, state, mapping)
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
    ignored += [key for key in unexpected if _is_zero_bias(key, source)]
    unexpected = [key for key in unexpected if key not in ignored]
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
    ordered = sorted(fills, key=lambda fill: (str(fill.sources[0].path), fill.sources[0].offset, fill.all_spans[0]))
    return Match(fills=tuple(ordered), unexpected=(*unexpected, *ignored), missing=(*missing, *ignored_missing))


def _match_keys(
    model: PreTrainedModel, source: Source, state: dict[str, Tensor], mapping: Sequence[WeightTransform]
) -> tuple[list[Fill], list[str]]:
    """Match by transformers' renames and converters, as its own loader does."""
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
            fills.extend(by_expert(model, straight_fill(model, target, info, state[target])))
        else:
            grouped.setdefault(target, (by_pattern[pattern], []))[1].append((pattern, info))
    known: dict[Any, list[Piece] | None] = {}
    for target, (converter, members) in grouped.items():
        fills.extend(_converted(model, target, converter, members, state, known))
    return fills, leftover


def _converted(
    model: PreTrainedModel,
    target: str,
    converter: WeightConverter,
    members: list[tuple[str, TensorInfo]],
    state: dict[str, Tensor],
    known: dict[Any, list[Piece] | None],
) -> list[Fill]:
    """Fills through one of transformers' converters, tried on meta tensors first to learn its targets and shapes.

    Where it only moves rows they go straight to their place, else by expert where experts do not mix, else as a whole.
    `known` has what was learnt of groups of the same shapes: the layers of a model are alike.
    """
    sources = tuple(info for _, info in members)
    patterns = [pattern for pattern, _ in members]
    # Whether `check_dims` turns is told here: by the time of the load the parameter that it compares with is a packed one.
    turns = len(sources) == 1 and target in state and sources[0].shape != tuple(state[target].shape)

    def convert(tensors: list[Tensor]) -> dict[str, Tensor]:
        fresh = copy.deepcopy(converter)
        for operation in fresh.operations:
            if turns and isinstance(operation, Transpose):
                operation.check_dims = False
        for pattern, info, tensor in zip(patterns, sources, tensors, strict=True):
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
    shapes = [info.shape for info in sources]
    matrices = {name: matrix_rows(model, name, state[name]) for name in made}
    alike = (
        id(converter),
        *zip(patterns, shapes, strict=True),
        *((state[name].shape, rows) for name, rows in matrices.items()),
    )
    if alike not in known:
        rows = rows_by_target(shapes, convert, {name: tuple(state[name].shape) for name in made})
        known[alike] = pieces_of(rows, shapes, matrices) if rows is not None else None
    pieces = known[alike]
    if pieces is not None:
        return [piece.fill(list(made), sources) for piece in pieces]
    turned_if_needed = all(isinstance(op, Transpose) and op.check_dims for op in converter.operations)
    if turned_if_needed and list(made) == [target] and shapes == [tuple(state[target].shape)]:
        return by_expert(model, straight_fill(model, target, sources[0], state[target]))
    whole = Fill(sources=sources, targets=tuple(made), convert=convert)
    return expert_fills(whole, state) if _keeps_experts_apart(converter) else [whole]


def _keeps_experts_apart(converter: WeightConverter) -> bool:
    """Whether a converter leaves the first dimension of one stored tensor alone."""
    dims = {Transpose: ("dim0", "dim1"), Interleave: ("dim",), Chunk: ("dim",)}
    return len(converter.source_patterns) == 1 and all(
        type(op) in dims and all(getattr(op, dim) > 0 for dim in dims[type(op)]) for op in converter.operations
    )


def _decoded_bytes(fill: Fill) -> int:
    """Bytes of what a fill reads, decoded."""
    total = 0
    for info, (start, stop) in zip(fill.sources, fill.all_spans, strict=True):
        total += held_bytes(info) * (stop - start) // max(1, row_count(info.shape))
    return total


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


def _is_zero_bias(key: str, source: Source) -> bool:
    """Whether a tensor is a bias of zeros beside a packed weight: some GPTQ checkpoints give every layer one."""
    base, _, leaf = key.rpartition(".")
    info = source.tensors[key]
    if leaf != "bias" or not isinstance(source.tensors.get(f"{base}.weight"), PackedTensor) or info.nbytes > MAX_BIAS_BYTES:
        return False
    with info.path.open("rb") as file:
        return not any(os.pread(file.fileno(), info.nbytes, info.offset))


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
