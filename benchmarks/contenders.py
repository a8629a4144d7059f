"""Who is measured: how each loads a model, computes a prompt and decodes. Each runs in a process of its own (`measure.py`).

Everything is imported before a clock starts. A contender takes its library's defaults wherever it has some.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PROMPT_TOKENS = 512
"""The longest prompt that is measured."""

DECODE_S = 15
"""Seconds after which no further token is decoded, however few there are."""


WITHOUT_AMX = Path(sys.prefix) / "llama-without-amx" / "llama_cpp" / "lib"
"""Where the Makefile puts a second build of llama.cpp, on processors that have AMX."""


class Model(Protocol):
    """A loaded model."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Compute a prompt, up to the logits of its last token."""

    def decode(self, ids: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
        """Tokens that follow a prompt, greedily, with the time at which each was there; only `DECODE_S` ends it before."""

    def weights(self) -> dict[str, int]:
        """`weight_bytes`: of all weights as they lie in memory; `token_bytes`: of those that one token needs."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table."""

    title: str
    """Name in tables."""
    load: Callable[[Any], Model]
    """Load from `Inputs.folder`, or from a GGUF file."""
    imports: tuple[str, ...]
    """Modules that are imported before the clock runs. The contender is absent where the first is not installed."""
    gguf: str = ""
    """Kind of GGUF file that it reads, of those in `Inputs.gguf`; empty: the folder."""
    library: Path | None = None
    """Folder of another build of llama.cpp's library; the contender is absent where there is none."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every contender is given, written once and the same for all."""

    folder: str
    """Checkpoint in bfloat16."""
    gguf: dict[str, str] = field(default_factory=dict)
    """GGUF files of the same weights, by kind."""
    prompts: dict[str, list[int]] = field(default_factory=dict)
    """Token ids by name: `short` is decoded after, those that are numbers are computed as prompts."""
    new_tokens: int = 64
    """Tokens that are decoded."""
    threads: int = 2
    """Threads for everybody."""


def _qlazy(gguf: str = "", *, compiled: bool = False, **options: Any) -> Callable[[Inputs], Model]:
    def load(inputs: Inputs) -> Model:
        import qlazy

        source = inputs.gguf[gguf] if gguf else inputs.folder
        model = qlazy.load_quantized(source, device_map="cpu", local_files_only=True, **options)
        if compiled:
            from qlazy.compiled import compile_decoding

            compile_decoding(model)
        return TorchModel(model)

    return load


def _transformers(config: Callable[[], Any] = lambda: None) -> Callable[[Inputs], Model]:
    def load(inputs: Inputs) -> Model:
        import torch
        from transformers import AutoModelForCausalLM

        return TorchModel(
            AutoModelForCausalLM.from_pretrained(
                inputs.folder, dtype=torch.bfloat16, quantization_config=config(), device_map="cpu", local_files_only=True
            )
        )

    return load


def _bnb_config(**options: Any) -> Callable[[], Any]:
    def config() -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.bfloat16)

    return config


def _quanto_config(weights: str) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return config


def _torchao_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _llama_cpp(kind: str) -> Callable[[Inputs], Model]:
    return lambda inputs: LlamaCppModel(inputs.gguf[kind], inputs.threads)


def _gguf(title: str, kind: str, library: Path | None = None) -> Contender:
    return Contender(title=title, load=_llama_cpp(kind), imports=("llama_cpp",), gguf=kind, library=library)


