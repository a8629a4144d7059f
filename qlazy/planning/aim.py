"""Formats for every layer of a model that has a target, where they lose least. No torch here.

What a format costs a layer is measured on its weights (`qlazy/sensitivity.py`), or where only headers are here taken to be what
it costs a typical one. How much that matters is told by what the layer does, see `weight_of`. Layers that serving engines merge
into one share a format.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from qlazy.errors import DoesNotFit
from qlazy.formats import Format, Int4, Int8
from qlazy.planning.data import Entry
from qlazy.planning.recipe import REASONS, Recipe
from qlazy.planning.spend import Option, least_bytes, spend
from qlazy.planning.target import Target
from qlazy.sizes import format_bytes

TYPICAL = {32: 6.1e-3, 64: 8.0e-3, 128: 9.9e-3, -1: 1.3e-2}
"""Squared error of asymmetric int4 over squared weights, by columns of a scale; on SmolLM2-135M with channels shuffled."""

WITHOUT_ZEROS = 1.3
"""How much more it is where it is symmetric."""

TYPICAL_INT8 = 7.5e-5
"""The same of int8."""

_MERGED = (
    (re.compile(r"(.*\bexperts)\b.*"), "experts"),
    (re.compile(r"(.*)\.(?:[qkv]_proj|query|key|value|attn_[qkv]|w[qkv]|[qkv])\.weight"), "qkv"),
    (re.compile(r"(.*)\.(?:gate_proj|up_proj|ffn_gate|ffn_up|w1|w3)\.weight"), "gate_up"),
    (re.compile(r"(.*)\.(?:q_a_proj|kv_a_proj_with_mqa)\.weight"), "qkv_a"),
    (re.compile(r"(.*)\.in_proj_\w+\.weight"), "in_proj"),
)
"""Layers that vLLM runs as one, and that share a format therefore."""

_BLOCK = re.compile(r"(.*?)(?<![^.])(\d+)\.")
"""What stands before the first component that is a number, and the number."""
_ATTENDS = re.compile(
    r"\.([qkv]_proj|query|key|value|attn_[qkv]|w[qkv]|[qkv]|query_key_value|qkv(_proj)?|Wqkv|c_attn|[qk]v?_[ab]_proj\w*)\.weight$"
)
"""What attention takes in: queries, keys and values."""
_DOWN = re.compile(r"(?<!attention)\.(down_proj|w2|fc2|wo|ffn_down|mlp\.c_proj|dense_4h_to_h|output\.dense)(\.weight)?$")
"""What goes out of the multilayer perceptron; experts have no `.weight`."""
_UP = re.compile(
    r"\.(gate_proj|up_proj|gate_up_proj|w[13]|fc1|wi(_\d)?|ffn_(gate|up)|c_fc|dense_h_to_4h|intermediate\.dense)(\.weight)?$"
)
"""What goes into it."""
_HEAD = 9.4
"""Weight of an output head for each block of the model: it counts alone, the others in threes. Measured on an embedding that is
the head too, so that for a head of its own it is a guess.
"""


def aim(tensors: Sequence[Entry], recipe: Recipe, dtype: str, *, exact: bool = True, patient: bool = False) -> Recipe:
    """Choose the format of every layer so that the model meets the recipe's target.

    Args:
        tensors: What the model holds.
        recipe: What it says of embeddings and of single modules stands; an output head gets its format at most.
        dtype: Dtype of everything that is not quantized.
        exact: Whether `tensors` come from the model itself, and not from names alone.
        patient: Take the smallest formats where even they are larger than the target.
    Returns:
        The recipe with `chosen` filled in; the same arguments give the same. A recipe without a target as it is.
    Raises:
        DoesNotFit: nothing is as small as the target, unless `patient`.
    """
    target = recipe.target
    if target is None:
        return recipe
    recipe = dataclasses.replace(recipe, chosen=())
    groups = _groups(tensors, recipe)
    free = {entry.name: entry for members in groups for entry in members}
    fixed = [
        (entry, recipe.format_for(entry.kind, entry.name, *entry.matrix)[0]) for entry in tensors if entry.name not in free
    ]
    if target.nbytes is None:
        fixed = [(entry, fmt) for entry, fmt in fixed if fmt is not None]  # bits are those of quantized weights alone
    beside = sum(entry.stored_bytes(fmt, dtype) for entry, fmt in fixed)
    weights = sum(math.prod(entry.shape) for entry in [*free.values(), *(entry for entry, _ in fixed)])
    wanted = math.floor(target.bpw * weights / 8) if target.bpw is not None else target.nbytes
    assert wanted is not None
    last_blocks = _last_blocks(free)
    formats = [shared_formats(members, recipe) for members in groups]
    choices = [
        [_option(members, fmt, target, dtype, last_blocks) for fmt in allowed]
        for members, allowed in zip(groups, formats, strict=True)
    ]
    least = least_bytes(choices) + beside
    if least > wanted and not patient:
        raise _too_small(target, recipe, least=least, wanted=wanted, weights=weights, exact=exact)
    picked = spend(choices, max(least, wanted) - beside)
    chosen = [
        (entry.name, allowed[index])
        for members, allowed, index in zip(groups, formats, picked, strict=True)
        for entry in members
    ]
    return dataclasses.replace(recipe, chosen=tuple(chosen))


def is_free(entry: Entry, recipe: Recipe) -> bool:
    """Whether a target chooses the format of a weight.

    Args:
        entry: Any tensor.
        recipe: What is asked for.
    Returns:
        True for layers, experts and output heads that the recipe quantizes and `modules` does not name.
    """
    if entry.kind not in ("linear", "experts", "head"):
        return False
    fmt, reason = recipe.format_for(entry.kind, entry.name, *entry.matrix)
    return fmt is not None and reason in ("", REASONS["head"])


def formats_of(entry: Entry, recipe: Recipe) -> list[Format | None]:
    """The formats that a weight may get.

    Args:
        entry: One that is free.
        recipe: With a target.
    Returns:
        Int4 in groups of 128, 64 and 32 columns as far as they divide its own, or else by rows; int8; and for a target in bytes
        None, the model's dtype. Of an output head those with no more bits than the recipe gives it.
    """
    sizes = [size for size in (128, 64, 32) if entry.matrix[1] % size == 0] or [-1]
    formats: list[Format | None] = [_int4(size, recipe) for size in sizes]
    if entry.kind != "head" or recipe.head == Int8():
        formats.append(Int8())
    if recipe.target is not None and recipe.target.nbytes is not None and entry.kind != "head":
        formats.append(None)
    return formats


def shared_formats(members: Sequence[Entry], recipe: Recipe) -> list[Format | None]:
    """The formats that weights may get that share one.

    Args:
        members: All of them, free.
        recipe: With a target.
    Returns:
        Those that each of them may get; where their columns take no groups in common int4 by rows too.
    """
    first, *others = (formats_of(entry, recipe) for entry in members)
    shared = [fmt for fmt in first if all(fmt in other for other in others)]
    if any(isinstance(fmt, Int4) for fmt in shared):
        return shared
    return [_int4(-1, recipe), *shared]


def offered(entries: Iterable[Entry], recipe: Recipe) -> dict[str, list[Format | None]]:
    """The formats that each weight of a model may get.

    Args:
        entries: What the model holds.
        recipe: With a target.
    Returns:
        Formats by name of all that are free.
    """
    return {entry.name: shared_formats(members, recipe) for members in _groups(entries, recipe) for entry in members}


def merged(name: str) -> str:
    """What a weight shares its format with.

    Args:
        name: Its name.
    Returns:
        The same for all that are merged; of others the name.
    """
    for pattern, suffix in _MERGED:
        if found := pattern.fullmatch(name):
            return f"{found[1]}.{suffix}"
    return name


def unlike(formats: Mapping[str, Format | None]) -> tuple[tuple[str, ...], ...]:
    """Layers that serving engines merge into one, and whose formats differ.

    Args:
        formats: By name of weight; None is 16 bits.
    Returns:
        The names of each such group.
    """
    groups: dict[str, list[str]] = {}
    for name in formats:
        groups.setdefault(merged(name), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len({formats[name] for name in names}) > 1)


def _groups(entries: Iterable[Entry], recipe: Recipe) -> list[list[Entry]]:
    """The weights whose format is chosen, those together that share one."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if is_free(entry, recipe):
            groups.setdefault(merged(entry.name), []).append(entry)
    return list(groups.values())


