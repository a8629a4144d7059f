"""The low-bit formats: what each stores, in which shape, dtype and bit order. No torch here: plans are made without it.

Shape legend, used in names all over qlazy:
    M = tokens, N = out_features (rows), K = in_features (columns), G = groups along K, P = packed elements along K.

One layout, in memory on every device as on disk (that of compressed-tensors `pack-quantized`)::

    Int4   weight_packed      int32 (N, ceil(K/8))   word p of a row holds k = 8p..8p+7, 4 bits each, k = 8p in bits 0-3;
                                                     a nibble holds code = q + 8, q in [-8, 7]
           weight_scale       dtype (N, G)           w = (code - zero) * scale,  zero = 8 where symmetric
           weight_zero_point  int32 (ceil(N/8), G)   asymmetric only: 8 zeros along N in a word, row 8i in bits 0-3
    Int8   weight_packed      uint8 (N, K)           code = q + 128, q in [-127, 127];  w = (code - 128) * scale
           weight_scale       dtype (N, G)           (on disk the same bytes, four in an int32 word)
    NF4    weight_packed      uint8 (ceil(N*K/2),)   bitsandbytes: flat row-major, even element in the *high* nibble
    FP4    absmax             float32 (B,)           B = ceil(N*K/64) blocks; with double quantization instead:
           absmax_packed      uint8 (B,), nested_absmax float32 (ceil(B/256),), nested_offset float32 ()
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
"""Bytes of one element by torch dtype name; every name not listed is one byte wide."""

BNB_BLOCK = 64
"""Elements that share one absmax in NF4 and FP4, as transformers and bitsandbytes have it."""

BNB_NESTED_BLOCK = 256
"""Absmax values that share one nested absmax under double quantization."""


@dataclass(frozen=True)
class Storage:
    """Shape and dtype of one tensor that a format stores."""

    shape: tuple[int, ...]
    """Extent of each dimension."""
    dtype: str
    """Torch's name of the dtype, without `torch.`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEMSIZE.get(self.dtype, 1)


@dataclass(frozen=True, kw_only=True)
class Int4:
    """Four-bit integers with one scale, and where asymmetric one integer zero, per group of columns."""

    group_size: int = 32
    """Columns that share a scale: 32, 64 or 128; -1 = the whole row."""
    symmetric: bool = False
    """True: the zero is always code 8 and is not stored."""

    bits = 4

    @property
    def name(self) -> str:
        """Short name, e.g. `int4-g32-asym`."""
        return f"int4-{_group_name(self.group_size)}-{'sym' if self.symmetric else 'asym'}"

    def for_columns(self, columns: int) -> Int4:
        """The same format, per channel where the group does not divide `columns`."""
        return self if _divides(self.group_size, columns) else Int4(group_size=-1, symmetric=self.symmetric)

    def storage(self, rows: int, columns: int, dtype: str) -> dict[str, Storage]:
        """Tensors that hold a weight of `rows` x `columns` whose scales are in `dtype`, by name."""
        groups = _groups(self.group_size, columns)
        stored = {
            "weight_packed": Storage((rows, -(-columns // 8)), "int32"),
            "weight_scale": Storage((rows, groups), dtype),
        }
        if not self.symmetric:
            stored["weight_zero_point"] = Storage((-(-rows // 8), groups), "int32")
        return stored


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Eight-bit symmetric integers with one scale per row, or per group of columns."""

    group_size: int = -1
    """Columns that share a scale: 32, 64 or 128; -1 = the whole row."""

    bits = 8

    @property
    def name(self) -> str:
        """Short name, e.g. `int8-channel`."""
        return f"int8-{_group_name(self.group_size)}"

    def for_columns(self, columns: int) -> Int8:
        """The same format, per channel where the group does not divide `columns`."""
        return self if _divides(self.group_size, columns) else Int8()

    def storage(self, rows: int, columns: int, dtype: str) -> dict[str, Storage]:
        """Tensors that hold a weight of `rows` x `columns` whose scales are in `dtype`, by name."""
        groups = _groups(self.group_size, columns)
        return {"weight_packed": Storage((rows, columns), "uint8"), "weight_scale": Storage((rows, groups), dtype)}


@dataclass(frozen=True, kw_only=True)
class Codebook4:
    """bitsandbytes' four-bit codebooks, byte for byte: 16 values, one float32 absmax per 64 consecutive elements."""

    kind: str = "nf4"
    """`nf4` or `fp4`."""
    double_quant: bool = True
    """Store absmax in 8 bits, in blocks of 256, as bitsandbytes' `compress_statistics` does."""

    bits = 4
    group_size = BNB_BLOCK

    @property
    def name(self) -> str:
        """Short name, e.g. `nf4-dq`."""
        return f"{self.kind}-dq" if self.double_quant else self.kind

    def for_columns(self, columns: int) -> Codebook4:
        """The same format: blocks run over the flat weight, so any number of columns will do."""
        return self

    def storage(self, rows: int, columns: int, dtype: str) -> dict[str, Storage]:
        """Tensors that hold a weight of `rows` x `columns`, by name; `dtype` does not matter, statistics are float32."""
        count = rows * columns
        blocks = -(-count // BNB_BLOCK)
        packed = {"weight_packed": Storage((-(-count // 2),), "uint8")}
        if not self.double_quant:
            return packed | {"absmax": Storage((blocks,), "float32")}
        return packed | {
            "absmax_packed": Storage((blocks,), "uint8"),
            "nested_absmax": Storage((-(-blocks // BNB_NESTED_BLOCK),), "float32"),
            "nested_offset": Storage((), "float32"),
        }


Format = Int4 | Int8 | Codebook4


def packed_nbytes(fmt: Format, rows: int, columns: int, dtype: str) -> int:
    """Bytes that a weight of `rows` x `columns` takes in `fmt`, scales and zeros included."""
    return sum(stored.nbytes for stored in fmt.storage(rows, columns, dtype).values())


def _groups(group_size: int, columns: int) -> int:
    return 1 if group_size == -1 else columns // group_size


def _divides(group_size: int, columns: int) -> bool:
    return group_size == -1 or columns % group_size == 0


def _group_name(group_size: int) -> str:
    return "channel" if group_size == -1 else f"g{group_size}"
