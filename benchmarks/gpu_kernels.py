"""Time products with packed weights on a CUDA device beside what others have; `gpu.py` starts it.

    python benchmarks/gpu_kernels.py OUT.json SECONDS

Every time is of a CUDA graph that multiplies by several copies of a weight in turn, so many that none is still in the L2 cache
when its turn comes again: median of the replays, divided by the copies. What cannot be captured is timed call by call, by
events, after a fill that clears the cache, and is marked. Results are written after each shape; none is begun after SECONDS.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Call = Callable[[Tensor], Tensor]

SHAPES = {
    "8b gate, up": (14336, 4096),
    "8b down": (4096, 14336),
    "8b q, o": (4096, 4096),
    "8b k, v": (1024, 4096),
    "70b gate, up": (28672, 8192),
    "70b down": (8192, 28672),
    "70b q, o": (8192, 8192),
    "70b k, v": (1024, 8192),
}
"""Rows and columns of the linear layers of Llama 3 in 8B and 70B."""

TOKENS = (1, 4, 16, 64, 512, 4096)
REPLAYS = 15
MOST_COPIES = 48


def ceilings() -> dict[str, float]:
    """What the device does at best: bytes moved from and to its memory, products, and bytes from the host; a second."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    upload_s = _median_s(lambda: target[: host.numel()].copy_(host, non_blocking=True))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product_s = _median_s(lambda: a @ b)
    return {
        "copy_bytes_per_s": 2 * source.numel() / copy_s,
        "upload_bytes_per_s": host.numel() / upload_s,
        "matmul_flops": 2 * 8192**3 / product_s,
    }


def contenders(weight: Tensor) -> Iterator[tuple[str, Callable[[], tuple[Call, int]]]]:
    """What multiplies by a weight: its name, and a function that makes one more copy of it, with the bytes of the copy."""
    from qlazy.formats import Codebook4, Int4, Int8
    from qlazy.layers.linear import LAYERS

    rows, columns = weight.shape

    def ours(fmt: Any) -> tuple[Call, int]:
        layer = LAYERS[type(fmt)](columns, rows, format=fmt, dtype=torch.bfloat16, bias=None)
        layer.allocate("cuda")
        layer.fill(weight)
        return functools.partial(layer.product, bias=None), sum(stored.nbytes for stored in layer.storage.values())

    yield "bf16", lambda: (functools.partial(_flipped_linear, weight.clone()), weight.nbytes)
    for fmt in (Int4(), Int4(group_size=128, symmetric=True), Int8(), Codebook4()):
        yield f"qlazy {fmt.name}", functools.partial(ours, fmt)
    yield "tinygemm int4 g128", functools.partial(_tinygemm, weight)
    if importlib.util.find_spec("bitsandbytes"):
        yield "bitsandbytes nf4", functools.partial(_bitsandbytes, weight)
    if importlib.util.find_spec("gemlite"):
        yield "gemlite int4 g128", functools.partial(_gemlite, weight)


def time_calls(calls: list[Call], x: Tensor) -> tuple[float, str]:
    """Seconds of one call, and how they were taken."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for call in calls:  # kernels are compiled here, and libraries take their workspace
                call(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call(x)
        graph.replay()
        return _median_s(graph.replay) / len(calls), "graph"
    except Exception:  # as a graph is not what every library and compiler expects; if it is not that, it comes again below
        torch.cuda.synchronize()
        flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        return _median_s(lambda: calls[0](x), before=flush.zero_), "events"


def measure(out: Path, seconds: float) -> None:
    """All shapes, as far as the time goes."""
    began = time.perf_counter()
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
    found: dict[str, Any] = {"ceilings": ceilings(), "l2_bytes": cache, "rows": [], "absent": {}}
    for label, (rows, columns) in SHAPES.items():
        if time.perf_counter() - began > seconds:
            found["absent"][label] = f"not begun after {seconds:.0f} s"
            continue
        weight = torch.randn(rows, columns, device="cuda").mul_(0.02).bfloat16()
        for name, make in contenders(weight):
            try:
                found["rows"] += _rows(label, name, make, (rows, columns), cache)
            except Exception as error:  # whatever a peer or a compiler raises: the others go on
                found["absent"][f"{label}: {name}"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            torch.cuda.empty_cache()
        out.write_text(json.dumps(found))


def _rows(
    label: str, name: str, make: Callable[[], tuple[Call, int]], size: tuple[int, int], cache: int
) -> list[dict[str, Any]]:
    first, nbytes = make()
    copies = max(2, min(MOST_COPIES, -(-3 * cache // nbytes)))
    calls = [first, *(make()[0] for _ in range(copies - 1))]
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, size[1], device="cuda").bfloat16()
        with torch.inference_mode():
            # Many tokens are bound by arithmetic, which no cache speeds up.
            took, how = time_calls(calls if tokens <= 64 else calls[:2], x)
        moved = nbytes + x.nbytes + 2 * tokens * size[0]
        rows.append(
            {
                "shape": label,
                "rows": size[0],
                "columns": size[1],
                "name": name,
                "tokens": tokens,
                "seconds": took,
                "how": how,
                "bytes_per_s": moved / took,
                "flops": 2 * tokens * size[0] * size[1] / took,
            }
        )
    return rows


def _median_s(call: Callable[[], object], before: Callable[[], object] = int) -> float:
    call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _flipped_linear(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def _tinygemm(weight: Tensor) -> tuple[Call, int]:
    """The codes mean nothing: a product takes as long whatever they are."""
    rows, columns = weight.shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, device="cuda").bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales), packed.nbytes + scales.nbytes


def _bitsandbytes(weight: Tensor) -> tuple[Call, int]:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nbytes = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state), nbytes


def _gemlite(weight: Tensor) -> tuple[Call, int]:
    from gemlite.helper import A16W4

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16, device="cuda")
    layer.weight.data = weight
    made = A16W4(device="cuda", dtype=torch.bfloat16).from_linear(layer, del_orig=False)
    return made, sum(tensor.nbytes for tensor in made.state_dict().values())


if __name__ == "__main__":
    measure(Path(sys.argv[1]), float(sys.argv[2]))
    print("{}")