def _last_blocks(names: Iterable[str]) -> dict[str, int]:
    """Number of the last block, by what stands before the numbers: an encoder's and a decoder's may differ."""
    last: dict[str, int] = {}
    for found in filter(None, map(_BLOCK.match, names)):
        last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return last


def _int4(group_size: int, recipe: Recipe) -> Int4:
    """With zero points or without, as the recipe says."""
    return Int4(group_size=group_size, symmetric=isinstance(recipe.format, Int4) and recipe.format.symmetric)


def _option(members: Sequence[Entry], fmt: Format | None, target: Target, dtype: str, last_blocks: Mapping[str, int]) -> Option:
    """What a format takes and costs, summed over weights that share it."""
    nbytes, loss = 0, 0.0
    for entry in members:
        own = None if fmt is None else fmt.for_columns(entry.matrix[1])
        nbytes += entry.stored_bytes(own, dtype)
        if own is not None:
            error = target.errors.get(entry.name, {}).get(own, _typical(own))
            loss += weight_of(entry, last_blocks) * error / len(members)
    return Option(nbytes=nbytes, loss=loss)


def _typical(fmt: Format) -> float:
    if not isinstance(fmt, Int4):
        return TYPICAL_INT8
    return TYPICAL[fmt.group_size] * (WITHOUT_ZEROS if fmt.symmetric else 1)


