"""Which packed weights of a checkpoint can be kept as they are, as they have one of our own layouts. No torch here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qlazy.formats import BNB_BLOCK, BNB_NESTED_BLOCK, Codebook4, Format, Int4, Int8
from qlazy.planning.experts import stack_name
from qlazy.planning.recipe import Kind, Recipe
from qlazy.sources.packed import BitsAndBytes4, BitsAndBytes8, Gptq, Integers, PackedTensor
from qlazy.sources.quantized import quantization
from qlazy.sources.source import Source

_GROUPS = (-1, 32, 64, 128)
_PACKABLE: tuple[Kind, ...] = ("linear", "head", "experts", "embedding", "tied")


@dataclass(frozen=True, kw_only=True)
class KeptRecipe(Recipe):
    """What is packed already: the format of each weight is the one that it is stored in, where we have that."""

    formats: Mapping[str, Format | None] = field(default_factory=dict)
    """By name of what is packed in the files; None where it is packed as no format of ours is, or not as the model has it."""
    others: Recipe = Recipe()
    """What becomes of these."""

    def format_for(self, kind: Kind, name: str, rows: int, columns: int) -> tuple[Format | None, str]:
        """The format that a weight is stored in, or is requantized to.

        Args:
            kind: What it is.
            name: Its path.
            rows: out_features.
            columns: in_features.
        Returns:
            The format, or None and the reason.
        """
        if name not in self.formats or kind not in _PACKABLE:
            return None, "not packed in the files"
        fmt = self.formats[name]
        if fmt is None:
            fmt, reason = self.others.format_for(kind, name, rows, columns)
            return fmt, reason or "packed otherwise in the files"
        return fmt, "" if fmt == self.format else "packed so in the files"


def keep(source: Source, recipe: Recipe | None = None) -> KeptRecipe | None:
    """The recipe that keeps what a checkpoint holds, weight by weight.

    Args:
        source: An opened source.
        recipe: What was asked for; what is stored is kept where this is the default, or asks for what is stored.
    Returns:
        The recipe; None where nothing is packed as a format of ours, or something else is asked for.
    """
    formats = {name: _format_of(info, source) for name, info in source.tensors.items() if isinstance(info, PackedTensor)}
    kept = [fmt for fmt in formats.values() if fmt is not None]
    if not kept:
        return None
    most = Counter(kept).most_common(1)[0][0]
    head = next((fmt for name, fmt in formats.items() if fmt is not None and "head" in name), None)
    if recipe is not None and recipe != Recipe():
        as_stored = recipe.format == most and recipe.head in (Recipe().head, head)
        as_stored = as_stored and (recipe.embedding is None or recipe.embedding in kept)
        if not as_stored or recipe.target or recipe.modules or recipe.modules_to_not_convert:
            return None
    stacks: dict[str, list[str]] = {}
    for name in formats:
        if (stack := stack_name(name)) is not None:
            stacks.setdefault(stack, []).append(name)
    made = KeptRecipe(format=most, head=head, formats=formats, others=recipe or Recipe())
    # A plan from the headers calls the experts of a layer by one name.
    return dataclasses.replace(made, formats={**formats, **renamed(made, stacks).formats})


def renamed(recipe: KeptRecipe, names: Mapping[str, Collection[str]], otherwise: Collection[str] = ()) -> KeptRecipe:
    """The same recipe, for the names of a model.

    Args:
        recipe: With the names of the checkpoint.
        names: By name in the model all in the checkpoint that fill it.
        otherwise: Names in the model of what is stored in another way than the model has it, such as in parts.
    Returns:
        The recipe with the names of the model. Its formats are kept where all that fills a weight has one.
    """
    formats: dict[str, Format | None] = {}
    for name, keys in names.items():
        found = {recipe.formats.get(key) for key in keys}
        if not recipe.formats.keys().isdisjoint(keys):
            formats[name] = found.pop() if len(found) == 1 and name not in otherwise else None
    return dataclasses.replace(recipe, formats=formats)


def _format_of(info: PackedTensor, source: Source) -> Format | None:
    """Our format with the same bits, or None."""
    scheme = info.scheme
    if info.part("g_idx") is not None and not (isinstance(scheme, Gptq) and _in_order(source)):
        return None
    if isinstance(scheme, Integers):
        zero = info.part("zero")
        if scheme.group_size not in _GROUPS or (zero is not None and zero.dtype != "int32"):
            return None
        if scheme.bits == 4 and scheme.packed:
            return Int4(group_size=scheme.group_size, symmetric=scheme.symmetric)
        return Int8(group_size=scheme.group_size) if scheme.bits == 8 and scheme.symmetric else None
    if isinstance(scheme, BitsAndBytes4):
        if scheme.blocksize != BNB_BLOCK or scheme.nested_blocksize not in (0, BNB_NESTED_BLOCK):
            return None
        return Codebook4(kind=scheme.kind, double_quant=scheme.nested_blocksize > 0)
    if isinstance(scheme, BitsAndBytes8):
        return Int8()
    if isinstance(scheme, Gptq):
        return _gptq_format(info, scheme, source)
    return None


def _gptq_format(info: PackedTensor, scheme: Gptq, source: Source) -> Format | None:
    """GPTQ's words, transposed, are ours where columns are in order and zeros are stored as they are, or not needed."""
    symmetric = (quantization(source.config) or {}).get("sym") is True
    word = 8 if scheme.bits == 4 else 4
    rows, columns = info.shape
    if scheme.group_size not in _GROUPS or not _in_order(source) or rows % word or columns % word:
        return None
    if scheme.bits == 4 and (symmetric or scheme.zero_offset == 0):
        return Int4(group_size=scheme.group_size, symmetric=symmetric)
    return Int8(group_size=scheme.group_size) if scheme.bits == 8 and symmetric else None


def _in_order(source: Source) -> bool:
    """Whether a GPTQ checkpoint says that its columns are in the order of the model's."""
    said = quantization(source.config) or {}
    return said.get("desc_act") is False and not said.get("static_groups")
