"""Weights that a checkpoint holds in low bits: which stored tensors make up one weight, and by which scheme. No torch here.

    model.layers.0.mlp.down_proj.weight_packed ─┐
    model.layers.0.mlp.down_proj.weight_scale  ─┼─>  PackedTensor(name="model.layers.0.mlp.down_proj.weight", shape=(N, K))
    model.layers.0.mlp.down_proj.weight_shape  ─┘

To a plan and to the matching with a model it is a tensor like any other: its name, shape and dtype are those of the values that
it stands for. What is read are the bytes of its parts, and `qlazy/reading/unpack.py` turns rows of them into values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qlazy.sources.safetensors import TensorInfo

WHOLE_BYTES = 64 << 20
"""Stored bytes of weights that cannot be read by rows, of all that are unpacked at a time; one is, whatever it takes."""

MAX_WHOLE = 16
"""Most of them at a time: as many as a load has workers."""


@dataclass(frozen=True, kw_only=True)
class Float8:
    """Eight-bit floats times a scale: DeepSeek's blocks, `float-quantized`, fbgemm.

    Parts: weight float8 (N, K); scale, one for each block, row or tensor.
    """

    block: tuple[int, int]
    """Rows and columns that share a scale; the blocks at the right and lower edge may be cut off."""
    product: str
    """Dtype in which value and scale are multiplied."""


@dataclass(frozen=True, kw_only=True)
class Float4:
    """Four-bit floats (E2M1) times a scale for every few columns: MXFP4 and NVFP4.

    Parts: weight uint8 (N, K/2), the even element in the low bits; scale (N, K/group); of NVFP4 global_scale, one number.
    """

    group_size: int
    """Columns that share a scale: 32 in MXFP4, 16 in NVFP4."""
    scale: Literal["e8m0", "e4m3"]
    """What the bytes of a scale are: a power of two, or an eight-bit float."""
    global_scale: Literal["none", "divides", "multiplies"] = "none"
    """What the number for the whole tensor does to the scales: compressed-tensors divides by it, modelopt multiplies."""
    transposed: bool = False
    """Whether the weight that it stands for is (E, K, N), as gpt-oss' experts, and the parts are (E, N, K)."""


@dataclass(frozen=True, kw_only=True)
class Integers:
    """Integers times a scale, row by row: compressed-tensors' `pack-quantized` and `int-quantized`. w = (q - zero) * scale.

    Parts: weight int32 (N, ceil(K*bits/32)) or int8 (N, K); scale (N, G), (N, 1) or (1,); zero where asymmetric, packed along N
    where the weight is packed; g_idx int32 (K,), the group of each column, where columns are out of order.
    """

    bits: int
    """Of one integer, 1 to 8."""
    group_size: int
    """Columns that share a scale; -1 = the whole row, 0 = the whole tensor."""
    symmetric: bool
    """True: no zero points."""
    packed: bool
    """Whether integers stand bit to bit in words, each with 2^(bits-1) added; else each is a byte of its own."""


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ: integers packed along K. w = (q - zero) * scale.

    Parts: weight int32 (K*bits/32, N); zero int32 (G, N*bits/32); scale (G, N); g_idx int32 (K,), which may be absent.
    """

    bits: int
    """Of one integer: 2, 3, 4 or 8."""
    group_size: int
    """Rows of the stored matrix that share a scale, where there is no g_idx; -1 = all."""
    zero_offset: int
    """What is added to a stored zero: 1 in the first version of the format, 0 in the second."""


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AWQ's GEMM layout: 4 bits packed along N, eight columns of a word interleaved. w = (q - zero) * scale.

    Parts: weight int32 (K, N/8); zero int32 (G, N/8); scale (G, N).
    """

    group_size: int
    """Rows of the stored matrix that share a scale; -1 = all."""
    bits: int = 4
    """Of one integer."""


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes4:
    """bitsandbytes' NF4 and FP4.

    Parts: weight uint8 (N*K/2, 1); absmax float32, or uint8 where nested; quant_map float32 (16,); where nested nested_absmax
    float32 and nested_quant_map float32 (256,).
    """

    kind: Literal["nf4", "fp4"]
    """Which codebook."""
    blocksize: int
    """Elements that share one absmax."""
    nested_blocksize: int = 0
    """Absmax values that share one nested absmax; 0 = they are float32."""
    nested_offset: float = 0.0
    """Added to every nested absmax."""


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes8:
    """bitsandbytes' LLM.int8(). w = q * scale / 127.

    Parts: weight int8 (N, K); scale float32 (N,).
    """


Scheme = Float8 | Float4 | Integers | Gptq | Awq | BitsAndBytes4 | BitsAndBytes8


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the stored tensors that make up a weight."""

    role: str
    """What it is: weight, scale, zero, g_idx, absmax ..."""
    stored: TensorInfo
    """Where it lies."""
    rows: int = 0
    """Rows of the weight that one slice of it is for; 0 = it is needed as a whole, whatever the rows."""
    slice_nbytes: int = 0
    """Bytes of that slice."""

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """First byte in the file, and number of bytes, that rows `start` to `stop` of the weight need of this part."""
        if not self.rows:
            return self.stored.offset, self.stored.nbytes
        begin = start // self.rows * self.slice_nbytes
        end = min(-(-stop // self.rows) * self.slice_nbytes, self.stored.nbytes)
        return self.stored.offset + begin, max(0, end - begin)


@dataclass(frozen=True, kw_only=True)
class PackedTensor(TensorInfo):
    """A weight that several stored tensors make up.

    `dtype` is what its values are when they are unpacked, `path` and `offset` those of its first part, `nbytes` those of all.
    """

    scheme: Scheme
    """How values come of the parts."""
    parts: tuple[Part, ...]
    """What is read, the weight itself first."""
    row_block: int
    """Rows that are unpacked together: a chunk starts at a multiple of it."""

    @property
    def end(self) -> int:
        """One past the last byte of the first part."""
        return self.parts[0].stored.end

    @property
    def whole(self) -> bool:
        """Whether the weight itself cannot be read by rows, so that one tensor's stored bytes are held beside the ring."""
        return self.parts[0].rows == 0

    def part(self, role: str) -> TensorInfo | None:
        """The stored tensor of a role, or None."""
        return next((part.stored for part in self.parts if part.role == role), None)


def read_whole_at_once(tensors: Iterable[TensorInfo]) -> tuple[int, int]:
    """How many weights that cannot be read by rows are held beside the ring at a time, as GPTQ's and AWQ's.

    Args:
        tensors: All that will be read.

    Returns:
        The number, and the bytes that as many of the largest take.
    """
    largest = max((info.nbytes for info in tensors if isinstance(info, PackedTensor) and info.whole), default=0)
    count = min(MAX_WHOLE, max(1, WHOLE_BYTES // max(1, largest)))
    return count, count * largest
