"""Which tensors make up weights of bitsandbytes: NF4 and FP4 with their `quant_state`, LLM.int8() with `SCB`. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qlazy.sources.packed import BitsAndBytes4, BitsAndBytes8, PackedTensor, Part
from qlazy.sources.parts import ROW_BLOCK, SCALES, Settings, by_rows, corrupt, pack, read_small, require, take, whole_number
from qlazy.sources.safetensors import TensorInfo, load_json, short

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Elements of a block that bitsandbytes knows."""

_STATE = ".quant_state.bitsandbytes__"


def join_bitsandbytes(tensors: dict[str, TensorInfo], settings: Settings) -> Iterator[PackedTensor]:
    """`bitsandbytes`, 4 and 8 bits.

    Args:
        tensors: Stored tensors; those that make up a weight are taken out.
        settings: What the config says.

    Yields:
        The weights.
    """
    for state in [info for name, info in tensors.items() if _STATE in name]:
        yield _four_bits(tensors, state, settings)
    for scale in [info for name, info in tensors.items() if name.endswith(".SCB")]:
        yield _eight_bits(tensors, scale, settings)


def _four_bits(tensors: dict[str, TensorInfo], state: TensorInfo, settings: Settings) -> PackedTensor:
    name, _, kind = state.name.partition(_STATE)
    if kind not in ("nf4", "fp4"):
        settings.unsupported(f"{state.name!r}: there is no codebook {short(kind)}; nf4 and fp4 are read")
    del tensors[state.name]
    raw = read_small(state)
    if raw is None:
        settings.unsupported(
            "the shapes of its 4-bit weights are not in the headers; a plan needs the files: hf download ORG/NAME"
        )
    said = load_json(raw, file=f"{state.path.name}: tensor {state.name!r}")
    rows, columns = _shape(state, said.get("shape"))
    blocksize = said.get("blocksize")
    if (
        type(blocksize) is not int
        or blocksize not in BLOCK_SIZES
        or said.get("quant_type") != kind
        or said.get("dtype") not in SCALES
    ):
        corrupt(state, f"says {short({key: said.get(key) for key in ('quant_type', 'blocksize', 'dtype')})}, which cannot be")
    count = rows * columns
    blocks = -(-count // blocksize)
    weight = take(tensors, name, of=state)
    if weight.nbytes != -(-count // 2):
        corrupt(weight, f"has {weight.nbytes:,} bytes instead of {-(-count // 2):,} for {rows:,} x {columns:,} in 4 bits")
    absmax = take(tensors, f"{name}.absmax", of=state)
    require(take(tensors, f"{name}.quant_map", of=state), dtypes=("float32",), shapes=((16,),))
    block = math.lcm(ROW_BLOCK, blocksize // math.gcd(blocksize, columns))
    parts = [
        Part(role="weight", stored=weight, rows=block, slice_nbytes=block * columns // 2),
        Part(role="absmax", stored=absmax, rows=block, slice_nbytes=block * columns // blocksize * (absmax.nbytes // blocks)),
    ]
    nested, offset = 0, 0.0
    if "nested_blocksize" in said:
        what = f"{state.path.name}: nested_blocksize of {state.name!r}"
        nested = whole_number(said["nested_blocksize"], what, least=1, most=1 << 20)
        offset = _offset(state, said.get("nested_offset"))
        inner, inner_map = (take(tensors, f"{name}.nested_{end}", of=state) for end in ("absmax", "quant_map"))
        require(inner, dtypes=("float32",), shapes=((-(-blocks // nested),),))
        require(inner_map, dtypes=("float32",), shapes=((256,),))
        parts += [Part(role="nested_absmax", stored=inner), Part(role="nested_quant_map", stored=inner_map)]
    require(absmax, dtypes=("uint8",) if nested else ("float32",), shapes=((blocks,), (blocks, 1)))
    scheme = BitsAndBytes4(
        kind="nf4" if kind == "nf4" else "fp4", blocksize=blocksize, nested_blocksize=nested, nested_offset=offset
    )
    return pack(name, (rows, columns), said["dtype"], scheme, *parts, row_block=block)


def _eight_bits(tensors: dict[str, TensorInfo], scale: TensorInfo, settings: Settings) -> PackedTensor:
    base = scale.name.removesuffix(".SCB")
    del tensors[scale.name]
    weight = take(tensors, f"{base}.weight", of=scale)
    order = tensors.pop(f"{base}.weight_format", None)
    if order is not None and (read_small(order) or b"\0") != b"\0":
        settings.unsupported(f"{order.name!r} says that the weight is not stored by rows; only that is read")
    if len(weight.shape) != 2 or 0 in weight.shape:
        corrupt(weight, f"has shape {list(weight.shape)} instead of rows and columns")
    require(weight, dtypes=("int8",))
    require(scale, dtypes=("float32",), shapes=((weight.shape[0],),))
    return pack(weight.name, weight.shape, "float32", BitsAndBytes8(), by_rows("weight", weight), by_rows("scale", scale))


def _offset(state: TensorInfo, said: Any) -> float:
    if type(said) not in (float, int) or not math.isfinite(said):
        corrupt(state, f"says nested_offset {short(said)}")
    return float(said)


def _shape(state: TensorInfo, said: Any) -> tuple[int, int]:
    if not isinstance(said, list) or len(said) != 2 or not all(type(n) is int and 0 < n < 1 << 40 for n in said):
        corrupt(state, f"says shape {short(said)} instead of rows and columns")
    return said[0], said[1]
