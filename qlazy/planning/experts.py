"""Experts as a model will hold them, told from headers: one tensor for all of a layer. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from qlazy.planning.data import Entry
from qlazy.planning.demand import text_config

_ONE = re.compile(r"(.*\bexperts)\.([0-9]+)\.(.*)")
_GATE_AND_UP = (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3"))
"""Names of the two matrices that transformers fuses into one, gate first."""
_DOWN = ("w2", "fc2")
"""Names of the third, which transformers calls `down_proj`."""
_FLAT = re.compile(r"\.experts\.mlp\.(w1|v1|w2)$")
"""Stacks of experts that are stored as one matrix, as Dbrx has them."""


def stack_experts(entries: list[Entry], config: Mapping[str, Any]) -> list[Entry]:
    """Make one entry of the experts of a layer, (E, N, K), as the model's own plan has it.

    Args:
        entries: One for each stored tensor.
        config: A config.json.
    Returns:
        The entries; experts of different shapes, or of which some are not there, stay as they are.
    """
    groups: dict[tuple[str, str], dict[int, list[Entry]]] = {}
    made: dict[str, list[Entry]] = {}
    hidden = text_config(config).get("hidden_size")
    for entry in entries:
        one = _ONE.match(entry.name)
        if entry.kind != "experts":
            continue
        if one is None or len(entry.shape) != 2:
            made[entry.name] = [_turned(entry, config, hidden)]
            continue
        role = _role(one.group(3))
        groups.setdefault((one.group(1), role), {}).setdefault(int(one.group(2)), []).append(entry)
    for (path, role), experts in groups.items():
        members = [experts[number] for number in sorted(experts)]
        shapes = {tuple(sorted(entry.shape for entry in member)) for member in members}
        if len(shapes) != 1 or len({entry.shape[1] for entry in members[0]}) != 1:
            continue
        everything = [entry for member in members for entry in member]
        first = everything[0]
        stack = dataclasses.replace(
            first,
            name=f"{path}.{role}",
            shape=(len(members), sum(entry.shape[0] for entry in members[0]), first.shape[1]),
            source_nbytes=sum(entry.source_nbytes for entry in everything),
        )
        made |= {entry.name: [] for entry in everything} | {first.name: [stack]}
    return [kept for entry in entries for kept in made.get(entry.name, [entry])]


def stack_name(name: str) -> str | None:
    """What `stack_experts` calls the stack that a matrix of one expert belongs to.

    Args:
        name: Key in the checkpoint.
    Returns:
        The name; None for what is not numbered among experts.
    """
    one = _ONE.match(name)
    return None if one is None else f"{one.group(1)}.{_role(one.group(3))}"


def is_flat_stack(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a matrix holds those of all experts, one below the other.

    Args:
        name: Key in the checkpoint.
        config: A config.json.
    Returns:
        True for Dbrx's.
    """
    return _FLAT.search(name) is not None and expert_count(config) > 1


def expert_count(config: Mapping[str, Any]) -> int:
    """Number of experts of a layer, for configs that keep it in a part of their own.

    Args:
        config: A config.json.
    Returns:
        1 where it does not say.
    """
    part = config.get("ffn_config")
    return int(part.get("moe_num_experts") or 1) if isinstance(part, Mapping) else 1


def _role(rest: str) -> str:
    """What a matrix of an expert is in the model: gate and up are one."""
    *path, last = rest.removesuffix(".weight").split(".")
    if any(last in pair for pair in _GATE_AND_UP):
        last = "gate_up_proj"
    return ".".join([*path, "down_proj" if last in _DOWN else last])


def _turned(entry: Entry, config: Mapping[str, Any], hidden: Any) -> Entry:
    """A stored stack as (E, N, K): what comes from the hidden states has K of their width, what goes back to them N."""
    shape = entry.shape
    if is_flat_stack(entry.name, config):
        experts = expert_count(config)
        rows, columns = shape[0] // experts, shape[1]
        return dataclasses.replace(
            entry, shape=(experts, columns, rows) if entry.name.endswith("w2") else (experts, rows, columns)
        )
    if len(shape) != 3 or math.prod(shape) == 0:
        return entry
    experts, rows, columns = shape
    goes_back = re.search(r"down|w2|fc2|output_linear", entry.name.rpartition("experts")[2] or entry.name) is not None
    is_turned = columns == hidden != rows if goes_back else rows == hidden != columns
    return dataclasses.replace(entry, shape=(experts, columns, rows) if is_turned else shape)
