"""Measure one contender, once, in this process; `run.py` starts it. The last line of what it prints is JSON.

    python benchmarks/measure.py CONTENDER INPUTS.json

Seconds to load are from the call to a model that takes tokens, after all imports; and once more in the same process, when
all is done and the first model is gone: in memory that the machine has at hand. Memory is what the process holds above what the
imports took: anonymous memory sampled every 10 ms and the resident set with its mapped files, both while loading, and the
resident set over everything. Rates are tokens a second of one sequence: prompts after one warm-up prompt, then greedy tokens
after the first, which the prompt gives.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Inputs, Model

WARM_UP_TOKENS = 4
"""Decoded before the clock runs."""

PIECE_ELEMENTS = 1 << 22
"""Weights that a thread quantizes at a time, as many as a chunk of a load holds."""


def measure(name: str, inputs: Inputs) -> dict[str, Any]:
    """Load, prompts, tokens."""
    contender = CONTENDERS[name]
    for module in contender.imports:
        importlib.import_module(module)
    _set_threads(inputs.threads)
    with Peak() as peak:
        start = time.perf_counter()
        model = contender.load(inputs)
        load_s = time.perf_counter() - start
    found: dict[str, Any] = {"load_s": load_s, "anonymous_peak_bytes": peak.anonymous, "total_peak_bytes": peak.total}
    found |= _rates(model, inputs)
    found |= model.weights()
    found["run_peak_bytes"] = memory()["VmHWM"] - peak.baseline["VmRSS"]
    if "llama_cpp" in sys.modules:
        found["build"] = sys.modules["llama_cpp"].llama_print_system_info().decode()
    report = getattr(getattr(model, "model", None), "qlazy_report", None)
    if report is not None:
        from qlazy.planning.plan import RING_BYTES

        found |= {"ring_bytes": RING_BYTES, "planned_bytes": report.plan.weight_bytes, "stages_s": report.seconds}
    del model, report
    gc.collect()
    start = time.perf_counter()
    again = contender.load(inputs)
    found["load_again_s"] = time.perf_counter() - start
    del again
    return found


def _rates(model: Model, inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lengths = [name for name in inputs.prompts if name.isdigit()]
    for name in lengths[:1]:
        start = time.perf_counter()
        model.prefill(inputs.prompts[name])
        # What a library puts off until its first use shows here.
        found[f"first_prompt_{name}_s"] = time.perf_counter() - start
    for name in lengths:
        start = time.perf_counter()
        model.prefill(inputs.prompts[name])
        found[f"prefill_{name}"] = len(inputs.prompts[name]) / (time.perf_counter() - start)
    model.decode(inputs.prompts["short"], WARM_UP_TOKENS)
    answer, times = model.decode(inputs.prompts["short"], inputs.new_tokens)
    found["decode"] = (len(times) - 1) / (times[-1] - times[0])
    found["answer"] = answer
    return found


def measure_quantizers(inputs: Inputs) -> dict[str, float]:
    """Seconds to quantize all linear weights from memory into qlazy's packed storage, by format: no file is read."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    import qlazy
    from qlazy.layers.quant_linear import QuantLinear
    from qlazy.sources.source import open_source

    source = open_source(inputs.folder, local_files_only=True)
    found = {}
    for name, options in {"int4": {"bits": 4}, "int8": {"bits": 8}, "nf4": {"format": "nf4"}}.items():
        _set_threads(inputs.threads)
        model = qlazy.load_quantized(inputs.folder, device_map="cpu", local_files_only=True, **options)
        work = []
        for key, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and f"{key}.weight" in source.tensors:
                weight = _read(source.tensors[f"{key}.weight"])
                step = max(64, PIECE_ELEMENTS // weight.shape[1] // 64 * 64)
                work += [(layer, first, weight[first : first + step]) for first in range(0, weight.shape[0], step)]
                layer.allocate("cpu")

        def quantize(item: tuple[Any, int, Any]) -> None:
            torch.set_num_threads(1)
            layer, first, rows = item
            with torch.no_grad():
                layer.fill(rows, first)

        with ThreadPoolExecutor(inputs.threads) as pool:
            start = time.perf_counter()
            list(pool.map(quantize, work))
            found[f"quantize_{name}_s"] = time.perf_counter() - start
        del work, model, layer, weight
    return found


def _read(info: Any) -> Any:
    """A bfloat16 matrix in memory of its own."""
    import torch

    data = torch.empty(info.shape, dtype=torch.bfloat16)
    with info.path.open("rb") as file:
        file.seek(info.offset)
        file.readinto(data.view(torch.uint8).numpy())
    return data


def _set_threads(threads: int) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


class Peak:
    """Peaks of this process's memory above its start, while a `with` block runs."""

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        # The kernel's own peak of the resident set starts over.
        Path("/proc/self/clear_refs").write_text("5")
        self.baseline = memory()
        self._most_anonymous = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        end = memory()
        self.anonymous = max(self._most_anonymous, end["RssAnon"]) - self.baseline["RssAnon"]
        self.total = end["VmHWM"] - self.baseline["VmRSS"]

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self._most_anonymous = max(self._most_anonymous, memory()["RssAnon"])


def memory() -> dict[str, int]:
    """Bytes that Linux counts for this process, by its names: VmRSS, VmHWM, RssAnon and so on."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        words = line.split()
        if words[-1] == "kB":
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    return found


if __name__ == "__main__":
    given = Inputs(**json.loads(Path(sys.argv[2]).read_text()))
    result = measure_quantizers(given) if sys.argv[1] == "quantizers" else measure(sys.argv[1], given)
    # Some libraries crash while they are taken down, after all is done.
    print(json.dumps(result), flush=True)
    os._exit(0)