_TRANSFORMERS = ("transformers", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")
_QLAZY = ("qlazy", "qlazy.api", "qlazy.load", *_TRANSFORMERS)
_BNB = ("bitsandbytes", "transformers.integrations.bitsandbytes", *_TRANSFORMERS)
_QUANTO = ("optimum.quanto", "transformers.integrations.quanto", *_TRANSFORMERS)
_TORCHAO = ("torchao", "torchao.quantization", "transformers.quantizers.quantizer_torchao", *_TRANSFORMERS)
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

CONTENDERS: dict[str, Contender] = {
    "qlazy-int4": Contender(title="qlazy int4", load=_qlazy(bits=4), imports=_QLAZY),
    "qlazy-int8": Contender(title="qlazy int8", load=_qlazy(bits=8), imports=_QLAZY),
    "qlazy-int4-compiled": Contender(
        title="qlazy int4, --compile", load=_qlazy(bits=4, compiled=True), imports=(*_QLAZY, "qlazy.compiled")
    ),
    "qlazy-int8-compiled": Contender(
        title="qlazy int8, --compile", load=_qlazy(bits=8, compiled=True), imports=(*_QLAZY, "qlazy.compiled")
    ),
    "qlazy-nf4": Contender(title="qlazy NF4", load=_qlazy(format="nf4"), imports=_QLAZY),
    "qlazy-shipped": Contender(
        title="qlazy int4, from the file as shipped", load=_qlazy("shipped", bits=4), imports=_QLAZY, gguf="shipped"
    ),
    "bnb-nf4": Contender(title="transformers + bitsandbytes NF4", load=_transformers(_bnb_config(**_NF4)), imports=_BNB),
    "bnb-int8": Contender(
        title="transformers + bitsandbytes int8", load=_transformers(_bnb_config(load_in_8bit=True)), imports=_BNB
    ),
    "quanto-int4": Contender(title="transformers + quanto int4", load=_transformers(_quanto_config("int4")), imports=_QUANTO),
    "quanto-int8": Contender(title="transformers + quanto int8", load=_transformers(_quanto_config("int8")), imports=_QUANTO),
    "torchao-int8": Contender(
        title="transformers + torchao int8 weight-only", load=_transformers(_torchao_config), imports=_TORCHAO
    ),
    "bf16": Contender(title="transformers bfloat16", load=_transformers(), imports=_TRANSFORMERS),
    "llamacpp-q4_0": _gguf("llama.cpp Q4_0", "q4_0"),
    "llamacpp-q4_k_m": _gguf("llama.cpp Q4_K_M", "q4_k_m"),
    "llamacpp-q8_0": _gguf("llama.cpp Q8_0", "q8_0"),
    "llamacpp-q4_0-noamx": _gguf("llama.cpp Q4_0, without AMX", "q4_0", WITHOUT_AMX),
    "llamacpp-q8_0-noamx": _gguf("llama.cpp Q8_0, without AMX", "q8_0", WITHOUT_AMX),
    "llamacpp-shipped": _gguf("llama.cpp, the file as shipped", "shipped"),
}
"""By the name that `--only` takes."""


class TorchModel:
    """A transformers model, whatever made it.

    Args:
        model: A causal language model on the CPU.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        # Random weights choose any token, the one that ends a text too.
        model.generation_config.eos_token_id = None

    def prefill(self, ids: Sequence[int]) -> None:
        import torch

        tokens = torch.tensor([ids])
        with torch.no_grad():
            self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True, logits_to_keep=1)

    def decode(self, ids: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                times.append(time.perf_counter())
                return torch.full((len(input_ids),), times[-1] - times[0] > DECODE_S, dtype=torch.bool)

        times: list[float] = []
        tokens = torch.tensor([ids])
        found = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        return found[0, len(ids) :].tolist(), times

    def weights(self) -> dict[str, int]:
        embedding = set(self.model.get_input_embeddings().modules())
        needed = [module for module in self.model.modules() if module not in embedding]
        return {"weight_bytes": storage_bytes(self.model.modules()), "token_bytes": storage_bytes(needed)}


def storage_bytes(modules: Iterable[Any]) -> int:
    """Bytes of the modules' own parameters and buffers, of packed ones what lies under them, each storage once."""
    found = {}
    for module in modules:
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            for plain in _plain_tensors(tensor):
                storage = plain.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _plain_tensors(tensor: Any) -> Iterator[Any]:
    """What a tensor is made of: the parts of a subclass, the scales that bitsandbytes hangs on a weight, or itself."""
    import torch

    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _plain_tensors(getattr(tensor, name))
        return
    state = getattr(tensor, "quant_state", None)
    for hung in (state, getattr(state, "state2", None), tensor):
        for name in ("absmax", "code", "offset", "SCB", "CB"):
            part = getattr(hung, name, None)
            if isinstance(part, torch.Tensor):
                yield part
    yield tensor


class LlamaCppModel:
    """A GGUF file in llama.cpp, through its C interface, with its defaults but for the threads and the room for tokens.

    Args:
        path: The file.
        threads: For prompts and for decoding.
    """

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        self._path = path
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {Path(path).name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = 2 * PROMPT_TOKENS
        options.n_batch = PROMPT_TOKENS
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, ids: Sequence[int]) -> None:
        self._forget()
        self._next_token(ids)

    def decode(self, ids: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
        self._forget()
        found, times = [self._next_token(ids)], [time.perf_counter()]
        while len(found) < new_tokens and times[-1] - times[0] <= DECODE_S:
            found.append(self._next_token(found[-1:]))
            times.append(time.perf_counter())
        return found, times

    def weights(self) -> dict[str, int]:
        from gguf_files import bytes_for_a_token

        total = self._lib.llama_model_size(self._model)
        return {"weight_bytes": total, "token_bytes": bytes_for_a_token(Path(self._path))}

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def _next_token(self, ids: Sequence[int]) -> int:
        import numpy as np

        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama.cpp could not compute the tokens")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocabulary,))))
