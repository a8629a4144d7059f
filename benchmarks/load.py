"""Load time and memory, qlazy beside transformers + bitsandbytes, on the same files, in turn, each in a process of its own.

    python benchmarks/load.py [--shape 1.1b] [--runs 3] [--only int4 --only bnb-nf4] [--folder DIR]

Writes benchmarks/results/load_<shape>.json and .md. Times are from the start of the load to a model that runs, after all
imports, with a warm page cache; memory is the peak of anonymous memory above what the imports took. A peer that is not
installed is absent.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

QLAZY = {
    "int4": {"bits": 4},
    "int8": {"bits": 8},
    "nf4": {"format": "nf4", "double_quant": True},
}
PEERS = {
    "transformers bf16": None,
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-int8": {"load_in_8bit": True},
}


def measure(name: str, folder: str) -> dict[str, float]:
    """One load, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401

    import qlazy.load
    from qlazy.memory import Meter

    if name.startswith("bnb"):
        import bitsandbytes  # noqa: F401
    with Meter() as meter:
        start = time.perf_counter()
        if name in QLAZY:
            model = qlazy.load_quantized(folder, device_map="cpu", drop_page_cache=False, **QLAZY[name])
        else:
            options = PEERS[name]
            config = None if options is None else BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.bfloat16)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
            )
        seconds = time.perf_counter() - start
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.untyped_storage().nbytes() for t in tensors)
    planned = model.qlazy_report.plan.total_bytes if name in QLAZY else 0
    return {"seconds": seconds, "peak_bytes": meter.peak_bytes, "weight_bytes": weights, "planned_total_bytes": planned}


def read_files(folder: Path) -> float:
    """Seconds to read all shards through the page cache."""
    start = time.perf_counter()
    subprocess.run("cat *.safetensors > /dev/null", shell=True, cwd=folder, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", action="append", help="measure these alone; repeatable")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or will be; kept. Default: a temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, str(arguments.folder))))
        return

    from checkpoint import write_checkpoint

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="qlazy-bench-"))
    try:
        write_checkpoint(folder, arguments.shape)
        names = arguments.only or [*QLAZY, *PEERS]
        have = importlib.util.find_spec("bitsandbytes") is not None
        names = [name for name in names if have or not name.startswith("bnb")]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        reads = []
        for _ in range(arguments.runs):
            reads.append(read_files(folder))
            for name in names:
                command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, {key: round(value, 2) for key, value in runs[name][-1].items()}, file=sys.stderr)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    report(arguments.shape, runs, reads)


def report(shape: str, runs: dict[str, list[dict[str, float]]], reads: list[float]) -> None:
    """Write the JSON and the table."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit,
        **versions,
    }
    result = {"shape": shape, "machine": machine, "cache": "warm", "cat_seconds": reads, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"load_{shape}.json").write_text(json.dumps(result, indent=1) + "\n")
    base = {name: statistics.median(r["seconds"] for r in found) for name, found in runs.items()}
    lines = [
        f"# Loading a Llama of {shape}, bfloat16, warm cache",
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items())
        + f". `cat` of the files: {statistics.median(reads):.2f} s.",
        "",
        "| | seconds (median) | min - max | times bnb-nf4 | weights MiB | peak above imports MiB | peak - weights MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        seconds = [r["seconds"] for r in found]
        peak, weights = (max(r[key] for r in found) for key in ("peak_bytes", "weight_bytes"))
        ratio = f"{base[name] / base['bnb-nf4']:.3f}" if "bnb-nf4" in base else "-"
        mib = [f"{value / 2**20:.0f}" for value in (weights, peak, peak - weights)]
        span = f"{min(seconds):.2f} - {max(seconds):.2f}"
        lines.append(f"| {name} | {base[name]:.2f} | {span} | {ratio} | " + " | ".join(mib) + " |")
    (RESULTS / f"load_{shape}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
