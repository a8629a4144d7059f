"""Packed weights as other libraries have them on disk, and back: names, shapes and bit order of the tensors of a saved folder.

compressed-tensors   Int4, Int8: our own tensors, byte for byte; bytes of Int8 stand four in a word
bitsandbytes         NF4, FP4: our own tensors. Int8, one scale a row: our own bytes less 128, the scale times 127 in float32
gptq                 Int4, Int8: the words of compressed-tensors, transposed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlazy.errors import CorruptCheckpoint, UsageError
from qlazy.formats import BNB_BLOCK, BNB_NESTED_BLOCK, Codebook4, Format, Int4, Int8
from qlazy.quantizing import codebook
from qlazy.saving.layout_config import Layout
from qlazy.sources.packed import BitsAndBytes4, BitsAndBytes8, Gptq, PackedTensor

_WORD = {4: 8, 8: 4}
"""Integers in a word, by bits."""
_BNB_STATE = "weight.quant_state.bitsandbytes__"


def default_layout(fmt: Format) -> Layout:
    """The layout of a folder where none is asked for.

    Args:
        fmt: Format of most of its weights.
    Returns:
        compressed-tensors for integers, bitsandbytes for its codebooks.
    """
    return "bitsandbytes" if isinstance(fmt, Codebook4) else "compressed-tensors"


def misfit(layout: Layout, fmt: Format, rows: int, columns: int) -> str:
    """Why a layout cannot hold a weight.

    Args:
        layout: Of the folder.
        fmt: How the weight is packed.
        rows: N.
        columns: K.
    Returns:
        The reason, to go on after the name of the weight; empty where it can.
    """
    if layout == "bitsandbytes":
        fits = isinstance(fmt, Codebook4) or fmt == Int8()
        return "" if fits else f"is {fmt.name}, and bitsandbytes has nf4, fp4 and int8 with one scale a row"
    if isinstance(fmt, Codebook4):
        return f"is {fmt.name}, and {layout} has integers only"
    if layout == "gptq":
        if isinstance(fmt, Int4) and not fmt.symmetric and rows % 8:
            return f"has {rows} rows, and gptq packs eight zero points into a word"
        word = _WORD[fmt.bits]
        if rows % word or columns % word:
            return f"is {rows} x {columns}, and gptq takes multiples of {word}"
    return ""


def to_stored(
    layout: Layout, fmt: Format, held: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A packed weight as the folder holds it.

    Args:
        layout: Of the folder; it can hold the weight.
        fmt: How the weight is packed.
        held: Its tensors by the names of `Format.storage`; meta tensors tell the shapes.
        rows: N.
        columns: K.
        dtype: That the layer computes in.
    Returns:
        Tensors by their name after the layer's.

    Memory: views, but for int8 of bitsandbytes and for gptq, which take as much again.
    """
    if layout == "bitsandbytes":
        return _to_bitsandbytes(fmt, held, rows, columns, dtype)
    words = held["weight_packed"] if isinstance(fmt, Int4) else _int8_words(held["weight_packed"])
    scale, zero = held["weight_scale"], held.get("weight_zero_point")
    if layout == "gptq":
        return _to_gptq(fmt, words, scale, zero, columns)
    stored = {"weight_packed": words, "weight_scale": scale}
    if zero is not None:
        stored["weight_zero_point"] = zero
    return stored | {"weight_shape": torch.tensor([rows, columns], dtype=torch.int64)}


