"""Which tensors make up weights of compressed-tensors: packed and plain integers, eight- and four-bit floats. No torch here.

`config_groups` say which modules have which scheme: a target is a module's name, `re:` and a regular expression, or a class.
Only what is stored counts, not what is done with activations.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlazy.errors import CorruptCheckpoint
from qlazy.sources.float8 import drop_activation_scales, float8, mxfp4, nvfp4
from qlazy.sources.packed import Integers, PackedTensor, Part
from qlazy.sources.parts import (
    FLOAT8,
    SCALES,
    Settings,
    by_rows,
    corrupt,
    pack,
    read_small,
    require,
    require_matrix,
    take,
    whole_number,
)
from qlazy.sources.safetensors import FETCH_AGAIN, TensorInfo, short

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
"""What is read of the library's formats."""

MAX_PATTERN = 1000
"""Longest regular expression of a target that is taken for one."""

MAX_REPEATS = 6
"""Most repeats in one; each multiplies the steps that a match may take."""

MAX_NAME = 300
"""Longest part of a module's name that is matched."""

Scheme = Mapping[str, Any]
"""The `weights` of a config group."""

_UNUSED = (
    ".weight_observer",
    ".input_zero_point",
    ".output_zero_point",
    ".input_global_scale",
    ".k_zero_point",
    ".v_zero_point",
)


