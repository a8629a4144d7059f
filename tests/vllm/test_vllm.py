"""vLLM serves what qlazy saved, on one worker and cut over three, and finds the same probabilities. Run by `make test-vllm`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import qlazy
from qlazy.sources.source import open_source
from qlazy.tokenizer import load_tokenizer

PYTHON = os.environ.get("QLAZY_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own; run `make test-vllm`"),
    pytest.mark.timeout(1800),
]

RECIPES: dict[str, dict[str, Any]] = {
    "g32-asym": {},
    "g64-sym": {"symmetric": True, "group_size": 64},
    "mixed-calibrated": {
        "target_bpw": 4.45,
        "calibrate": qlazy.Calibration(random_tokens=True, samples=4, sequence_length=128),
    },
}
MIXED = {(4, 32), (4, 64), (4, 128), (8, None)}
"""Bits and groups of `mixed-calibrated`."""
MIXTURE = "mixture-g64-sym"
RECIPES[MIXTURE] = RECIPES["g64-sym"]
AMX = "amx_tile" in Path("/proc/cpuinfo").read_text()

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

APART = (0.1, 0.6)
"""Nats between the two for a token of the text, in the mean and at most; see docs/vllm.md for what was measured."""
MIXTURES_APART = (0.2, 2.0)
"""The same of a mixture: vLLM's kernel for CPUs rounds activations to eight bits, by which a token may go to another expert."""


@pytest.fixture(
    scope="module",
    params=[
        *(name for name in RECIPES if name != MIXTURE),
        pytest.param(MIXTURE, marks=pytest.mark.skipif(not AMX, reason="vLLM's kernel for int4 experts on a CPU needs AMX")),
    ],
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo model, or of a mixture of experts, named after its recipe."""
    base = tmp_path_factory.mktemp("saved")
    source = make_mixture(base / "source") if request.param == MIXTURE else "demo"
    qlazy.save_quantized(source, base / request.param, **RECIPES[request.param])
    return base / request.param


def make_mixture(folder: Path) -> Path:
    """Experts with weights large enough for all probabilities to hang on them; they divide by three."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=49152,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        num_local_experts=6,
        initializer_range=0.15,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(open_source("demo"), without="tokens").save_pretrained(folder)
    return folder


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """What makes `plain_int8` a plugin of vLLM for a process with this PYTHONPATH."""
    told = tmp_path / "plain_int8-0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-int8\nVersion: 0\n")
    (told / "entry_points.txt").write_text("[vllm.general_plugins]\nplain_int8 = plain_int8:register\n")
    return os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])


def formats(folder: Path) -> set[tuple[int, int | None]]:
    """Bits and groups of a folder's layers."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    return {(group["weights"]["num_bits"], group["weights"]["group_size"]) for group in groups}


def free_port() -> int:
    """A port below those that programs get who ask for any: vLLM takes it half a minute later."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports are taken")


class Server:
    """vLLM's OpenAI server on loopback; ready when the block begins."""

    def __init__(self, folder: Path, workers: int, environment: dict[str, str]) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self._command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--tensor-parallel-size", str(workers), "--dtype", "bfloat16", "--enforce-eager"]
        self._command += ["--max-model-len", "512", "--max-num-seqs", "2"]
        self._environment = os.environ | SETTINGS | environment

    def __enter__(self) -> Server:
        self._log: list[str] = []
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
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
def test_same_probabilities(saved, workers, plugin, capsys):
    recipe = saved.name
    assert formats(saved) == MIXED if recipe == "mixed-calibrated" else len(formats(saved)) == 1
    ids = AutoTokenizer.from_pretrained(saved)(TEXT)["input_ids"]
    ours = own_logprobs(saved, ids)
    # vLLM's own kernels alone, but where it has none for a CPU.
    with Server(saved, workers, {"PYTHONPATH": plugin} if (8, None) in formats(saved) else {}) as server:
        theirs = served_logprobs(server.address, ids)
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    mean, most = sum(apart) / len(apart), max(apart)
    with capsys.disabled():
        print(f"\n{recipe}, {workers} workers: {len(apart)} tokens, apart by {mean:.3f} nats in the mean, {most:.3f} at most")
    allowed = MIXTURES_APART if recipe == MIXTURE else APART
    assert mean < allowed[0] and most < allowed[1]
