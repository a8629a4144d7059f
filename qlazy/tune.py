"""Measures the kernels on a GPU, and makes the table that `qlazy/products/tuned.py` reads.

First the tile of each kernel and number of tokens: the candidate with the least time over all shapes. Then, with those, which
kernel is fastest at each number of tokens. A candidate that the GPU cannot run (too much shared memory) is passed over.
"""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from qlazy_kernels.tiles import Tile
from torch import Tensor

from qlazy import gpu
from qlazy.errors import DeviceUnavailable
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers.linear import LAYERS
from qlazy.products import ops, tuned
from qlazy.products.native_product import INT8, Weight

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""Rows and columns of the layers of an 8B model."""

FORMATS: dict[str, Format] = {"int4": Int4(), "int8": Int8(), "codebook4": Codebook4()}
"""What is measured for each name in a table."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of tokens at which kernels are compared; beyond the last rows are dequantized."""

GEMV_TOKENS, GEMM_TOKENS = (1, 2, 4, 8), (16, 32, 64, 128)
"""Numbers of tokens that get a tile of their own; the last one also stands for more."""

REPETITIONS = 20

Timer = Callable[[Callable[[], Tensor | None]], float]


def tune(
    device: str,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    timer: Timer | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the kernels.

    Args:
        device: `cuda:N`.
        shapes: Rows and columns of the weights to measure with.
        timer: Gives the seconds that work takes; default the GPU's own clock.
        on_progress: Told what is measured.
    Returns:
        The table.
    Raises:
        DeviceUnavailable: there is no such GPU, or the kernels do not run on it.

    Memory: on the GPU the largest weight in 4 or 8 bits, its activations, and 256 MiB to clear the cache with.
    """
    where = torch.device(device)
    name = device_name(device) if timer is None else str(where)
    timer = timer or gpu_timer(where)
    table: dict[str, Any] = {
        "schema": tuned.SCHEMA,
        "device": name,
        "measured": f"{datetime.date.today()}, torch {torch.__version__}",
        "dispatch": {},
        "tiles": {},
    }
    for format_name, fmt in FORMATS.items():
        weights = [_random_weight(fmt, rows, columns, where) for rows, columns in shapes]
        for kernel, sizes in (("gemv", GEMV_TOKENS), ("gemm", GEMM_TOKENS)):
            if f"{kernel}_{format_name}" in tuned.TILES:
                on_progress(f"{kernel}, {format_name}")
                entries = [_best_tile(kernel, weights, tokens, timer) for tokens in sizes]
                table["tiles"][f"{kernel}_{format_name}"] = [*entries[:-1], entries[-1] | {"max_tokens": None}]
        for choice in (c for c in tuned.KERNELS if c.removesuffix("_alone") == format_name):
            on_progress(f"which kernel for {choice}")
            table["dispatch"][choice] = _borders(choice, weights, table["tiles"], timer)
    return table


def device_name(device: str) -> str:
    """The name of a GPU that the kernels run on.

    Args:
        device: `cuda:N`.
    Returns:
        As PyTorch gives it.
    Raises:
        DeviceUnavailable: there is none of that name, or the kernels do not run on it.
    """
    hint = "`qlazy doctor` says what this machine has."
    try:
        probe = torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise DeviceUnavailable(f"PyTorch cannot use {device!r}: {str(error).splitlines()[0]}", hint=hint) from error
    if not probe.is_cuda or not gpu.has_kernels(probe):
        raise DeviceUnavailable(
            f"The Triton kernels do not run on {device!r}: they need Triton, a C compiler and an NVIDIA GPU from Ampere on.",
            hint=hint,
        )
    return torch.cuda.get_device_name(probe.device)


def gpu_timer(device: torch.device) -> Timer:
    """A timer by the GPU's own clock, with nothing left in its caches.

    Args:
        device: The GPU.
    Returns:
        Gives the median of some runs in seconds; infinity for work that the GPU cannot run or no kernel takes.

    Memory: 256 MiB on the GPU.
    """
    from triton.runtime.errors import OutOfResources

    filler = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def seconds(work: Callable[[], Tensor | None]) -> float:
        try:
            if work() is None:
                return float("inf")
        except OutOfResources:
            return float("inf")
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
        with torch.cuda.device(device):  # events are of the current one
            for begin, end in pairs:
                filler.zero_()  # takes longer than to launch what follows
                begin.record()
                work()
                end.record()
            torch.cuda.synchronize()
        times = sorted(begin.elapsed_time(end) for begin, end in pairs)
        return float(times[len(times) // 2]) / 1e3

    return seconds


def candidates(kernel: str, tokens: int, bits: int) -> Iterator[dict[str, int]]:
    """Tiles to try.

    Args:
        kernel: `gemv` or `gemm`.
        tokens: M.
        bits: Of the weight.
    Yields:
        The fields of a tile.
    """
    if kernel == "gemm":
        for block_n, block_k, split_k, warps in itertools.product((32, 64, 128), (64, 128), (1, 2, 4, 8), (4, 8)):
            if block_n * tokens >= 256 * warps // 2:
                yield _tile(tokens, block_n, block_k, split_k=split_k, num_warps=warps, num_stages=3)
        return
    for block_n, warps, words in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2)):
        # Words a thread holds of each row, results it sums up: more would not fit its registers.
        if words * block_n * tokens <= 16 and block_n * words >= 2:
            yield _tile(tokens, block_n, words * warps * 32 * (32 // bits), num_warps=warps)


def _tile(block_m: int, block_n: int, block_k: int, *, split_k: int = 1, num_warps: int, num_stages: int = 2) -> dict[str, int]:
    return dict(zip(tuned.TILE_FIELDS, (block_m, block_n, block_k, split_k, num_warps, num_stages), strict=True))


def _best_tile(kernel: str, weights: Sequence[Weight], tokens: int, timer: Timer) -> dict[str, Any]:
    bits = 8 if weights[0].kind == INT8 else 4
    tiles = list(candidates(kernel, tokens, bits))
    times = [_time(kernel, weights, tokens, tile, timer) for tile in tiles]
    return {"max_tokens": tokens} | tiles[times.index(min(times))]


def _borders(choice: str, weights: Sequence[Weight], tiles: dict[str, Any], timer: Timer) -> list[dict[str, Any]]:
    """The fastest kernel by number of tokens; neighbours that agree become one entry."""
    entries: list[dict[str, Any]] = []
    rows, columns = weights[0].shape
    for tokens in TOKENS:
        times = {}
        for kernel in tuned.KERNELS[choice]:
            own = tiles.get(f"{kernel}_{choice.removesuffix('_alone')}")
            tile = None if own is None else {f: tuned.choose(own, tokens, rows, columns)[f] for f in tuned.TILE_FIELDS}
            times[kernel] = _time(kernel, weights, tokens, tile, timer)
        fastest = min(times, key=lambda kernel: times[kernel])
        if entries and entries[-1]["kernel"] == fastest:
            entries.pop()
        entries.append({"max_tokens": tokens, "kernel": fastest})
    if entries[-1]["kernel"] == "dequantize":
        entries.pop()
    return [*entries, {"max_tokens": None, "kernel": "dequantize"}]


def _time(kernel: str, weights: Sequence[Weight], tokens: int, tile: dict[str, int] | None, timer: Timer) -> float:
    """Seconds of one product with each weight; infinity where one has no such kernel."""
    from qlazy.products import triton_products

    cut = None if tile is None else Tile(**tile)
    total = 0.0
    for weight in weights:
        x = torch.ones(tokens, weight.shape[1], dtype=torch.bfloat16, device=weight.packed.device)
        work: Callable[[], Tensor | None]
        if kernel == "dequantize":
            work = functools.partial(ops.product_by_blocks, x, weight, None)
        else:
            work = functools.partial(triton_products.run, kernel, cut, x, weight, None)
        total += timer(work)
    return total


def _random_weight(fmt: Format, rows: int, columns: int, device: torch.device) -> Weight:
    layer = LAYERS[type(fmt)](columns, rows, format=fmt.for_columns(columns), dtype=torch.bfloat16, bias=None)
    layer.allocate(device)
    values: Tensor = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
    layer.fill(values)
    return layer._packed()
