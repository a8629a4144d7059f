"""vLLM serves what qlazy saved, on one worker and cut over three, and finds the same probabilities. Run by `make test-vllm`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import qlazy

PYTHON = os.environ.get("QLAZY_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own; run `make test-vllm`"),
    pytest.mark.timeout(900),
]

RECIPES: dict[str, dict[str, Any]] = {"g32-asym": {}, "g64-sym": {"symmetric": True, "group_size": 64}}

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of the machine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else three workers want three processors
    "VLLM_CPU_INT4_W4A8": "0",  # else activations are rounded to eight bits
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

TEXT = (
    "The sea is a large body of salt water. It covers most of the planet, and people have sailed on it for thousands of years, "
    "carrying grain, oil, timber and news from one harbour to another. Whoever lived beside it learned to read the sky."
)

MEAN, MOST = 0.1, 0.6
"""Nats between the two for a token of the text, in the mean and at most; see docs/vllm.md for what was measured."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model's folder by recipe."""
    base = tmp_path_factory.mktemp("saved")
    for name, options in RECIPES.items():
        qlazy.save_quantized("demo", base / name, **options)
    return {name: base / name for name in RECIPES}


class Server:
    """vLLM's OpenAI server on loopback; ready when the block begins."""

    def __init__(self, folder: Path, workers: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self._command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--tensor-parallel-size", str(workers), "--dtype", "bfloat16", "--enforce-eager"]
        self._command += ["--max-model-len", "512", "--max-num-seqs", "2"]

    def __enter__(self) -> Server:
        self._log: list[str] = []
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            self._command,
            env=os.environ | SETTINGS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._ready.wait(600) or self._process.poll() is not None:
            self.__exit__()
            raise AssertionError("vLLM did not start:\n" + "".join(self._log[-60:]))
        while not self._listens():  # it says that it is complete a moment before it listens
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
                self.__exit__()
                raise AssertionError("vLLM ended:\n" + "".join(self._log[-60:]))
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()
        self._reader.join()

    def _listens(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=60):
                return True
        except OSError:
            return False

    def _read(self) -> None:
        with self._process.stdout as lines:  # type: ignore[union-attr]
            for line in lines:
                self._log.append(line)
                if "Application startup complete" in line:
                    self._ready.set()
        self._ready.set()  # it has ended


def served_logprobs(address: str, ids: list[int]) -> list[float]:
    """Log-probability of every token of a text but the first."""
    body = {"model": "demo", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        told = json.load(answer)["choices"][0]["prompt_logprobs"]
    return [at[str(token)]["logprob"] for at, token in zip(told[1:], ids[1:], strict=True)]


def own_logprobs(folder: Path, ids: list[int]) -> list[float]:
    model: Any = qlazy.load_quantized(folder, device_map="cpu")
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [logprobs[at, token].item() for at, token in enumerate(ids[1:])]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_same_probabilities(saved, recipe, workers, capsys):
    folder = saved[recipe]
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    ours = own_logprobs(folder, ids)
    with Server(folder, workers) as server:
        theirs = served_logprobs(server.address, ids)
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    mean, most = sum(apart) / len(apart), max(apart)
    with capsys.disabled():
        print(f"\n{recipe}, {workers} workers: {len(apart)} tokens, apart by {mean:.3f} nats in the mean, {most:.3f} at most")
    assert mean < MEAN and most < MOST
