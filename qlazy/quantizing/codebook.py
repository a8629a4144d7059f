"""NF4 and FP4: the 4-bit codebooks of bitsandbytes, with the same bytes that bitsandbytes makes on a CPU.

A weight is a flat row of elements in blocks of 64. A block keeps one float32 `absmax`; each element, divided by it, becomes the
code of the nearest of 16 values. Two codes share a byte, the even element in the high nibble. Double quantization then stores
`absmax` itself in 8 bits, in blocks of 256, around its mean.

All of it is plain torch, so nothing here waits for `import bitsandbytes`; the tests hold it against bitsandbytes byte for byte.
What makes equal bytes: a block is multiplied by 1/absmax in float32 whatever the dtype of the weight, a value that lies exactly
between two codes takes the smaller one, and a last block shorter than 64 is divided by its absmax instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from qlazy import gpu
from qlazy.formats import BNB_BLOCK, Codebook4
from qlazy.quantizing import native_quantize
from qlazy.quantizing.nested import nest_absmax as nest_absmax
from qlazy.quantizing.nested import nested_code as nested_code
from qlazy.quantizing.nested import unnest_absmax as unnest_absmax

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # sign bit, two exponent bits, one fraction bit; times 1/12

CODES: dict[str, Tensor] = {
    "nf4": torch.tensor(_NF4),
    "fp4": torch.tensor([*_FP4_TWELFTHS, *(0.0 - value for value in _FP4_TWELFTHS)]) / 12.0,
}
"""Value of each of the 16 codes in float32, by kind, in bitsandbytes' order."""

_CHUNK = 1 << 16
"""Elements worked on at a time, so that the work buffers (1 MiB) stay in the cache of one core."""

_TINY = 1e-38
"""bitsandbytes' least divisor; it also is the absmax that it stores for a short last block of zeros."""