def weight_of(entry: Entry, last_blocks: Mapping[str, int]) -> float:
    """How much an error of a weight matters: KL divergence, in any unit, at equal squared error over squared weights.

    Measured on SmolLM2-135M, three blocks at a time (`docs/quality.md`): queries, keys and values matter most in the middle of
    a model, what goes into and out of the multilayer perceptron in the last blocks and the first.

    Args:
        entry: A weight; what is merged has the mean of its members.
        last_blocks: Number of the last block, by what stands before the numbers.
    Returns:
        A positive number.
    """
    block = _BLOCK.match(entry.name)
    if entry.kind == "head" or block is None:
        return _HEAD * (1 + max(last_blocks.values(), default=0))
    depth = int(block[2]) / max(1, last_blocks[block[1]])
    if _ATTENDS.search(entry.name):
        return 5 + 14 * math.sin(math.pi * depth) ** 2
    if _DOWN.search(entry.name):
        return 10 if depth < 0.1 else 24 if depth > 0.9 else 3
    if _UP.search(entry.name):
        return 20 if depth > 0.9 else 5
    return 2


def _too_small(target: Target, recipe: Recipe, *, least: int, wanted: int, weights: int, exact: bool) -> DoesNotFit:
    """The error that names the smallest target."""
    told = "" if exact else ", by their names,"
    if target.nbytes is None:
        # Rounded up, so that what is named is enough.
        smallest = math.ceil(8e4 * least / weights) / 1e4
        fewer = "" if recipe.embedding is None else ", or leave --embedding-bits out: embeddings count among these weights"
        return DoesNotFit(
            f"The smallest formats{told} take {smallest:g} bits per quantized weight, more than the {target.bpw:g} of the "
            "target.",
            hint=f"Use --target-bpw {smallest:g} or more{fewer}.",
            needed_bytes=least,
            free_bytes=wanted,
        )
    unit, scale = ("MiB", 1 << 20) if least >= 1 << 30 else ("KiB", 1 << 10)
    smaller = "" if recipe.embedding == Int4() else ", or give embeddings fewer bits: --embedding-bits 4"
    return DoesNotFit(
        f"With the smallest formats the weights{told} take {format_bytes(least, round_up=True)} ({least:,} bytes), more than "
        f"the {format_bytes(wanted)} of the target.",
        hint=f"Use --target-size {-(-least // scale)}{unit} or more{smaller}.",
        needed_bytes=least,
        free_bytes=wanted,
    )
