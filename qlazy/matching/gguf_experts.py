"""Fills of fused experts from a GGUF file, which holds a layer's gates, ups and downs apart, each as (experts, rows, columns).

    blk.0.ffn_gate_exps  rows 0 .. I of expert 0  ──> gate_up_proj rows   0 .. I
    blk.0.ffn_up_exps    rows 0 .. I of expert 0  ──> gate_up_proj rows   I .. 2I
    blk.0.ffn_down_exps  all rows                 ──> down_proj

Rows are read a chunk at a time where they go straight to their place. One expert is decoded as a whole where the model holds it
turned with gate and up alternating (gpt-oss), and where a gate does not end on a block of rows.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel
from qlazy.layers.stacks import Stack, stack_of
from qlazy.matching.fill import Fill
from qlazy.matching.row_map import Piece, pieces_of, rows_by_target
from qlazy.sources.gguf_config import EXPERTS
from qlazy.sources.source import Source, TensorInfo

_Members = dict[str, list[TensorInfo]]
"""By part (gate, up, gate_up, down): one tensor of all experts, or one for each."""


def expert_fills(model: PreTrainedModel, source: Source, state: dict[str, Tensor]) -> list[Fill]:
    """Find the place of every tensor of experts.

    Args:
        model: A placeholder.
        source: An opened GGUF file.
        state: The model's tensors by name.
    Returns:
        The fills; none for a model without experts.
    Raises:
        UnsupportedModel: the model has no fused experts where the file has some.
        IncompleteCheckpoint: a gate without its up, or the other way round, or an expert is missing.
        CorruptCheckpoint: the shapes differ from the model's.

    Memory: sixteen bytes for each row of a layer's experts, once.
    """
    groups: dict[tuple[int, str, str], dict[tuple[str, int], TensorInfo]] = {}
    for key, info in source.tensors.items():
        one = EXPERTS.fullmatch(key)
        if one is not None:
            role = "down_proj" if one[2] == "down" else "gate_up_proj"
            groups.setdefault((int(one[1]), role, one[4]), {})[one[2], int(one[3] or 0)] = info
    if not groups:
        return []
    owners = _owners(model)
    fills: list[Fill] = []
    known: dict[Any, list[Piece]] = {}
    for (layer, role, leaf), group in groups.items():
        members: _Members = {}
        for part, number in sorted(group):
            members.setdefault(part, []).append(group[part, number])
        target = f"{owners.get(layer)}.{role}" + ("_bias" if leaf == "bias" else "")
        if target not in state:
            first = next(iter(group.values()))
            raise UnsupportedModel(
                f"{first.path.name}: {first.name!r} has no place in {type(model).__name__}.",
                hint="Use the model's safetensors files, or a newer transformers.",
            )
        fills.extend(_group_fills(model, target, role, members, state, known))
    return fills


def _owners(model: PreTrainedModel) -> dict[int, str]:
    """Path of the module of fused experts in each layer."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", path)
        if number is not None and stack_of(module, "down_proj") is not None:
            found[int(number[1])] = path
    return found


def _group_fills(
    model: PreTrainedModel,
    target: str,
    role: str,
    members: _Members,
    state: dict[str, Tensor],
    known: dict[Any, list[Piece]],
) -> list[Fill]:
    parts = [members[part] for part in ("gate_up", "gate", "up", "down") if part in members]
    sources = tuple(info for part in parts for info in part)
    first = sources[0]
    path, _, _ = target.rpartition(".")
    experts = model.get_submodule(path)
    stack = stack_of(experts, role)
    assert stack is not None
    for part, infos in members.items():
        lacking = {"gate": "up", "up": "gate"}.get(part)
        if lacking and len(members.get(lacking, ())) != len(infos):
            raise IncompleteCheckpoint(
                f"{first.path.name}: {infos[0].name!r} and its like are {len(infos)}, but {len(members.get(lacking, ()))} of "
                f"{lacking!r} belong to them.",
                hint="Fetch the file again, with all its parts.",
            )
    alternate = len(parts) == 2 and not getattr(experts, "is_concatenated", True)
    turned = stack.transposed and not target.endswith("_bias")
    each = len(parts[0]) if EXPERTS.fullmatch(first.name)[3] else 0  # type: ignore[index]
    convert = functools.partial(_merge, target, each, alternate, turned)
    wanted = tuple(state[target].shape)
    _require_shape(target, wanted, sources, convert)
    if target.endswith("_bias"):
        return [Fill(sources=sources, targets=(target,), convert=convert)]
    if turned:
        return _by_expert(stack, target, sources, len(parts), alternate)
    shapes = [info.shape for info in sources]
    alike = (tuple(shapes), each, alternate, wanted)
    if alike not in known:
        rows = rows_by_target(shapes, convert, {target: wanted})
        pieces = pieces_of(rows, shapes, {target: (stack.rows, False)}) if rows is not None else None
        assert pieces is not None, "experts one below the other are whole spans of rows"
        known[alike] = pieces
    return [piece.fill([target], sources) for piece in known[alike]]


def _by_expert(stack: Stack, target: str, sources: tuple[TensorInfo, ...], parts: int, alternate: bool) -> list[Fill]:
    """One fill for each expert, which is decoded and turned."""
    convert = functools.partial(_merge, target, 0, alternate, True)
    single = len(sources[0].shape) == 3
    fills = []
    for expert in range(stack.experts):
        mine = sources if single else sources[expert :: stack.experts]
        rows = [info.shape[-2] for info in mine]
        spans = tuple((expert * count, (expert + 1) * count) if single else (0, count) for count in rows)
        fills.append(Fill(sources=mine, targets=(target,), convert=convert, spans=spans, target_row=expert * stack.held_rows))
    return fills


def _merge(target: str, each: int, alternate: bool, turned: bool, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Gate and up, or one of them, as the model holds them: (E, rows, K), (rows, K), or biases (E, rows).

    `each`: tensors of a part, one for each expert; 0 = one holds all that there is of it.
    """
    parts = [torch.stack(tensors[at : at + each]) for at in range(0, len(tensors), each)] if each else tensors
    if is_bias := target.endswith("_bias"):
        parts = [part.unsqueeze(-1) for part in parts]
    made = torch.stack(parts, dim=-2).flatten(-3, -2) if alternate else torch.cat(parts, dim=-2)
    if is_bias:
        made = made.squeeze(-1)
    return {target: made.transpose(-1, -2) if turned else made}


def _require_shape(
    target: str, wanted: tuple[int, ...], sources: tuple[TensorInfo, ...], convert: Callable[[list[Tensor]], dict[str, Tensor]]
) -> None:
    try:
        made = list(convert([torch.empty(info.shape, device="meta") for info in sources])[target].shape)
    except (RuntimeError, IndexError) as error:
        raise CorruptCheckpoint(
            f"{sources[0].path.name}: {len(sources)} tensors from {sources[0].name!r} on do not fit each other: {error}",
            hint="The file is damaged; fetch it again.",
        ) from error
    if made != list(wanted):
        raise CorruptCheckpoint(
            f"{sources[0].path.name}: {sources[0].name!r} and its group become {target!r} of shape {made}, but the model has "
            f"{list(wanted)}.",
            hint="The metadata and the tensors belong to different models; fetch the file again.",
        )
