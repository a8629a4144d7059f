"""Which device gets which tensor: whole blocks in order, each device filled before the next begins. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from qlazy.errors import UsageError
from qlazy.planning.budget import Budget
from qlazy.planning.data import Entry

_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech|encoder")


def block_of(name: str) -> str:
    """The repeated block that a tensor belongs to: its path up to the first number, or an empty string.

    Args:
        name: A tensor's path, e.g. `model.layers.3.mlp.up_proj.weight`.
    Returns:
        E.g. `model.layers.3`.
    """
    match = re.match(r"(?:.*?\.)??[0-9]+(?=\.)", name)
    return match.group() if match else ""


def assign(
    tensors: Sequence[Entry],
    budget: Budget,
    *,
    nbytes: Callable[[Entry, str], int],
    room: Mapping[str, int],
    block_kv_bytes: Mapping[str, int],
    exact: bool,
) -> dict[str, str]:
    """Device of every tensor: as the device map says, else blocks in order.

    Args:
        tensors: What the model holds.
        budget: Devices and their limits.
        nbytes: Bytes of a tensor on a device.
        room: Bytes for weights and KV cache, by device.
        block_kv_bytes: KV cache of each block.
        exact: Whether names are the model's own. A checkpoint's may differ, so that a device map need not know them.
    Returns:
        Device by name. What does not fit anywhere is on the last device.
    Raises:
        UsageError: a device map that leaves a tensor out.
    """
    if budget.device_map is not None:
        mapped = {t.name: _mapped(t.name, budget.device_map) for t in tensors}
        if not exact and not any(mapped.values()):
            # The file has other names than the model (GGUF, GPT-2). Only the exact plan can follow the map.
            mapped = dict.fromkeys(mapped, max(budget.devices, key=lambda device: room[device]))
        if not exact:
            mapped |= {t.name: budget.devices[0] for t in tensors if mapped[t.name] is None and t.source_nbytes == 0}
        return {name: _required(name, device) for name, device in mapped.items()}
    units: dict[tuple[int, str], list[Entry]] = {}
    for t in tensors:
        units.setdefault(_unit(t), []).append(t)
    places: dict[str, str] = {}
    at, used = 0, 0
    for unit in sorted(units, key=lambda unit: (unit[0], natural(unit[1]))):
        while True:
            device = budget.devices[at]
            need = sum(nbytes(t, device) for t in units[unit]) + block_kv_bytes.get(unit[1], 0)
            if used + need <= room[device] or at + 1 == len(budget.devices):
                break
            at, used = at + 1, 0
        used += need
        places.update((t.name, device) for t in units[unit])
    return places


def kv_by_block(blocks: Sequence[str], layer_bytes: Sequence[int]) -> dict[str, int]:
    """KV cache of each block; the sum over blocks is the sum over layers.

    Args:
        blocks: Every repeated block of a model.
        layer_bytes: KV cache of each layer of its language model.
    Returns:
        Bytes by block. Blocks that are as many as the layers get theirs, the decoder's before those of another tower; where
        there are none such, all blocks get equal shares.
    """
    towers: dict[str, list[str]] = {}
    for block in sorted(blocks, key=natural):
        towers.setdefault(block.rpartition(".")[0], []).append(block)
    same = [tower for tower, members in towers.items() if len(members) == len(layer_bytes)]
    if same:
        tower = min(same, key=lambda name: (_OTHER_TOWER.search(name) is not None, name))
        return dict(zip(towers[tower], layer_bytes, strict=True))
    if not blocks:
        return {"": sum(layer_bytes)}
    share, rest = divmod(sum(layer_bytes), len(blocks))
    return {block: share + (i < rest) for i, block in enumerate(sorted(blocks, key=natural))}


def natural(name: str) -> list[int | str]:
    """A sort key by which `layers.2` comes before `layers.10`.

    Args:
        name: A path.
    Returns:
        Its text and numbers in turn.
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def _unit(tensor: Entry) -> tuple[int, str]:
    """What stays together: a block; and before all blocks the embeddings, after them norms and heads outside of any."""
    block = block_of(tensor.name)
    if block:
        return 1, block
    return (0, "") if tensor.kind in ("embedding", "positions", "shared") else (2, "")


def _mapped(name: str, device_map: Mapping[str, str]) -> str | None:
    """The device of the longest prefix of `name` in a device map."""
    prefixes = [p for p in device_map if p == "" or name == p or name.startswith(p + ".")]
    return device_map[max(prefixes, key=len)] if prefixes else None


def _required(name: str, device: str | None) -> str:
    if device is None:
        raise UsageError(f"The device map has no entry for {name!r}.", hint='Add "" as an entry for everything else.')
    return device
