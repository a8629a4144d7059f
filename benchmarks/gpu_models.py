"""Load and run whole models on a CUDA device; `gpu.py` starts it, each part in a process of its own.

    python benchmarks/gpu_models.py load|decode|peer|70b FOLDER OUT.json SECONDS

Results are written after each step. Host memory is anonymous memory, above what the imports took where it says so; on the
device it is what PyTorch has allocated. Rates are of one sequence, greedy, after a prompt of 16 tokens.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import drop, warm

NEW_TOKENS = 128
FORMATS: dict[str, dict[str, Any]] = {"int4": {"bits": 4}, "int8": {"bits": 8}, "nf4": {"format": "nf4"}}
READ_BYTES = 16 << 20


class Results:
    """What was found so far, on disk after each addition."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.found: dict[str, Any] = {"rows": []}

    def add(self, **row: Any) -> None:
        self.found["rows"].append(row)
        self._out.write_text(json.dumps(self.found))

    def note(self, **facts: Any) -> None:
        self.found |= facts
        self._out.write_text(json.dumps(self.found))


def read_rate(files: list[Path]) -> float:
    """Bytes a second that eight threads read from what the page cache holds."""
    jobs = [(file, start) for file in files for start in range(0, file.stat().st_size, READ_BYTES)]
    local = threading.local()

    def read(job: tuple[Path, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(READ_BYTES))
        descriptor = os.open(job[0], os.O_RDONLY)
        try:
            return os.preadv(descriptor, [local.buffer], job[1])
        finally:
            os.close(descriptor)

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(read, jobs))
    return total / (time.perf_counter() - began)


def load_once(folder: Path, import_bytes: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model, and what loading it took."""
    import qlazy

    before, asked_before = torch.cuda.memory_allocated(), _requested("current")
    model = qlazy.load_quantized(folder, device_map="cuda:0", max_model_len=1024, **options)
    report = model.qlazy_report
    planned = next(device for device in report.plan.devices if device.device == "cuda:0")
    return model, {
        "seconds": report.seconds["total"],
        "stages": report.seconds,
        "bytes_read": report.bytes_read,
        "bytes_per_s": report.bytes_read / report.seconds["stream"],
        "host_peak_bytes": report.host_peak_bytes,
        "host_peak_above_import_bytes": max(nbytes for _, nbytes in report.samples) - import_bytes,
        "device_peak_bytes": report.device_peak_bytes["cuda:0"] - before,
        "device_requested_peak_bytes": _requested("peak") - asked_before,
        "weight_bytes": report.plan.weight_bytes,
        "planned_staging_bytes": planned.staging_bytes,
    }


def _requested(which: str) -> int:
    """Bytes that were asked for; PyTorch's allocator rounds a large tensor up by as much as a MiB."""
    return int(torch.cuda.memory_stats().get(f"requested_bytes.all.{which}", 0))


def free(model: Any) -> None:
    """Drop a model; the caller must hold it no longer."""
    del model
    gc.collect()
    torch.cuda.empty_cache()


def tokens_per_s(model: Any) -> float:
    """Greedy tokens a second, of a run that is not the first."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).cuda()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        for count in (8, NEW_TOKENS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            torch.cuda.synchronize()
    return NEW_TOKENS / (time.perf_counter() - began)


def compiled(model: Any) -> float:
    """Seconds that it takes to have a model decode through compiled code."""
    from qlazy.compiled import compile_decoding, warm_up

    torch._dynamo.reset()
    compile_decoding(model)
    model.generation_config.max_cache_len = 256
    ids = torch.full((1, 16), 7, device="cuda")
    return warm_up(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, model.generation_config)


def measure_load(folder: Path, results: Results, deadline: float, import_bytes: int) -> None:
    files = sorted(folder.glob("*.safetensors"))
    warm(files)
    results.note(read_bytes_per_s=read_rate(files), import_bytes=import_bytes)
    # The first compiles kernels; that time is its own and is told apart.
    for name, run in ((name, run) for name in FORMATS for run in ("first", "again")):
        if time.perf_counter() > deadline:
            return
        model, row = load_once(folder, import_bytes, **FORMATS[name])
        results.add(format=name, run=run, cache="warm", **row)
        del model
        free(None)
    if time.perf_counter() < deadline:
        drop(files)
        _, row = load_once(folder, import_bytes, **FORMATS["int4"])
        results.add(format="int4", run="again", cache="cold", **row)


def measure_decode(folder: Path, results: Results, deadline: float, import_bytes: int) -> None:
    for name in ("int4", "nf4", "int8"):
        if time.perf_counter() > deadline:
            return
        model, _ = load_once(folder, import_bytes, **FORMATS[name])
        results.add(format=name, how="generate", tokens_per_s=tokens_per_s(model))
        if name == "int4":
            try:
                compile_s = compiled(model)
                results.add(format=name, how="compiled", tokens_per_s=tokens_per_s(model), compile_s=compile_s)
            except Exception as error:  # whatever a compiler or a graph raises: the other formats go on
                results.note(not_compiled=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        del model
        free(None)


def measure_peer(folder: Path, results: Results, deadline: float, import_bytes: int) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlazy.memory import Meter

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    torch.zeros(1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with Meter() as meter:
        began = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": 0}, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    peaks = {"host_peak_bytes": meter.peak_bytes, "device_peak_bytes": torch.cuda.max_memory_allocated()}
    results.note(seconds=seconds, **peaks)
    results.add(format="bitsandbytes nf4", how="generate", tokens_per_s=tokens_per_s(model))


def measure_70b(folder: Path, results: Results, deadline: float, import_bytes: int) -> None:
    model, row = load_once(folder, import_bytes, **FORMATS["int4"])
    results.add(format="int4", run="first", cache="holes", **row)
    if time.perf_counter() < deadline:
        results.add(format="int4", how="generate", tokens_per_s=tokens_per_s(model))


PARTS = {"load": measure_load, "decode": measure_decode, "peer": measure_peer, "70b": measure_70b}


def main() -> None:
    began = time.perf_counter()
    part, folder, out, seconds = sys.argv[1:]
    importlib.import_module("qlazy.load")  # and with it transformers: their memory is not the load's
    from qlazy.memory import anonymous_bytes

    PARTS[part](Path(folder), Results(Path(out)), began + float(seconds), anonymous_bytes())
    print("{}")


if __name__ == "__main__":
    main()
