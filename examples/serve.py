"""An OpenAI-compatible server around a model in low bits: python examples/serve.py demo --port 8000

The server is transformers' own (`transformers serve`, continuous batching left off); only what it loads is replaced. It
listens on loopback, sends no CORS headers and serves one model: /v1/chat/completions and /v1/completions (streaming or not),
/v1/models, /health.
Needs `pip install ".[serve]"` in a clone.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "What is the capital of France?"}])
"""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path
from typing import Any

import uvicorn
from transformers import AutoTokenizer
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

import qlazy
from qlazy.sources.source import open_source

ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


class OneModel(ModelManager):
    """Serves one model, loaded by qlazy before the server listens; never unloads it for being idle."""

    def __init__(self, name: str, model_id: str, **load: Any) -> None:
        self._model_id, self._load, self._created = model_id, load, int(time.time())
        super().__init__(force_model=name)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        source = open_source(self._model_id)
        return AutoTokenizer.from_pretrained(source.folder, **({"gguf_file": source.gguf_file} if source.gguf_file else {}))

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        model = qlazy.load_quantized(self._model_id, **self._load)
        print(model.qlazy_report, flush=True)
        return model

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        model, tokenizer = super().load_model_and_processor(*args, **kwargs)
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model, tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "qlazy"}]


def build(models: OneModel) -> Any:
    """transformers' application with the routes that this server offers."""
    state = GenerationState()
    handlers = {name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")}
    handlers |= {
        "chat_handler": ChatCompletionHandler(models, state),
        "completion_handler": CompletionHandler(models, state),
    }
    app = build_server(models, generation_state=state, enable_cors=False, **handlers)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one model in low bits on loopback.")
    parser.add_argument("model", help="alias, hub id, folder or .gguf file")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--format", choices=("int4", "int8", "nf4", "fp4"))
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens that memory is planned for")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="name of the model to clients; default the last part of MODEL")
    asked = parser.parse_args()

    name = asked.name or Path(asked.model).name.removesuffix(".gguf")
    models = OneModel(name, asked.model, bits=asked.bits, format=asked.format, max_model_len=asked.max_model_len)
    print(f"Serving {name} on http://127.0.0.1:{asked.port}/v1; Ctrl-C ends it.", flush=True)
    uvicorn.run(build(models), host="127.0.0.1", port=asked.port, log_level="warning")


if __name__ == "__main__":
    main()