def join_compressed(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`compressed-tensors`.

    Args:
        tensors: Stored tensors; those that make up a weight, and scales of activations, are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    targets = _targets(settings)
    drop_activation_scales(tensors)
    for name in [name for name in tensors if name.endswith(_UNUSED)]:
        del tensors[name]
    for info in list(tensors.values()):
        base = info.name.rpartition(".")[0]
        if info.name.endswith(".weight_packed"):
            said = targets.scheme_of(base, info)
            del tensors[info.name]
            yield _packed(tensors, info, base, said, settings)
        elif info.name.endswith(".weight") and f"{base}.weight_scale" in tensors:
            said = targets.scheme_of(base, info)
            del tensors[info.name]
            yield _plain(tensors, info, base, said, settings)


def _packed(tensors: dict[str, TensorInfo], info: TensorInfo, base: str, said: Scheme, settings: Settings) -> PackedTensor:
    name = f"{base}.weight"
    scale = take(tensors, f"{base}.weight_scale", of=info)
    if said.get("type") == "float":
        if said.get("num_bits") != 4:
            settings.unsupported(f"{info.name!r} holds floats of {short(said.get('num_bits'))} bits; 4 and 8 are read")
        if scale.dtype == "float8_e4m3fn":
            number = take(tensors, f"{base}.weight_global_scale", of=info)
            return nvfp4(name, info, scale, number, multiplies=False, dtype="bfloat16")
        return mxfp4(name, info, scale, dtype="bfloat16")
    rows, words = require_matrix(info)
    require(info, dtypes=("int32",))
    bits = _bits(said, info)
    shape = take(tensors, f"{base}.weight_shape", of=info)
    group, symmetric = _group(said, info), _symmetric(said, info)
    # Reading the shape of every weight takes time where there are tens of thousands; groups tell it just as well.
    by_groups = group > 0 and len(scale.shape) == 2 and -(-scale.shape[1] * group * bits // 32) == words
    columns = scale.shape[1] * group if by_groups else _columns(info, shape, words, bits, rows)
    groups = _require_scale(scale, rows, columns, group)
    parts = [by_rows("weight", info), _scale_part(scale, rows)]
    zero = tensors.pop(f"{base}.weight_zero_point", None)
    if not symmetric:
        zero = zero or take(tensors, f"{base}.weight_zero_point", of=info)
        plain = zero.dtype == "int8"  # before version 0.10 of the library
        require(zero, dtypes=("int32", "int8"), shapes=((rows if plain else -(-rows * bits // 32), groups),))
        # Where rows divide into whole words, those of 64 rows are read alone.
        whole = not plain and 32 % bits
        parts += [Part(role="zero", stored=zero) if whole else by_rows("zero", zero, 1 if plain else 32 // bits)]
    order = tensors.pop(f"{base}.weight_g_idx", None)
    if order is not None:
        require(order, dtypes=("int32", "int64"), shapes=((columns,),))
        parts += [Part(role="g_idx", stored=order)]
    scheme = Integers(bits=bits, group_size=group, symmetric=symmetric, packed=True)
    return pack(name, (rows, columns), scale.dtype, scheme, *parts)


def _plain(tensors: dict[str, TensorInfo], info: TensorInfo, base: str, said: Scheme, settings: Settings) -> PackedTensor:
    scale = take(tensors, f"{base}.weight_scale", of=info)
    zero = tensors.pop(f"{base}.weight_zero_point", None)
    if info.dtype in FLOAT8:
        require(scale, dtypes=SCALES)
        block = said.get("block_structure")
        rows_columns: tuple[int, int] | None = None
        if said.get("strategy") == "block":
            if not isinstance(block, list) or len(block) != 2:
                corrupt(info, f"has block_structure {short(block)} in config.json instead of rows and columns")
            rows_columns = (_whole(block[0], info, "block_structure"), _whole(block[1], info, "block_structure"))
        return float8(info, scale, block=rows_columns, product=scale.dtype, dtype=scale.dtype)
    if info.dtype != "int8":
        settings.unsupported(f"{info.name!r} is stored as {info.dtype}; of compressed-tensors int8, int32 and float8 are read")
    rows, columns = require_matrix(info)
    group, symmetric = _group(said, info), _symmetric(said, info)
    groups = _require_scale(scale, rows, columns, group)
    parts = [by_rows("weight", info), _scale_part(scale, rows)]
    if not symmetric:
        zero = zero or take(tensors, f"{base}.weight_zero_point", of=info)
        require(zero, dtypes=("int8",), shapes=(scale.shape, (rows, groups)))
        parts += [by_rows("zero", zero) if zero.shape[:1] == (rows,) else Part(role="zero", stored=zero)]
    return pack(
        info.name,
        (rows, columns),
        scale.dtype,
        Integers(bits=_bits(said, info), group_size=group, symmetric=symmetric, packed=False),
        *parts,
    )


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """Which module has which scheme: a name wins over a regular expression, that over a class."""

    names: Mapping[str, Scheme]
    patterns: Sequence[tuple[re.Pattern[str], Scheme]]
    others: Sequence[Scheme]
    """Of classes: which module is of which, headers do not tell. That it is stored in low bits tells that it is meant."""

    def scheme_of(self, base: str, info: TensorInfo) -> Scheme:
        if base in self.names:
            return self.names[base]
        found = next((said for pattern, said in self.patterns if pattern.match(base[:MAX_NAME])), None)
        if found is not None:
            return found
        # A model may have other names for its modules than the files; where there is one scheme that does not matter.
        every = self.others or [*self.names.values(), *(said for _, said in self.patterns)]
        if not every or any(said != every[0] for said in every if not self.others):
            corrupt(info, "belongs to a module that no config group of config.json names")
        return every[0]


def _targets(settings: Settings) -> _Targets:
    config = settings.config
    kind = config.get("format", "pack-quantized")
    sparse = config.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        settings.unsupported(f"its weights are sparse, as {short(sparse.get('format'))}; only dense ones are read")
    said = config.get("config_groups")
    if not isinstance(said, Mapping) or not said:
        raise CorruptCheckpoint(f"{settings.where}: quantization_config has no config_groups", hint=FETCH_AGAIN)
    names: dict[str, Scheme] = {}
    patterns, others = [], []
    for name, group in said.items():
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CorruptCheckpoint(f"{settings.where}: config group {short(name)} has no list of targets", hint=FETCH_AGAIN)
        own = group.get("format") or kind
        if own not in FORMATS:
            settings.unsupported(f"its format is {short(own)}; of compressed-tensors {', '.join(FORMATS)} are read")
        scheme = group.get("weights")
        for target in targets if isinstance(scheme, Mapping) else []:
            if target.startswith("re:"):
                patterns.append((_pattern(target[3:], settings), scheme))
            elif re.fullmatch(r"[A-Z]\w*", target, re.ASCII):
                others.append(scheme)
            else:
                names.setdefault(target, scheme)
    return _Targets(names=names, patterns=patterns, others=others)


def _pattern(text: str, settings: Settings) -> re.Pattern[str]:
    # A repeated group can take steps without end, and no name of a layer needs one.
    if re.search(r"\)[*+{]", text) or len(re.findall(r"(?<!\\)[*+{]", text)) > MAX_REPEATS:
        settings.unsupported(f"target {short(text)} repeats a group, or more than {MAX_REPEATS} things")
    try:
        if len(text) < MAX_PATTERN:
            return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        pass
    raise CorruptCheckpoint(f"{settings.where}: target {short(text)} is no regular expression", hint=FETCH_AGAIN)


def _bits(said: Scheme, info: TensorInfo) -> int:
    if said.get("type", "int") != "int":
        corrupt(info, f"holds integers, but config.json says {short(said.get('type'))}")
    return whole_number(said.get("num_bits", 8), f"{info.name}: num_bits in config.json", least=1, most=8)


def _group(said: Scheme, info: TensorInfo) -> int:
    """Columns of a group; -1 = a row, 0 = the tensor."""
    strategy, size = said.get("strategy"), said.get("group_size")
    if strategy == "tensor":
        return 0
    if strategy == "channel" or (strategy is None and size in (None, -1)):
        return -1
    if strategy not in ("group", None):
        corrupt(info, f"has strategy {short(strategy)} in config.json, which is none of tensor, channel and group")
    return _whole(size, info, "group_size")


def _symmetric(said: Scheme, info: TensorInfo) -> bool:
    symmetric = said.get("symmetric", True)
    if not isinstance(symmetric, bool):
        corrupt(info, f"has symmetric {short(symmetric)} in config.json")
    return symmetric


def _whole(value: Any, info: TensorInfo, key: str) -> int:
    return whole_number(value, f"{info.name}: {key} in config.json", least=1, most=1 << 30)


def _require_scale(scale: TensorInfo, rows: int, columns: int, group: int) -> int:
    """Check scales against the strategy. Returns how many there are in a row."""
    if group > 0 and columns % group:
        corrupt(scale, f"has groups of {group:,} columns, which do not divide {columns:,}")
    groups = columns // group if group > 0 else 1
    require(scale, dtypes=SCALES, shapes=((), (1,)) if group == 0 else ((rows, groups), (rows,))[: 1 if groups > 1 else 2])
    return groups


def _scale_part(scale: TensorInfo, rows: int) -> Part:
    return by_rows("scale", scale) if scale.shape[:1] == (rows,) and rows > 1 else Part(role="scale", stored=scale)


def _columns(info: TensorInfo, shape: TensorInfo, words: int, bits: int, rows: int) -> int:
    """Columns of a packed weight: `weight_shape` says them; where only headers are here, as many as the words can hold."""
    require(shape, dtypes=("int64", "int32"), shapes=((2,),))
    raw = read_small(shape)
    if raw is None:
        return words * 32 // bits
    said = struct.unpack("<2q" if shape.dtype == "int64" else "<2i", raw)
    if said[0] != rows or said[1] < 1 or -(-said[1] * bits // 32) != words:
        corrupt(shape, f"says {list(said)}, but {info.name!r} has {rows:,} rows of {words:,} words of {bits} bits")
    return int(said[1])