def cut_rows(fmt: Format, held: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Some rows of a packed weight.

    Args:
        fmt: How it is packed.
        held: Its tensors by the names of `Format.storage`.
        start: First row, a multiple of 8.
        stop: One past the last, a multiple of 8 or the number of rows.
    Returns:
        The same of these rows.
    Raises:
        UsageError: rows that cannot be had alone.

    Memory: views.
    """
    if isinstance(fmt, Codebook4) or (isinstance(fmt, Int4) and not fmt.symmetric and start % 8):
        raise UsageError(f"Rows {start} to {stop} of a weight in {fmt.name} cannot be written alone.", hint="Use int8.")
    cut = {name: tensor[start:stop] for name, tensor in held.items() if name != "weight_zero_point"}
    if "weight_zero_point" in held:
        cut["weight_zero_point"] = held["weight_zero_point"][start // 8 : -(-stop // 8)]
    return cut


def _int8_words(packed: Tensor) -> Tensor:
    """uint8 (N, K) -> int32 (N, ceil(K/4)): a view, where there is nothing to fill up."""
    left = -packed.shape[1] % 4
    return (torch.nn.functional.pad(packed, (0, left)) if left else packed).view(torch.int32)


def _flipped(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of 8 bits with a sign from those that are 128 too large, and back."""
    return (packed.view(torch.uint8) ^ 0x80).view(dtype)


def _to_gptq(fmt: Format, words: Tensor, scale: Tensor, zero: Tensor | None, columns: int) -> dict[str, Tensor]:
    rows, groups, word = words.shape[0], scale.shape[1], _WORD[fmt.bits]
    if zero is None:
        filler = 0x77777777 if fmt.bits == 4 else 0x7F7F7F7F  # 8, or 128, less one
        zeros = torch.full((groups, rows // word), filler, dtype=torch.int32, device=words.device)
    else:
        zeros = zero.t().contiguous()
    half = scale.to(torch.float16)
    exact = scale.is_meta or torch.equal(half.to(scale.dtype), scale)
    size = columns if fmt.group_size == -1 else fmt.group_size
    return {
        "qweight": words.t().contiguous(),
        "qzeros": zeros,
        # Readers expect float16, and take what else there is; a scale that float16 cannot hold stays as it is.
        "scales": (half if exact else scale).t().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }


def _to_bitsandbytes(fmt: Format, held: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if not isinstance(fmt, Codebook4):
        return {
            "weight": _flipped(held["weight_packed"], torch.int8),
            "SCB": held["weight_scale"].float().flatten() * 127,
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": fmt.kind,
        "blocksize": BNB_BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [rows, columns],
    }
    stored = {"weight": held["weight_packed"].view(-1, 1), "weight.quant_map": codebook.CODES[fmt.kind].clone()}
    if not fmt.double_quant:
        stored["weight.absmax"] = held["absmax"]
    else:
        stored["weight.absmax"] = held["absmax_packed"]
        stored["weight.nested_absmax"] = held["nested_absmax"]
        stored["weight.nested_quant_map"] = codebook.nested_code().clone()
        state["nested_blocksize"] = BNB_NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = 0.0 if held["nested_offset"].is_meta else held["nested_offset"].item()
    stored[_BNB_STATE + fmt.kind] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return stored


def from_stored(
    fmt: Format, info: PackedTensor, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A packed weight as a layer holds it, of the parts that a folder has.

    Args:
        fmt: The format that `keep` told.
        info: What the parts are.
        parts: By role.
        columns: K.
        dtype: Of scales.
    Returns:
        Tensors by the names of `Format.storage`.
    Raises:
        CorruptCheckpoint: a codebook or order of columns that is not the one that the format has.

    Memory: views where the layout is that in memory; of int8 with a sign and of gptq a copy.
    """
    scheme, words = info.scheme, parts["weight"]
    if isinstance(fmt, Codebook4):
        return _from_bitsandbytes4(fmt, info, parts)
    if isinstance(scheme, BitsAndBytes8):
        scale = (parts["scale"] / 127).to(dtype).view(-1, 1)
        return {"weight_packed": _flipped(words, torch.uint8), "weight_scale": scale}
    scale, zero = parts["scale"], parts.get("zero")
    if isinstance(scheme, Gptq):
        _require_gptq(fmt, info, parts, columns)
        words, scale = words.t().contiguous(), scale.t().contiguous()
        zero = None if zero is None else zero.t().contiguous()
    scale = scale.view(-1, 1).expand(words.shape[0], -1) if scale.dim() < 2 else scale
    if isinstance(fmt, Int8):
        packed = _flipped(words, torch.uint8) if words.dtype == torch.int8 else words.view(torch.uint8)[:, :columns]
        return {"weight_packed": packed.contiguous(), "weight_scale": scale.to(dtype).contiguous()}
    held = {"weight_packed": words, "weight_scale": scale.to(dtype).contiguous()}
    if zero is not None and isinstance(fmt, Int4) and not fmt.symmetric:
        held["weight_zero_point"] = zero
    return held


def _from_bitsandbytes4(fmt: Codebook4, info: PackedTensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert isinstance(info.scheme, BitsAndBytes4)
    held = {"weight_packed": parts["weight"].view(torch.uint8).flatten()}
    if not fmt.double_quant:
        return held | {"absmax": parts["absmax"].flatten()}
    if not torch.equal(parts["nested_quant_map"], codebook.nested_code()):
        raise CorruptCheckpoint(f"{info.path.name}: the nested codebook of {info.name!r} is not that of bitsandbytes.")
    return held | {
        "absmax_packed": parts["absmax"].flatten(),
        "nested_absmax": parts["nested_absmax"],
        "nested_offset": torch.tensor(info.scheme.nested_offset, dtype=torch.float32),
    }


def _require_gptq(fmt: Format, info: PackedTensor, parts: Mapping[str, Tensor], columns: int) -> None:
    """Zeros must be in the middle where the config says so, and columns in order."""
    assert isinstance(info.scheme, Gptq) and not isinstance(fmt, Codebook4)
    order, zero = parts.get("g_idx"), parts["zero"]
    size = columns if fmt.group_size == -1 else fmt.group_size
    if order is not None and not torch.equal(order.long(), torch.arange(columns) // size):
        raise CorruptCheckpoint(f"{info.path.name}: the columns of {info.name!r} are not in order, as desc_act says they are.")
    middle = {4: 0x88888888, 8: 0x80808080}[fmt.bits] - info.scheme.zero_offset * {4: 0x11111111, 8: 0x01010101}[fmt.bits]
    symmetric = isinstance(fmt, Int8) or fmt.symmetric
    if symmetric and not bool((zero == (middle if middle < 1 << 31 else middle - (1 << 32))).all()):
        raise CorruptCheckpoint(f"{info.path.name}: {info.name!r} has zero points, and config.json says that it is symmetric.")
