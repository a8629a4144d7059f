"""Decode through compiled code: `torch.compile` on a CPU, on GPUs CUDA graphs over a static cache as transformers has them.

What is compiled is the step from one token to the next; prompts run as ever. It saves mostly Python, in which a small model
spends more time than in products. qlazy's products are opaque to the compiler, and the same either way.
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from qlazy import native
from qlazy.errors import UnsupportedModel

_ROUNDING = {"emulate_precision_casts": True}
"""Round between operations as they do uncompiled: fused ones keep float32 in between, and near ties give another token."""

_GRAPHS = {"triton.cudagraphs": True}
"""What torch's mode `reduce-overhead` is; a mode and options together are not taken."""

LEAST_ROOM = 256
"""Tokens that a static cache holds at least."""


def compile_decoding(model: PreTrainedModel) -> None:
    """Have `generate` take its steps through compiled code, which is made at the first of them, in seconds to minutes.

    Args:
        model: A model that generates text; on a CPU its `forward` is replaced, on GPUs its generation config asks for a static
            cache.
    Raises:
        UnsupportedModel: the model does not continue text, or not from a cache that can be compiled.

    Memory: on GPUs the whole cache of a generation from its beginning, and what the graphs hold.
    """
    called: Any = model
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{type(model).__name__} does not continue text.", hint="Leave --compile out.")
    if model.device.type == "cpu":
        native.available()  # registers the op for few tokens, which must not happen while others call it
        called.forward = _by_length(model.forward, torch.compile(model.forward, dynamic=True, options=dict(_ROUNDING)))
        return
    if not getattr(model, "_can_compile_fullgraph", True):
        raise UnsupportedModel(
            f"{type(model).__name__} has no static cache that transformers can compile.", hint="Leave --compile out."
        )
    config: Any = model.generation_config
    config.cache_implementation = "static"
    config.compile_config = CompileConfig(mode=None, options=_GRAPHS | _ROUNDING)  # type: ignore[arg-type]


def cache_room(tokens: int, most: int) -> int:
    """Tokens that a static cache should have room for: powers of two, so that a longer conversation seldom compiles anew.

    Args:
        tokens: Of prompt and answer.
        most: Tokens that memory is planned for.
    Returns:
        At least `tokens`, and no more than `most` where that is at least `tokens`.
    """
    return max(tokens, min(most, max(LEAST_ROOM, 1 << (tokens - 1).bit_length())))


def warm_up(model: PreTrainedModel, inputs: dict[str, Tensor], config: Any) -> float:
    """Generate a few tokens greedily, so that what can be compiled for such a generation is.

    Args:
        model: After `compile_decoding`.
        inputs: A prompt.
        config: The generation config that will be used with it; this changes a copy.
    Returns:
        Seconds that it took.
    Raises:
        UnsupportedModel: PyTorch cannot compile it here.
    """
    config = copy.deepcopy(config)
    # A graph is compiled at one step, recorded at another and replayed at a third.
    config.max_new_tokens, config.max_length, config.min_new_tokens = 5, None, 5
    config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    config.eos_token_id, config.pad_token_id = None, 0
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            generated: Any = model
            generated.generate(**inputs, generation_config=config)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2])
        raise UnsupportedModel(
            f"PyTorch {torch.__version__} cannot compile {type(model).__name__} here: {reason}",
            hint="On a CPU it needs a C++ compiler (g++), on a GPU a C compiler. Or leave --compile out.",
        ) from error
    return time.perf_counter() - began


def _by_length(plain: Any, compiled: Any) -> Any:
    """One token goes through compiled code, more of them through plain."""

    @functools.wraps(plain)  # generate looks at the arguments that it takes
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        one = ids is not None and ids.shape[-1] == 1
        return (compiled if one else plain)(*args, **kwargs)

    return forward
