"""The tokens that a model is calibrated on: what it writes itself, a text, or any at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from qlazy.calibrating.calibration import Calibration
from qlazy.errors import UnsupportedModel, UsageError


@dataclass(frozen=True, kw_only=True)
class Text:
    """What goes through a model while it is calibrated."""

    tokens: Tensor
    """int64 (sequences, length)."""
    bits: int | None = None
    """In how many bits the model wrote it; None: it did not."""


def sample_tokens(
    model: PreTrainedModel, calibration: Calibration, *, batch: int, on_tokens: Callable[[int], None] | None = None
) -> Tensor:
    """Have a model write: each sequence begins with a token drawn from all, and goes on as the model would have it.

    Args:
        model: A causal language model, in low bits or not; its generation config is replaced.
        calibration: How many sequences, of which length, by which seed.
        batch: Sequences that are written side by side.
        on_tokens: Called with the tokens that are written.
    Returns:
        int64 (samples, length), on the host.
    Raises:
        UnsupportedModel: the model does not write.

    Memory: keys and values of `batch` sequences.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(model).__name__} does not predict the next token, so that it cannot write what it is calibrated on.",
            hint="Leave --calibrate out.",
        )
    writer: Any = model
    length, config = calibration.sequence_length, model.config.get_text_config()
    # What a model has for the end of a text does not end a sequence: the next text begins there, as it does in training.
    writer.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=0, use_cache=True
    )
    done = 0

    class Counter(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if on_tokens is not None:
                on_tokens(done + input_ids.numel())
            return scores

    found = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(calibration.seed)
        first = torch.randint(int(config.vocab_size), (calibration.samples, 1))
        for start in first.split(batch):
            start = start.to(model.device)
            written = writer.generate(
                input_ids=start, attention_mask=torch.ones_like(start), logits_processor=LogitsProcessorList([Counter()])
            )
            found.append(written.cpu())
            done += written.numel()
    return torch.cat(found)


def random_tokens(vocab_size: int, calibration: Calibration) -> Tensor:
    """Draw tokens, each as likely as any other.

    Args:
        vocab_size: How many there are.
        calibration: How many sequences, of which length, by which seed.
    Returns:
        int64 (samples, length).
    """
    generator = torch.Generator().manual_seed(calibration.seed)
    return torch.randint(vocab_size, (calibration.samples, calibration.sequence_length), generator=generator)


def text_tokens(tokenizer: Any, text: str, calibration: Calibration) -> Tensor:
    """Cut sequences out of a text, evenly over all of it.

    Args:
        tokenizer: Makes tokens of it; a token that it puts before every text stands before each sequence.
        text: The text.
        calibration: How many sequences, of which length.
    Returns:
        int64 (sequences, length); fewer sequences than asked for where the text is short.
    Raises:
        UsageError: it is too short for one.

    Memory: the text and its tokens.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    empty = tokenizer("")["input_ids"]
    prefix = torch.tensor([i for i in empty[:1] if i == tokenizer.bos_token_id], dtype=torch.int64)
    length = calibration.sequence_length - len(prefix)
    pieces = ids[: len(ids) // length * length].view(-1, length)
    if not len(pieces):
        raise UsageError(
            f"The text has {len(ids)} tokens, and a sequence {length}.",
            hint="Use a longer text, or a smaller --sequence-length.",
        )
    count = min(calibration.samples, len(pieces))
    pieces = pieces[torch.arange(count) * len(pieces) // count]
    return torch.cat([prefix.expand(count, -1), pieces], dim=1)
