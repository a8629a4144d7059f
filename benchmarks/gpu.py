"""Measure qlazy on a CUDA device: kernels, loads and decoding beside what others have, and a 70B shape on one GPU.

    python benchmarks/gpu.py [--only kernels|load|decode|70b]... [--work-dir DIR] [--seconds 465]

Runs from a checkout, with the Python that is there, and needs no network. Every part runs in a process of its own and within a
time of its own; `results/gpu-NAME.json` and `.md` are written after each, so that what was cut off costs little. With `--only`
the other parts of an earlier run on the same kind of GPU stay; each says of which commit it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child import call
from gpu_report import render
from machine import HERE, commit

PARTS = {"kernels": 130.0, "load": 80.0, "decode": 165.0, "70b": 70.0}
"""Seconds that each part takes; of what time there is, it gets a share in this proportion."""

SHARE_OF_DECODE = 0.65
"""What qlazy gets of decoding's time: it compiles; bitsandbytes has the rest."""

WORK_DIR = Path(tempfile.gettempdir()) / "qlazy-bench-gpu"
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "gemlite", "accelerate", "safetensors")


def device() -> dict[str, Any] | None:
    """The first CUDA device, its driver and what runs on it; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def versions() -> dict[str, str]:
    """Python and packages, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def this_commit() -> str:
    """Where the checkout stands; unknown where it came without its history."""
    try:
        return commit() or "unknown"
    except OSError:
        return "unknown"


def run_part(part: str, work_dir: Path, seconds: float, model: str) -> dict[str, Any]:
    """What a part found. What was cut off keeps what it had, and says why under `error`."""
    if part == "kernels":
        return _child(work_dir / "kernels.json", seconds, "gpu_kernels.py")
    began = time.perf_counter()
    if part == "70b":
        folder = work_dir / "70b"
        made = call("gpu_checkpoint.py", "70b", str(folder), "--holes", timeout_s=seconds)
        try:
            return _with_error(_model_part("70b", folder, work_dir, seconds), made)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    folder = work_dir / model
    made = call("gpu_checkpoint.py", model, str(folder), timeout_s=seconds)
    left = seconds - (time.perf_counter() - began)
    if part == "load":
        return _with_error(_model_part("load", folder, work_dir, left), made)
    ours = _model_part("decode", folder, work_dir, SHARE_OF_DECODE * left)
    left = seconds - (time.perf_counter() - began)
    if importlib.util.find_spec("bitsandbytes") is None:
        return _with_error(ours | {"peer": {"error": "bitsandbytes is not installed"}}, made)
    return _with_error(ours | {"peer": _model_part("peer", folder, work_dir, left)}, made)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; repeatable, default all")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, help="for checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--model", default="8b", choices=("tiny", "8b"), help="shape of load and decode")
    parser.add_argument("--seconds", type=float, default=465.0, help="for everything")
    parser.add_argument("--commit", default="", help="where the checkout has no history")
    asked = parser.parse_args(arguments)
    gpu = device()
    if gpu is None:
        print("No CUDA device: benchmarks/gpu.py needs one that PyTorch can use.", file=sys.stderr)
        return 2
    end = time.perf_counter() + asked.seconds
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    target = asked.out / f"{name}.json"
    result = json.loads(target.read_text()) if target.is_file() else {}
    parts = asked.only or list(PARTS)
    for number, part in enumerate(parts):
        began = time.perf_counter()
        # What the parts before it did not need is shared out too.
        left = (end - began) * PARTS[part] / sum(PARTS[other] for other in parts[number:])
        found = run_part(part, asked.work_dir, left, asked.model) if left > 10 else {"error": "no time was left"}
        found |= {"took_s": time.perf_counter() - began, "commit": asked.commit or this_commit(), "model": asked.model}
        result |= {"schema": 1, "device": gpu, "versions": versions(), part: found}
        asked.out.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        target.with_suffix(".md").write_text(render(result))
        print(
            f"{part}: {found['took_s']:.0f} s{', ' + found['error'] if 'error' in found else ''}", file=sys.stderr, flush=True
        )
    print(render(result))
    return 1 if any("error" in result[part] for part in parts) else 0


def _model_part(part: str, folder: Path, work_dir: Path, seconds: float) -> dict[str, Any]:
    return _child(work_dir / f"{part}.json", seconds, "gpu_models.py", part, str(folder))


def _child(out: Path, seconds: float, script: str, *words: str) -> dict[str, Any]:
    """Run a script that writes to `out` as it goes."""
    out.unlink(missing_ok=True)
    # It stops by itself where it can, between two steps.
    done = call(script, *words, str(out), f"{0.85 * seconds:.0f}", timeout_s=max(1.0, seconds))
    return (json.loads(out.read_text()) if out.is_file() else {}) | done


def _with_error(found: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """What was found, with the first error of what had to come before."""
    errors = [other["error"] for other in others if "error" in other]
    return found | ({"error": errors[0]} if errors else {})


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
