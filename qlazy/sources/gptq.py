"""Which tensors make up weights of GPTQ, AWQ and auto-round: `qweight`, `qzeros`, `scales` and `g_idx`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from qlazy.sources.packed import Awq, Gptq, PackedTensor, Part
from qlazy.sources.parts import SCALES, Settings, corrupt, pack, require, require_matrix, take
from qlazy.sources.safetensors import TensorInfo, short

GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format`, and what is added to a stored zero."""

AUTO_ROUND_FORMATS = {"auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:gptq": 1, "auto_round:auto_gptq": 1}
"""`packing_format` of what packs as GPTQ, and what is added to a stored zero."""

_BITS = (2, 3, 4, 8)


def join_gptq(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`gptq`, in both versions of its format, with and without act-order.

    Args:
        tensors: Stored tensors; those that make up a weight are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    version = settings.config.get("checkpoint_format", "gptq")
    if not isinstance(version, str) or version not in GPTQ_FORMATS:
        settings.unsupported(f"checkpoint_format is {short(version)}; of GPTQ {' and '.join(GPTQ_FORMATS)} are read")
    yield from _gptq(tensors, settings, GPTQ_FORMATS[version])


def join_awq(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`awq`, in its GEMM layout.

    Args:
        tensors: Stored tensors; those that make up a weight are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    version = settings.config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        settings.unsupported(f"version is {short(version)}; of AWQ the gemm layout is read")
    yield from _awq(tensors)


def join_auto_round(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`auto-round`, packed as GPTQ or AWQ pack.

    Args:
        tensors: Stored tensors; those that make up a weight are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    said = settings.config.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(said, str) or said not in (*AUTO_ROUND_FORMATS, "auto_round:awq", "auto_round:auto_awq"):
        settings.unsupported(f"packing_format is {short(said)}; of auto-round what packs as GPTQ or AWQ is read")
    yield from _gptq(tensors, settings, AUTO_ROUND_FORMATS[said]) if said in AUTO_ROUND_FORMATS else _awq(tensors)


def _gptq(tensors: dict[str, TensorInfo], settings: Settings, zero_offset: int) -> Iterator[PackedTensor]:
    for words in [info for name, info in tensors.items() if name.endswith(".qweight")]:
        base = words.name.removesuffix(".qweight")
        zeros, scales = take(tensors, f"{base}.qzeros", of=words), take(tensors, f"{base}.scales", of=words)
        order = tensors.pop(f"{base}.g_idx", None)
        del tensors[words.name]
        high, rows = require_matrix(words)
        groups, wide = require_matrix(zeros)
        # Of mixed bits the config says little: zeros are packed along the rows of the weight, so their number tells.
        bits = next((b for b in _BITS if wide == -(-rows * b // 32) and high * 32 % b == 0), 0)
        if not bits:
            corrupt(zeros, f"has shape {list(zeros.shape)}, which is none of {_BITS} bits for {rows:,} rows")
        columns = high * 32 // bits if order is None else order.shape[0] if len(order.shape) == 1 else 0
        if not 0 < columns <= high * 32 // bits or columns <= (high - bits) * 32 // bits:
            corrupt(words, f"has {high:,} words of {bits} bits for {columns:,} columns")
        require(words, dtypes=("int32",))
        require(zeros, dtypes=("int32",))
        require(scales, dtypes=SCALES, shapes=((groups, rows),))
        group = settings.number("group_size", -1, least=-1, most=1 << 30)
        if order is None:
            group = _group_size(words, columns, groups, group)
        else:
            require(order, dtypes=("int32", "int64"))
        parts = [Part(role="weight", stored=words), Part(role="zero", stored=zeros), Part(role="scale", stored=scales)]
        parts += [Part(role="g_idx", stored=order)] if order is not None else []
        scheme = Gptq(bits=bits, group_size=group, zero_offset=zero_offset)
        yield pack(f"{base}.weight", (rows, columns), scales.dtype, scheme, *parts)


def _awq(tensors: dict[str, TensorInfo]) -> Iterator[PackedTensor]:
    for words in [info for name, info in tensors.items() if name.endswith(".qweight")]:
        base = words.name.removesuffix(".qweight")
        zeros, scales = take(tensors, f"{base}.qzeros", of=words), take(tensors, f"{base}.scales", of=words)
        del tensors[words.name]
        columns, eighth = require_matrix(words)
        groups, _ = require_matrix(zeros)
        require(words, dtypes=("int32",))
        require(zeros, dtypes=("int32",), shapes=((groups, eighth),))
        require(scales, dtypes=SCALES, shapes=((groups, eighth * 8),))
        if columns % groups:
            corrupt(zeros, f"has {groups:,} groups, into which {columns:,} columns do not divide")
        parts = [Part(role="weight", stored=words), Part(role="zero", stored=zeros), Part(role="scale", stored=scales)]
        yield pack(f"{base}.weight", (eighth * 8, columns), scales.dtype, Awq(group_size=columns // groups), *parts)


def _group_size(words: TensorInfo, columns: int, groups: int, said: int) -> int:
    """Columns of a group: what the config says where that makes as many groups, else what divides evenly."""
    size = said if said > 0 else columns
    if -(-columns // size) == groups:
        return size
    if columns % groups:
        corrupt(words, f"has {columns:,} columns and {groups:,} groups, but group_size is {said}")
    return columns // groups
