"""A loaded model that answers. This module imports transformers, so commands import it only when they need it."""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging as transformers_logging

from qlazy.cli.options import Options
from qlazy.cli.progress import Display
from qlazy.compiled import cache_room, compile_decoding, warm_up
from qlazy.errors import UsageError
from qlazy.load import load as load_source
from qlazy.planning.budget import make_budget
from qlazy.planning.recipe import make_recipe
from qlazy.report import LoadReport, downloading
from qlazy.sources.source import Source, open_source
from qlazy.tokenizer import load_tokenizer
from qlazy.trace import Trace

LOAD_WITHOUT = "load without one: qlazy load --prompt ''"
"""What a command can do for a model without a tokenizer."""

Messages = list[dict[str, str]]
"""A conversation in the form of chat templates."""


class Answer(TextStreamer):
    """Collects what a model generates, and prints it as it comes.

    Args:
        tokenizer: Decodes it.
        echo: Whether to print it on stdout.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, echo: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._echo = echo

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next words.

        Args:
            text: Words that will not change any more.
            stream_end: Whether the answer is complete.
        """
        self.text += text
        if self._echo:
            print(text, end="\n" if stream_end else "", flush=True)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """An answer and what it took."""

    text: str
    """The answer without special tokens."""
    tokens: int
    """Tokens generated."""
    seconds: float
    """Seconds from the first token of the prompt to the last of the answer."""

    def __str__(self) -> str:
        """Tokens, seconds and rate."""
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its tokenizer, ready to answer."""

    model: PreTrainedModel
    """The quantized model."""
    tokenizer: Any
    """Its tokenizer; None where nothing will be asked."""
    max_model_len: int
    """Tokens that memory was planned for."""
    say: Callable[[str], None] | None = None
    """Where the decoding step is compiled: takes word of it."""
    _compiled: set[int] = field(default_factory=set)

    @property
    def report(self) -> LoadReport:
        """What the load told."""
        return cast(LoadReport, self.model.qlazy_report)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    def answer(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        echo: bool = False,
    ) -> Generated:
        """Generate an answer. Ctrl-C ends it early: `KeyboardInterrupt` is left to the caller.

        Args:
            prompt: Text to continue, or a conversation to answer.
            max_new_tokens: Tokens of the answer at most; what was planned for is not exceeded.
            temperature: 0 takes the likeliest token every time.
            seed: Of the random numbers.
            echo: Whether to print the answer on stdout as it comes.
        Returns:
            The answer.
        Raises:
            UsageError: the prompt leaves no room for an answer.
        """
        inputs = self._encode(prompt)
        length = inputs["input_ids"].shape[-1]
        room = self.max_model_len - length
        if room < 1:
            raise UsageError(
                f"The prompt has {length} tokens; memory is planned for {self.max_model_len}.",
                hint=f"Use --max-model-len {length + max_new_tokens}, or a shorter prompt.",
            )
        config = self._generation_config(min(max_new_tokens, room), temperature)
        self._compile(inputs, config, length + config.max_new_tokens)
        if seed is not None:
            torch.manual_seed(seed)  # set_seed of transformers imports its trainer, and that peft and bitsandbytes
        streamer = Answer(self.tokenizer, echo=echo)
        began = time.perf_counter()
        with torch.inference_mode():
            output = cast(Any, self.model).generate(
                **inputs,
                generation_config=config,
                streamer=streamer,
            )
        seconds = time.perf_counter() - began
        return Generated(text=streamer.text.strip(), tokens=output.shape[-1] - length, seconds=seconds)

    def compile_for(self, gen_tokens: list[int]) -> None:
        """Compile now what generations of these lengths from a single token need.

        Args:
            gen_tokens: Tokens generated.
        """
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._compile(inputs, self.model.generation_config, max(gen_tokens) + 1)

    def _compile(self, inputs: dict[str, torch.Tensor], config: Any, tokens: int) -> None:
        """Where the decoding step is compiled: make sure that it is, for a static cache of the size that these tokens need."""
        if self.say is None:
            return
        if config.cache_implementation == "static":
            config.max_cache_len = cache_room(tokens, self.max_model_len)
        size = config.max_cache_len or 0
        if size not in self._compiled:
            self.say("Compiling the decoding step, once ...")
            self.say(f"Compiled in {warm_up(self.model, inputs, config):.1f} s.")
            self._compiled.add(size)

    def _encode(self, prompt: str | Messages) -> Any:
        if isinstance(prompt, str):
            inputs = self.tokenizer(prompt, return_tensors="pt")
        else:
            inputs = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return {name: tensor.to(self.model.device) for name, tensor in kept.items()}

    def _generation_config(self, max_new_tokens: int, temperature: float) -> Any:
        config: Any = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = max_new_tokens, None
        config.do_sample, config.temperature = temperature > 0, temperature or None
        if not config.do_sample:
            config.top_p = config.top_k = None
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        if config.pad_token_id is None:
            first = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
            config.pad_token_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else first
        return config


def load(
    source: Source, options: Options, *, speaks: bool = True, trace: Trace | None = None, compiles: bool = False
) -> Loaded:
    """Load a model and its tokenizer, showing progress on stderr.

    Args:
        source: An opened source, of which the headers are enough.
        options: The shared options.
        speaks: Whether the model will be asked anything, and so needs a tokenizer.
        trace: Takes what the load does.
        compiles: Whether the decoding step will be compiled.
    Returns:
        The model, ready to answer.
    Raises:
        QlazyError: whatever stands in the way.
    """
    hush(options)
    if options.random_init:
        torch.manual_seed(0)
    recipe, budget = make_recipe(**options.recipe_arguments()), make_budget(**options.budget_arguments())
    with Display(silent=options.quiet or options.json) as display:
        source = fetch(source, options, display)
        tokenizer = load_tokenizer(source, without=LOAD_WITHOUT) if speaks else None
        model = load_source(source, recipe, budget, on_progress=display, trace=trace, **options.load_arguments())
    if compiles:
        compile_decoding(model)
    said = options.say if compiles else None
    return Loaded(model=model, tokenizer=tokenizer, max_model_len=options.max_model_len, say=said)


def fetch(source: Source, options: Options, display: Display) -> Source:
    """Download what is not here yet.

    Args:
        source: An opened source, of which the headers are enough.
        options: The shared options.
        display: Shows how far it is.
    Returns:
        The source with its folder.
    Raises:
        QlazyError: whatever stands in the way.
    """
    if source.folder is not None:
        return source
    return open_source(source.model_id, on_progress=downloading(display), **options.source_arguments())


def hush(options: Options) -> None:
    """Keep libraries from writing on stderr what is no news to the user, unless `--verbose` asks for it.

    Args:
        options: The shared options.
    """
    if options.verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells which kernels it lacks
    warnings.simplefilter("ignore")
