"""Double quantization: the absmax of NF4 and FP4 in 8 bits, byte for byte as bitsandbytes has it on a CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlazy import gpu
from qlazy.formats import BNB_NESTED_BLOCK

_NESTED_GRID = 1 << 16
"""Points between -1 and 1 to which bitsandbytes' CPU kernel rounds a scaled absmax before it looks for the nearest value."""

_PIECE = 1 << 18
"""Absmax worked on at a time, whole blocks, so that the work buffers (some 8 MiB) do not grow with the weight."""


def nest_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stores absmax in 8 bits: what bitsandbytes calls double quantization, or `compress_statistics`.

    Args:
        absmax: float32 [B] of a whole weight, as the offset is the mean of them all.

    Returns:
        `absmax_packed` uint8 [B], `nested_absmax` float32 [ceil(B/256)] and `nested_offset` float32 [].

    Memory: the result, half a byte for each absmax, and some 8 MiB.
    """
    offset, grid = _mean(absmax), gpu.on_device(_nested_grid(), absmax.device)
    packed = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(-(-absmax.numel() // BNB_NESTED_BLOCK))
    for start in range(0, absmax.numel(), _PIECE):
        centred = absmax[start : start + _PIECE] - offset
        count = centred.numel()
        blocks = torch.nn.functional.pad(centred, (0, -count % BNB_NESTED_BLOCK)).view(-1, BNB_NESTED_BLOCK)
        span = nested[start // BNB_NESTED_BLOCK :][: blocks.shape[0]].copy_(blocks.abs().amax(1))
        scaled = blocks.mul(span.reciprocal()[:, None]).clamp_(-1.0, 1.0)
        # A block of zeros has no scale, 0/0: code 0, which its absmax of 0 makes 0 again.
        place = scaled.add_(1.0).mul_(0.5).mul_(_NESTED_GRID - 1).add_(0.5).nan_to_num_(nan=0.0)
        packed[start : start + count] = grid[place.int()].view(-1)[:count]
    return packed, nested, offset


def unnest_absmax(absmax_packed: Tensor, nested_absmax: Tensor, nested_offset: Tensor, code: Tensor | None = None) -> Tensor:
    """The float32 absmax that `nest_absmax` stored in 8 bits.

    Args:
        absmax_packed: uint8 [B].
        nested_absmax: float32 [ceil(B/256)].
        nested_offset: float32 [].
        code: `nested_quant_map` of a checkpoint, where it is not `nested_code()`.

    Returns:
        absmax, float32 [B].

    Memory: 8 bytes for each absmax.
    """
    code = gpu.on_device(nested_code(), absmax_packed.device) if code is None else code
    scales = nested_absmax.repeat_interleave(BNB_NESTED_BLOCK)[: absmax_packed.numel()]
    return code.index_select(0, absmax_packed.int()).mul_(scales).add_(nested_offset)


@functools.cache
def nested_code() -> Tensor:
    """The 256 values, ascending, that stand for an absmax in 8 bits: bitsandbytes' `nested_quant_map`.

    Seven decades, each with twice the steps of the one below it, both signs, 0 and 1; there is no -1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1)
        steps = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (decade - 6)
        values += [steps, -steps]
    return torch.cat(values).sort().values


@functools.cache
def _nested_grid() -> Tensor:
    """The index into `nested_code` of the value nearest to each point of the grid."""
    code = nested_code()
    points = -1.0 + 2.0 * torch.arange(_NESTED_GRID, dtype=torch.float32) / (_NESTED_GRID - 1)
    return torch.bucketize(points, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)


def _mean(values: Tensor) -> Tensor:
    """The mean as bitsandbytes gets it from PyTorch on one thread of an x86 processor; the same on every device.

    PyTorch's own sum of many values depends on the number of threads, and on a GPU goes another way. This is its way on one
    thread: 32 columns are summed beside each other, each in runs of 16 rows (more for very many), runs of runs, and so on.
    """
    flat = values.reshape(-1)
    wide = flat.numel() // 32 * 32
    rows = flat[:wide].view(-1, 32)
    run = 1 << max(4, (max(rows.shape[0], 1) - 1).bit_length() // 4)
    levels = []
    for _ in range(3):
        runs = rows.shape[0] // run
        levels.append(_in_order(rows[runs * run :]))
        rows = _in_order(rows[: runs * run].view(runs, run, 32).transpose(0, 1))
    first, *others = _in_order(torch.stack([*levels, _in_order(rows)])).view(4, 8)
    whole = flat.numel() // 8 * 8
    if whole:
        lanes = _in_order(torch.stack([first, *flat[wide:whole].view(-1, 8), *others]))
        total = _in_order(torch.cat([flat[whole:], lanes]))
    else:
        total = _in_order(torch.cat([flat[:1], flat[4:], flat[1:4]]))
    return total / torch.full((), float(flat.numel()), device=flat.device)


def _in_order(terms: Tensor) -> Tensor:
    """Sum over the first axis, one after the other."""
    total = terms.new_zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total