def quantize_blocks(weight: Tensor, kind: str, *, packed_out: Tensor, absmax_out: Tensor) -> bool:
    """Quantizes consecutive elements of a weight straight into its storage.

    The run begins on a multiple of 64 in the flat weight, so `packed_out = packed[start // 2 :]` and
    `absmax_out = absmax[start // 64 :]`, cut to length. Only the last run of a weight may end inside a block.

    A NaN or an infinity makes the absmax of its block NaN or infinite. The codes of such a block mean nothing.

    Args:
        weight: The elements in row-major order, any shape, bfloat16, float16 or float32.
        kind: `nf4` or `fp4`.
        packed_out: uint8 [ceil(n/2)], contiguous. An odd last element shares its byte with the code of 0.
        absmax_out: float32 [ceil(n/64)].

    Returns:
        Whether all elements are finite; on a GPU True, as nothing looks there.

    Memory: none where the compiled loop or the kernel runs; else 1 MiB of work buffers, and a copy of `weight` where it is not
        contiguous.
    """
    flat = weight.reshape(-1)
    count = flat.numel()
    assert packed_out.shape == (-(-count // 2),) and absmax_out.shape == (-(-count // BNB_BLOCK),)
    boundaries, least = _compiled_boundaries(kind)
    finite = native_quantize.codebook4(flat, boundaries=boundaries, least=least, packed_out=packed_out, absmax_out=absmax_out)
    if finite is not None:
        return finite
    if gpu.has_kernels(flat):
        from qlazy.quantizing import triton_quantize

        bounds, order = _ordered(kind)
        if triton_quantize.codebook4(flat, bounds=bounds, order=order, packed_out=packed_out, absmax_out=absmax_out):
            return True
    room = min(_CHUNK, count + count % 2)
    scaled, work, total = torch.empty((3, room), device=flat.device).unbind()
    codes = torch.empty(room, dtype=torch.uint8, device=flat.device)
    for start in range(0, count, _CHUNK):
        values = flat[start : start + _CHUNK]
        size = values.numel()
        even = size + size % 2
        scaled[:size].copy_(values)
        _scale_blocks(scaled[:size], work[:size], absmax_out[start // BNB_BLOCK :][: -(-size // BNB_BLOCK)])
        scaled[size:even] = 0.0
        codes[:even].copy_(_count_codes(scaled[:even], work[:even], total[:even], kind))
        pairs = codes[:even].view(torch.int16)  # little-endian: the even element is the low byte
        packed_out[start // 2 :][: even // 2].copy_((pairs << 4).bitwise_or_(pairs >> 8))
    return absmax_out.is_cuda or bool(absmax_out.isfinite().all())


def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    kind: str,
    dtype: torch.dtype,
    start_element: int,
    count: int,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantizes consecutive elements of a stored weight.

    Args:
        packed: uint8 codes of the whole weight.
        absmax: float32 absmax of the whole weight (after `unnest_absmax` where it is stored in 8 bits).
        kind: `nf4` or `fp4`.
        dtype: Of the result; the product is made in float32 and rounded once.
        start_element: First element, a multiple of 64 in the flat weight.
        count: Elements to make.
        out: Where to put them: contiguous, of `dtype`, `count` elements in any shape. New and flat if not given.

    Returns:
        `out`.

    Memory: the result, and 0.4 MiB of work buffers or, where bitsandbytes' own kernel is used, the result once
    more if `out` is given.
    """
    assert start_element % BNB_BLOCK == 0
    assert out is None or (out.dtype == dtype and out.numel() == count)
    if dtype != torch.float64 and _has_native_kernel(packed.device, count):  # which gives zeros for float64, without a word
        halves = packed[start_element // 2 :][: count // 2]
        scales = absmax[start_element // BNB_BLOCK :][: -(-count // BNB_BLOCK)]
        # Not the shape of the weight: on AVX-512 the kernel (0.50) takes wrong absmax for rows that do not hold whole blocks.
        shape = [count // BNB_BLOCK, BNB_BLOCK] if count % BNB_BLOCK == 0 else [count]
        made = torch.ops.bitsandbytes.dequantize_4bit.default(halves, scales, BNB_BLOCK, kind, shape, dtype)
        return made.view(-1) if out is None else out.copy_(made.view(out.shape))
    out = torch.empty(count, dtype=dtype, device=packed.device) if out is None else out
    flat = out.view(-1)
    table = _pair_table(kind, packed.device)
    room = min(_CHUNK, -(-count // BNB_BLOCK) * BNB_BLOCK)
    values = torch.empty(room, device=packed.device)
    index = torch.empty(room // 2, dtype=torch.int32, device=packed.device)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        first = start_element + start
        bytes_ = index[: -(-size // 2)].copy_(packed[first // 2 :][: -(-size // 2)])
        torch.index_select(table, 0, bytes_, out=values.view(torch.int64)[: bytes_.numel()])
        blocks = -(-size // BNB_BLOCK)
        values.view(-1, BNB_BLOCK)[:blocks].mul_(absmax[first // BNB_BLOCK :][:blocks, None])
        flat[start : start + size].copy_(values[:size])
    return out


def dequantize(
    stored: Mapping[str, Tensor], fmt: Codebook4, rows: int, columns: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Dequantizes a whole weight.

    Args:
        stored: Its tensors by name, as `Codebook4.storage` lists them.
        fmt: Their format.
        rows: out_features.
        columns: in_features.
        dtype: Of the result.
        out: Contiguous [rows, columns] of `dtype` to put it in.

    Returns:
        The weight, [rows, columns].

    Memory: the result, and 4 bytes for each 64 elements where the absmax was stored in 8 bits.
    """
    absmax = (
        unnest_absmax(stored["absmax_packed"], stored["nested_absmax"], stored["nested_offset"])
        if fmt.double_quant
        else stored["absmax"]
    )
    packed = stored["weight_packed"]
    return dequantize_blocks(packed, absmax, fmt.kind, dtype, 0, rows * columns, out).view(rows, columns)


def _scale_blocks(values: Tensor, work: Tensor, absmax: Tensor) -> None:
    """Divides `values` by the absmax of each block in place, as bitsandbytes does it; NaN spreads into absmax."""
    full = values.numel() - values.numel() % BNB_BLOCK
    torch.abs(values, out=work)
    if full:
        blocks = values[:full].view(-1, BNB_BLOCK)
        torch.amax(work[:full].view(-1, BNB_BLOCK), 1, out=absmax[: len(blocks)])
        blocks.mul_(absmax[: len(blocks)].clamp(min=_TINY).reciprocal_()[:, None])
    if full < values.numel():
        absmax[-1] = work[full:].amax().clamp(min=_TINY)
        values[full:].div_(absmax[-1])


def _count_codes(scaled: Tensor, work: Tensor, total: Tensor, kind: str) -> Tensor:
    """Puts the code of each scaled value into `total`: one compare for each boundary between two codes, and a sum.

    All of it stays in float32, as torch's compare is vectorised only where the result has the dtype of its input; this is five
    times faster than `bucketize`.
    """
    bounds, steps, least = _boundaries(kind, scaled.device)
    total.fill_(least)
    for bound, step in zip(bounds, steps, strict=True):
        total.add_(torch.gt(scaled, bound, out=work), alpha=step)
    return total


@functools.cache
def _boundaries(kind: str, device: torch.device) -> tuple[tuple[Tensor, ...], list[float], float]:
    """Boundaries between codes in ascending order, the change of code at each, and the code of the least value.

    The codes of FP4 do not ascend with their values, and it has two zeros; the first (code 0) is the smaller one here.
    """
    values, order = CODES[kind].sort(stable=True)
    bounds = ((values[:-1] + values[1:]) / 2).to(device).unbind()  # 0-d tensors: a Python float costs a wrap per call
    return bounds, order.diff().tolist(), float(order[0])


@functools.cache
def _ordered(kind: str) -> tuple[Tensor, Tensor]:
    """Boundaries between codes and the codes themselves, both by ascending value, as the kernels take them."""
    values, order = CODES[kind].sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.int()


@functools.cache
def _compiled_boundaries(kind: str) -> tuple[Tensor, int]:
    """What `_boundaries` has, as the compiled loop takes it: boundaries and changes in one, and the code of the least value."""
    bounds, steps, least = _boundaries(kind, torch.device("cpu"))
    return torch.tensor([*(float(bound) for bound in bounds), *steps]), int(least)


def _has_native_kernel(device: torch.device, count: int) -> bool:
    """Whether bitsandbytes' compiled kernel can be used: two to three times faster on a CPU, with the same values.

    Only where something else has imported bitsandbytes, as that takes seconds. Its fallback for an odd count, or where its
    library did not load, is no use: it runs torch.compile.
    """
    name = "bitsandbytes::dequantize_4bit"
    return (
        count % 2 == 0
        and device.type in ("cpu", "cuda")
        and hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, device.type.upper())
    )


@functools.cache
def _pair_table(kind: str, device: torch.device) -> Tensor:
    """The two float32 values of each possible byte, as one int64 so that one lookup fetches both."""
    code = CODES[kind]
    byte = torch.arange(256)
    return torch.stack([code[byte >> 4], code[byte & 15]], 1).view(torch.int64).view(-1).to(device)
