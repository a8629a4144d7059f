"""The text that a model is calibrated on, as tokens: a file's, what the model itself writes in 8 bits, or any."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from qlazy.calibrating.calibration import Calibration
from qlazy.calibrating.tokens import Text, random_tokens, sample_tokens, text_tokens
from qlazy.errors import DoesNotFit
from qlazy.load import load
from qlazy.memory import anonymous_bytes, trim_heap
from qlazy.placeholder import load_config
from qlazy.planning.budget import make_budget
from qlazy.planning.demand import kv_cache_bytes
from qlazy.planning.recipe import make_recipe
from qlazy.report import Progress
from qlazy.sources.source import Source
from qlazy.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
"""Keys and values of the sequences that are written side by side."""

SLACK_BYTES = 1 << 30
"""Kept free beside them."""


def tokens_for(
    source: Source,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    drop_page_cache: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Text:
    """The tokens that a model is calibrated on.

    Args:
        source: An opened local source.
        calibration: Which text, and how much of it.
        trust_remote_code: Run Python code from the model's folder.
        drop_page_cache: Give the file pages that the load brings in back to the kernel.
        on_progress: Called now and then; the bytes of its stage `write` are those of token ids.
    Returns:
        The tokens, and in how many bits the model wrote them.
    Raises:
        UsageError: the file cannot be read, or is too short.
        UnsupportedModel: there is no tokenizer for the file, or the model does not predict tokens.
        DoesNotFit: the model does not fit in 4 bits.

    Memory: of a file, its text; of random tokens, themselves; else the model in 8 bits, or in 4 where these do not fit, and a
    gibibyte of keys and values.
    """
    text = calibration.text()
    if text is not None:
        tokenizer = load_tokenizer(source, without="leave --calibration-file out", trust_remote_code=trust_remote_code)
        return Text(tokens=text_tokens(tokenizer, text, calibration))
    if calibration.random_tokens:
        config = load_config(source, trust_remote_code=trust_remote_code)
        return Text(tokens=random_tokens(int(config.get_text_config().vocab_size), calibration))
    length, total = calibration.sequence_length, calibration.samples * calibration.sequence_length * 8
    per_sequence = max(1, kv_cache_bytes(source.config, length, "float32" if source.kind == "gguf" else "bfloat16"))
    batch = max(1, min(calibration.samples, CACHE_BYTES // per_sequence))
    model = None
    for bits in (8, 4):
        # One token of each sequence at a time: activations are few, but there are keys and values of all.
        budget = make_budget(max_model_len=length, reserve=batch * per_sequence + SLACK_BYTES)
        try:
            model = load(
                source,
                make_recipe(bits=bits, head_bits=8, embedding_bits=8),
                budget,
                trust_remote_code=trust_remote_code,
                drop_page_cache=drop_page_cache,
                on_progress=on_progress,
            )
            break
        except DoesNotFit as error:
            if bits == 4:
                raise DoesNotFit(
                    f"The model cannot write the text that it is calibrated on: {error.message}",
                    hint="Give a text, --calibration-file, or do without one: --random-tokens.",
                    needed_bytes=error.needed_bytes,
                    free_bytes=error.free_bytes,
                ) from None
            logger.warning("the model writes its calibration text in 4 bits, as it does not fit in 8: %s", error.message)
    assert model is not None

    def written(tokens: int) -> None:
        if on_progress is not None:
            on_progress(Progress(stage="write", done_bytes=8 * tokens, total_bytes=total, host_bytes=anonymous_bytes()))

    try:
        return Text(tokens=sample_tokens(model, calibration, batch=batch, on_tokens=written), bits=bits)
    finally:
        del model
        gc.collect()
        trim_heap()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
