"""Run one of these scripts in a process of its own, with the same settings for all, and take the JSON that it prints last."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from machine import HERE, THREADS


def call(script: str, *words: str, timeout_s: float, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the script found, or why it did not, under `error`. `more` goes into its environment."""
    command = [sys.executable, str(HERE / script), *words]
    environ = environment() | dict(more or {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {timeout_s:.0f} s"}
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode != 0:
        return {"error": reason(done.stderr) or f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def reason(text: str) -> str:
    """The exception that a traceback ends with, without the lines that follow its first; of other text the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|[a-z]): ", line)]
    return (raised or lines or [""])[-1]


def environment() -> dict[str, str]:
    """The process's own, with the threads, without the network, and with this checkout's qlazy."""
    threads = str(THREADS)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
